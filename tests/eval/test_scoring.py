"""Scores are a function of the answers: nothing dropped, nothing guessed, everything counted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from eval_stand_in import ARMS, StandIn, Toy, said, toy_rows, write_toy

from av_llava.cli.eval_scores import lines_of
from av_llava.errors import DataError
from av_llava_eval.compare import compare, compare_arms, compare_runs
from av_llava_eval.experiment import Arm
from av_llava_eval.records import RunFolder
from av_llava_eval.runner import RunSettings, run
from av_llava_eval.scoring import score_folder, summarise

TOY = Toy()
FAIL = {"v2": "missing", "v5": "oom"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("scored")
    data = write_toy(base / "data", toy_rows(n_videos=40))
    run(TOY, data, base / "run", lambda: StandIn(fail=FAIL), RunSettings(arms=ARMS))
    return base / "run"


def by_hand(arm, keep=lambda row: True):
    """Score of an arm with no help from the package but the prompt."""
    total = n = 0
    for sample in RunFolderSamples.samples:
        row = {"kind": sample.meta["kind"], "tags": sample.meta["tags"], "group": sample.group}
        if keep(row):
            n += 1
            if sample.group not in FAIL:
                total += said(arm, TOY.prompt(sample))[0] == sample.answer
    return total / n


class RunFolderSamples:
    samples: tuple = ()


@pytest.fixture(autouse=True)
def samples(folder):
    RunFolderSamples.samples = tuple(RunFolder(folder).samples())


def test_failures_and_unparsed_answers_are_wrong_and_counted(folder):
    result = summarise(score_folder(folder, task=TOY))
    assert result["complete"] and result["chance"] == 0.25
    for arm in ARMS:
        scores = result["arms"][arm.name]
        assert scores["n"] == 120 and scores["videos"] == 40
        assert scores["failures"] == {"missing": 3, "oom": 3} and scores["failed"] == 6
        assert scores["score"] == pytest.approx(by_hand(arm))
        assert scores["of_answered"] == pytest.approx(
            by_hand(arm, lambda row: row["group"] not in FAIL)
        )
        unparsed = [
            s
            for s in RunFolderSamples.samples
            if s.group not in FAIL and said(arm, TOY.prompt(s)) == "no idea"
        ]
        assert scores["unparsed"] == len(unparsed) > 0
        assert scores["interval"]["low"] < scores["score"] < scores["interval"]["high"]
        assert scores["wilson"]["low"] < scores["score"] < scores["wilson"]["high"]
        assert scores["how"]["letter"] + len(unparsed) + 6 == 120
        assert sum(v["right"] for v in scores["letters"].values()) == 120


def test_groups_add_up(folder):
    scores = summarise(score_folder(folder, task=TOY))["arms"]["audio on"]
    arm = ARMS[0]
    for value in ("short", "long"):
        group = scores["groups"]["kind"][value]
        expected = by_hand(arm, lambda r, value=value: r["kind"] == value)
        assert group["score"] == pytest.approx(expected)
        assert group["interval"]["low"] <= group["score"] <= group["interval"]["high"]
    tags = scores["groups"]["tags"]
    assert tags["all"]["n"] == 120 and tags["odd"]["n"] + tags["even"]["n"] == 120
    assert tags["all"]["score"] == pytest.approx(scores["score"])
    assert tags["all"]["interval"] == scores["interval"]


def test_a_macro_headline_is_the_mean_of_its_groups(folder):
    class Macro(Toy):
        headline = "macro:kind"

    scores = summarise(score_folder(folder, task=Macro()))["arms"]["audio on"]
    groups = scores["groups"]["kind"].values()
    assert scores["score"] == pytest.approx(sum(g["score"] for g in groups) / 2)
    assert scores["interval"]["low"] < scores["score"] < scores["interval"]["high"]


def test_scoring_is_repeatable_and_needs_no_data(folder, tmp_path):
    first = summarise(score_folder(folder, task=TOY))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    assert summarise(score_folder(copy, task=TOY)) == first
    assert json.loads(json.dumps(first)) == first


def test_another_rule_gives_columns_of_its_own(folder):
    class Quirky(Toy):
        def score(self, prediction, sample, compat=None):
            return 1.0 if compat else super().score(prediction, sample)

        def compat_metrics(self, records, compat):
            return {"their_accuracy": 100 * sum(r["score"] or 0 for r in records) / len(records)}

    ours = summarise(score_folder(folder, task=TOY))["arms"]["audio on"]
    both = summarise(score_folder(folder, task=Quirky()), compat="lmms")["arms"]["audio on"]
    assert both["score"] == ours["score"]
    assert both["compat"]["their_accuracy"] == pytest.approx(100 * 114 / 120)
    assert both["compat"]["rule"] == "lmms" and both["compat"]["random"] == 0


def test_an_unfinished_run_says_so(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("manifest.json", "samples.jsonl"):
        (copy / name).write_bytes((folder / name).read_bytes())
    lines = (folder / "answers.0of1.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "answers.0of1.jsonl").write_bytes(b"".join(lines[:30]))
    result = summarise(score_folder(copy, task=TOY))
    assert not result["complete"]
    assert sum(arm["n"] for arm in result["arms"].values()) == 30


def test_hidden_labels_have_no_score(tmp_path):
    rows = [{**row, "answer": None} for row in toy_rows(3)]
    run(TOY, write_toy(tmp_path / "data", rows), tmp_path / "run", StandIn, RunSettings())
    scores = summarise(score_folder(tmp_path / "run", task=TOY))["arms"]["main"]
    assert scores["score"] is None and scores["n"] == 0 and scores["unlabelled"] == 9


def test_empty_answers_are_wrong_and_counted(tmp_path):
    class Silent(StandIn):
        def answer(self, opened, arm, prompts, n_new):
            return [replace(r, text="") for r in super().answer(opened, arm, prompts, n_new)]

    run(TOY, write_toy(tmp_path / "data"), tmp_path / "run", Silent, RunSettings())
    scores = summarise(score_folder(tmp_path / "run", task=TOY))["arms"]["main"]
    assert (scores["score"], scores["unparsed"], scores["failed"]) == (0, 36, 0)
    assert scores["how"] == {"empty": 36} and scores["of_answered"] == 0


def test_videos_without_sound_are_counted_and_told(tmp_path):
    class Mute(StandIn):
        def answer(self, opened, arm, prompts, n_new):
            reason = "off" if arm.sound == "off" else "no sound track"
            used = {"no_audio": reason if opened.group != "v0" else None}
            found = super().answer(opened, arm, prompts, n_new)
            return [replace(r, used=used) for r in found]

    arms = (Arm("auto"), Arm("off", sound="off"))
    run(TOY, write_toy(tmp_path / "data"), tmp_path / "run", Mute, RunSettings(arms=arms))
    result = {**summarise(score_folder(tmp_path / "run", task=TOY)), "comparisons": []}
    assert result["arms"]["auto"]["silent"] == {"no sound track": 33}
    assert result["arms"]["off"]["silent"] == {}
    told = "\n".join(lines_of(result))
    assert told.count("answered without sound (no sound track: 33)") == 1


def test_answers_to_other_questions_are_not_scored(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    with (copy / "answers.1of2.jsonl").open("w") as handle:
        row = {"arm": "audio on", "id": "x", "group": "g", "status": "ok", "raw": "A"}
        handle.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"1 answers to questions that are not its own.*'x'"):
        score_folder(copy, task=TOY)
    with pytest.raises(DataError, match="is no folder of a run"):
        score_folder(tmp_path, task=TOY)


def test_few_videos_have_honest_intervals_and_are_told(tmp_path):
    """Resampling videos that are all wrong would say that the score is exactly zero."""
    run(TOY, write_toy(tmp_path / "data", toy_rows(5)), tmp_path / "run", StandIn, RunSettings())
    scored = score_folder(tmp_path / "run", task=TOY)
    wrong = [{**r, "score": 0.0} for r in scored.arms["main"]]
    found = summarise(replace(scored, arms={"main": wrong}))
    assert found["arms"]["main"]["interval"]["method"] == "Wilson"
    assert 0.15 < found["arms"]["main"]["interval"]["high"] < 0.25
    assert "Only 5 videos" in "\n".join(lines_of(found))
    right = [{**r, "score": 1.0} for r in wrong]
    difference = compare(TOY, wrong, right, ("a", "b"))
    assert difference["p_value"] == 2 / 2**5, "what five videos can show at most"
    assert difference["detectable"] is None or difference["detectable"] > 0
    assert compare(TOY, wrong, wrong, ("a", "b"))["detectable"] is None


def test_many_videos_are_resampled(folder):
    found = summarise(score_folder(folder, task=TOY))
    assert found["arms"]["audio on"]["interval"]["method"] == "cluster bootstrap"
    assert "Only" not in "\n".join(lines_of({**found, "comparisons": []}))


# -------------------------------------------------------------------- comparing


def test_two_arms_question_by_question(folder):
    scored = score_folder(folder, task=TOY)
    (found,) = compare_arms(scored)
    first, second = (list(scored.arms[a.name]) for a in ARMS)
    right = [[bool(r["score"]) for r in arm] for arm in (first, second)]
    table = found["table"]
    assert table["both"] == sum(a and b for a, b in zip(*right))
    assert table["only_first"] == sum(a and not b for a, b in zip(*right))
    assert table["only_second"] == sum(b and not a for a, b in zip(*right))
    assert found["difference"] == pytest.approx(
        (table["only_second"] - table["only_first"]) / found["n"]
    )
    assert found["interval"]["low"] < found["difference"] < found["interval"]["high"]
    assert 0 < found["p_value"] <= 1 and found["p_holm"] == found["p_value"]
    assert 0 < table["mcnemar_p"] <= 1 and found["detectable"] > 0
    assert len(found["flipped"]["better"]) == table["only_second"]
    kinds = found["groups"]["kind"]
    assert sum(g["n"] for g in kinds.values()) == 120
    assert all(g["p_holm"] >= g["p_value"] for g in kinds.values())


def test_a_run_with_itself_differs_in_nothing(folder):
    scored = score_folder(folder, task=TOY)
    same = compare_runs(scored, scored, ("audio on", "audio on"))
    assert same["difference"] == 0 and same["p_value"] == 1 and same["table"]["mcnemar_p"] == 1
    assert same["interval"]["low"] == same["interval"]["high"] == 0


def test_a_clear_difference_is_found(folder):
    scored = score_folder(folder, task=TOY)
    worse = [dict(r) for r in scored.arms["audio on"]]
    better = [{**r, "score": 1.0} for r in worse]
    found = compare(TOY, worse, better, ("a", "b"))
    assert found["difference"] > 0.5 and found["interval"]["low"] > 0.4
    assert found["p_value"] < 0.001 and found["table"]["mcnemar_p"] < 1e-6


def test_what_cannot_be_compared(folder, tmp_path):
    scored = score_folder(folder, task=TOY)
    with pytest.raises(DataError, match="no arm 'loud'.*'audio on', 'audio off'"):
        compare_runs(scored, scored, ("audio on", "loud"))
    with pytest.raises(DataError, match="no labelled question in common"):
        compare(TOY, scored.arms["audio on"], (), ("a", "b"))
    others = write_toy(tmp_path / "data", toy_rows(3))
    run(TOY, others, tmp_path / "val", StandIn, RunSettings(arms=ARMS, split="val"))
    with pytest.raises(DataError, match="of split 'test'.*of 'val'"):
        compare_runs(scored, score_folder(tmp_path / "val", task=TOY), ("audio on", "audio on"))
