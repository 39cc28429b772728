"""docs/converting.md: its commands run, its Python runs, its tests exist, its converters too."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

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


def test_every_test_of_the_tables_exists():
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", PAGE)
    assert len(named) > 15
    for file, function in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), f"{file}::{function}"


def test_the_converters_of_the_tables_exist():
    table = PAGE.split("## What becomes what")[1].split("What holds for all")[0]
    cells = re.findall(r"^\| [^|]+ \| ([^|]+) \|", table, re.MULTILINE)
    names = {name.split()[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert names <= set(CONVERTERS) and {"llava", "hf", "text-only", "surgery", "upgrade"} <= names
