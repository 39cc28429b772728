"""From scored runs to what a report shows.

Contract: every arm of every run is a column. With one run, its further arms are compared with its
first; with several, the first arm of each with that of the first run. Nothing is scored here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from av_llava.errors import DataError, UsageError
from av_llava_eval import stats
from av_llava_eval.compare import add_holm, compare_arms, compare_runs
from av_llava_eval.failures import OK
from av_llava_eval.points import points
from av_llava_eval.report.facts import Column, Difference, Estimate, Facts
from av_llava_eval.report.misses import find_misses
from av_llava_eval.scoring import Record, Scored, few_videos, score_folder, summarise
from av_llava_eval.task import Task

MISSES, FRAMES = 60, 6


def gather(
    folders: Sequence[str | Path],
    *,
    compat: str | None = None,
    misses: int = MISSES,
    frames: int = FRAMES,
    task: Task | None = None,
) -> Facts:
    """Collect a report.

    Args:
        folders: of runs of one task and split; the first is what the others are compared with.
        compat: also show another harness's metrics.
        misses: wrong answers of the first run to show.
        frames: pictures of each; 0 shows none and needs no media.
        task: of the runs, where it is not one that they can name.

    Raises:
        DataError: a folder holds no run or no answers, or the runs are of different tasks.
        UsageError: no folder.
    """
    if not folders:
        raise UsageError("A report needs the folder of at least one run.")
    runs = [score_folder(f, task=task) for f in folders]
    first = runs[0]
    columns, notes = [], []
    for run, name_of_run in zip(runs, _names(runs), strict=True):
        found = summarise(run, compat)
        notes += [f"{name_of_run}: {n}" if name_of_run else n for n in _notes(found)]
        columns += [
            _column(run, name_of_run, name, found, records)
            for name, records in run.arms.items()
            if records
        ]
    compared = list(_compared(runs))
    if not columns:
        raise DataError(f"{first.folder} holds no answers yet, so that there is nothing to report.")
    limits = [d["detectable"] for d, _ in compared if d["detectable"] is not None]
    records = next(iter(first.arms.values()))
    return Facts(
        title=f"{first.task.title}: {_named(first)}",
        task=first.task.title,
        columns=tuple(columns),
        differences=tuple(_difference(d, labels) for d, labels in compared),
        smallest_difference=max(limits, default=None),
        misses=tuple(find_misses(first, records, misses, frames)),
        n_misses=sum(r["labelled"] and points(r) < 1 for r in records),
        settings=dict(_settings(first)),
        notes=tuple(notes),
    )


def _names(runs: Sequence[Scored]) -> list[str]:
    """What tells runs apart; empty for the only one."""
    if len(runs) == 1:
        return [""]
    names = [r.folder.name for r in runs]
    return names if len(set(names)) == len(names) else [str(r.folder) for r in runs]


def _label(run: str, arm: str) -> str:
    """Name of a column: run and arm, as far as they tell something."""
    return ": ".join(x for x in (run, "" if run and arm == "main" else arm) if x)


def _column(
    run: Scored, name: str, arm: str, whole: Mapping[str, Any], records: Sequence[Record]
) -> Column:
    found = whole["arms"][arm]
    labelled = [r for r in records if r["labelled"]]
    failed = found["failures"]
    tokens = found["tokens"]
    seen = [tokens[k] for k in ("visual_tokens", "audio_tokens") if k in tokens]
    return Column(
        label=_label(name, arm),
        run=name,
        sound=next(str(a.get("sound", "")) for a in run.manifest.arms if a["name"] == arm),
        headline=_estimate("all", found["score"], found["interval"] or found["wilson"], found["n"]),
        groups={
            field: tuple(
                _estimate(value, g["score"], g["interval"], g["n"]) for value, g in rows.items()
            )
            for field, rows in found["groups"].items()
            if rows
        },
        by_length=tuple(_by_length(run, labelled)),
        letters=_letters(found["letters"]),
        stage_s=found["seconds"],
        n_unparsed=found["unparsed"],
        failed=failed,
        answered=found["of_answered"] if failed else None,
        visual_tokens=tokens.get("visual_tokens"),
        media_tokens=sum(seen) if seen else None,
        chance=whole["chance"],
        metrics=_metrics(found),
    )


def _estimate(
    name: str, score: float | None, interval: Mapping[str, Any] | None, n: int
) -> Estimate:
    """A score; without an interval it is its own, and without labels 0 of 0 questions."""
    value = 0.0 if score is None else score
    if interval is None:
        return Estimate(name, value, value, value, n)
    return Estimate(name, value, interval["low"], interval["high"], n)


def _by_length(run: Scored, records: Sequence[Record]) -> Iterator[Estimate]:
    """Quarters of the questions by the length of their video."""
    length_s = {s.id: s.duration_s for s in run.samples if s.duration_s}
    known = [r for r in records if r["id"] in length_s]
    if not known:
        return
    lengths = np.array([length_s[r["id"]] for r in known], float)
    edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
    if len(edges) < 3:
        return
    last = len(edges) - 2
    places = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, last)
    for place in range(last + 1):
        some = [r for r, p in zip(known, places, strict=True) if p == place]
        if some:
            values = [points(r) for r in some]
            interval = stats.cluster_bootstrap(values, [r["group"] for r in some])
            name = f"{_clock(edges[place])} to {_clock(edges[place + 1])}"
            mean = sum(values) / len(values)
            ends = None if interval is None else interval.to_dict()
            yield _estimate(name, mean, ends, len(some))


def _clock(seconds: float) -> str:
    """Seconds for short lengths, else minutes and seconds."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def _letters(found: Mapping[str, Mapping[str, int]]) -> dict[str, tuple[float, float]]:
    said = max(sum(v["said"] for v in found.values()), 1)
    right = max(sum(v["right"] for v in found.values()), 1)
    return {k: (v["said"] / said, v["right"] / right) for k, v in found.items()}


