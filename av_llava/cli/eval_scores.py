"""Scores of evaluations: computed, kept beside the answers, and told in a few lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from av_llava.errors import UsageError

if TYPE_CHECKING:
    from av_llava_eval.judge import Judge

SCORES = "scores.json"


def keep_scores(
    folder: Path, compat: str | None = None, judge: Judge | None = None
) -> dict[str, Any]:
    """Score a run and write ``scores.json``, and what the benchmark's server takes if it has one.

    Args:
        folder: of the run.
        compat: also by another harness's rules.
        judge: has open answers judged first.
    """
    from av_llava_eval.compare import compare_arms
    from av_llava_eval.judge import judge_run
    from av_llava_eval.records import write_whole
    from av_llava_eval.scoring import score_folder, summarise
    from av_llava_eval.submission import write_submissions

    scored = score_folder(folder)
    judged = None if judge is None else judge_run(scored, judge)
    found = summarise(scored if judged is None else judged.scored, compat)
    found["comparisons"] = compare_arms(scored) if len(scored.arms) > 1 else []
    if judged is not None:
        found["judge"] = judged.to_dict()
    if files := write_submissions(scored):
        found["submissions"] = [file.name for file in files]
    write_whole(folder / SCORES, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def judge_of(url: str | None, model: str | None, key_name: str | None) -> Judge | None:
    """The judge that the flags describe; None without an address.

    Raises:
        UsageError: flags that do not go together, or a variable that is not set.
    """
    if url is None:
        if model or key_name:
            raise UsageError("--judge-model and --judge-key-env go with --judge URL.")
        return None
    if model is None:
        raise UsageError("--judge needs --judge-model: the name of the model that judges.")
    key = None if key_name is None else os.environ.get(key_name)
    if key_name is not None and not key:
        raise UsageError(f"The environment variable {key_name!r} holds no key for the judge.")
    from av_llava_eval.judge import UrlJudge

    return UrlJudge(url, model, key)


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """A run's scores for people."""
    title = f"{found['title'] or found['task']} ({found['split']})"
    yield f"{title}: {found['metric']}" + ("" if found["complete"] else ", NOT COMPLETE")
    width = max(map(len, found["arms"]), default=0)
    for name, arm in found["arms"].items():
        yield f"  {name.ljust(width)}  {_score(arm)}{_counts(arm)}"
        if arm["silent"]:
            reasons = ", ".join(f"{reason}: {n:,}" for reason, n in arm["silent"].items())
            yield f"  {''.ljust(width)}  answered without sound ({reasons})"
        for metric, value in arm["metrics"].items():
            yield f"  {''.ljust(width)}  {metric}: {100 * value['score']:.1f} (n={value['n']:,})"
        for metric, value in (arm.get("compat") or {}).items():
            if isinstance(value, float) and metric != "headline":
                yield f"  {''.ljust(width)}  {arm['compat']['rule']}: {metric} {value:.5g}"
    from av_llava_eval.scoring import few_videos

    if few := few_videos(found):
        yield f"  {few}"
    if found["chance"] is not None:
        yield f"  guessing gives {100 * found['chance']:.1f}"
    if found["bad_rows"]:
        yield f"  {found['bad_rows']} annotation rows could not be used and are left out"
    for pair in found.get("comparisons", ()):
        yield "  " + comparison_line(pair)
    if found.get("submissions"):
        yield f"  for the benchmark's server: {', '.join(found['submissions'])}"
    judge = found.get("judge")
    if judge:
        yield (
            f"  judged by {judge['judge']}: {judge['unreadable']} verdicts could not be read, "
            f"{judge['failed']} not be had"
        )


def _score(arm: Mapping[str, Any]) -> str:
    if arm["score"] is None:
        return "no public labels" if arm["unlabelled"] else "no answers yet"
    text = f"{100 * arm['score']:5.1f}"
    if arm["interval"] is not None:
        text += f" [{100 * arm['interval']['low']:.1f}, {100 * arm['interval']['high']:.1f}]"
    return text


def _counts(arm: Mapping[str, Any]) -> str:
    text = f"  n={arm['n'] or arm['unlabelled']:,}, {arm['unparsed']} unparsed"
    if not arm["failed"]:
        return text + ", 0 failed"
    kinds = ", ".join(f"{kind} {n}" for kind, n in arm["failures"].items())
    rest = (
        "" if arm["of_answered"] is None else f"; of those answered {100 * arm['of_answered']:.1f}"
    )
    return f"{text}, {arm['failed']} failed ({kinds}{rest})"


def comparison_line(pair: Mapping[str, Any]) -> str:
    """``audio off - audio on: -3.2 points [-5.0, -1.4], p = 0.001 …``."""
    first, second = pair["names"]
    text = f"{second} - {first}: {100 * pair['difference']:+.1f} points"
    if pair["interval"] is not None:
        low, high = 100 * pair["interval"]["low"], 100 * pair["interval"]["high"]
        text += f" [{low:+.1f}, {high:+.1f}], p = {pair['p_value']:.3g}"
    if "p_holm" in pair and pair["p_holm"] != pair["p_value"]:
        text += f" ({pair['p_holm']:.3g} after Holm)"
    table = pair["table"]
    if table is not None:
        text += (
            f"; {table['only_second']} better, {table['only_first']} worse, McNemar p = "
            f"{table['mcnemar_p']:.3g}"
        )
    if pair["detectable"] is not None:
        text += f"; differences below {100 * pair['detectable']:.1f} would likely be missed"
    return text
