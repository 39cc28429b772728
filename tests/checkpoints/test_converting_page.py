"""docs/converting.md: its commands and Python run; the tests of its tables exist, and converters.

Of docs/checkpoints.md the tables are tested here, too.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from golden_data import golden

from av_llava.checkpoints.convert import CONVERTERS
from av_llava.cli import main as cli

from .folders import V16

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "converting.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_commands_and_python_run_in_the_order_of_the_page(tmp_path, monkeypatch, capsys):
    shutil.copytree(golden(f"llava/{V16}") / "checkpoint", tmp_path / "llava-v1.6")
    shutil.copytree(golden(f"llava/{V16}") / "vision_tower", tmp_path / "vision_tower")
    monkeypatch.chdir(tmp_path)
    known = dict(CONVERTERS)
    for language, body in FENCE.findall(PAGE):
        if language == "sh":
            for line in body.splitlines():
                program, *words = shlex.split(line)
                assert program == "av-llava"
                assert cli.run(words) == 0, f"{line}: {capsys.readouterr().err}"
        else:
            exec(compile(body, "docs/converting.md", "exec"), {})
    assert CONVERTERS.pop("mine").options["depth"].default == 3
    assert known == CONVERTERS
    assert "21 0.0 (" in capsys.readouterr().out
    assert (tmp_path / "llava-v1.6" / "config.json.bak").is_file()


@pytest.mark.parametrize(("page", "at_least"), [("converting", 25), ("checkpoints", 45)])
def test_every_row_of_the_tables_names_tests_that_exist(page, at_least):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", text)
    assert len(named) >= at_least
    for file, function in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), f"{file}::{function}"
    tables = re.findall(r"^\|[^\n]*\| test \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    groups = [row for row in rows if re.fullmatch(r"\| \*\*[^|]+\*\* \|(  \|)+", row)]
    assert len(tables) == 2 and len(rows) - len(groups) >= 24
    assert [row for row in rows if row not in groups and "`tests/" not in row] == []


def test_the_converters_of_the_tables_exist():
    table = PAGE.split("## What becomes what")[1].split("What holds for all")[0]
    cells = re.findall(r"^\| [^|]+ \| ([^|]+) \|", table, re.MULTILINE)
    names = {name.split()[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert names <= set(CONVERTERS) and {"llava", "hf", "text-only", "surgery", "upgrade"} <= names
