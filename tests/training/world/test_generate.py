"""Data sets: the same whatever happens on the way, and readable by whoever trains on them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from av_llava.errors import DataError, UsageError
from av_llava.media import probe
from av_llava.training.world import folder as folder_module
from av_llava.training.world import generate
from av_llava.training.world.generate import synthesize
from av_llava.training.world.kinds import KINDS
from av_llava.training.world.parts import SceneSettings
from av_llava.training.world.scene import sample_scene

ROOT = Path(__file__).parents[3]


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file of a folder, and what is in it."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def rows_of(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 clips by one process."""
    out = tmp_path_factory.mktemp("world") / "whole"
    synthesize(out, 70, seed=4)
    return out


def test_a_folder_holds_clips_rows_and_the_setting(whole: Path) -> None:
    assert sorted(p.name for p in whole.iterdir()) == ["clips", "train.json", "train.world"]
    scenes = [sample_scene(4, i, "train") for i in range(70)]
    assert {p.name for p in (whole / "clips").iterdir()} == {s.key + s.suffix for s in scenes}
    assert json.loads((whole / "train.world").read_text())["seed"] == 4


def test_rows_are_llavas_and_name_files_that_are_there(whole: Path) -> None:
    rows = rows_of(whole / "train.json")
    assert len(rows) == 70 and len({row["id"] for row in rows}) == 70
    for row, index in zip(rows, range(70), strict=True):
        scene = sample_scene(4, index, "train")
        (medium,) = {"video", "audio"} & set(row)
        info = probe(whole / row[medium])
        assert (info.video is not None) == scene.has_video == (medium == "video")
        assert (info.audio is not None) == scene.has_audio
        turns = row["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        marks = [t["value"].count(f"<{medium}>\n") for t in turns]
        assert marks == [1] + [0] * (len(turns) - 1) and turns[0]["value"].startswith("<")
        assert len(row["kind"]) == len(row["needs"]) == len(turns) // 2
        assert [sorted(KINDS[k].needs) for k in row["kind"]] == row["needs"]


def test_rows_are_read_by_the_training_data_reader(whole: Path) -> None:
    store = pytest.importorskip("av_llava.training.store").open_store(whole / "train.json")
    assert len(store) == 70
    kinds = {frozenset(store[i].modalities) for i in range(70)}
    assert any("video" in k for k in kinds) and any("audio" in k for k in kinds)


def test_question_rows_carry_choices(tmp_path: Path) -> None:
    rows = rows_of(synthesize(tmp_path / "q", 30, seed=4, split="test", form="question"))
    assert len({row["id"] for row in rows}) == len(rows) > 50
    for row in rows:
        human, gpt = row["conversations"]
        assert human["value"].endswith(row["question"]) and gpt["value"] == row["answer"]
        assert row["answer"] in row["choices"] and row["needs"] == sorted(KINDS[row["kind"]].needs)


def test_both_forms_ask_the_same(whole: Path, tmp_path: Path) -> None:
    single = rows_of(synthesize(tmp_path / "q", 40, seed=4, form="question"))
    together = [
        (row["conversations"][i]["value"].split("\n")[-1], row["conversations"][i + 1]["value"])
        for row in rows_of(whole / "train.json")[:40]
        for i in range(0, len(row["conversations"]), 2)
    ]
    assert [(r["question"], r["answer"]) for r in single] == together


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_files(whole: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "two", 70, seed=4, workers=2)
    assert fingerprint(tmp_path / "two") == fingerprint(whole)


def test_other_seeds_and_splits_give_other_clips(whole: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "a", 8, seed=5)
    synthesize(tmp_path / "a", 8, seed=5, split="test")
    clips = [v for k, v in fingerprint(tmp_path / "a").items() if k.startswith("clips")]
    assert len(set(clips)) == 16 and not set(clips) & set(fingerprint(whole).values())


def test_doing_it_again_writes_no_clip(whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (whole / "clips").iterdir()}
    calls: list[tuple[int, int]] = []
    synthesize(whole, 70, seed=4, progress=lambda done, n: calls.append((done, n)))
    assert {p: p.stat().st_mtime_ns for p in (whole / "clips").iterdir()} == before
    assert calls[-1] == (70, 70) and [d for d, _ in calls] == sorted(d for d, _ in calls)


def test_a_data_set_can_grow_but_not_shrink(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "grow"
    synthesize(out, 20, seed=4)
    with pytest.raises(DataError, match="holds 20 clips of the split 'train', more than n=10"):
        synthesize(out, 10, seed=4)
    synthesize(out, 70, seed=4)
    assert fingerprint(out) == fingerprint(whole)


def alive(group: int) -> bool:
    """Whether a process group has members."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_is_taken_up(whole: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "killed"
    program = f"""
from av_llava.training.world.generate import synthesize
if __name__ == "__main__":
    synthesize({str(out)!r}, 70, seed=4, workers={workers})
"""
    file = tmp_path / "run.py"
    file.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, file], start_new_session=True, env=environment)
    deadline = time.monotonic() + 60
    while len(list(out.glob("clips/[!.]*"))) < 12 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process.pid), "its workers go on without it"
    there = list(out.glob("clips/[!.]*"))
    assert 12 <= len(there) < 70 and not (out / "train.json").exists()
    (out / "clips" / ".train-4-000069.1.part.mp4").write_bytes(b"half")
    synthesize(out, 70, seed=4)
    assert fingerprint(out) == fingerprint(whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 9}, "seed was 4, now 9"),
        ({"form": "question"}, "form was conversation, now question"),
        ({"settings": SceneSettings(size=96)}, "size was 64, now 96"),
    ],
)
def test_another_setting_is_refused(whole: Path, change: dict[str, Any], says: str) -> None:
    before = fingerprint(whole)
    with pytest.raises(DataError, match=says):
        synthesize(whole, 70, **{"seed": 4, **change})
    assert fingerprint(whole) == before


def test_another_version_of_the_world_is_refused(tmp_path: Path) -> None:
    synthesize(tmp_path / "w", 2)
    file = tmp_path / "w" / "train.world"
    file.write_text(json.dumps({**json.loads(file.read_text()), "world": 0}))
    with pytest.raises(DataError, match="world was 0, now 1"):
        synthesize(tmp_path / "w", 2)


def test_a_damaged_setting_is_refused(tmp_path: Path) -> None:
    synthesize(tmp_path / "w", 2)
    (tmp_path / "w" / "train.world").write_text('{"world": 1, "se')
    with pytest.raises(DataError, match=r"train\.world, which says how the split was made"):
        synthesize(tmp_path / "w", 2)


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not of a synthetic data set"):
        synthesize(tmp_path, 2)
    assert fingerprint(tmp_path).keys() == {"notes.txt"}
    with pytest.raises(UsageError, match="cannot be written: Not a directory"):
        synthesize(tmp_path / "notes.txt", 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"n": 0}, "n is 0, but must be at least 1"),
        ({"n": 2, "seed": -1}, "seed is -1"),
        ({"n": 2, "workers": 0}, "workers is 0"),
        ({"n": 2, "split": "../up"}, r"The split '\.\./up' names files"),
        ({"n": 2, "split": ""}, "The split '' names files"),
        ({"n": 2, "form": "questions"}, "Did you mean 'question'"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        synthesize(tmp_path / "w", **arguments)
    assert not (tmp_path / "w").exists()


def test_two_processes_cannot_write_one_split(tmp_path: Path) -> None:
    out = tmp_path / "w"
    program = f"""
from pathlib import Path
from av_llava.training.world.folder import claimed
with claimed(Path({str(out)!r}), "train", {{}}):
    print("claimed", flush=True)
    input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert holder.stdout and holder.stdout.readline() == "claimed\n"
    with pytest.raises(UsageError, match="Another process is writing the split 'train'"):
        synthesize(out, 2)
    synthesize(out, 2, split="test")  # splits of one folder do not stand in each other's way
    holder.communicate("\n")
    assert holder.returncode == 0


def test_a_full_disk_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from av_llava.training.world import write

    real, calls = write.write_clip, []

    def full(scene: Any, path: Path) -> Path:
        calls.append(path)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return real(scene, path)

    monkeypatch.setattr(write, "write_clip", full)
    out = tmp_path / "w"
    with pytest.raises(UsageError, match="No space left on device. The clips so far are kept"):
        synthesize(out, 6)
    assert len(list((out / "clips").iterdir())) == 3 and not (out / "train.json").exists()
    monkeypatch.undo()
    synthesize(out, 6)
    assert len(list((out / "clips").iterdir())) == 6


def test_a_json_file_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder_module.write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        folder_module.write_json(file, [object()])
    assert json.loads(file.read_text()) == [1] and list(tmp_path.iterdir()) == [file]


def test_progress_counts_every_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_CHUNK", 2)
    calls: list[tuple[int, int]] = []
    synthesize(tmp_path / "w", 5, progress=lambda done, n: calls.append((done, n)))
    assert calls == [(2, 5), (4, 5), (5, 5)]
