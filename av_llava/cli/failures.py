"""What went wrong, as a type, a sentence and an exit code.

Contract: :func:`attempt` is the only place in the package that catches every exception. It
serves the whole program and the rows of ``ask --batch``, of which one must not end the others.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import typer

from av_llava.answers import SCHEMA
from av_llava.errors import AVLlavaError, BudgetError, DataError, is_out_of_memory

INTERRUPTED = 130
BROKEN_PIPE = 141  # 128 + SIGPIPE, as the shell reports a program whose reader has gone
ROWS_FAILED = DataError.exit_code

# typer brings its own copy of click since 0.24 and used click before; both have this class.
CliError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """An error as users see it."""

    type: str
    """Name of the error class, such as MediaError."""
    message: str
    exit_code: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that stands in an answer's place."""
        error = {"type": self.type, "message": self.message, "exit_code": self.exit_code}
        return {"schema": SCHEMA, "error": error}


def attempt(work: Callable[[], T]) -> tuple[T | None, Failure | None]:
    """Do some work; return its result, or how it failed.

    ``SystemExit`` and typer's own exceptions pass through. With AV_LLAVA_DEBUG set, the traceback
    of an error that nobody foresaw is printed.
    """
    try:
        return work(), None
    except (typer.Exit, typer.Abort, CliError):
        raise
    except KeyboardInterrupt as error:
        return None, failure_of(error)
    except Exception as error:
        failure = failure_of(error)
        _log.debug("failed", exc_info=error)
        if os.environ.get("AV_LLAVA_DEBUG"):
            traceback.print_exception(error, file=sys.stderr)
        return None, failure


def failure_of(error: BaseException) -> Failure:
    """Classify an exception."""
    name = type(error).__name__
    if isinstance(error, AVLlavaError):
        return Failure(name, str(error), error.exit_code)
    if isinstance(error, CliError):
        return Failure("UsageError", error.format_message(), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Failure("Interrupted", "Interrupted.", INTERRUPTED)
    if isinstance(error, BrokenPipeError) or _is_errno(error, errno.EPIPE):
        return Failure("BrokenPipe", "Nobody reads the output.", BROKEN_PIPE)
    if is_out_of_memory(error):
        said = f"Out of memory: {_first_line(error)}. Use a smaller --dtype or another --device."
        return Failure("BudgetError", said, BudgetError.exit_code)
    hint = "" if os.environ.get("AV_LLAVA_DEBUG") else " Set AV_LLAVA_DEBUG=1 for the traceback."
    return Failure(name, f"Unexpected {name}: {_first_line(error)}.{hint}", 1)


def _is_errno(error: BaseException, number: int) -> bool:
    return isinstance(error, OSError) and error.errno == number


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no message"
