"""The film that decoding and sessions are measured on: made once, kept in ``bench_out/``.

Five minutes of 1280×720 at 30 frames per second, H.264 with x264's usual keyframes (every 250
frames at most) and B-frames, and AAC sound. A large picture pans, with noise in one corner.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from bench.measure import ROOT

FPS, WIDTH, HEIGHT, RATE_HZ = 30, 1280, 720, 44_100


def film(quick: bool = False) -> Path:
    """Path of the film; a quick one has ten seconds."""
    seconds = 10 if quick else 300
    path = ROOT / "bench_out" / f"film_{seconds}s_v1.mp4"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part.mp4")
        _make(part, seconds)
        part.replace(path)  # an interrupted run leaves no half film
    return path


def _make(path: Path, seconds: int) -> None:
    options = {"preset": "superfast", "crf": "28"}
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        picture = out.add_stream("libx264", rate=FPS, options=options)
        assert isinstance(picture, av.VideoStream)
        picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = out.add_stream("aac", rate=RATE_HZ, layout="stereo")
        assert isinstance(sound, av.AudioStream)
        planes = _Planes()
        for number in range(seconds * FPS):
            frame = av.VideoFrame.from_ndarray(planes.frame(number), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            for packet in picture.encode(frame):
                out.mux(packet)
            if number % FPS == 0:
                for packet in sound.encode(_second(number // FPS)):
                    out.mux(packet)
        for packet in picture.encode(None) + sound.encode(None):
            out.mux(packet)


class _Planes:
    """A picture larger than the frame, over which the frame moves."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.large = {}
        for name, (height, width) in {
            "y": (1440, 2560),
            "u": (720, 1280),
            "v": (720, 1280),
        }.items():
            coarse = self.rng.integers(40, 200, (height // 16, width // 16), dtype=np.uint8)
            self.large[name] = np.kron(coarse, np.ones((16, 16), np.uint8))
        self.noise = self.rng.integers(16, 235, (16, 90, 320), dtype=np.uint8)

    def frame(self, number: int) -> np.ndarray:
        """One frame as PyAV takes yuv420p. uint8 [H * 3 / 2, W]"""
        left = 2 * (abs(number * 3 % 1200 - 600))
        top = 2 * (abs(number % 600 - 300))
        luma = self.large["y"][top : top + HEIGHT, left : left + WIDTH].copy()
        luma[-90:, -320:] = self.noise[number % 16]
        half = [
            self.large[c][top // 2 :, left // 2 :][: HEIGHT // 2, : WIDTH // 2].reshape(-1, WIDTH)
            for c in "uv"
        ]
        return np.concatenate([luma, *half])


def _second(number: int) -> av.AudioFrame:
    """One second of sound."""
    time_s = number + np.arange(RATE_HZ) / RATE_HZ
    tone = (0.1 * np.sin(2 * np.pi * (220 + number) * time_s)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), format="fltp", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = RATE_HZ, number * RATE_HZ, Fraction(1, RATE_HZ)
    return frame
