"""The errors that av_llava raises on purpose, each with the exit code of the command line.

Contract: a message is a full sentence (or more) that says what happened, names the file or
value, and says what to do. Everything raised for a user's mistake or a user's file derives
from :class:`AVLlavaError`; broken internal invariants stay plain ``AssertionError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class AVLlavaError(Exception):
    """Base of every error that a user of av_llava can cause or repair."""

    exit_code = 1


class UsageError(AVLlavaError, ValueError):
    """Arguments that do not fit together: unknown names, counts that do not match."""

    exit_code = 2


class MediaError(AVLlavaError, ValueError):
    """A media file that is missing, unreadable, damaged, too large, or lacks a stream."""

    exit_code = 3


class CheckpointError(AVLlavaError, ValueError):
    """A checkpoint folder that is missing, incomplete, or does not fit its configuration."""

    exit_code = 4


class BudgetError(AVLlavaError, ValueError):
    """A request that does not fit the context, the token budget, or the memory."""

    exit_code = 5


class MissingExtraError(AVLlavaError, ImportError):
    """An optional package is needed; the message holds the install command."""

    exit_code = 6

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f'Install it with: pip install "av-llava[{extra}]"'
        )


class DataError(AVLlavaError, ValueError):
    """Training or evaluation data that cannot be used as it is."""

    exit_code = 7


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """Make the error for a name that a registry does not hold.

    Args:
        kind: what the registry holds, e.g. ``"projector"``.
        name: the name that was asked for.
        known: the names that exist.
    """
    names = sorted(str(k) for k in known)
    hint = did_you_mean(str(name), names)
    return UsageError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # The CPU allocator of torch raises a plain RuntimeError.
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )
