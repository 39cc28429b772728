"""Ask a trained small model about clips that it has never seen, through the whole path.

python scripts/tiny/evaluate.py [--model FOLDER] [--clips N] [--seed S] [--out FILE.json]

Contract: every clip is written as a real H.264 + AAC file and asked about with `ask`, one question
at a time. The same clips are asked about again with the sound muted and with the frames blanked.
An answer counts when it is the right word, nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import av_llava
from av_llava.training.world import KINDS, sample_scene
from av_llava.training.world.parts import Scene
from av_llava.training.world.questions import questions
from av_llava.training.world.scene import generator
from av_llava.training.world.write import suffix, write_clip

CONDITIONS = ("whole", "muted", "blanked")
ALL_TARGET, KIND_TARGET = 0.95, 0.90


@dataclass(frozen=True)
class Row:
    """One question, its answer, and what the model said."""

    clip: str
    condition: str
    kind: str
    question: str
    answer: str
    said: str
    chance: float

    @property
    def right(self) -> bool:
        """Whether the model said the right word."""
        return self.said.strip().lower().rstrip(".") == self.answer


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def without(scene: Scene, condition: str) -> Scene:
    """A scene whose sounds are too faint to hear (muted) or whose things never appear (blanked)."""
    if condition == "muted":
        return replace(scene, sounds=tuple(replace(s, level=0.0) for s in scene.sounds))
    if condition == "blanked":
        never = scene.duration_s + 1
        return replace(scene, things=tuple(replace(t, appears_s=never) for t in scene.things))
    return scene


def ask_about(model: av_llava.AVLlava, scene: Scene, condition: str, folder: Path) -> Iterator[Row]:
    """Ask every question about one clip, each on its own."""
    path = write_clip(without(scene, condition), folder / f"{scene.key}{suffix(scene)}")
    rng = generator(scene.seed, scene.index, scene.split, "questions")
    for asked in questions(scene, rng):
        said = model.ask(path, asked.question, max_new_tokens=8).text
        yield Row(
            scene.key,
            condition,
            asked.kind,
            asked.question,
            asked.answer,
            said,
            1 / len(asked.choices),
        )
    path.unlink()


def evaluate(
    model: av_llava.AVLlava, n_clips: int, seed: int, conditions: tuple[str, ...] = CONDITIONS
) -> list[Row]:
    """Ask about ``n_clips`` clips of a seed, under every condition."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(n_clips):
            scene = sample_scene(seed, index, "heldout")
            for condition in conditions:
                rows += ask_about(model, scene, condition, Path(folder))
    return rows


def table(rows: list[Row]) -> list[dict[str, float | str | int | bool]]:
    """Accuracy by kind and over all (last), under every condition, with intervals of the first."""
    out: list[dict[str, float | str | int | bool]] = []
    for kind in (*KINDS, "all"):
        of = [r for r in rows if kind in (r.kind, "all")]
        whole = [r.right for r in of if r.condition == "whole"]
        if not whole:
            continue
        low, high = interval(sum(whole), len(whole))
        line: dict[str, float | str | int | bool] = {
            "kind": kind,
            "needs": "" if kind == "all" else " ".join(sorted(KINDS[kind].needs)),
            "n": len(whole),
            "chance": sum(r.chance for r in of) / len(of),
            "low": low,
            "high": high,
            "met": sum(whole) / len(whole) >= (ALL_TARGET if kind == "all" else KIND_TARGET),
        }
        for condition in CONDITIONS:
            right = [r.right for r in of if r.condition == condition]
            if right:
                line[condition] = sum(right) / len(right)
        out.append(line)
    return out


def markdown(lines: list[dict[str, float | str | int | bool]]) -> str:
    """The table as it stands in docs/tiny.md."""
    conditions = [c for c in CONDITIONS if c in lines[0]]
    head = ["kind", "needs", "questions", "chance", *conditions, "95 % interval", "bar met"]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        shares = [f"{100 * float(line[c]):.1f}" for c in conditions]
        bounds = f"{100 * float(line['low']):.1f}-{100 * float(line['high']):.1f}"
        rows.append(
            [
                str(line["kind"]).replace("_", " "),
                str(line["needs"]),
                str(line["n"]),
                f"{100 * float(line['chance']):.0f}",
                *shares,
                bounds,
                "yes" if line["met"] else "**no**",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Evaluate and print the table."""
    parser = argparse.ArgumentParser(description="Held-out accuracy of the small model.")
    parser.add_argument("--model", help="folder; by default the model that ships")
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--seed", type=int, default=2029, help="of the held-out clips")
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("--out", type=Path, help="JSON file for the answers and the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    conditions = tuple(given.conditions.split(","))
    model = av_llava.load(given.model)
    rows = evaluate(model, given.clips, given.seed, conditions)
    lines = table(rows)
    if given.out:
        data = {"seed": given.seed, "clips": given.clips, "table": lines}
        data["rows"] = [asdict(r) | {"right": r.right} for r in rows]
        given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{model.name}: {given.clips} clips of seed {given.seed}, right answers in %\n")
    print(markdown(lines) if lines else "No table: the condition 'whole' was left out.")


if __name__ == "__main__":
    main()
