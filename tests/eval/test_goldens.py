"""Agreement with the published scorers: every record of goldens/eval, its score and its prompt.

The whole set is used where it lies beside the clone, otherwise the part of it in tests/goldens. It
was made by running lmms-eval's own functions (and three other harnesses') on invented questions.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from golden_data import COMPACT, FULL

from av_llava_eval import get_task, mcq
from av_llava_eval.reading import verdicts
from av_llava_eval.subtitles import (
    frame_times,
    interleave,
    lmms_white_lines,
    longvideobench_lines,
    read_srt,
)
from av_llava_eval.tasks.dailyomni import SCRIPTS
from av_llava_eval.tasks.videomme import subtitle_prompt

FOLDER = next(f for f in (FULL / "eval", COMPACT / "eval") if f.is_dir())
SCORED = (
    *("videomme", "mvbench", "nextqa_mc", "egoschema_subset", "perceptiontest_val_mc"),
    *("longvideobench_val_v", "mlvu_dev", "mlvu_test", "lvbench", "tempcompass_multi_choice"),
    *("tempcompass_yes_no", "tempcompass_caption_matching", "activitynetqa", "worldsense"),
    *("omni_bench", "av_odyssey", "av_speakerbench_audiovisual", "videommmu", "charades_sta"),
    *("music_avqa", "dailyomni"),
)
RANDOM = ("nextqa_mc", "egoschema_subset", "longvideobench_val_v")
ROUNDED = {"longvideobench_val_v", "videommmu", "omni_bench"}
N_OPTIONS = {"nextqa_mc": 5, "egoschema_subset": 5}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").open(encoding="utf-8")]


def scored(name: str) -> list[dict[str, Any]]:
    task = get_task(name)
    return [task.score_record(r["doc"], r["prediction"], compat="lmms") for r in rows(name)]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", SCORED)
def test_every_record_is_read_and_scored_as_there(name: str) -> None:
    wrong = []
    for golden, ours in zip(rows(name), scored(name), strict=True):
        drawn = golden.get("random_fallback", False)
        assert ours["random_fallback"] == (ours["how"] == "random") == drawn, golden
        if drawn:
            n = N_OPTIONS.get(name) or sum(
                v != "N/A" for k, v in golden["doc"].items() if k[:6] == "option"
            )
            assert ours["extracted"] is None
            assert ours["score"] == pytest.approx(1 / n)
            continue
        for field in ("extracted", "score"):
            if field in golden and ours[field] != golden[field]:
                wrong.append((golden["prediction"], field, ours[field], golden[field]))
        if "needs_judge" in golden:
            assert ours["needs_judge"] == (ours["how"] == "judge") == golden["needs_judge"], golden
    assert wrong == []


@pytest.mark.parametrize("name", [n for n in SCORED if "reference_prompt_sha256" in rows(n)[0]])
def test_prompts_in_the_style_of_lmms_eval(name: str) -> None:
    task = get_task(name)
    for golden in rows(name):
        ours = task.prompt(task.sample(golden["doc"], 0, Path()), "lmms")
        if "reference_prompt" in golden:
            assert ours == golden["reference_prompt"]
        assert sha256(ours) == golden["reference_prompt_sha256"], ours


@pytest.mark.parametrize("name", [n for n in SCORED if n != "activitynetqa"])
def test_aggregates(name: str) -> None:
    """Against a slow, separate sum of the goldens' own scores; on the whole set also against the
    published functions' own results, but for draws, which those make and we do not."""
    golden, meta = rows(name), json.loads((FOLDER / "meta.json").read_text())
    ours = get_task(name).aggregate(scored(name))
    expected = simple_sum(name, golden)
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, abs=1e-9), key
    facts = meta.get("tasks", {}).get(name, {})
    if facts.get("records") != len(golden) or name in RANDOM:
        return
    if isinstance(facts.get("aggregated"), dict):
        for key, value in facts["aggregated"].items():
            assert ours[key] == pytest.approx(value, abs=1e-9), key
    if "accuracy_by_original_script" in facts:
        assert ours["accuracy_by_original_script"] == pytest.approx(
            facts["accuracy_by_original_script"]
        )


