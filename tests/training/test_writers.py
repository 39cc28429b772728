"""Converting: nothing lost, whole files or none."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_strategies import samples

from av_llava.chat import MediaPart, Message, TextPart
from av_llava.errors import DataError, UsageError
from av_llava.training.readers import Reading
from av_llava.training.samples import Sample
from av_llava.training.store import open_store
from av_llava.training.writers import convert, to_llava


class Listed:
    """A store of given samples."""

    def __init__(self, samples):
        self.samples, self.sources = samples, ("list",)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def reading(self, index):
        return Reading(self.samples[index])

    def where(self, index):
        return f"list, line {index + 1}"

    def digest(self):
        return "none"


def row(i, **more):
    turns = [{"from": "human", "value": f"Question {i}?"}, {"from": "gpt", "value": f"Answer {i}."}]
    return {"id": str(i), "conversations": turns, **more}


def source(folder, rows):
    file = folder / "train.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return open_store(file)


@settings(max_examples=40)
@given(
    st.lists(samples(), min_size=1, max_size=3),
    st.sampled_from([("normal", ".json"), ("normal", ".jsonl"), ("llava", ".json")]),
)
def test_files_are_read_again_as_they_were(tmp_path_factory, found, how):
    folder = tmp_path_factory.mktemp("out")
    given = Listed(found)
    result = convert(given, folder / f"out{how[1]}", to=how[0])
    again = open_store(folder / f"out{how[1]}")
    assert (result.written, result.skipped) == (len(found), 0) and len(again) == len(found)
    for old, new in zip(found, again, strict=True):
        assert [m.text for m in new.messages] == [m.text for m in old.messages]
        assert len(new.paths) == len(old.paths)
        for a, b in zip(old.paths, new.paths, strict=True):
            assert os.path.normpath(b) == os.path.abspath(a)
        fields = ("id", "train_turns", "weight", "meta", "modalities")
        assert all(getattr(new, f) == getattr(old, f) for f in fields)


def test_paths_lead_to_the_same_files_from_everywhere(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = [
        row(0, video="a.mp4", audio="s/a.wav"),
        row(1, image=["/abs/p.png", "https://x.org/q.png"]),
    ]
    source(tmp_path / "data", rows)
    monkeypatch.chdir(tmp_path)
    convert(open_store("data/train.jsonl"), "out/deep/all.jsonl")
    lines = [json.loads(line) for line in Path("out/deep/all.jsonl").read_text().splitlines()]
    film, first = lines[0]["messages"][0]["content"][0], lines[1]["messages"][0]["content"]
    assert (film["path"], film["audio"]) == ("../../data/a.mp4", "../../data/s/a.wav")
    assert [p["path"] for p in first if p["type"] == "image"] == [
        "/abs/p.png",
        "https://x.org/q.png",
    ]
    moved = open_store("out/deep/all.jsonl")[0].paths
    assert [os.path.normpath(p) for p in moved] == ["data/a.mp4", "data/s/a.wav"]


@pytest.mark.parametrize(
    ("parts", "keys"),
    [
        ([MediaPart("video", "a", audio="s")], {"video": "a", "audio": "s"}),
        ([MediaPart("video", "a", audio="auto")], {"video": "a", "use_audio": True}),
        ([MediaPart("video", "a", audio="off")], {"video": "a", "use_audio": False}),
        ([MediaPart("video", "a", audio="on")], {"video": "a", "use_audio": "on"}),
        ([MediaPart("video", "a"), MediaPart("audio", "s")], {"video": "a", "audio": "s"}),
        (
            [MediaPart("video", "a", audio="t"), MediaPart("audio", "s")],
            {"video": {"path": "a", "audio": "t"}, "audio": "s"},
        ),
        ([MediaPart("image", "p"), MediaPart("image", "q")], {"image": ["p", "q"]}),
        ([MediaPart("video", "a", start_s=1)], {"video": {"path": "a", "start": 1}}),
        ([MediaPart("image", b"x")], {"image": {"base64": "eA=="}}),
    ],
)
def test_rows_that_llava_writes(parts, keys):
    said = Message("assistant", (TextPart("Red."),))
    found = to_llava(Sample("7", (Message("user", (*parts, TextPart("\nWhat?"))), said)))
    tokens = "".join(f"<{p.kind}>" for p in parts)
    turns = [{"from": "human", "value": f"{tokens}\nWhat?"}, {"from": "gpt", "value": "Red."}]
    assert found == {"id": "7", "conversations": turns, **keys}


def test_a_key_that_llava_needs_is_not_overwritten():
    turns = (Message("user", (TextPart("?"),)), Message("assistant", (TextPart("!"),)))
    with pytest.raises(DataError, match="list, line 1: The sample keeps 'video' in its meta"):
        convert(Listed([Sample("1", turns, meta={"video": 1})]), "unwritten.json", to="llava")
    assert not os.path.exists("unwritten.json")


def test_half_a_character_is_kept(tmp_path):
    store = source(tmp_path, ['{"q": "\\ud83d?", "a": "ü\\ud800", "video_id": "v.mp4"}'])
    convert(store, tmp_path / "out.jsonl")
    assert open_store(tmp_path / "out.jsonl")[0].messages == store[0].messages


# ------------------------------------------------------------------ whole or not at all


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_first_bad_row_ends_it_and_leaves_nothing(tmp_path):
    store = source(tmp_path, [row(0), "{broken", row(2)])
    with pytest.raises(DataError, match="line 2: not JSON"):
        convert(store, tmp_path / "out.json")
    assert names(tmp_path) == ["train.jsonl"]


def test_bad_rows_can_be_left_out(tmp_path):
    store = source(tmp_path, [row(0), "{broken", row(2), row(3, image="x", video_id=1)])
    calls = []
    options = {"skip_bad": True, "progress": lambda *x: calls.append(x), "max_reasons": 1}
    done = convert(store, tmp_path / "out.json", **options)
    assert (done.written, done.skipped) == (3, 1) and calls[-1] == (4, 4)
    assert "line 2: not JSON" in done.reasons[0]
    assert [s.id for s in open_store(tmp_path / "out.json")] == ["0", "2", "3"]


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(DataError, match="No row could be used; .*out.json was not written.*line 1"):
        convert(source(tmp_path, ["{"]), tmp_path / "out.json", skip_bad=True)
    assert names(tmp_path) == ["train.jsonl"]


def test_a_file_is_replaced_only_when_asked(tmp_path):
    store = source(tmp_path, [row(0)])
    out = tmp_path / "out.json"
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        convert(store, out)
    assert out.read_text() == "mine"
    bad = source(tmp_path, [row(0), "{broken"])
    with pytest.raises(DataError):
        convert(bad, out, overwrite=True)
    assert out.read_text() == "mine"
    convert(source(tmp_path, [row(0)]), out, overwrite=True)
    assert open_store(out)[0].id == "0"


def test_a_file_can_take_its_own_place(tmp_path):
    store = source(tmp_path, [row(i) for i in range(3)])
    convert(store, tmp_path / "train.jsonl", overwrite=True)
    assert [s.id for s in open_store(tmp_path / "train.jsonl")] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("out.txt", {}, "must end in .jsonl"),
        ("out.json", {"to": "lava"}, "Did you mean 'llava'"),
        ("train.jsonl/out.json", {}, "cannot be written"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, options, says):
    store = source(tmp_path, [row(0)])
    with pytest.raises((DataError, UsageError), match=says):
        convert(store, tmp_path / name, **options)
    assert names(tmp_path) == ["train.jsonl"]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    store = source(tmp_path, [row(i) for i in range(500)])
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DataError, match="out.jsonl cannot be written: File too large"):
            convert(store, out, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert out.read_text() == "mine" and names(tmp_path) == ["out.jsonl", "train.jsonl"]


SLOWLY = """
import sys, time
from av_llava.training.store import open_store
from av_llava.training.writers import convert
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.02)
convert(open_store(sys.argv[1]), sys.argv[2], overwrite=True, progress=progress)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_what_was_there(tmp_path, how):
    source(tmp_path, [row(i) for i in range(2000)])
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    run = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, str(tmp_path / "train.jsonl"), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert run.stdout is not None
    while int(run.stdout.readline()) < 5:
        pass
    run.send_signal(how)
    run.communicate(timeout=60)
    assert run.returncode != 0 and out.read_text() == "mine"
    left = [n for n in names(tmp_path) if n not in ("out.jsonl", "train.jsonl")]
    assert len(left) == (1 if how == signal.SIGKILL else 0)
