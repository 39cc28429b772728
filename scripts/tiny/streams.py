"""What each stream is worth: slow alone, fast alone, and both, at about as many tokens a clip.

python scripts/tiny/streams.py FOLDER [--seeds 1,2,3] [--jobs N] [--out FILE.json]

Contract: the vision tower of the checkpoint in FOLDER stays as it is, and its features of each clip
are computed once and used by every run. Projector and language model start anew in each run, from a
seed, and learn in the stages of the small model, shortly; several runs at a time, on one core each.
Only what needs sight is asked; there is no sound. Reports the right answers by kind, as they come
out, with intervals over the seeds' runs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing  # its tensors pass between processes through shared memory
from build import build
from clip_targets import ClipTargets
from make_data import EVENTS, lessons
from pretrain_events import Clips, Loss, learn_events
from pretrain_towers import GRID, halved_colour, train
from torch import Tensor

from av_llava.auto import AVLlavaForConditionalGeneration
from av_llava.chat import MediaPart, Message, Part, TextPart
from av_llava.encoding import TowerOutputs
from av_llava.prepared import BatchBuilder, Prepared
from av_llava.settings import AggregatorSettings, PoolSettings, StreamSettings
from av_llava.training.world import KINDS, Scene, sample_scene
from av_llava.training.world.picture import frames
from av_llava.training.world.questions import Question, questions
from av_llava.training.world.scene import generator

Step = Callable[[], Loss]
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""0.975-quantiles with 1 to 9 degrees of freedom."""
SEEN = tuple(name for name, kind in KINDS.items() if "audio" not in kind.needs)


@dataclass(frozen=True)
class Variant:
    """Which frames are shown, and how."""

    frames: int
    aggregator: AggregatorSettings | None
    """None: that of the small model, both streams."""


def _single(stride: int) -> AggregatorSettings:
    pool = PoolSettings("average", stride, tail="partial")
    return AggregatorSettings(
        layout="single", slow=StreamSettings(pool=pool), fast=None, stage="pre"
    )


VARIANTS = {
    "slow": Variant(7, _single(2)),  # 7 frames of 4 x 4 tokens
    "fast": Variant(24, _single(4)),  # 24 frames of 2 x 2 tokens
    "both": Variant(12, None),
}


@torch.no_grad()
def encode(model: AVLlavaForConditionalGeneration, scenes: Sequence[Scene]) -> Tensor:
    """Patches of every frame of every clip, bfloat16 [clips, frames, GRID, GRID, width]."""
    out = []
    for scene in scenes:
        times = np.arange(round(scene.duration_s * scene.fps)) / scene.fps
        pixels = torch.from_numpy(halved_colour(frames(scene, times))).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            patches = model.model.encode_patches(pixels)
        out.append(patches.bfloat16().unflatten(1, (GRID, GRID)))
    return torch.stack(out)


@dataclass(frozen=True)
class Features:
    """Scenes with pictures, and what the tower gave for them."""

    scenes: list[Scene]
    patches: Tensor
    """bfloat16 [scenes, frames, GRID, GRID, width]"""


def seen(split: str, n: int, seed: int) -> list[Scene]:
    """The first n scenes of a split that have pictures."""
    many = (sample_scene(seed, i, split) for i in range(4 * n))
    return [scene for scene in many if scene.has_video][:n]


