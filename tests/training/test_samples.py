"""The normal form: exact round trips, strict reading."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_strategies import samples

from av_llava.chat import MediaPart, Message, TextPart
from av_llava.errors import DataError
from av_llava.training.samples import SCHEMA, Sample, sound_file

ASKED = Message("user", (TextPart("Why?"),))
SAID = Message("assistant", (TextPart("Because."),))


@given(samples())
def test_a_sample_survives_its_row_exactly(sample):
    row = json.loads(json.dumps(sample.to_row()))
    assert Sample.from_row(row) == sample
    assert Sample.from_row(row).to_row() == row


def test_what_a_row_looks_like():
    film = MediaPart("video", "a.mp4", start_s=1, end_s=2.5, fps=2.0, frames=8, audio="voice.wav")
    sample = Sample(
        "7",
        (Message("user", (film, TextPart("\nWhy?"))), SAID, ASKED, SAID),
        "data.json[3]",
        (False, True),
        0.5,
        {"kind": "order"},
    )
    assert sample.to_row() == {
        "schema": SCHEMA,
        "id": "7",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video", "path": "a.mp4", "start": 1, "end": 2.5, "fps": 2.0,
                     "frames": 8, "audio": "voice.wav"},
                    {"type": "text", "text": "\nWhy?"},
                ],
            },
            {"role": "assistant", "content": "Because.", "train": False},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Because.", "train": True},
        ],
        "source": "data.json[3]",
        "weight": 0.5,
        "meta": {"kind": "order"},
    }  # fmt: skip
    assert sample.paths == ("a.mp4", "voice.wav")


@pytest.mark.parametrize(
    ("audio", "modalities", "file"),
    [
        (None, {"video"}, None),
        ("off", {"video"}, None),
        ("auto", {"video"}, None),
        ("on", {"video", "audio"}, None),
        ("voice.wav", {"video", "audio"}, "voice.wav"),
    ],
)
def test_sound_of_a_video(audio, modalities, file):
    film = MediaPart("video", "a.mp4", audio=audio)
    assert Sample("1", (Message("user", (film,)), SAID)).modalities == modalities
    assert sound_file(film) == file


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": ""}, "id of a sample"),
        ({"id": 3}, "not 3"),
        ({"messages": ()}, "no turns"),
        ({"weight": -1}, "not -1"),
        ({"weight": float("nan")}, "nan"),
        ({"weight": True}, "not True"),
        ({"train_turns": (True, True)}, "of 2 answers .* but has 1"),
        ({"messages": (Message("user", (TextPart("see <video>"),)), SAID)}, "placeholder <video>"),
        ({"messages": (Message("user", (MediaPart("image"),)), SAID)}, "image .* no source"),
    ],
)
def test_a_sample_that_cannot_be(change, says):
    with pytest.raises(DataError, match=says):
        Sample(**{"id": "1", "messages": (ASKED, SAID), **change})


TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"id": "1", "messages": TURNS, "vidoe": "a"}, "Unknown key of a sample 'vidoe'"),
        ({"id": "1"}, "'messages' must be a list"),
        ({"id": "1", "messages": "Why?"}, "'messages' must be a list"),
        ({"id": "1", "messages": ["Why?"]}, "Turn 0 is a str"),
        ({"id": "1", "messages": [{"role": "user"}]}, "Turn 0 needs a 'role' and a 'content'"),
        ({"id": "1", "messages": [{"role": "tool", "content": "x"}]}, "Turn 0: Unknown role"),
        ({"id": "1", "messages": [{**TURNS[0], "loss": 1}]}, "Unknown key of turn 0 'loss'"),
        ({"id": "1", "messages": [{**TURNS[0], "train": True}, TURNS[1]]}, "not the assistant's"),
        ({"id": "1", "messages": [TURNS[0], {**TURNS[1], "train": 1}]}, "true or false, not 1"),
        ({"id": "1", "messages": [{"role": "user", "content": ["x"]}]}, "A part is a str"),
        ({"id": "1", "messages": [{"role": "user", "content": [{"type": "vdeo"}]}]}, "'vdeo'"),
        ({"id": "1", "messages": TURNS, "meta": []}, "'meta' must be an object"),
        ({"id": "1", "messages": TURNS, "weight": "2"}, "not '2'"),
    ],
)
def test_a_row_that_is_none(row, says):
    with pytest.raises(DataError, match=says):
        Sample.from_row(row)


def test_arrays_cannot_be_written():
    sample = Sample("1", (Message("user", (MediaPart("audio", np.zeros(3)),)), SAID))
    with pytest.raises(DataError, match="ndarray cannot be written"):
        sample.to_row()


@given(st.binary(min_size=1))
def test_bytes_are_written_as_base64(data):
    sample = Sample("1", (Message("user", (MediaPart("image", data),)), SAID))
    assert Sample.from_row(json.loads(json.dumps(sample.to_row()))) == sample


def test_reading_data_needs_no_torch():
    code = (
        "import sys, av_llava.training as t; t.open_store, t.READERS, t.Sample\n"
        "import av_llava.training.mixture, av_llava.training.report, av_llava.training.writers\n"
        "import av_llava.training.statistics\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