def simple_sum(name: str, golden: list[dict[str, Any]]) -> dict[str, Any]:
    """What each benchmark's aggregation comes to, told once more and as plainly as possible."""
    if name == "dailyomni":
        percent = {s: 100 * sum(r["score"][s] for r in golden) / len(golden) for s in SCRIPTS}
        return {"accuracy_by_original_script": pytest.approx(percent)}
    kept = []
    for r, ours in zip(golden, scored(name), strict=True):
        kept.append((r, ours["score"] if r.get("random_fallback") else r["score"]))
    mean = sum(s or 0 for _, s in kept) / len(kept)
    if name == "mvbench":
        said = [s for r, s in kept if r["prediction"] != ""]
        return {"mvbench_accuracy": 100 * sum(said) / len(said)}
    if name == "videommmu":
        said = [s for _, s in kept if s is not None]
        return {"mmmu_acc": round(sum(said) / len(said), 5)}
    if name in ("mlvu_dev", "mlvu_test"):
        kinds = 7 if name == "mlvu_dev" else 9
        by_kind: dict[str, list[float]] = {}
        for r, s in kept:
            by_kind.setdefault(r["doc"]["task_type"], []).append(s)
        total = sum(sum(s) / len(s) for s in by_kind.values())
        return {"mlvu_percetion_score": 100 * total / kinds}
    if name in ("worldsense", "av_odyssey"):
        first: dict[Any, float] = {}
        for r, s in kept:
            first.setdefault(r["doc"].get("index", r["doc"].get("question_id")), s)
        return {f"{name}_score": 100 * sum(first.values()) / len(first)}
    if name == "charades_sta":
        last = {json.dumps(r["doc"]): s for r, s in kept}
        over = {t: 100 * sum(s >= t / 10 for s in last.values()) / len(last) for t in (3, 5, 7)}
        return {
            **{f"IOU@{t}": v for t, v in over.items()},
            "mIOU": 100 * sum(last.values()) / len(last),
        }
    if name.startswith("tempcompass"):
        out = {"avg_accuracy": 100 * mean}
        for dim in {r["doc"]["dim"] for r in golden}:
            own = [s for r, s in kept if r["doc"]["dim"] == dim]
            out[f"{dim}_accuracy"] = 100 * sum(own) / len(own)
        return out
    named = {
        "videomme": ("videomme_perception_score", 100 * mean),
        "nextqa_mc": ("exact_match_mean", mean),
        "egoschema_subset": ("score", mean),
        "perceptiontest_val_mc": ("accuracy", mean),
        "longvideobench_val_v": ("lvb_acc", round(mean, 5)),
        "lvbench": ("lvbench_score_mean", mean),
        "omni_bench": ("accuracy", round(100 * mean, 5)),
        "av_speakerbench_audiovisual": ("av_speakerbench_score", 100 * mean),
        "music_avqa": ("overall_accuracy", 100 * mean),
    }
    key, value = named[name]
    return {key: value}


def test_the_rounds_of_charades_sta() -> None:
    """On the whole set: the j-th answer to every question, as the published numbers have it."""
    golden = rows("charades_sta")
    facts = json.loads((FOLDER / "meta.json").read_text()).get("tasks", {}).get("charades_sta", {})
    if facts.get("records") != len(golden):
        pytest.skip("the rounds are complete in the whole set only")
    rounds: dict[str, list[dict[str, Any]]] = {}
    for r in golden:
        rounds.setdefault(json.dumps(r["doc"]), []).append(r)
    task = get_task("charades_sta")
    for j, expected in enumerate(facts["aggregated_per_round"]):
        answers = [group[j] for group in rounds.values()]
        ours = task.aggregate(
            [task.score_record(r["doc"], r["prediction"], compat="lmms") for r in answers]
        )
        for key, value in expected.items():
            assert ours[key] == pytest.approx(value, abs=1e-9)


