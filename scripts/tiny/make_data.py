"""Write what the small model learns from: clips of the world, and longer conversations about them.

python scripts/tiny/make_data.py OUT [--clips N] [--seed S] [--workers W]

Contract: clips are those of `av-llava data synth`. A conversation holds the world's own questions
about a clip, and lessons that are never tested: more questions about looks, the way of each thing
that moves, on which side things are and what colour they have at the start, at the end and while
the sound plays, and whether something happens early or late.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from build import COLOUR_THEN, WHEN, WHERE

from av_llava.training.world import KINDS, Scene, sample_scene, synthesize
from av_llava.training.world.parts import DIRECTIONS, Thing
from av_llava.training.world.questions import all_questions
from av_llava.training.world.rows import CLIPS, clip_name
from av_llava.training.world.scene import generator

SPLIT = "lessons"
LONGEST = 6
"""Questions of a conversation."""
CLEAR = 0.12
"""How far from the middle a thing is that is called left, right, up or down."""
CLEAR_S = 0.25
"""How far from the middle of the clip what happens is that is called early or late."""
WEIGHTS = {
    **dict.fromkeys(("direction", "mover", "first", "order"), 4.0),
    **dict.fromkeys(("then", "when", "count"), 2.0),
    "beeps": 1.5,
    **dict.fromkeys(("colour", "shape", "sound", "where"), 0.5),
    **dict.fromkeys(("yes_no_picture", "yes_no_sound"), 0.4),
}
"""How much more often than others a question of a kind is chosen: what is hard, more often."""
PER_CLIP = 3
"""Conversations about each clip, with other questions and other words."""

Lesson = tuple[str, str, str]
"""Kind, question, answer."""


def where(scene: Scene, thing: Thing, rng: np.random.Generator) -> list[Lesson]:
    """At most two questions about the side on which a thing is."""
    moments = [(" at the start", 0.0), (" at the end", scene.duration_s)]
    if thing.motion is None:
        moments.append(("", scene.duration_s))
    found: list[Lesson] = []
    for when, time_s in moments:
        if time_s < thing.appears_s:
            continue
        place = thing.place_at(time_s)
        for axis, sides in enumerate((("left", "right"), ("up", "down"))):
            along = thing.motion is None or DIRECTIONS[thing.motion.direction][axis] != 0
            if along and abs(place[axis] - 0.5) > CLEAR:
                words = WHERE[axis].format(shape=thing.shape, when=when)
                found.append(("where", words, sides[int(place[axis] > 0.5)]))
    return [found[i] for i in rng.permutation(len(found))[:2]]


def then(scene: Scene) -> list[Lesson]:
    """The colour of what changes it, and the side of what moves, at moments that are clear."""
    moments = [(" at the start", 0.0), (" at the end", scene.duration_s)]
    heard = [(" when the sound played", (s.onset_s + s.end_s) / 2) for s in scene.sounds]
    found: list[Lesson] = []
    for thing in scene.things:
        if thing.turn:
            found += [
                ("then", COLOUR_THEN.format(shape=thing.shape, when=words), thing.colour_at(time_s))
                for words, time_s in (*moments, *heard)
                if abs(time_s - thing.turn.time_s) > CLEAR_S
            ]
        if thing.motion and scene.plot == "turns":
            for words, time_s in heard:
                found += _side(thing, words, time_s)
    return found


def _side(thing: Thing, words: str, time_s: float) -> list[Lesson]:
    """On which side of the way that it moves along a moving thing is."""
    assert thing.motion is not None
    axis = 0 if DIRECTIONS[thing.motion.direction][0] else 1
    place = thing.place_at(time_s)[axis]
    if abs(place - 0.5) <= CLEAR:
        return []
    sides = (("left", "right"), ("up", "down"))[axis]
    question = WHERE[axis].format(shape=thing.shape, when=words)
    return [("then", question, sides[int(place > 0.5)])]


def when(scene: Scene) -> list[Lesson]:
    """Whether what happens is early or late, where that is clear."""
    times: list[tuple[str, float]] = []
    for thing in scene.things:
        if thing.motion and scene.plot == "turns":
            middle = (thing.motion.start_s + thing.motion.end_s) / 2
            times.append((WHEN["moves"].format(shape=thing.shape), middle))
        if thing.turn:
            times.append((WHEN["turns"].format(shape=thing.shape), thing.turn.time_s))
        if thing.appears_s > 0:
            times.append((WHEN["comes"].format(shape=thing.shape), thing.appears_s))
    times += [(WHEN["sounds"], (s.onset_s + s.end_s) / 2) for s in scene.sounds]
    middle = scene.duration_s / 2
    return [
        ("when", question, "early" if time_s < middle else "late")
        for question, time_s in times
        if abs(time_s - middle) > CLEAR_S
    ]


def lessons(scene: Scene, rng: np.random.Generator) -> list[Lesson]:
    """The questions of one conversation, in random order, no two alike."""
    asked = [(q.kind, q.question, q.answer) for q in all_questions(scene, rng)]
    for thing in scene.things:
        asked += where(scene, thing, rng)
        if thing.motion and scene.plot == "turns":
            wordings = KINDS["direction"].wordings["named"]
            words = wordings[int(rng.integers(len(wordings)))].format(shape=thing.shape)
            asked.append(("direction", words, thing.motion.direction))
    asked += when(scene) + then(scene)
    weights = np.array([WEIGHTS.get(kind, 1.0) for kind, _, _ in asked])
    n = min(LONGEST, len(asked))
    chosen = rng.choice(len(asked), n, replace=False, p=weights / weights.sum())
    return [asked[i] for i in chosen]


def row(scene: Scene, number: int) -> dict[str, object]:
    """One of the conversations about a clip, in LLaVA's format."""
    medium = "video" if scene.has_video else "audio"
    asked = lessons(scene, generator(scene.seed, scene.index, scene.split, f"lessons {number}"))
    turns = []
    for i, (_, question, answer) in enumerate(asked):
        mark = f"<{medium}>\n" if i == 0 else ""
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {
        "id": f"{scene.key}-{number}",
        medium: f"{CLIPS}/{clip_name(scene)}",
        "conversations": turns,
        "kind": [kind for kind, _, _ in asked],
    }


def main() -> None:
    """Write the clips, then the conversations."""
    parser = argparse.ArgumentParser(description="Training data of the small model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()

    def progress(done: int, wanted: int) -> None:
        print(f"\r{done}/{wanted} clips", end="" if done < wanted else "\n", flush=True)

    synthesize(given.out, given.clips, given.seed, SPLIT, given.workers, progress)
    rows = []
    for index in range(given.clips):
        scene = sample_scene(given.seed, index, SPLIT)
        rows += [row(scene, number) for number in range(PER_CLIP)]
    file = given.out / "conversations.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    print(f"Wrote {file}: {len(rows)} conversations.")


if __name__ == "__main__":
    main()
