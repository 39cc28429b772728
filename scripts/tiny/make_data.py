"""Write what the small model learns from: clips of the world, and conversations about them.

python scripts/tiny/make_data.py OUT [--clips N] [--seed S] [--workers W]

Contract: clips are those of `av-llava data synth`. `events.json` asks about each clip in which
something happens what it is; `conversations.json` has one conversation about each, of questions
that the world asks, what is hard more often; `looks.json` has others, in which shapes are asked for
as often as what happens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from av_llava.training.world import Question, Scene, sample_scene, synthesize
from av_llava.training.world.questions import all_questions
from av_llava.training.world.rows import CLIPS, clip_name
from av_llava.training.world.scene import generator

SPLIT = "lessons"
LONGEST = 6
"""Questions of a conversation."""
WEIGHTS = {
    **dict.fromkeys(("direction", "mover", "first", "order"), 4.0),
    **dict.fromkeys(("count", "beeps"), 2.0),
    **dict.fromkeys(("colour", "shape", "sound"), 0.5),
    **dict.fromkeys(("yes_no_picture", "yes_no_sound"), 0.4),
}
"""How much more often than others a question of a kind is chosen."""
LOOKS = 12_000
"""Clips of the last file."""
EVENTS = ("direction", "first", "order", "mover")
"""Kinds that ask what happens."""


def lessons(
    scene: Scene, rng: np.random.Generator, weights: dict[str, float] = WEIGHTS
) -> list[Question]:
    """The questions of one conversation, in random order, no two alike."""
    asked = all_questions(scene, rng)
    shares = np.array([weights.get(q.kind, 1.0) for q in asked])
    n = min(LONGEST, len(asked))
    return [asked[i] for i in rng.choice(len(asked), n, replace=False, p=shares / shares.sum())]


def looking(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """A conversation that asks for shapes as often as for what happens."""
    return lessons(scene, rng, {**WEIGHTS, "shape": WEIGHTS["first"]})


def happening(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """The question about what happens, if something does."""
    return [q for q in all_questions(scene, rng) if q.kind in EVENTS]


def row(scene: Scene, asked: list[Question]) -> dict[str, object]:
    """A conversation about a clip, in LLaVA's format."""
    medium = "video" if scene.has_video else "audio"
    turns = []
    for i, question in enumerate(asked):
        mark = f"<{medium}>\n" if i == 0 else ""
        turns.append({"from": "human", "value": mark + question.question})
        turns.append({"from": "gpt", "value": question.answer})
    return {
        "id": scene.key,
        medium: f"{CLIPS}/{clip_name(scene)}",
        "conversations": turns,
        "kind": [question.kind for question in asked],
    }


def write(folder: Path, scenes: list[Scene]) -> None:
    """Write the files of conversations."""
    files = (
        ("events", happening, len(scenes)),
        ("conversations", lessons, len(scenes)),
        ("looks", looking, LOOKS),
    )
    for name, choose, n in files:
        rows = []
        for scene in scenes[:n]:
            asked = choose(scene, generator(scene.seed, scene.index, scene.split, name))
            if asked:
                rows.append(row(scene, asked))
        file = folder / f"{name}.json"
        file.write_text(json.dumps(rows), encoding="utf-8")
        print(f"Wrote {file}: {len(rows)} conversations.")


def main() -> None:
    """Write the clips, then the conversations."""
    parser = argparse.ArgumentParser(description="Training data of the small model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()

    def progress(done: int, wanted: int) -> None:
        if done % 1000 == 0 or done == wanted:
            print(f"{done}/{wanted} clips", flush=True)

    synthesize(given.out, given.clips, given.seed, SPLIT, given.workers, progress)
    write(given.out, [sample_scene(given.seed, i, SPLIT) for i in range(given.clips)])


if __name__ == "__main__":
    main()
