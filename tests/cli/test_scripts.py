"""The demo and the example of the Python API."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT

from av_llava.media import probe, read_audio, read_frames
from av_llava.settings import SamplingSettings

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_clip_shows_a_ball_and_rings_a_bell(tmp_path: Path) -> None:
    demo = script("demo")
    clip = demo.write_clip(tmp_path / "demo" / "clip.mp4")
    info = probe(clip)
    assert info.video.codec == "h264" and info.audio.codec == "aac"
    assert info.video.n_frames == demo.SECONDS * demo.FPS
    assert info.duration_s == pytest.approx(demo.SECONDS, abs=0.1)
    batch = read_frames(clip, SamplingSettings(frames=7))
    red = (batch.frames[..., 0] > 150) & (batch.frames[..., 1] < 100)
    centres = [np.nonzero(r)[1].mean() for r in red]
    assert np.argmax(centres) == 3 and centres[0] < 60 and centres[3] > 240
    heard = read_audio(clip)
    loud = np.flatnonzero(np.abs(heard.waveform) > 0.1)[0] / heard.sample_rate_hz
    assert loud == pytest.approx(demo.BELL_S, abs=0.05)


@pytest.mark.slow
def test_the_demo_runs_and_says_that_the_model_is_random(clip: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "demo.py"), clip, "What", "is", "it?"],
        capture_output=True, text=True, env=ENV, check=True,
    )  # fmt: skip
    assert "RANDOM" in done.stdout and "random" in done.stderr
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
