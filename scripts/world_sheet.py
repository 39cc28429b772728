"""Draw docs/world.png: a few clips of the synthetic world, their sound, and what is asked.

python scripts/world_sheet.py [FILE]
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from av_llava.training.world.parts import Scene
from av_llava.training.world.picture import frames
from av_llava.training.world.rows import ask
from av_llava.training.world.scene import sample_scene
from av_llava.training.world.sound import RATE_HZ, waveform

FILE = Path(__file__).resolve().parents[1] / "docs" / "world.png"
SPLIT = "sheet"
SIDE, GAP, SHOWN, SOUND, TEXT, ROW = 64, 2, 8, 36, 330, 122
WIDTH = SHOWN * (SIDE + GAP)
HIGHEST_HZ, FLOOR_DB = 5000, 50


def scenes() -> list[Scene]:
    """One clip of each plot, all with sound if they can, and a silent one."""
    found: dict[str, Scene] = {}
    for index in range(200):
        scene = sample_scene(0, index, SPLIT)
        name = scene.plot if scene.has_audio else "silent"
        if len(ask(scene)) >= (1 if name == "listen" else 2):
            found.setdefault(name, scene)
    order = ("crowd", "travel", "sequence", "change", "turns", "silent", "listen")
    return [found[name] for name in order]


def spectrogram(scene: Scene) -> np.ndarray:
    """Return the sound over the width of the frames: dark is loud; uint8 [SOUND, WIDTH]."""
    wave, window = waveform(scene), 512
    starts = np.linspace(0, len(wave) - window, WIDTH).astype(int)
    parts = np.stack([wave[s : s + window] * np.hanning(window) for s in starts])
    power = abs(np.fft.rfft(parts, 1024)) ** 2
    edges = np.linspace(0, HIGHEST_HZ * 1024 / RATE_HZ, SOUND + 1).astype(int)
    bands = np.stack([power[:, a:b].max(1) for a, b in pairwise(edges)])
    loud = 10 * np.log10(bands / bands.max() + 1e-9) + FLOOR_DB
    return (255 - 255 * np.clip(loud, 0, FLOOR_DB) / FLOOR_DB).astype(np.uint8)[::-1]


def draw(sheet: Image.Image, top: int, scene: Scene) -> None:
    """Draw one clip as a row of the sheet."""
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    if scene.has_video:
        every = scene.duration_s / SHOWN
        for i, picture in enumerate(frames(scene, [every * (i + 0.5) for i in range(SHOWN)])):
            sheet.paste(Image.fromarray(picture), (i * (SIDE + GAP), top))
    if scene.has_audio:
        sheet.paste(Image.fromarray(spectrogram(scene)).convert("RGB"), (0, top + SIDE + 4))
    if not (scene.has_video and scene.has_audio):
        lacks = "no sound" if scene.has_video else "no picture"
        pen.text((WIDTH + 12, top + 88), f"({lacks})", fill=(120, 120, 120), font=font)
    for line, question in enumerate(ask(scene)):
        y = top + 4 + line * 27
        pen.text((WIDTH + 12, y), question.question, fill=(0, 0, 0), font=font)
        pen.text((WIDTH + 24, y + 12), question.answer, fill=(0, 90, 200), font=font)


def main() -> None:
    """Draw the sheet and write it."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    chosen = scenes()
    sheet = Image.new("RGB", (WIDTH + TEXT, ROW * len(chosen)), (255, 255, 255))
    for number, scene in enumerate(chosen):
        draw(sheet, number * ROW + 4, scene)
    sheet.save(file, optimize=True)
    print(f"Wrote {file} ({file.stat().st_size / 1000:.0f} kB).")


if __name__ == "__main__":
    main()
