"""Which words are media and which is the prompt, and whether the media can be read at all.

Contract: no torch. Files are only probed: their header is read, so that a missing or broken one
is told within a second. Addresses are left to the library, which fetches them once.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from av_llava.errors import MediaError, UsageError, unknown_name

if TYPE_CHECKING:
    from av_llava.media import MediaInfo

# Endings by which a word that names no file is still taken for one, rather than for a prompt.
_VIDEO = "mp4|m4v|mov|mkv|webm|avi|ts|mts|m2ts|mpg|mpeg|flv|wmv|3gp|ogv|gif"
_AUDIO = "wav|mp3|m4a|aac|flac|ogg|opus|oga|wma"
_IMAGE = "jpg|jpeg|png|webp|bmp|tif|tiff"
_MEDIA_FILE = re.compile(rf"\S+\.({_VIDEO}|{_AUDIO}|{_IMAGE})", re.IGNORECASE)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
NO_PROMPT = (
    "There is no prompt. Write it after the media, in quotes, or give it with --prompt or on "
    "standard input."
)


@dataclass(frozen=True)
class Inputs:
    """What is asked about what."""

    media: tuple[str, ...]
    prompt: str


def is_address(word: str) -> bool:
    """Whether a word is a URL."""
    return _ADDRESS.fullmatch(word) is not None


def names_medium(word: str) -> bool:
    """Whether a word stands for a file: a URL, something that exists, or a media file's name."""
    if is_address(word) or os.path.exists(os.path.expanduser(word)):
        return True
    return _MEDIA_FILE.fullmatch(word) is not None


def split(words: Sequence[str], prompt: str | None) -> Inputs:
    """Tell media from the prompt.

    The last word is the prompt, unless --prompt gives it. A last word that names a file is a
    medium, and the prompt comes from standard input, if something is piped there.

    Args:
        words: the positional words of the command.
        prompt: the value of --prompt; ``-`` reads standard input.

    Raises:
        UsageError: there is no prompt, or several.
        MediaError: the last word is the name of a media file that does not exist.
    """
    media = list(words)
    if prompt is None and media and (media[-1] == "-" or not names_medium(media[-1])):
        prompt = media.pop()
    elif prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            _check_exists(media)
            raise UsageError(NO_PROMPT)
        prompt = "-"
    if "-" in media:
        raise UsageError("'-' stands for a prompt on standard input: it comes last, and once.")
    if prompt == "-":
        _check_exists(media)
        prompt = _read_stdin()
    if not prompt.strip():
        raise UsageError("The prompt is empty. " + NO_PROMPT.partition(". ")[2])
    return Inputs(tuple(media), prompt)


def _read_stdin() -> str:
    try:
        return sys.stdin.read().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"Standard input is not text ({error}); it holds the prompt.") from error


def _check_exists(media: Sequence[str]) -> None:
    """Raise for the first of some words that is no address and names nothing."""
    for word in media:
        if not is_address(word) and not os.path.exists(os.path.expanduser(word)):
            several = " If it belongs to the prompt, put the whole prompt in quotes."
            raise MediaError(f"There is no file {word!r}. Check the path.{several}")


def check_media(media: Sequence[str], audio: str = "auto") -> dict[str, MediaInfo]:
    """Open each file's header, and make sure that the sound that is asked for exists.

    Args:
        media: paths and addresses.
        audio: the value of --audio.

    Returns:
        The headers of those that are files, by the words that name them.

    Raises:
        UsageError: --audio is neither a mode nor a file.
        MediaError: missing, unreadable, not media, or without the sound that is asked for.
    """
    _check_exists(media)
    from av_llava.media import probe

    known = {word: probe(word) for word in media if not is_address(word)}
    if audio == "on":
        for word, info in known.items():
            if info.kind in ("video", "frames") and info.audio is None:
                raise MediaError(
                    f"{word!r} has no sound track, but --audio on asks for one. Leave it out, or "
                    f"name a sound file with --audio FILE."
                )
    elif audio not in ("auto", "off") and not is_address(audio):
        if not os.path.exists(audio) and re.fullmatch(r"\w*", audio):
            raise unknown_name("--audio", audio, ("auto", "on", "off", "FILE"))
        if probe(audio).audio is None:
            raise MediaError(f"--audio: {audio!r} has no sound track.")
    return known
