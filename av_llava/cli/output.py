"""Where words go: stdout carries only the answer, stderr everything else.

Contract: what a model or a file name says can not steer the terminal: control characters are
taken out wherever a person reads. Progress is shown only to a person, and never with --json.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from av_llava.cli.failures import Failure

# Everything that moves a cursor or starts a terminal's escape sequence; tab and newline stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CHATTY = (
    "bitsandbytes",
    "transformers",
    "huggingface_hub",
    "httpx",
    "httpcore",
    "urllib3",
    "accelerate",
    "filelock",
)


def clean(text: str) -> str:
    """Replace control characters, so that text cannot steer a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


class Output:
    """The two streams of one command.

    Args:
        as_json: stdout carries JSON only.
        quiet: no notes on stderr.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet

    @property
    def streams(self) -> bool:
        """Whether an answer is shown while it is made."""
        return sys.stdout.isatty() and not self.as_json

    @property
    def shows_progress(self) -> bool:
        """Whether a person watches stderr and wants to."""
        return sys.stderr.isatty() and not (self.as_json or self.quiet)

    def answer(self, text: str) -> None:
        """Print an answer."""
        print(clean(text) if sys.stdout.isatty() else text, flush=True)

    def pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        """Print the pieces of an answer as they come, and pass them on; ends the line."""
        written = False
        try:
            for piece in pieces:
                sys.stdout.write(clean(piece) if sys.stdout.isatty() else piece)
                sys.stdout.flush()
                written = True
                yield piece
        finally:
            if written:
                print(flush=True)

    def data(self, data: dict[str, Any]) -> None:
        """Print one JSON object on one line."""
        print(json.dumps(data, ensure_ascii=False), flush=True)

    def note(self, text: str) -> None:
        """Tell a person something that is not the answer."""
        if not self.quiet:
            print(clean(text), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Tell what a person must know, with --quiet too."""
        print(f"warning: {clean(text)}", file=sys.stderr, flush=True)


def report(failure: Failure, as_json: bool = False) -> None:
    """Print a failure: a line on stderr and, with ``as_json``, an object on stdout."""
    if as_json:
        print(json.dumps(failure.to_dict(), ensure_ascii=False), flush=True)
    print(f"error: {clean(failure.message)}", file=sys.stderr, flush=True)


def make_output_safe() -> None:
    """Let no character that the terminal's encoding lacks end the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_stdout() -> None:
    """Send what is still buffered nowhere, so that Python's own flush at the end is silent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def configure_logging(verbose: int, output: Output) -> None:
    """Set up logging for one run; to be called before torch or transformers are imported.

    Args:
        verbose: 0 shows warnings of av_llava, 1 what it does, 2 everything of everyone.
        output: of the command; progress bars of libraries follow it.
    """
    levels = {0: logging.WARNING, 1: logging.INFO}
    logging.basicConfig(
        level=logging.WARNING if verbose < 2 else logging.DEBUG,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger("av_llava").setLevel(levels.get(verbose, logging.DEBUG))
    logging.captureWarnings(True)
    if verbose < 2:
        for name in (*_CHATTY, "py.warnings"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not output.shows_progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
