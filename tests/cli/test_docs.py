"""The page about the command line says what the program says."""

from __future__ import annotations

import re

import pytest
import typer

from av_llava.cli.docs import PAGE, WIDTH, help_text, updated
from av_llava.cli.main import app

ALL = typer.main.get_command(app).commands  # type: ignore[attr-defined]
DATA = ["data", *(f"data {name}" for name in ALL["data"].commands)]
COMMANDS = [*(c.name for c in app.registered_commands), *DATA[1:]]


def squeezed(text: str) -> str:
    """Without what differs between versions of typer: line breaks and stray backslashes."""
    return re.sub(r"\s+", " ", text.replace("\\[", "["))


def test_help_texts_are_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert squeezed(updated(page)) == squeezed(page), "run: python -m av_llava.cli.docs"


def test_every_command_has_its_block() -> None:
    page = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"<!-- help (\w[\w ]*) -->", page)
    assert sorted(found) == sorted({*COMMANDS, "data"})


def test_a_stale_block_is_noticed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    stale = page.replace("--batch-size N", "--batchsize N", 1)
    assert squeezed(stale) != squeezed(page)
    assert squeezed(updated(stale)) == squeezed(page)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_its_width_and_explains_every_flag(command: str) -> None:
    text = help_text(*command.split())
    assert max(map(len, text.splitlines())) <= WIDTH
    known = ALL
    for word in command.split()[:-1]:
        known = known[word].commands
    known = known[command.split()[-1]]
    flags = [p for p in known.params if p.param_type_name == "option"]
    assert flags and all(p.help for p in flags)


def test_every_exit_code_is_explained() -> None:
    from av_llava import errors
    from av_llava.cli.failures import BROKEN_PIPE, INTERRUPTED

    kinds = [v for v in vars(errors).values() if isinstance(v, type) and hasattr(v, "exit_code")]
    codes = {k.exit_code for k in kinds} | {0, BROKEN_PIPE, INTERRUPTED}
    page = PAGE.read_text(encoding="utf-8")
    assert codes == {int(c) for c in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
