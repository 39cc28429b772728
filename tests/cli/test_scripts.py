"""The demo and the example of the Python API."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest
from conftest import ROOT

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_asks_what_its_clip_shows() -> None:
    demo = script("demo")
    scene = demo.scene()
    (sound,) = scene.sounds
    moving = [t for t in scene.things if t.motion.start_s <= sound.onset_s < t.motion.end_s]
    (mover,) = moving  # the other one moves at another time
    assert len(scene.things) == 2
    expected = {
        "What sound do you hear?": sound.kind,
        f"Which way does the {mover.shape} move?": mover.motion.direction,
        f"What colour is the {mover.shape}?": mover.colour,
        "Which shape moved when the sound played?": mover.shape,
    }
    assert expected == demo.QUESTIONS


@pytest.mark.slow
def test_the_demo_answers_right_about_its_clip() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "demo.py")],
        capture_output=True, text=True, env=ENV, check=True, cwd=ROOT,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    right = [line for line in lines if line.startswith("(Right is: ")]
    said = [lines[lines.index(line) - 1] for line in right]
    assert [f"(Right is: {word}.)" for word in said] == right and len(right) == 4


@pytest.mark.slow
def test_the_demo_takes_a_file_of_yours(clip: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "demo.py"), clip, "What", "is", "it?"],
        capture_output=True, text=True, env=ENV, check=True,
    )  # fmt: skip
    assert "docs/tiny.md" in done.stdout and "Right is" not in done.stdout
    assert f"$ av-llava ask {clip} 'What is it?' --show-plan" in done.stdout
    assert "h264" in done.stdout and "prompt tokens" in done.stderr


@pytest.mark.slow
def test_the_example_gives_the_answers_of_the_program(clip: str, cli_run) -> None:
    words = [clip, "What is it?", "And now?", "--frames", "4", "--max-tokens", "6"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "video_qa.py"), *words],
        capture_output=True, text=True, env=ENV, check=True,
    )  # fmt: skip
    answers = [
        cli_run("ask", clip, q, "--frames", "4", "--max-tokens", "6").out.strip()
        for q in words[1:3]
    ]
    assert [line.strip() for line in done.stdout.splitlines()] == answers
    assert done.stderr.count("video 4/20 frames") == 2
    missing = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "video_qa.py"), "missing.mp4", "What?"],
        capture_output=True, text=True, env=ENV, check=False,
    )  # fmt: skip
    assert missing.returncode == 3 and "missing.mp4" in missing.stderr