class CachedClips(Clips):
    """Lays out clips whose features are known."""

    def prepare(
        self, known: Features, chosen: Sequence[int], turns: Sequence[Sequence[Message]]
    ) -> Prepared:
        """Conversations about clips; the first turn of each lacks its video still."""
        fps = self.n_frames / known.scenes[0].duration_s
        options = self.processor.media_options(source_fps=fps, audio="off")
        builder = BatchBuilder(self.processor, self.planner, options, False)
        blank = np.zeros((self.n_frames, 64, 64, 3), np.uint8)
        supervised = any(m.role == "assistant" for m in turns[0])
        for messages in turns:
            first: tuple[Part, ...] = (MediaPart("video", blank), *messages[0].parts)
            told = [Message("user", first), *messages[1:]]
            builder.add(told, add_generation_prompt=False, supervised=supervised)
        prepared = builder.finish("right", supervised=supervised)
        last = known.patches.shape[1] - 1
        shown = torch.from_numpy(np.round(np.linspace(0, last, self.n_frames)).astype(np.int64))
        aggregator, outputs = prepared.media.aggregator, TowerOutputs()
        for i, (clip, plan) in enumerate(zip(chosen, prepared.media.videos, strict=True)):
            reduced = aggregator.reduce(known.patches[clip][shown].float(), plan)
            outputs.known["video", i] = reduced.streams
        prepared.tensors["tower_outputs"] = outputs
        return prepared

    def events(self, known: Features, chosen: Sequence[int]) -> tuple[Prepared, dict[str, Tensor]]:
        """Clips with names after them, and what each token is to say."""
        turns = [[Message("user", (self.written_names(),))] for _ in chosen]
        silent = [replace(known.scenes[i], sounds=()) for i in chosen]
        clips = [ClipTargets(scene, self.n_frames) for scene in silent]
        prepared = self.prepare(known, chosen, turns)
        return prepared, self.targets(prepared, clips)


def conversation(asked: Sequence[Question]) -> list[Message]:
    """Questions and answers; the place of the video is before the first."""
    turns = []
    for i, question in enumerate(asked):
        turns.append(Message("user", (TextPart("\n" * (i == 0) + question.question),)))
        turns.append(Message("assistant", (TextPart(question.answer),)))
    return turns


def answered(logits: Tensor, labels: Tensor) -> list[bool]:
    """Whether every supervised token of each row is the likeliest. [B]"""
    wanted, said = labels[:, 1:], logits[:, :-1].argmax(-1)
    return ((said == wanted) | (wanted == -100)).all(1).tolist()


def run(
    variant: Variant, seed: int, taught: Features, held: Features, steps: tuple[int, int, int]
) -> dict[str, list[int]]:
    """Train one model; right answers and questions by kind."""
    model, processor = build(seed, variant.aggregator, variant.frames)
    model.set_attn_implementation("eager")
    for part in ("vision_tower", "audio_tower", "mm_audio_projector"):
        getattr(model.model, part).requires_grad_(False)
    clips, rng = CachedClips(processor, seed), np.random.default_rng(seed)

    def events() -> tuple[Prepared, dict[str, Tensor]]:
        return clips.events(taught, rng.integers(len(taught.scenes), size=32).tolist())

    learn_events(model, events, steps[0], 2e-3)

    def answers(kinds: tuple[str, ...], n: int) -> Step:
        def step() -> Loss:
            chosen: list[int] = []
            turns: list[list[Message]] = []
            while len(chosen) < n:
                index = int(rng.integers(len(taught.scenes)))
                asked = [q for q in lessons(taught.scenes[index], rng) if q.kind in kinds]
                if asked:
                    chosen.append(index)
                    turns.append(conversation(asked))
            prepared = clips.prepare(taught, chosen, turns)
            return model(media=prepared.media, **prepared.tensors).loss, {}

        return step

    model.train()
    happening = tuple(kind for kind in SEEN if kind in EVENTS)
    train(answers(happening, 32), [model], steps[1], 1e-3, "what happens")
    train(answers(SEEN, 16), [model], steps[2], 1e-3, "answers")
    model.eval()
    found: dict[str, list[int]] = {kind: [0, 0] for kind in SEEN}
    pairs = [
        (i, q)
        for i, scene in enumerate(held.scenes)
        for q in questions(scene, generator(scene.seed, scene.index, scene.split, "questions"))
        if q.kind in SEEN
    ]
    for at in range(0, len(pairs), 64):
        some = pairs[at : at + 64]
        prepared = clips.prepare(held, [i for i, _ in some], [conversation([q]) for _, q in some])
        with torch.no_grad():
            logits = model(media=prepared.media, **prepared.tensors).logits
        labels = prepared.media.splice.labels()
        assert labels is not None
        for (_, question), right in zip(some, answered(logits, labels), strict=True):
            found[question.kind][0] += right
            found[question.kind][1] += 1
    return found


