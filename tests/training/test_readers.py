"""Every format of rows becomes the same messages; what cannot be read is said."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_strategies import TEXT, samples

from av_llava.chat import MediaPart, Message, TextPart
from av_llava.errors import DataError, UsageError
from av_llava.training.media_roots import MediaRoots
from av_llava.training.readers import (
    ALIASES,
    READERS,
    RowContext,
    detect,
    reader_named,
    renamed,
)
from av_llava.training.readers.common import PlaceholderError
from av_llava.training.samples import SCHEMA, Sample
from av_llava.training.writers import to_llava, to_normal


def read(row, format=None, **context):
    row = json.loads(json.dumps(row))
    reader = detect(row) if format is None else reader_named(format)
    return reader.read(row, RowContext("data.json[0]", "data-0", **context))


def talk(*parts, answer="Red.", system=None):
    turns = [Message("system", (TextPart(system),))] if system else []
    given = tuple(TextPart(p) if isinstance(p, str) else p for p in parts)
    return (*turns, Message("user", given), Message("assistant", (TextPart(answer),)))


FILM = MediaPart("video", "a.mp4")
ASKED = "\nWhat colour?"
PAIR = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red."}]
BARE = [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "Red."}]
CHAT = [{"role": "user", "content": "<video>\nWhat colour?"}, {"role": "assistant", "content": "Red."}]  # fmt: skip

SAME = {
    "llava": {"id": 7, "video": "a.mp4", "conversations": PAIR},
    "llava, list": {"id": 7, "video": ["a.mp4"], "conversations": PAIR},
    "llava, no token": {"id": 7, "video": "a.mp4", "conversations": BARE},
    "llava, no text": {"id": 7, "video": "a.mp4", "image": "", "audio": [], "conversations": BARE},
    "shi_labs": {"id": 7, "video": "a.mp4", "conversation": BARE},
    "video_instruct": {"id": 7, "q": "What colour?", "a": "Red.", "video_id": "a.mp4"},
    "chat": {
        "id": 7,
        "messages": [
            {"role": "user", "content": [{"type": "video", "path": "a.mp4"},
                                         {"type": "text", "text": "What colour?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        ],
    },
    "chat, OpenAI": {
        "id": 7,
        "messages": [
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a.mp4"}},
                                         {"type": "text", "text": "What colour?"}]},
            {"role": "assistant", "content": "Red."},
        ],
    },
    "chat, TRL": {
        "id": 7,
        "messages": [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What colour?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        ],
        "videos": ["a.mp4"],
    },
    "swift": {"id": 7, "messages": CHAT, "videos": ["a.mp4"]},
    "swift_query": {"id": 7, "query": "<video>\nWhat colour?", "response": "Red.", "videos": ["a.mp4"]},
    "swift_pairs": {"id": 7, "conversation": [{"human": "<video>\nWhat colour?", "assistant": "Red."}],
                    "videos": ["a.mp4"]},
    "prompt_completion": {"id": 7, "prompt": "<video>\nWhat colour?", "completion": "Red.",
                          "video": "a.mp4"},
    "prompt_completion, turns": {"id": 7, "prompt": CHAT[:1], "completion": CHAT[1:],
                                 "videos": ["a.mp4"]},
    "alpaca": {"id": 7, "instruction": "<video>", "input": "What colour?", "output": "Red.",
               "videos": ["a.mp4"]},
    "sharegpt": {"id": 7, "conversations": PAIR, "videos": ["a.mp4"]},
    "normal": {
        "schema": SCHEMA, "id": "7",
        "messages": [
            {"role": "user", "content": [{"type": "video", "path": "a.mp4"},
                                         {"type": "text", "text": "\nWhat colour?"}]},
            {"role": "assistant", "content": "Red."},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_every_format_says_the_same(name):
    format = name.split(",")[0]
    assert detect(SAME[name]).name == format
    found = read(SAME[name])
    assert found == read(SAME[name], format)
    sample = found.sample
    assert sample.messages == talk(FILM, ASKED)
    assert (sample.id, sample.source, sample.train_turns) == ("7", "data.json[0]", None)
    assert not found.notes


def test_every_reader_is_tried_here():
    assert {name.split(",")[0] for name in SAME} == set(READERS)
    assert set(ALIASES.values()) <= set(READERS)


@given(samples(), st.sampled_from([to_normal, to_llava]))
def test_what_is_written_is_read_again(sample, write):
    again = read(write(sample)).sample
    assert again.messages == sample.messages
    assert (again.id, again.train_turns, again.weight, again.meta) == (
        sample.id,
        sample.train_turns,
        sample.weight,
        sample.meta,
    )


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.sampled_from(["", "Be kind."]))
def test_long_talks_are_the_same_in_every_format(pairs, system):
    """What is said is kept, whatever format says it."""
    llava = [
        t for q, a in pairs for t in ({"from": "human", "value": q}, {"from": "gpt", "value": a})
    ]
    chat = [t for q, a in pairs for t in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]  # fmt: skip
    before = [{"from": "system", "value": system}] if system else []
    first = [{"role": "system", "content": system}] if system else []
    rows = [
        {"video": "a.mp4", "conversations": before + llava},
        {"videos": ["a.mp4"], "conversations": llava, "system": system},
        {"video": "a.mp4", "conversation": before + llava},
        {"videos": ["a.mp4"], "messages": first + chat},
        {"videos": ["a.mp4"], "query": pairs[-1][0], "response": pairs[-1][1], "system": system,
         "history": [list(p) for p in pairs[:-1]]},
        {"videos": ["a.mp4"], "instruction": pairs[-1][0], "output": pairs[-1][1],
         "system": system, "history": [list(p) for p in pairs[:-1]]},
        {"videos": ["a.mp4"], "system": system,
         "conversation": [{"human": q, "assistant": a} for q, a in pairs]},
    ]  # fmt: skip
    found = [read(row).sample.messages for row in rows]
    assert all(messages == found[0] for messages in found)
    assert [m.role for m in found[0]].count("assistant") == len(pairs)


# ------------------------------------------------------------------ media


def test_media_bind_in_order():
    row = {
        "image": ["1.png", "2.png"],
        "audio": "s.wav",
        "conversations": [
            {"from": "human", "value": "First <image>, then <audio>, then <image>?"},
            {"from": "gpt", "value": "Red."},
        ],
    }
    one, two = MediaPart("image", "1.png"), MediaPart("image", "2.png")
    heard = MediaPart("audio", "s.wav")
    assert read(row).sample.messages == talk("First ", one, ", then ", heard, ", then ", two, "?")


def test_ola_writes_speech_and_image():
    turns = [{"from": "human", "value": "<speech><image>\nWhat?"}, PAIR[1]]
    row = {"video": "a.mp4", "audio": "a.wav", "conversations": turns}
    assert read(row).sample.messages == talk(MediaPart("audio", "a.wav"), FILM, "\nWhat?")


@pytest.mark.parametrize(
    ("extra", "audio"),
    [
        ({"audio": "a.wav"}, "a.wav"),
        ({"audio": ["a.wav"]}, "a.wav"),
        ({"use_audio": True}, "auto"),
        ({"use_audio": False}, "off"),
        ({"use_audio": "on"}, "on"),
        ({"audio_from_video": True}, "auto"),
        ({"use_audio_in_video": True}, "auto"),
    ],
)
def test_salmonn_gives_a_video_its_sound(extra, audio):
    row = {"video": "a.mp4", "conversations": PAIR, **extra}
    assert read(row).sample.messages == talk(MediaPart("video", "a.mp4", audio=audio), ASKED)


def test_preference_turns_are_kept_apart():
    turns = [*PAIR, {"from": "reject_gpt", "value": "Blue."}, {"from": "gt", "value": "A red one."}]
    found = read({"video": "a.mp4", "conversations": turns})
    assert found.sample.messages == talk(FILM, ASKED)
    assert [n.kind for n in found.notes] == ["preference turns"] * 2
    assert found.sample.meta["preference_turns"] == [
        {"at": 2, "from": "reject_gpt", "value": "Blue."},
        {"at": 3, "from": "gt", "value": "A red one."},
    ]


def test_swift_keeps_the_rejected_answer_apart():
    found = read({"messages": CHAT, "videos": ["a.mp4"], "rejected_response": "Blue."})
    assert found.sample.meta == {"rejected_response": "Blue."}
    assert [n.kind for n in found.notes] == ["preference turns"]


def test_times_of_a_medium():
    cut = {"path": "a.mp4", "start": 1.5, "end": 3, "fps": 2, "bytes": None}
    row = {"video": cut, "conversations": PAIR}
    part = MediaPart("video", "a.mp4", start_s=1.5, end_s=3, fps=2)
    assert read(row).sample.messages == talk(part, ASKED)


def test_roots_of_media(tmp_path):
    roots = MediaRoots(tmp_path, video_root=tmp_path / "v", audio_root=tmp_path / "s")
    row = {
        "image": ["p.png", "/there/q.png", "https://x.org/r.png"],
        "video": "a.mp4",
        "audio": "a.wav",
        "conversations": [{"from": "human", "value": "What?"}, PAIR[1]],
    }
    assert read(row, roots=roots).sample.paths == (
        str(tmp_path / "p.png"),
        "/there/q.png",
        "https://x.org/r.png",
        str(tmp_path / "v" / "a.mp4"),
        str(tmp_path / "s" / "a.wav"),
    )


def test_a_file_address_is_the_file_that_it_names(tmp_path):
    film, sound = tmp_path / "a b.mp4", tmp_path / "s.wav"
    row = {"video": film.as_uri(), "audio": f"file://localhost{sound}", "conversations": PAIR}
    found = read(row, roots=MediaRoots(tmp_path / "elsewhere")).sample
    assert found.paths == (str(film), str(sound))


@pytest.mark.parametrize(
    ("address", "says"),
    [("s3://bucket/a.mp4", "protocol 's3'"), ("file://there/a.mp4", "names the host 'there'")],
)
def test_an_address_that_nobody_reads(address, says):
    with pytest.raises(DataError, match=says):
        read({"video": address, "conversations": PAIR})


def test_video_instruct_looks_for_the_extension(tmp_path):
    (tmp_path / "v_1.mkv").touch()
    (tmp_path / "v_2").mkdir()
    roots = MediaRoots(video_root=tmp_path)
    names = {}
    for name in ("v_1", "v_2", "v_3", "v_1.mkv"):
        row = {"q": "What?", "a": "Red.", "video_id": name}
        found = read(row, roots=roots).sample
        assert found.meta == {"video_id": name}
        names[name] = found.paths[0].removeprefix(f"{tmp_path}/")
    assert names == {"v_1": "v_1.mkv", "v_2": "v_2", "v_3": "v_3", "v_1.mkv": "v_1.mkv"}


def test_known_noise_is_taken_out():
    noise = "QA_GT_caption_based_noisy"
    found = read({"q": f"What colour? {noise}", "a": f"Red.{noise}", "video_id": "a.mp4"})
    assert found.sample.messages == talk(FILM, "\nWhat colour? ")
    assert [n.kind for n in found.notes] == ["cleaned text"] * 2


# ------------------------------------------------------------------ what else a row holds


def test_what_has_no_place_is_kept():
    turns = [PAIR[0], {**PAIR[1], "lang": "en", "loss": False}, *BARE]
    row = {
        "id": "x",
        "video": "a.mp4",
        "data_source": "academic",
        "vdeo": 3,
        "conversations": turns,
    }
    found = read(row)
    assert found.sample.meta == {
        "data_source": "academic",
        "vdeo": 3,
        "turns": {"1": {"lang": "en"}},
    }
    assert [n.text for n in found.notes] == [
        "'lang' of a turn is not used",
        "'vdeo' is not used; was 'video' meant?",
    ]
    assert found.sample.train_turns == (False, True)


def test_a_row_without_an_id_has_its_place_for_one():
    assert read({"video": "a.mp4", "conversations": PAIR}).sample.id == "data-0"


@pytest.mark.parametrize("key", ["loss", "train", "weight"])
def test_answers_that_are_not_learned(key):
    chat = [*CHAT, CHAT[0], {**CHAT[1], key: 0}]
    found = read({"messages": chat, "videos": ["a.mp4", "b.mp4"]})
    assert found.sample.train_turns == (True, False)


def test_tools_become_turns_and_keep_their_role():
    turns = [
        BARE[0],
        {"from": "function_call", "value": "look()"},
        {"from": "observation", "value": "a ball"},
        BARE[1],
    ]
    found = read({"conversations": turns, "videos": [], "tools": "[look]"})
    assert [m.role for m in found.sample.messages] == ["user", "assistant", "user", "assistant"]
    assert found.sample.meta["turns"] == {
        "1": {"from": "function_call"},
        "2": {"from": "observation"},
    }
    assert found.sample.meta["tools"] == "[look]"


def test_llama_factory_tags():
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "me", "assistant_tag": "it"}
    turns = [{"role": "me", "content": "<video>\nWhat colour?"}, {"role": "it", "content": "Red."}]
    found = read({"conversations": turns, "videos": ["a.mp4"]}, "sharegpt", tags=tags)
    assert found.sample.messages == talk(FILM, ASKED) and not found.notes


def test_columns_are_renamed():
    row = {"ask": "What?", "say": "Red.", "film": ["a.mp4"]}
    columns = {"prompt": "ask", "response": "say", "videos": "film"}
    assert renamed(row, columns, READERS["alpaca"]) == {
        "instruction": "What?",
        "output": "Red.",
        "videos": ["a.mp4"],
    }
    assert renamed(row, {"prompt": "ask", "completion": "say"}, None).keys() == {
        "prompt",
        "completion",
        "film",
    }


# ------------------------------------------------------------------ what cannot be read


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"conversations": PAIR, "video": "a", "videos": ["a"]}, "llava, sharegpt"),
        ({"conversations": PAIR, "messages": CHAT}, "llava, chat"),
        ({"messages": CHAT, "instruction": "x", "output": "y"}, "chat, alpaca"),
    ],
)
def test_keys_of_several_formats(row, names):
    with pytest.raises(DataError, match=f"several formats: {names}.*format="):
        detect(row)


@pytest.mark.parametrize(
    "row", [{}, {"text": "x"}, {"conversation": "x", "a": 1}, {"q": 1, "a": 2}]
)
def test_keys_of_no_format(row):
    if "conversation" in row:
        with pytest.raises(DataError, match="must be a list"):
            read(row)
        return
    with pytest.raises(DataError, match="No known format.*llava.*columns"):
        detect(row)


def test_a_format_that_nobody_knows():
    with pytest.raises(UsageError, match="'lava'.*Did you mean 'llava'"):
        reader_named("lava")


TWO = [{"from": "human", "value": "<image> <image>"}, PAIR[1]]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"video": "a.mp4", "conversations": TWO}, "2 × <image> but the media given are 1 × video"),
        ({"image": ["1", "2"], "conversations": PAIR}, "1 × <image> but .* 2 × image"),
        ({"conversations": PAIR}, "1 × <image> but no such medium"),
        ({"image": "1", "conversations": [{"from": "human", "value": "<video>"}, PAIR[1]]}, "1 × <video> but"),
        ({"video": ["a", "b"], "audio": "s", "conversations": BARE}, "2 videos and 1 sounds"),
    ],
)  # fmt: skip
def test_placeholders_that_do_not_match(row, says):
    with pytest.raises(PlaceholderError, match=says):
        read(row)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"video": "a", "conversations": []}, "'conversations' must be a list"),
        ({"video": "a", "conversations": "x"}, "'conversations' must be a list"),
        ({"video": "a", "conversations": ["x"]}, "Turn 0 is 'x'"),
        ({"video": "a", "conversations": [{"value": "x"}]}, "Turn 0 is"),
        ({"video": "a", "conversations": [{"from": "man", "value": "x"}]}, "unknown role 'man'"),
        ({"video": "a", "conversations": [{"from": "human", "value": None}]}, "no text under 'value'"),
        ({"video": "a", "conversations": [{"from": "human"}]}, "no text under 'value'"),
        ({"video": 3, "conversations": PAIR}, "must be a path.* not 3"),
        ({"video": [["1.png", "2.png"]], "conversations": PAIR}, "into a folder"),
        ({"video": {"path": "a", "begin": 1}, "conversations": PAIR}, "'begin'"),
        ({"video": "a", "videos": "b", "conversations": PAIR, "_format": "llava"}, "video and videos"),
        ({"video": "a", "audio": "b", "use_audio": True, "conversations": PAIR}, "says use_audio"),
        ({"video": "a", "use_audio": 1.5, "conversations": PAIR}, "audio of a video"),
        ({"video": "a", "use_audio": True, "audio_from_video": True, "conversations": PAIR}, "give one"),
        ({"video": "a", "conversations": [PAIR[0], {**PAIR[1], "loss": "no"}]}, "true or false, not 'no'"),
        ({"video": "a", "weight": "x", "conversations": PAIR}, "not 'x'"),
        ({"q": "x", "a": "y", "video_id": 3}, "'video_id'"),
        ({"q": 1, "a": "y", "video_id": "a"}, "'q' must be a text, not 1"),
        ({"messages": CHAT, "videos": ["a"], "label": False}, "only preference training"),
        ({"messages": [{"role": "user", "content": "<bbox>"}], "images": ["a"]}, "<bbox>"),
        ({"messages": [{"role": "user", "content": [{"type": "vid"}]}]}, "'vid'"),
        ({"instruction": "x", "output": ["y", "z"]}, "only one can be learned"),
        ({"instruction": "x", "output": "y", "history": [["x"]]}, "'history' must hold pairs"),
        ({"conversation": [{"human": "x", "gpt": "y"}]}, "needs 'human' and 'assistant'"),
        ({"prompt": 1, "completion": "x"}, "'prompt' must be"),
        ({"schema": "av-llava-sample/9", "messages": CHAT, "_format": "normal"}, "av-llava-sample/9"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read(row, says):
    format = row.pop("_format", None)
    with pytest.raises((DataError, UsageError), match=says):
        read(row, format)


WORDS = st.sampled_from(
    ["human", "gpt", "user", "assistant", "system", "text", "video", "image", "<image>", "a.mp4", "",
     "reject_gpt", SCHEMA]
)  # fmt: skip
KEYS = st.sampled_from(
    ["path", "type", "text", "start", "audio", "from", "value", "role", "content", "loss", "video",
     "image", "images", "label", "history", "use_audio", "weight", "id", "system", "url"]
)  # fmt: skip
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=True) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw, value):
    """A row with something else at one place of it."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(list(value)) | KEYS)
        return {**value, key: draw(damaged(value.get(key)))}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(damaged(value[at])), *value[at + 1 :]]
    return draw(ANY)


@settings(max_examples=500)
@given(st.sampled_from(list(SAME)), st.data())
def test_any_row_is_read_or_refused_in_words(name, data):
    """Whatever stands in a row, no other exception comes of it."""
    row = SAME[name]
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(damaged(row))
    if isinstance(row, dict):
        with contextlib.suppress(DataError, UsageError):
            sample = read(row, name.split(",")[0]).sample
            assert all(isinstance(p.source, (str, bytes)) for p in sample.media)
            assert Sample.from_row(sample.to_row()) == sample
