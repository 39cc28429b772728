"""Keeps the help texts in ``docs/cli.md`` the same as the program's own.

Contract: everything between ``<!-- help NAME -->`` and ``<!-- end -->`` is generated; a test
compares. ``python -m av_llava.cli.docs`` brings the page up to date.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

import typer

from av_llava.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
WIDTH = 98
_BLOCK = re.compile(r"(<!-- help(?P<name>(?: \w+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def help_text(*words: str) -> str:
    """Return what ``av-llava WORDS --help`` prints on a terminal of a fixed width."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        typer.main.get_command(app).main(
            args=[*words, "--help"],
            prog_name="av-llava",
            standalone_mode=False,
            terminal_width=WIDTH,
        )
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip() + "\n"


def updated(page: str) -> str:
    """Return a page with every generated block made anew."""

    def block(match: re.Match[str]) -> str:
        text = help_text(*match["name"].split())
        return f"{match[1]}```text\n{text}```\n{match[3]}"

    return _BLOCK.sub(block, page)


def main() -> int:
    """Rewrite the page; returns 1 if it had to change."""
    before = PAGE.read_text(encoding="utf-8")
    after = updated(before)
    if after == before:
        return 0
    PAGE.write_text(after, encoding="utf-8")
    print(f"{PAGE} was brought up to date.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