def spread(shares: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean over seeds, by Student's t; nan for a single seed."""
    n = len(shares)
    if n == 1:
        return math.nan
    return STUDENT_T[min(n - 2, len(STUDENT_T) - 1)] * statistics.stdev(shares) / math.sqrt(n)


def markdown(runs: list[dict[str, object]]) -> str:
    """The table as it stands in docs/tiny.md: mean over seeds ± half its interval (each seed's)."""
    lines = ["| kind | questions | " + " | ".join(VARIANTS) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(VARIANTS))
    for kind in (*SEEN, "all"):
        cells, n = [], 0
        for name in VARIANTS:
            shares = []
            for one in (r for r in runs if r["variant"] == name):
                found: dict[str, list[int]] = one["found"]  # type: ignore[assignment]
                counts = found.values() if kind == "all" else [found[kind]]
                right, n = (sum(c[k] for c in counts) for k in (0, 1))
                shares.append(100 * right / max(n, 1))
            each = ", ".join(f"{share:.0f}" for share in shares)
            cells.append(f"{statistics.mean(shares):.1f} ± {spread(shares):.1f} ({each})")
        if n:
            lines.append(f"| {kind.replace('_', ' ')} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# What every run needs; workers inherit it by fork, so that features are held in memory once.
_towers: AVLlavaForConditionalGeneration | None = None
_taught: Features | None = None
_held: Features | None = None


def _encode_some(scenes: list[Scene]) -> Tensor:
    assert _towers is not None
    return encode(_towers, scenes)


def _run_one(job: tuple[str, int, tuple[int, int, int]]) -> dict[str, object]:
    name, seed, steps = job
    assert _taught is not None and _held is not None
    start = time.monotonic()
    found = run(VARIANTS[name], seed, _taught, _held, steps)
    seconds = round(time.monotonic() - start)
    return {"variant": name, "seed": seed, "seconds": seconds, "found": found}


def main() -> None:
    """Train every variant with every seed and print the table."""
    parser = argparse.ArgumentParser(description="Slow, fast and both streams, compared.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--held", type=int, default=600)
    parser.add_argument("--steps", default="300,300,500", help="of 0b, what happens, and all kinds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)  # before any work: a fork after threads have worked would hang
    global _towers, _taught, _held
    fork = multiprocessing.get_context("fork")
    _towers = AVLlavaForConditionalGeneration.from_pretrained(given.folder, dtype=torch.float32)
    _towers.eval()
    taught, held = seen("streams", given.clips, 1), seen("heldout", given.held, 2028)
    scenes = [*taught, *held]
    with fork.Pool(given.jobs) as pool:
        share = -(-len(scenes) // given.jobs)
        chunks = [scenes[i : i + share] for i in range(0, len(scenes), share)]
        patches = torch.cat(pool.map(_encode_some, chunks))
    _taught = Features(taught, patches[: len(taught)])
    _held = Features(held, patches[len(taught) :])
    first, happening, answering = map(int, given.steps.split(","))
    jobs = [
        (name, seed, (first, happening, answering))
        for seed in map(int, given.seeds.split(","))
        for name in VARIANTS
    ]
    runs: list[dict[str, object]] = []
    with fork.Pool(given.jobs) as pool:
        for one in pool.imap(_run_one, jobs, chunksize=1):
            runs.append(one)
            print(one, flush=True)
            if given.out:
                given.out.write_text(json.dumps(runs) + "\n", encoding="utf-8")
    print(markdown(runs))


if __name__ == "__main__":
    main()
