"""Reports of real run folders: numbers as scored, notes, pictures of the wrong answers."""

from __future__ import annotations

import io

import numpy as np
import pytest
from clips import make_clip, read_counter
from eval_stand_in import ARMS, StandIn, Toy, toy_rows, write_toy
from PIL import Image

from av_llava.cli.eval_scores import lines_of
from av_llava.errors import DataError, UsageError
from av_llava_eval.report import gather, write_report
from av_llava_eval.runner import RunSettings, run
from av_llava_eval.scoring import score_folder, summarise

TOY = Toy()
ROWS = toy_rows()


def a_run(place, arms=ARMS, **answerer):
    data = write_toy(place / "data")
    run(TOY, data, place / "run", lambda: StandIn(**answerer), RunSettings(arms=arms))
    return place / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    (place / "data" / "videos").mkdir(parents=True)
    make_clip(place / "data" / "videos" / "v1.mp4", seconds=20, fps=10, size=(320, 240))
    (place / "data" / "videos" / "v2.mp4").write_bytes(b"no film")
    return a_run(place, fail={"v4": "missing"})


def test_columns_hold_the_scores_of_the_arms(folder):
    facts = gather([folder], task=TOY)
    found = summarise(score_folder(folder, task=TOY))["arms"]
    assert [c.label for c in facts.columns] == ["audio on", "audio off"]
    for column in facts.columns:
        arm = found[column.label]
        assert column.headline.score == arm["score"] and column.headline.n == len(ROWS)
        assert column.headline.low < column.headline.score < column.headline.high
        assert dict(column.failed) == {"missing": 3} and column.answered > column.headline.score
        assert {e.name: e.score for e in column.groups["kind"]} == {
            k: v["score"] for k, v in arm["groups"]["kind"].items()
        }
        assert sum(said for said, _ in column.letters.values()) == pytest.approx(1)
        assert column.chance == 0.25
    assert facts.title == "Toy: run" and len(facts.differences) == 1


def test_lengths_are_quarters_of_the_questions(folder):
    (column, _) = gather([folder], task=TOY, frames=0).columns
    assert [e.n for e in column.by_length] == [9, 9, 9, 9]
    assert [e.name for e in column.by_length] == [
        "10 s to 38 s",
        "38 s to 65 s",
        "65 s to 1:32",
        "1:32 to 2:00",
    ]
    right = sum(e.score * e.n for e in column.by_length)
    assert right == pytest.approx(column.headline.score * column.headline.n)


def test_wrong_answers_have_pictures_where_their_film_can_be_read(folder):
    facts = gather([folder], task=TOY, frames=4)
    by_id = {m.id: m for m in facts.misses}
    assert facts.n_misses == len(by_id)
    shown = {m.source for m in facts.misses if m.frames}
    assert shown == {"v1.mp4"}, "v2.mp4 is no film, the others are not there"
    miss = next(m for m in facts.misses if m.frames)
    assert miss.times_s == (0.0, 5.0, 10.0, 15.0)
    picture = np.asarray(Image.open(io.BytesIO(miss.frames[2])))
    assert picture.shape == (144, 192, 3)
    assert read_counter(picture) == 100
    failed = [m for m in facts.misses if m.why.startswith("missing: There is no file")]
    assert {m.id for m in failed} == {"v4-0", "v4-1", "v4-2"}
    assert {m.groups["kind"] for m in facts.misses[:2]} == {"short", "long"}


def test_a_limit_shows_the_first_of_each_group_and_says_how_many_there_are(folder):
    facts = gather([folder], task=TOY, misses=2, frames=0)
    assert len(facts.misses) == 2 < facts.n_misses


def test_two_runs_stand_side_by_side(folder, tmp_path):
    other = a_run(tmp_path, arms=ARMS[1:])
    renamed = other.rename(tmp_path / "other")
    facts = gather([folder, renamed], task=TOY, frames=0)
    assert [c.label for c in facts.columns] == [
        "run: audio on",
        "run: audio off",
        "other: audio off",
    ]
    (difference,) = facts.differences
    assert (difference.first, difference.second) == ("run: audio on", "other: audio off")
    assert difference.n == len(ROWS)


def test_what_is_missing_is_said(tmp_path):
    folder = a_run(tmp_path)
    file = next(folder.glob("answers.*"))
    file.write_bytes(b"".join(file.read_bytes().splitlines(True)[:40]))
    assert any("not complete" in note for note in gather([folder], task=TOY).notes)
    with pytest.raises(DataError):
        gather([tmp_path / "nothing"], task=TOY)
    with pytest.raises(UsageError):
        gather([], task=TOY)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file/report.md cannot be written"):
        write_report([folder], tmp_path / "file", task=TOY, misses=0)
    file.write_bytes(b"")
    with pytest.raises(DataError, match="holds no answers yet"):
        gather([folder], task=TOY)
    none = summarise(score_folder(folder, task=TOY))
    assert "no answers yet" in "\n".join(lines_of(none)) and not none["complete"]


def test_both_files_are_written_and_written_again_the_same(folder, tmp_path):
    text, page = write_report([folder], tmp_path / "out", task=TOY)
    before = text.read_bytes(), page.read_bytes()
    assert b"| audio on |" in before[0] and before[1].startswith(b"<!doctype html>")
    write_report([folder], tmp_path / "out", task=TOY)
    assert (text.read_bytes(), page.read_bytes()) == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.md"]
