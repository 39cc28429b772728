"""Requests of lmms-eval in this package's terms, without lmms-eval itself."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from av_llava.chat import MediaPart, TextPart
from av_llava.errors import UsageError
from av_llava_eval.lmms.requests import group_key, read_options, read_talk


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(words):
    return {"type": "text", "text": words}


VIDEO = {"type": "video", "url": "a.mp4"}


def test_parts_keep_their_order_and_their_window():
    clip = {**VIDEO, "start_time": 1.0, "end_time": 2.5}
    (message,) = read_talk(user(text("Look:"), clip, text("What is it?"))).messages
    assert message.role == "user"
    assert message.parts == (
        TextPart("Look:"),
        MediaPart("video", "a.mp4", start_s=1.0, end_s=2.5),
        TextPart("What is it?"),
    )


def test_questions_about_one_video_share_a_key_and_others_do_not():
    greedy = read_options({"max_new_tokens": 4}, 128)
    first = group_key(read_talk(user(VIDEO, text("What is it?"))), greedy)
    assert first is not None
    assert first == group_key(read_talk(user(VIDEO, text("Where is it?"))), greedy)
    others = [
        (user({**VIDEO, "url": "b.mp4"}, text("What is it?")), greedy),
        (user({**VIDEO, "start_time": 1.0}, text("What is it?")), greedy),
        (user(VIDEO, text("What is it?")), read_options({"max_new_tokens": 5}, 128)),
        ([{"role": "system", "content": "Be brief."}, *user(VIDEO, text("What?"))], greedy),
    ]
    keys = [group_key(read_talk(m), o) for m, o in others]
    assert None not in keys
    assert len({first, *keys}) == 1 + len(others)


@pytest.mark.parametrize(
    "messages",
    [
        user(text("What is it?"), VIDEO),
        user(text("No media.")),
        [*user(VIDEO, text("a")), {"role": "assistant", "content": "b"}, *user(text("c"))],
        user({"type": "image", "url": Image.new("RGB", (4, 4))}, text("What is it?")),
    ],
    ids=["media last", "text alone", "several turns", "a picture in memory"],
)
def test_what_a_session_cannot_answer_stands_alone(messages):
    assert group_key(read_talk(messages), {}) is None


@pytest.mark.parametrize("shape", [(8000,), (2, 8000), (8000, 2)])
def test_decoded_sound_becomes_16_khz_mono(shape):
    time_s = np.arange(8000) / 8000
    wave = np.sin(2 * np.pi * 440 * time_s).astype(np.float32)
    array = np.broadcast_to(wave if shape[-1] == 8000 else wave[:, None], shape)
    sound = {"type": "audio", "url": {"array": array, "sampling_rate": 8000}}
    (part, _) = read_talk(user(sound, text("What is heard?"))).messages[0].parts
    assert part.source.shape == (16000,)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(part.source[1000:-1000] - expected[1000:-1000]).max() < 1e-2


def test_sound_that_is_not_decoded_is_passed_on():
    for given, expected in ((b"RIFF", b"RIFF"), (None, "a.wav")):
        sound = {"type": "audio", "url": {"bytes": given, "path": "a.wav", "array": None}}
        (part, _) = read_talk(user(sound, text("What is heard?"))).messages[0].parts
        assert part.source == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 128, "temperature": 0.0, "stop": []}),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1},
            {"max_new_tokens": 16, "temperature": 0.0, "stop": []},
        ),
        (
            {"do_sample": False, "temperature": 0.7, "until": ["\n\n", ""]},
            {"max_new_tokens": 128, "temperature": 0.0, "stop": ["\n\n"]},
        ),
        (
            {"temperature": 0.7, "top_p": 0.9, "until": "END"},
            {"max_new_tokens": 128, "temperature": 0.7, "top_p": 0.9, "stop": ["END"]},
        ),
    ],
)
def test_generation_options(given, expected):
    assert read_options(given, 128) == expected


def test_beams_are_refused_and_unknown_options_are_named(caplog):
    with pytest.raises(UsageError, match="5 beams"):
        read_options({"num_beams": 5}, 128)
    read_options({"repetition_penalty": 1.2}, 128)
    assert "repetition_penalty=1.2 has no effect" in caplog.text


def test_an_unknown_part_is_refused():
    with pytest.raises(UsageError, match="'point'"):
        read_talk(user({"type": "point", "url": "x"}))
