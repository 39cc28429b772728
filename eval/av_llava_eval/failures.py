"""What can go wrong with one sample of a long run, by kind.

Contract: a failure is recorded under one of these kinds, counts as wrong in the headline, is shown
beside it, and is tried again when the run is continued. What is not listed here is a mistake of
the program and ends the run, which can be continued.
"""

from __future__ import annotations

from av_llava.errors import AVLlavaError, BudgetError, MediaError, is_out_of_memory
from av_llava.media import TookTooLongError

OK = "ok"
KINDS = {
    "missing": "a file is not there",
    "decode": "a file cannot be decoded",
    "no_audio": "sound was asked for, and there is none",
    "timeout": "decoding took too long",
    "oom": "memory ran out",
    "context": "prompt and answer do not fit the context",
    "error": "another error",
}
"""Kind → what it means."""

CATCHABLE = (AVLlavaError, RuntimeError, MemoryError, OSError)
"""What one sample may raise without ending the run."""


class MissingFileError(MediaError):
    """A file that the annotations name is not on the disk."""


class NoSoundError(MediaError):
    """Sound was asked for, but the file has none."""


def kind_of(error: BaseException) -> str:
    """The kind under which an error is counted."""
    if isinstance(error, (MissingFileError, FileNotFoundError)):
        return "missing"
    if isinstance(error, NoSoundError):
        return "no_audio"
    if isinstance(error, TookTooLongError):
        return "timeout"
    if is_out_of_memory(error):
        return "oom"
    if isinstance(error, BudgetError):
        return "context"
    return "decode" if isinstance(error, MediaError) else "error"


def said(error: BaseException) -> str:
    """One line about an error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
