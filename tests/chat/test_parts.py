"""Every accepted spelling of a content part, and the refusal of every other."""

from __future__ import annotations

import base64

import pytest

from av_llava.chat import MEDIA_TOKENS, PART_READERS, MediaPart, TextPart, read_medium
from av_llava.chat.parts import read_part
from av_llava.errors import UsageError

SOUND = b"RIFF\x00\x01"
ENCODED = base64.b64encode(SOUND).decode()


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("hi", TextPart("hi")),
        ({"type": "text", "text": "hi"}, TextPart("hi")),
        ({"type": "text", "text": "hi", "image": None}, TextPart("hi")),
        ({"type": "input_text", "text": "hi"}, TextPart("hi")),
        ({"type": "output_text", "text": "hi"}, TextPart("hi")),
        ({"type": "video", "video": "a.mp4"}, MediaPart("video", "a.mp4")),
        ({"type": "video", "path": "a.mp4"}, MediaPart("video", "a.mp4")),
        ({"type": "video", "url": "https://x/a.mp4"}, MediaPart("video", "https://x/a.mp4")),
        ({"type": "image", "image": "a.png"}, MediaPart("image", "a.png")),
        ({"type": "image", "base64": ENCODED}, MediaPart("image", SOUND)),
        ({"type": "image"}, MediaPart("image")),
        ({"type": "audio", "audio": "a.wav"}, MediaPart("audio", "a.wav")),
        ({"type": "image_url", "image_url": {"url": "u"}}, MediaPart("image", "u")),
        (
            {"type": "image_url", "image_url": {"url": "u", "detail": "low"}},
            MediaPart("image", "u"),
        ),
        ({"type": "image_url", "image_url": "u"}, MediaPart("image", "u")),
        ({"type": "input_image", "image_url": "u", "detail": "auto"}, MediaPart("image", "u")),
        ({"type": "video_url", "video_url": {"url": "u"}}, MediaPart("video", "u")),
        ({"type": "audio_url", "audio_url": {"url": "u"}}, MediaPart("audio", "u")),
        (
            {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{ENCODED}"}},
            MediaPart("audio", SOUND),
        ),
        (
            {"type": "video", "url": f"DATA:application/octet-stream;base64,{ENCODED}"},
            MediaPart("video", SOUND),
        ),
        (
            {"type": "input_audio", "input_audio": {"data": ENCODED, "format": "wav"}},
            MediaPart("audio", SOUND),
        ),
        (
            {"type": "input_audio", "input_audio": {"data": f"data:audio/wav;base64,{ENCODED}"}},
            MediaPart("audio", SOUND),
        ),
        (
            {"type": "video", "path": "v", "start": 1, "end": 2.5, "fps": 2, "num_frames": 8},
            MediaPart("video", "v", start_s=1, end_s=2.5, fps=2, frames=8),
        ),
        (
            {"type": "video", "path": "frames", "source_fps": 2},
            MediaPart("video", "frames", source_fps=2),
        ),
        (
            {"type": "video", "path": "v", "video_start": 1, "video_end": 2, "nframes": 4},
            MediaPart("video", "v", start_s=1, end_s=2, frames=4),
        ),
    ],
)
def test_spelling(part, expected):
    assert read_part(part) == expected


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (7, "int"),
        ({"text": "hi"}, "type of content part None"),
        ({"type": "movie", "movie": "x"}, "Unknown type of content part 'movie'"),
        ({"type": "text"}, "needs a string"),
        ({"type": ["text"]}, "type of content part"),
        ({"type": "text", "text": "x", "colour": 1}, "'colour'"),
        ({"type": "video", "vidoe": "a.mp4"}, "Did you mean 'video'"),
        ({"type": "video", "video": "a", "url": "b"}, "video and url"),
        ({"type": "image", "base64": "###"}, "cannot be decoded"),
        ({"type": "image", "base64": ""}, "is empty"),
        ({"type": "image", "base64": 3}, "int"),
        ({"type": "image", "url": "data:image/png,abc"}, "not base64"),
        ({"type": "image", "url": f"data:video/mp4;base64,{ENCODED}"}, "video/mp4"),
        ({"type": "image_url", "image_url": {"uri": "x"}}, "'uri'"),
        ({"type": "image_url", "url": "x"}, "'url'"),
        ({"type": "image_url"}, "needs"),
        ({"type": "input_audio", "input_audio": "x"}, "needs"),
        ({"type": "video", "path": "v", "start": 3, "end": 2}, "cannot end at 2 s"),
        ({"type": "video", "path": "v", "start": -1}, "start of a medium"),
        ({"type": "video", "path": "v", "start": "0:10"}, "'0:10'"),
        ({"type": "video", "path": "v", "end": float("nan")}, "nan"),
        ({"type": "video", "path": "v", "fps": 0}, "fps of a medium"),
        ({"type": "video", "path": "v", "source_fps": "x"}, "source_fps of a medium"),
        ({"type": "video", "path": "v", "frames": 0}, "number of frames"),
        ({"type": "video", "path": "v", "frames": 1.5}, "whole number, not 1.5"),
        ({"type": "video", "path": "v", "frames": 10**400}, "must be a number, not 10"),
        ({"type": "video", "path": "v", "end": 10**30}, "between 0.0 and 1000000000.0, not 10"),
        ({"type": "video", "path": "v", "frames": 8, "nframes": 9}, "twice"),
    ],
)
def test_refusal_names_what_is_wrong(part, says):
    with pytest.raises(UsageError, match=r"(?s).*" + says.replace("(", r"\(")):
        read_part(part)


@pytest.mark.parametrize(
    ("key", "value", "audio"),
    [
        ("audio", "on", "on"),
        ("audio", "voice.wav", "voice.wav"),
        ("use_audio", True, "auto"),
        ("use_audio_in_video", False, "off"),
        ("audio_from_video", True, "auto"),
    ],
)
@pytest.mark.parametrize("kind", ["video", "video_url"])
def test_a_video_says_what_to_do_with_its_sound(kind, key, value, audio):
    assert read_part({"type": kind, kind: "a.mp4", key: value}) == MediaPart(
        "video", "a.mp4", audio=audio
    )


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image", "path": "a.png", "use_audio": True}, "Unknown key of the image part"),
        ({"type": "video", "path": "v", "audio": 3}, "not 3"),
        ({"type": "video", "path": "v", "audio": " "}, "not ' '"),
        ({"type": "video", "path": "v", "audio": "on", "use_audio": True}, "audio twice"),
    ],
)
def test_sound_that_cannot_be(part, says):
    with pytest.raises(UsageError, match=says):
        read_part(part)
    with pytest.raises(UsageError, match="Only a video has sound"):
        MediaPart("image", "a.png", audio="on")


def test_separate_medium_needs_a_source():
    assert read_medium({"type": "video", "path": "a.mp4"}) == MediaPart("video", "a.mp4")
    for wrong in ({"type": "video"}, {"type": "text", "text": "x"}):
        with pytest.raises(UsageError, match="no source"):
            read_medium(wrong)


def test_kinds_and_readers_are_open(monkeypatch):
    monkeypatch.setitem(MEDIA_TOKENS, "depth", "<depth>")
    monkeypatch.setitem(PART_READERS, "shout", lambda part: TextPart(part["text"].upper()))
    assert read_part({"type": "depth", "depth": "d.npy"}) == MediaPart("depth", "d.npy")
    assert MediaPart("depth").token == "<depth>"
    assert read_part({"type": "shout", "text": "hi"}) == TextPart("HI")
