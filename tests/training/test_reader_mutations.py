"""Whatever stands at any place of a row, a reader gives a sample or says what is wrong with it."""

from __future__ import annotations

import copy
import json
import random

import pytest
from clips import make_clip
from tiny import tiny

from av_llava.errors import AVLlavaError, DataError, UsageError
from av_llava.training.file_store import FileStore
from av_llava.training.index import build_index
from av_llava.training.readers import RowContext, detect
from av_llava.training.samples import SCHEMA, Sample

ASKED = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
VIDEO = {"type": "video", "path": "v.mp4", "start": 1, "end": 2, "fps": 2, "source_fps": 3}
TEXT = {"type": "text", "text": "Q"}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A"}], "weight": 1}
TURNS = [{"role": "user", "content": "<video><audio>Q"}, {"role": "assistant", "content": "A"}]

ROWS = {
    "llava": {"id": "1", "image": "a.png", "conversations": ASKED},
    "salmonn": {
        "id": 1,
        "video": "a.mp4",
        "audio": "a.wav",
        "conversations": [*ASKED, {"from": "reject_gpt", "value": "B"}],
    },
    "own sound": {"video": "a.mp4", "use_audio": True, "conversations": ASKED},
    "swift": {"messages": [*TURNS, *TURNS], "videos": ["v.mp4"] * 2, "audios": ["a.wav"] * 2},
    "parts": {
        "messages": [{"role": "user", "content": [VIDEO, TEXT]}, ANSWER],
        "audios": ["x.wav"],
        "videos": [],
    },
    "parts without sources": {
        "messages": [{"role": "user", "content": [{"type": "video"}, TEXT]}, ANSWER],
        "audios": ["x.wav"],
        "videos": ["a.mp4"],
    },
    "alpaca": {
        "instruction": "I",
        "input": "J",
        "output": "O",
        "history": [["a", "b"]],
        "system": "S",
        "images": ["a.png"],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "<image>Q"},
            {"from": "function_call", "value": "A"},
            {"from": "observation", "value": "o"},
            {"from": "gpt", "value": "A"},
        ],
        "images": [{"path": "a.png", "bytes": None}],
        "tools": "t",
    },
    "video_instruct": {"q": "Q", "a": "A", "video_id": "v_1"},
    "pairs": {"conversation": [{"human": "q", "assistant": "a"}]},
    "shi_labs": {"conversation": ASKED, "video": "x.mp4"},
    "trl": {
        "prompt": [{"role": "user", "content": "Q"}],
        "completion": [{"role": "assistant", "content": "A"}],
        "images": ["a.png"],
    },
    "query": {
        "query": "Q",
        "response": "A",
        "history": [["a", "b"]],
        "images": ["a"],
        "label": True,
    },
    "normal": {
        "schema": SCHEMA,
        "id": "x",
        "messages": [
            {"role": "user", "content": [{**VIDEO, "audio": "on"}, TEXT]},
            {"role": "assistant", "content": "A", "train": True},
        ],
        "weight": 2.0,
        "meta": {},
    },
}

HUGE = 10**400
JUNK = [
    None, 0, 1, -1, 1.5, "", True, [], {}, [None], [[]], [{}], "x", ["x"], [0], {"a": 1},
    "<image>", "<audio>", float("nan"), 1e400, "\ud800", "\0", HUGE, -HUGE, [HUGE],
    {"type": "video"}, {"type": ["x"]}, [["x"]], {"path": None}, {"type": "image", "path": 5},
]  # fmt: skip


def places(data, at=()):
    """Every place in a row, as a path of keys and numbers."""
    if at:
        yield at
    inner = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in inner:
        yield from places(value, (*at, key))


def put(row, place, value):
    for key in place[:-1]:
        row = row[key]
    row[place[-1]] = copy.deepcopy(value)


def mutated(row):
    """The row with something else at one place, then at three."""
    chance = random.Random(0)
    for place in places(row):
        for junk in JUNK:
            other = copy.deepcopy(row)
            put(other, place, junk)
            yield other
    for _ in range(300):
        other = copy.deepcopy(row)
        for _ in range(3):
            left = list(places(other))
            if left:
                put(other, chance.choice(left), chance.choice(JUNK))
        yield other


@pytest.mark.parametrize("name", ROWS)
def test_a_mutated_row_is_read_or_refused_in_words(name):
    read = 0
    for row in mutated(ROWS[name]):
        row = json.loads(json.dumps(row))
        before = copy.deepcopy(row)
        try:
            sample = detect(row).read(row, RowContext("data.json[0]", "data-0")).sample
        except (DataError, UsageError) as error:
            said = str(error)
            assert said.endswith(".") or "format=" in said, before
            assert len(said) < 1500, before
            continue
        written = sample.to_row()
        assert Sample.from_row(json.loads(json.dumps(written))).to_row() == written
        read += 1
    assert read >= 10, "too little was changed harmlessly for this to be a test of what is read"


BESIDE = {"video": "a.mp4", "audio": "a.wav"}


@pytest.mark.parametrize("odd", [None, 0, 1.5, True, [], ["x"]])
def test_a_part_that_is_none_beside_video_and_sound(odd):
    row = {**BESIDE, "conversations": [{"from": "human", "value": [odd]}, ASKED[1]]}
    with pytest.raises(UsageError, match=f"content part is a {type(odd).__name__}, not a mapping"):
        detect(row).read(row, RowContext())


@pytest.mark.parametrize("key", ["start", "end", "fps", "frames", "source_fps"])
def test_numbers_that_are_too_large_to_count_with(key):
    part = {"type": "video", "path": "v.mp4", key: HUGE}
    row = {"messages": [{"role": "user", "content": [part, TEXT]}, ANSWER]}
    with pytest.raises(UsageError, match=r"must be a number, not 10+\.") as caught:
        detect(row).read(row, RowContext())
    assert len(str(caught.value)) < 200


ODD = [1e300, 10**30, 1e10, 1.5, 1e-5, 0, -0.0, 2**31, 2**64, "x", "\0", "\ud800", "on"]


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_odd_options_and_paths_are_measured_or_noted(kind, tmp_path):
    """One row further than reading: nothing that it holds ends the measuring of the others."""
    file = make_clip(tmp_path / "film.mp4", seconds=1, size=(64, 48))
    keys = ["start", "end", "fps", "frames", "source_fps", "audio"]
    parts = [{"type": kind, "path": str(file), key: odd} for key in keys for odd in ODD]
    parts += [{"type": kind, "path": odd} for odd in ("\0", "a\0b", "\ud800", "x" * 5000, "/")]
    parts += [{"type": "text", "text": "\ud83d"}]
    rows = [{"messages": [{"role": "user", "content": [part, TEXT]}, ANSWER]} for part in parts]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, processor = tiny()
    index = build_index(FileStore(data), processor, processor.media_options(frames=4))
    assert all(f"rows.jsonl, line {row + 1}" in why for row, why in index.errors.items())
    assert index.usable.sum() >= 5 and (index.lengths[index.usable] > 0).all()


def test_a_weight_that_is_too_large_to_count_with():
    row = {**copy.deepcopy(ROWS["normal"]), "weight": HUGE}
    with pytest.raises(DataError, match="weight of a sample must be a number from 0, not 10+"):
        detect(row).read(row, RowContext())


def test_digits_that_python_refuses_are_said_with_their_row(tmp_path):
    """Python reads whole numbers of at most 4300 digits."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS["llava"])[:-1] + ', "n": ' + "1" * 5000 + "}\n")
    with pytest.raises(AVLlavaError, match="rows.jsonl, line 1: not usable: .*4300 digits"):
        FileStore(file)[0]