def _metrics(found: Mapping[str, Any]) -> dict[str, Any]:
    """Further metrics of the task, then those of another harness under its names."""
    own = {name: value["score"] for name, value in found["metrics"].items()}
    theirs = found.get("compat")
    if theirs is None:
        return own
    rule = theirs["rule"]
    numbers = {k: v for k, v in theirs.items() if isinstance(v, (int, float)) and k not in _COUNTS}
    return {**own, **{f"{rule}: {k}": v for k, v in numbers.items()}}


_COUNTS = ("n", "unparsed", "random")


def _compared(runs: Sequence[Scored]) -> Iterator[tuple[dict[str, Any], tuple[str, str]]]:
    """Comparisons, each with the labels of its columns."""
    first, names = runs[0], _names(runs)
    if len(runs) == 1:
        for found in compare_arms(first):
            yield found, (found["names"][0], found["names"][1])
        return
    arm = next(iter(first.arms))
    pairs = [(other, next(iter(other.arms))) for other in runs[1:]]
    found_all = [compare_runs(first, other, (arm, their)) for other, their in pairs]
    add_holm(found_all)
    for found, (_, their), name in zip(found_all, pairs, names[1:], strict=True):
        yield found, (_label(names[0], arm), _label(name, their))


def _difference(found: Mapping[str, Any], labels: tuple[str, str]) -> Difference:
    table = found["table"] or {}
    mean = found["difference"]
    ends = found["interval"] or {"low": mean, "high": mean}
    return Difference(
        first=labels[0],
        second=labels[1],
        difference=mean,
        low=ends["low"],
        high=ends["high"],
        p=found["p_value"],
        p_holm=found.get("p_holm"),
        p_mcnemar=table.get("mcnemar_p"),
        gained=len(found["flipped"]["better"]) if not table else table["only_second"],
        lost=len(found["flipped"]["worse"]) if not table else table["only_first"],
        n=found["n"],
    )


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    """What a reader should know before believing the numbers."""
    if not found["complete"]:
        yield "The run is not complete: only the questions that were asked so far are scored."
    if found["bad_rows"]:
        yield f"{found['bad_rows']} rows of the annotations could not be used and are left out."
    if "answered_with_version" in found:
        yield (
            f"The questions were asked with version {found['answered_with_version']} of the task; "
            f"this is version {found['version']}."
        )
    if few := few_videos(found):
        yield few
    for name, arm in found["arms"].items():
        silent = sum(arm["silent"].values())
        if silent:
            why = ", ".join(arm["silent"])
            yield f"{name}: {silent} of {arm['n']} questions were answered without sound ({why})."
        if arm["unlabelled"]:
            yield f"{name}: {arm['unlabelled']} questions have no public answers."


def _named(run: Scored) -> str:
    name = run.manifest.about.get("model")
    return Path(str(name)).name if name else run.folder.name


def _settings(run: Scored) -> Iterator[tuple[str, str]]:
    """Everything that makes the run what it is, flat."""
    yield from _flat("", {k: v for k, v in run.manifest.identity.items() if k != "arms"})
    yield "arms", ", ".join(a["name"] for a in run.manifest.arms)
    yield from _flat("", run.manifest.about)
    failed = sum(r["status"] != OK for records in run.arms.values() for r in records)
    yield "failed", str(failed)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    elif value is not None:
        yield name, str(value)
