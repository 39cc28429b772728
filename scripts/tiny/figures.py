"""Draw the pictures of docs/tiny.md from what evaluate.py wrote.

python scripts/tiny/figures.py RESULT.json OUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from av_llava.training.world.picture import frames
from av_llava.training.world.scene import sample_scene

COLOURS = {"whole": "#3b6ea5", "muted": "#c9a227", "blanked": "#8a8f98"}
CLIPS, COLUMNS = 5, 8


def bars(result: dict[str, Any], path: Path) -> None:
    """Accuracy by kind: whole clips, without sound, without things to see."""
    lines = result["table"]
    figure, axes = plt.subplots(figsize=(10, 4))
    places = np.arange(len(lines))
    for i, (condition, colour) in enumerate(COLOURS.items()):
        shares = [100 * line.get(condition, 0) for line in lines]
        axes.bar(places + (i - 1) * 0.27, shares, 0.25, color=colour, label=condition)
    for place, line in zip(places, lines, strict=True):
        axes.hlines(100 * line["chance"], place - 0.42, place + 0.42, "black", lw=1)
    names = [line["kind"].replace("_", " ") for line in lines]
    axes.set_xticks(places, names, rotation=30, ha="right")
    axes.set(ylabel="right answers, %", ylim=(0, 100))
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.13), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def strips(result: dict[str, Any], path: Path) -> None:
    """Frames of the first clips with a picture, and what was asked and said."""
    asked: dict[int, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["condition"] == "whole":
            asked.setdefault(int(row["clip"].rsplit("-", 1)[1]), []).append(row)
    shown = [i for i in asked if sample_scene(result["seed"], i, "heldout").has_video][:CLIPS]
    figure, rows = plt.subplots(len(shown), 1, figsize=(10, 2.1 * len(shown)))
    for axes, index in zip(rows, shown, strict=True):
        scene = sample_scene(result["seed"], index, "heldout")
        times = np.linspace(0, scene.duration_s - 1 / scene.fps, COLUMNS)
        axes.imshow(np.concatenate(list(frames(scene, times)), 1))
        sound = scene.sounds[0] if scene.sounds else None
        heard = f"{sound.kind} at {sound.onset_s:.1f} s" if sound else "silent"
        said = [
            f"{r['question']}  {r['said']}{'' if r['right'] else '  (wrong: ' + r['answer'] + ')'}"
            for r in asked[index]
        ]
        axes.set_title("\n".join([f"[{heard}]", *said]), fontsize=8, loc="left")
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Write both pictures."""
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    bars(result, folder / "tiny_accuracy.png")
    strips(result, folder / "tiny_clips.png")


if __name__ == "__main__":
    main()
