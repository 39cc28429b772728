"""Every task on its mini-benchmark: it loads, checks, asks, reads, scores, and says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from eval_mini import MINIS, Media, Mini

from av_llava.errors import DataError
from av_llava_eval import Sample, get_task, task_names
from av_llava_eval.answerer import Clip, Reply
from av_llava_eval.records import RunFolder, sample_of_row, sample_row
from av_llava_eval.runner import RunSettings, run

NUMBERED = {m.name for m in MINIS if not m.ids}

every = pytest.mark.parametrize("mini", MINIS, ids=[m.name for m in MINIS])


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return Media(tmp_path_factory.mktemp("media"))


@pytest.fixture
def data(mini: Mini, media: Media, tmp_path: Path) -> Path:
    return mini.build(tmp_path / "data", media)


def right(sample: Sample) -> str:
    """What a model that knows the answer says."""
    if isinstance(sample.answer, list):
        return f"The event happens in {sample.answer[0]} - {sample.answer[1]} seconds."
    return f"{sample.answer}" if sample.answer is not None else "A"


def test_every_task_has_a_mini_benchmark() -> None:
    assert {m.task for m in MINIS} == set(task_names())
    assert len({m.name for m in MINIS}) == len(MINIS)


@every
def test_it_loads_and_nothing_is_missing(mini: Mini, data: Path) -> None:
    task = get_task(mini.task)
    samples = list(task.load(data, mini.split))
    assert len(samples) == mini.n
    assert task.check(data, mini.split) == []
    assert task.scan(data, mini.split).problems == ()
    assert len({s.id for s in samples}) == len(samples)
    for sample in samples:
        assert sample.files and all(f.exists() for f in sample.files)
        assert all(g in sample.meta for g in task.groupings)
        assert sample.answer is None or not sample.options or sample.answer in sample.letters
    if not mini.task.startswith("videommmu"):
        assert len({s.options is None for s in samples}) == 1
    # The same again, so that a run can be gone on with; and through JSON, as a run keeps them.
    assert samples == list(task.load(data, mini.split))
    rows = json.loads(json.dumps([sample_row(s, data) for s in samples]))
    assert [sample_of_row(row, data) for row in rows] == samples


@every
def test_prompts_hold_question_and_options_and_differ_by_question(mini: Mini, data: Path) -> None:
    task = get_task(mini.task)
    samples = list(task.load(data, mini.split))
    for style in task.styles:
        for sample in samples:
            prompt = task.prompt(sample, style)
            if style == "default":
                assert sample.question.rstrip(".") in prompt
                assert "<image>" not in prompt and "<video>" not in prompt
            assert all(option in prompt for option in sample.options or ())
            assert prompt == task.prompt(sample, style)


@every
def test_right_wrong_and_empty_answers(mini: Mini, data: Path) -> None:
    task = get_task(mini.task)
    samples = list(task.load(data, mini.split))
    labelled = [s for s in samples if s.answer is not None]
    good = task.aggregate([task.score_sample(s, right(s)) for s in samples])
    bad = task.aggregate([task.score_sample(s, "qqq zzz") for s in samples])
    empty = task.aggregate([task.score_sample(s, "") for s in samples])
    assert good["n"] == bad["n"] == empty["n"] == len(samples)
    if not labelled:
        assert good["headline"] is bad["headline"] is empty["headline"] is None
        return
    assert good["headline"] == pytest.approx(1.0, abs=1e-9)
    assert bad["headline"] == pytest.approx(0.0)
    assert empty["headline"] == 0.0 and empty["unparsed"] == len(labelled)
    assert good["unparsed"] == 0
    for grouping in task.groupings:
        counts = good["groups"][grouping]
        assert sum(g["n"] for g in counts.values()) >= len(labelled), grouping


@every
def test_scores_by_the_rule_of_lmms_eval(mini: Mini, data: Path) -> None:
    task = get_task(mini.task)
    samples = list(task.load(data, mini.split))
    for said in ("right", "I do not know", ""):
        texts = [right(s) if said == "right" else said for s in samples]
        records = [task.score_sample(s, t, "lmms") for s, t in zip(samples, texts, strict=True)]
        for record in records:
            assert record["score"] is None or 0 <= record["score"] <= 1
            assert record["how"] != "random" or record["extracted"] is None
        out = task.aggregate(records)
        assert set(out) >= {"headline", "n", "groups"}
        json.dumps(out)


class Knowing:
    """Answers right, by the clip and the question; notes what it was shown."""

    def __init__(self, task: Any, samples: Sequence[Sample]) -> None:
        style = task.styles[0]
        self.known = {(Clip.of(s), task.prompt(s, style)): right(s) for s in samples}
        self.opened: list[Clip] = []

    def fingerprint(self) -> dict[str, Any]:
        return {"model": {"weights": "known"}}

    def open(self, clip: Clip, arms: Any, lenders: Any) -> Clip:
        self.opened.append(clip)
        return clip

    def answer(self, opened: Clip, arm: Any, prompts: Sequence[str], n_new: int) -> list[Reply]:
        return [Reply(self.known[opened, p], {}, {}) for p in prompts]


@every
def test_a_run_from_the_files_to_the_headline(mini: Mini, data: Path, tmp_path: Path) -> None:
    task = get_task(mini.task)
    samples = list(task.load(data, mini.split))
    knowing = Knowing(task, samples)
    settings = RunSettings(split=mini.split, workers=0)
    done = run(task, data, tmp_path / "run", lambda: knowing, settings)
    assert done.complete and done.failed == 0 and done.answers == mini.n
    assert len(knowing.opened) == len({Clip.of(s) for s in samples})
    kept = RunFolder(tmp_path / "run")
    answers = {id_: row["raw"] for (_, id_), row in kept.answers().items()}
    records = [task.score_sample(s, answers[s.id]) for s in kept.samples()]
    out = task.aggregate(records)
    if any(s.answer is not None for s in samples):
        assert out["headline"] == pytest.approx(1.0, abs=1e-9)


# -------------------------------------------------------------------- wrong input


@every
def test_missing_media_are_counted_and_named(mini: Mini, data: Path) -> None:
    task = get_task(mini.task)
    first = next(task.load(data, mini.split)).files[0]
    gone = first.rename(first.with_name("gone"))
    said = " ".join(task.check(data, mini.split))
    assert f"1 of {len(set(_files(task, mini, data)))} media files are missing" in said
    assert first.stem in said
    assert len(list(task.load(data, mini.split))) == mini.n  # a failure of samples, not of the run
    gone.rename(first)
    assert task.check(data, mini.split) == []


def _files(task: Any, mini: Mini, data: Path) -> list[Path]:
    return [f for s in task.load(data, mini.split) for f in s.files]


@every
def test_a_row_without_a_field_is_named(mini: Mini, media: Media, tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        key = next(k for k in (mini.drop, "Q", "q_uid") if k in rows[-1])
        del rows[-1][key]

    _is_refused(
        mini, mini.build(tmp_path / "data", media, change), r"row \d|\d of \d|line \d|film \d"
    )


@every
def test_an_answer_outside_the_options_is_named(mini: Mini, media: Media, tmp_path: Path) -> None:
    if not mini.bad_answer:
        pytest.skip("any text is an answer, or the answers lie in a file of their own")

    def change(rows: list[dict[str, Any]]) -> None:
        rows[-1].update(mini.bad_answer)

    data = mini.build(tmp_path / "data", media, change)
    said = _is_refused(
        mini, data, r"is none of|not the number of an option|neither|has no duration"
    )
    found = get_task(mini.task).scan(data, mini.split)
    assert len(found.problems) == 1 and len(found.samples) == mini.n - 1, said


@every
def test_a_row_that_is_there_twice_is_named(mini: Mini, media: Media, tmp_path: Path) -> None:
    if mini.name in NUMBERED:
        pytest.skip("the rows have no ids; their numbers are theirs")

    def change(rows: list[dict[str, Any]]) -> None:
        rows.append(dict(rows[-1]))

    _is_refused(mini, mini.build(tmp_path / "data", media, change), r"is also that of row \d")


def _is_refused(mini: Mini, data: Path, said: str) -> str:
    task = get_task(mini.task)
    with pytest.raises(DataError, match=said) as caught:
        list(task.load(data, mini.split))
    assert len(str(caught.value)) < 600
    assert task.check(data, mini.split)[0] == str(caught.value)
    return str(caught.value)


@every
def test_no_annotations_at_all(mini: Mini, tmp_path: Path) -> None:
    task = get_task(mini.task)
    with pytest.raises(DataError, match="There is no folder|lacks|holds no|no annotation"):
        list(task.load(tmp_path / "nowhere", mini.split))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="looked for|lacks"):
        list(task.load(tmp_path / "empty", mini.split))


@every
def test_no_rows(mini: Mini, media: Media, tmp_path: Path) -> None:
    data = mini.build(tmp_path / "data", media, lambda rows: rows.clear())
    with pytest.raises(DataError, match="no rows|lacks|holds no|looked for"):
        list(get_task(mini.task).load(data, mini.split))
