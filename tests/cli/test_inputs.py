"""Which words are media and which is the prompt."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.cli.inputs import check_media, names_medium, split
from av_llava.errors import MediaError, UsageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> str:
        raise AssertionError("a terminal must not be read for a prompt")


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch):
    def pipe(text: str | None) -> None:
        monkeypatch.setattr(sys, "stdin", Terminal() if text is None else io.StringIO(text))

    pipe(None)
    return pipe


def test_the_last_word_is_the_prompt(piped, clip: str) -> None:
    asked = split([clip, "What happens?"], None)
    assert asked.media == (clip,) and asked.prompt == "What happens?"


def test_a_prompt_alone_is_text_only(piped) -> None:
    assert split(["Hello"], None).media == ()


def test_a_given_prompt_makes_every_word_a_medium(piped, clip: str) -> None:
    asked = split([clip, clip], "What?")
    assert asked.media == (clip, clip) and asked.prompt == "What?"


def test_stdin_is_not_touched_when_there_is_a_prompt(piped, clip: str) -> None:
    class Forbidden(io.StringIO):
        def read(self, size: int | None = -1) -> str:
            raise AssertionError("read")

    sys.stdin = Forbidden()  # undone by the fixture's monkeypatch
    assert split([clip, "What?"], None).prompt == "What?"


@pytest.mark.parametrize("words", [[], ["-"]])
def test_stdin_alone_is_the_prompt(piped, words: list[str]) -> None:
    piped("a long\nprompt\n")
    assert split(words, None).prompt == "a long\nprompt"


def test_one_existing_file_and_piped_stdin_is_medium_and_prompt(piped, clip: str) -> None:
    piped("What?\n")
    asked = split([clip], None)
    assert asked.media == (clip,) and asked.prompt == "What?"


def test_a_dash_reads_stdin(piped, clip: str) -> None:
    piped("What?")
    assert split([clip, "-"], None).prompt == "What?"
    piped("What?")
    assert split([clip], "-").prompt == "What?"


def test_an_address_is_a_medium(piped) -> None:
    piped("What?")
    assert split(["https://example.org/a.mp4"], None).media == ("https://example.org/a.mp4",)


def test_a_file_without_a_prompt_on_a_terminal_is_an_error(piped, clip: str) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        split([clip], None)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_stdin_is_an_error(piped, clip: str, text: str) -> None:
    piped(text)
    with pytest.raises(UsageError, match="empty"):
        split([clip], None)


def test_an_empty_prompt_is_an_error(piped, clip: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        split([clip, "  "], None)
    with pytest.raises(UsageError, match="empty"):
        split([clip], "")


@pytest.mark.parametrize("text", [None, "What?"])
def test_a_lone_media_name_that_does_not_exist_is_a_media_error(piped, text) -> None:
    piped(text)
    with pytest.raises(MediaError, match=r"no-such\.mp4"):
        split(["no-such.mp4"], None)


def test_a_dash_elsewhere_is_an_error(piped, clip: str) -> None:
    with pytest.raises(UsageError, match="'-'"):
        split(["-", clip, "What?"], None)
    with pytest.raises(UsageError, match="'-'"):
        split([clip, "-"], "What?")


@pytest.mark.parametrize(
    ("word", "is_medium"),
    [
        ("missing.mp4", True),
        ("MISSING.MOV", True),
        ("What is in clip.mp4", False),
        ("Describe.", False),
        ("why?", False),
        ("http://host/x", True),
        ("rtsp://host/x", True),
        ("a" * 5000, False),
        ("nul\x00byte", False),
        (".mp4", False),
    ],
)
def test_names_of_media(word: str, is_medium: bool) -> None:
    assert names_medium(word) is is_medium


def test_a_folder_is_a_medium(tmp_path: Path) -> None:
    assert names_medium(str(tmp_path))


@given(st.text())
def test_every_word_is_one_or_the_other(word: str) -> None:
    assert names_medium(word) in (True, False)


def test_words_of_an_unquoted_prompt_say_so(clip: str) -> None:
    with pytest.raises(MediaError, match="quotes"):
        check_media([clip, "What", "is"])


def test_missing_sound_is_an_error_only_when_it_is_asked_for(clip: str, mute_clip: str) -> None:
    for audio in ("auto", "off"):
        assert check_media([mute_clip], audio)[mute_clip].audio is None
    with pytest.raises(MediaError, match="no sound track"):
        check_media([clip, mute_clip], "on")
    assert check_media([clip], "on")[clip].kind == "video"


def test_a_sound_file_must_hold_sound(clip: str, mute_clip: str) -> None:
    check_media([mute_clip], clip)
    with pytest.raises(MediaError, match="no sound track"):
        check_media([clip], mute_clip)
    with pytest.raises(MediaError, match=r"no-such\.wav"):
        check_media([clip], "no-such.wav")
    with pytest.raises(UsageError, match="Did you mean 'auto'"):
        check_media([clip], "autp")


@pytest.mark.parametrize("content", [b"", b"just text", b"\x00" * 4096])
def test_what_is_not_media_is_a_media_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.mp4"
    file.write_bytes(content)
    with pytest.raises(MediaError, match=r"broken\.mp4"):
        check_media([str(file)])
