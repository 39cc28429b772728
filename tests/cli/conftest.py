"""Clips, a fake model behind the commands, and ways of running them."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip

sys.path.insert(0, str(Path(__file__).parent))

import cli_fake

from av_llava.cli import main as cli

ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", seconds=2.0))


@pytest.fixture(scope="session")
def mute_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_clip(tmp_path_factory.mktemp("clips") / "mute.mp4", seconds=1.0, audio=None))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AV_LLAVA_MODEL", "AV_LLAVA_DEBUG", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Undo what one run of the program configures for its whole process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("av_llava").setLevel(logging.NOTSET)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> cli_fake.FakeModel:
    return cli_fake.install(monkeypatch.setattr)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def cli_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run in this process: ``cli_run("ask", clip, "What?", stdin="...")``; no stdin is a tty."""

    def call(*words: str, stdin: str | None = None) -> Result:
        monkeypatch.setattr(sys, "stdin", _Terminal() if stdin is None else io.StringIO(stdin))
        capsys.readouterr()
        code = cli.run(words)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def program(*words: str, stdin: str | None = "", **options: Any) -> Result:
    """Run ``python -m av_llava.cli`` in its own process."""
    options.setdefault("env", {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    done = subprocess.run(
        [sys.executable, "-m", "av_llava.cli", *words],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    return Result(done.returncode, done.stdout, done.stderr)
