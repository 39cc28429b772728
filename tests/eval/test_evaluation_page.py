"""docs/evaluation.md is true: its task works, its commands run, its names exist."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from clips import make_clip

from av_llava.cli import main as cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [body for kind, body in FENCE.findall(PAGE) if kind == language]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """A folder with what the page says is there."""
    folder = tmp_path_factory.mktemp("newcomer")
    (row,) = map(json.loads, blocks("json"))
    rows = [row, {**row, "id": "2", "film": "street", "right": "a phone", "place": "outdoors"}]
    (folder / "data" / "films").mkdir(parents=True)
    (folder / "data" / "rows.json").write_text(json.dumps(rows))
    for name in ("kitchen", "street"):
        make_clip(folder / "data" / "films" / f"{name}.mp4", seconds=1, size=(64, 48))
    (folder / "sounds.py").write_text(blocks("python")[0])
    return folder


@pytest.fixture(autouse=True)
def like_a_newcomer(newcomer, monkeypatch):
    monkeypatch.chdir(newcomer)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("AV_LLAVA_MODEL", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_task_takes_less_than_sixty_lines():
    assert len(blocks("python")[0].splitlines()) < 60


@pytest.mark.slow
def test_the_commands_about_the_new_task_work(newcomer, capsys):
    (commands,) = blocks("sh")
    for line in commands.splitlines():
        words = shlex.split(line)
        assert words[0] == "av-llava"
        assert cli.run(words[1:]) == 0, capsys.readouterr().err
    page = (newcomer / "runs" / "sounds" / "report.html").read_text(encoding="utf-8")
    assert "Which sound?" in page and "indoors" in page


def test_the_python_prints_what_the_page_says():
    code = blocks("python")[1]
    printed = FENCE.findall(PAGE[PAGE.index(code) + len(code) :].split("```", 1)[1])[0]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "docs/evaluation.md", "exec"), {})
    assert printed[0] == "text" and out.getvalue() == printed[1]


def test_commands_and_flags_in_the_text_exist():
    import typer

    group = typer.main.get_command(cli.app).commands["eval"]
    flags = {f for c in group.commands.values() for p in c.params for f in p.opts}
    text = "\n".join(blocks("text")) + FENCE.sub("", PAGE)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--nproc-per-node"}
    assert named and named <= flags
    assert set(re.findall(r"av-llava eval (\w+)", text)) <= set(group.commands)


def test_names_in_the_text_exist():
    for dotted in re.findall(r"`(av_llava_eval(?:\.\w+)+)`", PAGE):
        module, _, name = dotted.rpartition(".")
        assert hasattr(importlib.import_module(module), name), dotted
    for path in re.findall(r"`((?:eval|docs)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
