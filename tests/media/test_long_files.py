"""Hours of film: memory does not grow with the length, windows do not read it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import read_counters

from av_llava.media import read_frames, scan_frames
from av_llava.settings import SamplingSettings


def test_one_full_frame_at_a_time(clip: Any) -> None:
    """Resized frames are all that is kept: 100 frames of 640x480 would be 92 MB."""
    path = clip("large.mp4", seconds=10, size=(640, 480), audio=None)
    full = 640 * 480 * 3
    tracemalloc.start()
    batch = read_frames(path, SamplingSettings(frames=None), resize=lambda a: a[::8, ::8].copy())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(batch) == 100
    assert peak < batch.frames.nbytes + 4 * full + 3_000_000


@pytest.mark.slow
def test_three_hours(clip: Any) -> None:
    path = clip("hours.mkv", seconds=3 * 3600, fps=1, gop=50, bframes=2, audio=None)
    batch = read_frames(path, SamplingSettings(frames=8))
    assert read_counters(batch.frames) == np.linspace(0, 10_799, 8, dtype=int).tolist()
    window = read_frames(path, SamplingSettings(frames=3), start_s=9000, end_s=9010)
    assert read_counters(window.frames) == [9000, 9004, 9009]
    assert len(scan_frames(path, start_s=9000, end_s=9010)) < 200
    grown = {length: _growth(path, length) for length in (1000, 10_800)}
    assert grown[10_800] < grown[1000] + 15e6


def _growth(path: Path, end_s: float) -> float:
    """Return by how many bytes a fresh process grows while reading 32 frames up to ``end_s``."""
    code = (
        "import json, resource, sys\n"
        "from av_llava.media import read_frames\n"
        "from av_llava.settings import SamplingSettings\n"
        "path, end = json.loads(sys.argv[1])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "read_frames(path, SamplingSettings(32), end_s=end, resize=lambda a: a[::8, ::8].copy())\n"
        "print(peak() - before)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([str(path), end_s])],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    return float(done.stdout)
