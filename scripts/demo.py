"""What ``make demo`` runs: a real H.264 + AAC file through the whole path, by the real program.

python scripts/demo.py            writes demo/clip.mp4 and asks about it
python scripts/demo.py FILE       asks about a file of yours

The clip shows a red ball that rolls to the right; when it bounces off the right edge, a bell rings.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import av
import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "demo"
SECONDS, FPS, WIDTH, HEIGHT = 6, 24, 320, 240
RATE_HZ, BELL_S, BELL_HZ = 44_100, 3.0, 880.0
QUESTION = "What does the ball do when the bell rings?"


def draw(time_s: float) -> np.ndarray:
    """Return one picture, uint8 [HEIGHT, WIDTH, 3]: a ball over a floor."""
    way = 1 - abs(time_s - BELL_S) / BELL_S  # 0 at both ends, 1 at the bounce
    x, y, radius = 30 + way * (WIDTH - 60), HEIGHT * 0.65, 28
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    picture = np.full((HEIGHT, WIDTH, 3), (190, 215, 235), np.uint8)
    picture[rows > y + radius] = (110, 130, 90)
    picture[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = (200, 40, 35)
    return picture


def sound() -> np.ndarray:
    """Return the sound track, float32 [1, samples]: a bell that fades."""
    time_s = np.arange(SECONDS * RATE_HZ) / RATE_HZ - BELL_S
    fading = np.where(time_s < 0, 0.0, np.exp(-3 * np.maximum(time_s, 0)))
    tones = sum(np.sin(2 * np.pi * BELL_HZ * k * time_s) / k for k in (1.0, 2.76, 5.4))
    return np.asarray(0.3 * fading * tones, np.float32)[None]


def write_clip(path: Path) -> Path:
    """Write the clip as H.264 and AAC in mp4."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as out:
        film = out.add_stream("libx264", rate=FPS, options={"crf": "20"})
        film.width, film.height, film.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        track = out.add_stream("aac", rate=RATE_HZ, layout="mono")
        for number in range(SECONDS * FPS):
            frame = av.VideoFrame.from_ndarray(draw(number / FPS), format="rgb24")
            frame.pts = number
            out.mux(film.encode(frame))
        out.mux(film.encode(None))
        samples = sound()
        for start in range(0, samples.shape[1], 1024):
            block = np.ascontiguousarray(samples[:, start : start + 1024])
            part = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            part.sample_rate, part.pts = RATE_HZ, start
            out.mux(track.encode(part))
        out.mux(track.encode(None))
    return path


def av_llava(*words: str) -> None:
    """Run the installed program and show the command; end with its exit code if it fails."""
    installed = Path(sys.executable).with_name("av-llava")
    program = [str(installed)] if installed.exists() else [sys.executable, "-m", "av_llava.cli"]
    print(f"\n$ {shlex.join(['av-llava', *words])}", flush=True)
    done = subprocess.run([*program, *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Write the clip unless a file is given, then look at it, plan, and ask."""
    if len(sys.argv) > 1:
        clip, question = sys.argv[1], " ".join(sys.argv[2:]) or "What happens in this video?"
    else:
        clip, question = os.path.relpath(write_clip(FOLDER / "clip.mp4")), QUESTION
        print(f"Wrote {clip}: {SECONDS} s of H.264 picture and AAC sound.")
    if not os.environ.get("AV_LLAVA_MODEL"):
        print(
            "The model below is tiny and has RANDOM weights, so its answer is noise: this shows\n"
            "that the whole path runs. AV_LLAVA_MODEL=path/to/checkpoint asks a trained one."
        )
    av_llava("info", clip)
    av_llava("ask", clip, question, "--show-plan")
    av_llava("ask", clip, question, "--max-tokens", "48")


if __name__ == "__main__":
    main()