def test_golden_rows_themselves_can_be_aggregated() -> None:
    """Rows that hold ``doc`` and ``score`` are enough."""
    golden = [r for r in rows("mlvu_dev")]
    ours = get_task("mlvu_dev").aggregate(golden)
    assert ours["mlvu_percetion_score"] == pytest.approx(
        simple_sum("mlvu_dev", golden)["mlvu_percetion_score"]
    )
    assert set(ours["groups"]["task_type"]) == {r["doc"]["task_type"] for r in golden}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lmms_eval", "lmms"),
        ("vlmevalkit", "vlmevalkit"),
        ("videollama2", "videollama2"),
        ("apple_sfllava", "sfllava"),
    ],
)
def test_extraction_rules_of_four_harnesses(theirs: str, ours: str) -> None:
    for r in rows("extraction_rules_compared"):
        found = mcq.extract(r["prediction"], r["options"], ours).extracted
        expected = r["extracted"][theirs]
        # The original fails on an empty answer; ours says that there is nothing.
        assert found == (None if expected == "error IndexError" else expected), r


def test_verdicts_of_activitynetqa() -> None:
    """Words of a judge as they are parsed there; what cannot be read is no verdict."""
    read = []
    for r in rows("activitynetqa"):
        found = verdicts.yes_and_score(r["judge_review"])
        expected = r["parsed_review"]
        assert found == (None if expected is None else tuple(expected)), r["judge_review"]
        if found is not None:
            read.append({"doc": r["doc"], "score": None, "judge_review": r["judge_review"]})
    ours = get_task("activitynetqa").aggregate(read, "lmms")
    words = [r["parsed_review"] for r in rows("activitynetqa") if r["parsed_review"]]
    yes, no = (sum(w == x for w, _ in words) for x in ("yes", "no"))
    assert ours["gpt_eval_accuracy"] == pytest.approx(100 * yes / (yes + no))
    assert ours["gpt_eval_score"] == pytest.approx(sum(s for _, s in words) / len(words))
    facts = json.loads((FOLDER / "meta.json").read_text()).get("tasks", {}).get("activitynetqa", {})
    if facts.get("records") == len(rows("activitynetqa")):
        assert ours["gpt_eval_accuracy"] == pytest.approx(facts["aggregated"]["gpt_eval_accuracy"])
        assert ours["gpt_eval_score"] == pytest.approx(facts["aggregated"]["gpt_eval_score"])


def test_verdicts_of_tempcompass() -> None:
    for r in rows("tempcompass_judge_parse"):
        if r.get("kind") == "llm_output_to_rating":
            expected = r["reference_output"]
            found = verdicts.correct(r["judge_output"])
            assert found == (None if expected == "error AssertionError" else expected)
        else:
            assert verdicts.chosen(r["judge_output"], r["mc_answer"]) == r["reference_output"]


def test_subtitle_prompts_of_videomme(tmp_path: Path) -> None:
    task = get_task("videomme_w_subtitle")
    for number, r in enumerate(rows("videomme_subtitle_prompt")):
        lines = None
        if r["srt"] is not None:
            file = tmp_path / f"{number}.srt"
            file.write_text(r["srt"], encoding="utf-8")
            said = read_srt(file)
            lines = lmms_white_lines(said, r["video_fps"], r["video_frames"], r["frame_num"])
        prompt = subtitle_prompt(task.sample(r["doc"], 0, tmp_path), lines)
        assert sha256(prompt) == r["reference_prompt_sha256"], prompt


def test_interleaved_prompts_of_longvideobench(tmp_path: Path) -> None:
    task = get_task("longvideobench_val_i")
    for r in rows("longvideobench_interleave_prompt"):
        doc = r["doc"]
        times = frame_times(doc["duration"], r["max_num_frames"])
        assert times == r["frame_timestamps"]
        begin = doc["starting_timestamp_for_subtitles"]
        lines = longvideobench_lines(r["subtitles"], begin, doc["duration"])
        file = tmp_path / "subtitles" / doc["subtitle_path"]
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(r["subtitles"]), encoding="utf-8")
        prompt = task.prompt(task.sample(doc, 0, tmp_path), "lmms")
        assert prompt.startswith(interleave(lines, times))
        if r["max_num_frames"] == 16:
            assert sha256(prompt) == r["reference_prompt_sha256"], prompt
