"""Stage 0a: teach both towers what single frames show and what short sounds are, with heads that
are thrown away.

python scripts/tiny/pretrain_towers.py FOLDER [--frame-steps N] [--sound-steps N]

Contract: changes only the two towers of the checkpoint in FOLDER. Scenes are drawn on the fly and
never repeat. What heads read, they read linearly from the features after the aggregator's pooling,
which is what the projectors will see.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from av_llava.auto import AVLlavaForConditionalGeneration
from av_llava.training.world import Scene, sample_scene
from av_llava.training.world.parts import COLOURS, SHAPES, SOUNDS, Seen
from av_llava.training.world.picture import frames
from av_llava.training.world.sound import waveform

SPLIT = "towers"
N_COLOURS, N_SHAPES = len(COLOURS), len(SHAPES)
GRID = 8
CELLS = {2: 0.2, 4: 0.15}
"""Tokens on a side of the fast and of the slow stream, and the least share of a thing's box that a
token must hold to tell of it."""
TABLES = ("colours", "shape_of", "shapes", "place", "most")
PLACE = 20.0
"""Weight of the squared error of a place, whose unit is the picture's side."""
FRAMES_PER_SCENE = 3


def overlaps(place: tuple[float, float], size: float, cells: int) -> np.ndarray:
    """Share of a thing's box in each of cells x cells parts of the picture, [cells * cells]."""
    edges = np.arange(cells + 1) / cells

    def along(centre: float) -> np.ndarray:
        low, high = max(0.0, centre - size / 2), min(1.0, centre + size / 2)
        inside = np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])
        return np.clip(inside, 0, None) / (high - low)

    return (along(place[1])[:, None] * along(place[0])[None]).reshape(-1)


class FrameTargets:
    """What is to be read of one frame: of each patch, and of each token of both streams.

    A token tells of the things that lie in its own part of the picture, and of no others: then
    the language model can choose among tokens. Where every token knows the whole picture, it
    learns to answer what is there, and not what belongs together (docs/tiny.md).
    """

    def __init__(self, scene: Scene, time_s: float) -> None:
        axis = (np.arange(GRID) + 0.5) / GRID
        self.patch_colour = np.zeros((GRID, GRID), np.int64)  # 0 is background
        self.patch_shape = np.zeros((GRID, GRID), np.int64)
        self.patch_place = np.zeros((GRID, GRID, 2), np.float32)
        self.tables = {}
        for cells in CELLS:
            self.tables[f"colours{cells}"] = np.zeros((cells**2, N_COLOURS, 3), np.float32)
            self.tables[f"shape_of{cells}"] = np.full((cells**2, N_COLOURS), -1, np.int64)
            self.tables[f"shapes{cells}"] = np.zeros((cells**2, N_SHAPES), np.float32)
            self.tables[f"place{cells}"] = np.zeros((cells**2, 2), np.float32)
            self.tables[f"most{cells}"] = np.zeros(cells**2, np.float32)
        for thing in scene.things_at(time_s):
            self._add(thing, axis)

    def _add(self, thing: Seen, axis: np.ndarray) -> None:
        colour, shape = list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)
        x, y = thing.place
        across = abs(axis[None] - x) < thing.size / 2
        near = across & (abs(axis[:, None] - y) < thing.size / 2)
        self.patch_colour[near], self.patch_shape[near] = colour + 1, shape
        self.patch_place[near] = (x, y)
        for cells, least in CELLS.items():
            share = overlaps(thing.place, thing.size, cells)
            held = share >= least
            most = held & (share > self.tables[f"most{cells}"])
            self.tables[f"most{cells}"][most] = share[most]
            self.tables[f"place{cells}"][most] = (x, y)
            self.tables[f"colours{cells}"][held, colour] = (1, x, y)  # it is there, where
            self.tables[f"shape_of{cells}"][held, colour] = shape
            self.tables[f"shapes{cells}"][held, shape] = 1

    def arrays(self) -> dict[str, np.ndarray]:
        """All of them by name."""
        patches = ("patch_colour", "patch_shape", "patch_place")
        return {**{name: getattr(self, name) for name in patches}, **self.tables}


def halved_colour(pictures: np.ndarray) -> np.ndarray:
    """What 4:2:0 does to frames [T, H, W, 3]: colour at half the size, brightness at the whole."""
    levels = pictures.astype(np.float32)
    bright = (levels @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    n, side = levels.shape[:2]
    colour = (levels - bright).reshape(n, side // 2, 2, side // 2, 2, 3).mean((2, 4))
    whole = bright + colour.repeat(2, 1).repeat(2, 2)
    return np.clip(whole + 0.5, 0, 255).astype(np.uint8)


class Scenes:
    """An endless row of scenes."""

    def __init__(self, seed: int) -> None:
        self.rng, self.seed, self.index = np.random.default_rng(seed), seed, 0

    def next(self, wanted: Callable[[Scene], bool]) -> Scene:
        """The next scene of a kind."""
        while True:
            scene = sample_scene(self.seed, self.index, SPLIT)
            self.index += 1
            if wanted(scene):
                return scene

    def frame_batch(self, n: int) -> tuple[Tensor, dict[str, Tensor]]:
        """``n`` frames, uint8 [n, 3, H, W], and their targets."""
        pictures: list[np.ndarray] = []
        targets: list[FrameTargets] = []
        while len(pictures) < n:
            scene = self.next(lambda s: s.has_video)
            times = self.rng.uniform(0, scene.duration_s, FRAMES_PER_SCENE)
            pictures += list(halved_colour(frames(scene, times)))
            targets += [FrameTargets(scene, float(t)) for t in times]
        rows = [t.arrays() for t in targets[:n]]
        stacked = {name: torch.from_numpy(np.stack([r[name] for r in rows])) for name in rows[0]}
        return torch.from_numpy(np.stack(pictures[:n])).permute(0, 3, 1, 2), stacked

    def sound_batch(
        self, n: int, n_tokens: int, token_s: float
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """``n`` waveforms and their targets."""
        centres = (np.arange(n_tokens) + 0.5) * token_s
        waves, rows = [], []
        for _ in range(n):
            scene = self.next(lambda s: s.has_audio)
            sound = scene.sounds[0]
            waves.append(torch.from_numpy(waveform(scene)))
            started = centres > sound.onset_s
            rows.append(
                {
                    "kind": SOUNDS.index(sound.kind),
                    "beeps": sound.beeps,
                    "pitch": 1 + sound.rising if sound.kind == "chirp" else 0,
                    "started": started.astype(np.int64),
                    "sounds": (started & (centres < sound.end_s)).astype(np.int64),
                }
            )
        return waves, {k: torch.tensor(np.stack([r[k] for r in rows])) for k in rows[0]}


class FrameHeads(nn.Module):
    """Linear readers of patches, and of the tokens of both streams."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, N_COLOURS + 1 + N_SHAPES + 2)
        table = N_COLOURS * (3 + N_SHAPES) + N_SHAPES + 2
        self.tokens = nn.ModuleDict({str(cells): nn.Linear(width, table) for cells in CELLS})

    def forward(self, features: Tensor, want: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss and accuracies; features [n, patches, width]."""
        colour, shape, place = self.patch(features).split([N_COLOURS + 1, N_SHAPES, 2], -1)
        there = want["patch_colour"].flatten(1) > 0
        loss = 2 * F.cross_entropy(colour.flatten(0, 1), want["patch_colour"].flatten())
        loss = loss + F.cross_entropy(shape[there], want["patch_shape"].flatten(1)[there])
        wanted = want["patch_place"].flatten(1, 2)[there]
        loss = loss + PLACE * F.mse_loss(place[there], wanted)
        seen: dict[str, float] = {}
        grid = features.transpose(1, 2).unflatten(2, (GRID, GRID))
        for cells, head in self.tokens.items():
            tokens = F.avg_pool2d(grid, GRID // int(cells)).flatten(2).transpose(1, 2)
            part, read = self._table(head(tokens), {k: want[k + cells] for k in TABLES})
            loss = loss + part
            seen |= {f"{name} {cells}x{cells}": value for name, value in read.items()}
        return loss, seen

    def _table(self, read: Tensor, want: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss and accuracies of one stream's tokens."""
        colours, shapes, place = read.split([N_COLOURS * (3 + N_SHAPES), N_SHAPES, 2], -1)
        colours = colours.unflatten(-1, (N_COLOURS, -1))
        is_there = want["colours"][..., 0]
        there = is_there > 0
        places, wanted = colours[..., 1:3][there], want["colours"][..., 1:][there]
        named, shape = colours[..., 3:][there], want["shape_of"][there]
        loss = 4 * F.binary_cross_entropy_with_logits(colours[..., 0], is_there)
        loss = loss + 4 * F.binary_cross_entropy_with_logits(shapes, want["shapes"])
        loss = loss + PLACE * F.mse_loss(places, wanted) + F.cross_entropy(named, shape)
        held = want["most"] > 0
        missed = place[held] - want["place"][held]
        loss = loss + 2 * PLACE * missed.square().mean()
        miss = (places - wanted).abs().mean().item()
        return loss, {
            "shape": share_right(named, shape),
            "place error": miss,
            "own place error": missed.abs().mean().item(),
        }


class SoundHeads(nn.Module):
    """A linear reader of every audio token."""

    SIZES = {"kind": len(SOUNDS), "beeps": 5, "pitch": 3, "started": 2, "sounds": 2}  # noqa: RUF012

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, sum(self.SIZES.values()))

    def forward(self, tokens: Tensor, want: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss and accuracies; tokens [n, T, width]."""
        parts = self.read(tokens).split(list(self.SIZES.values()), -1)
        loss, seen = torch.zeros([]), {}
        for (name, target), got in zip(want.items(), parts, strict=True):
            each = target if target.ndim == 2 else target[:, None].expand(-1, tokens.shape[1])
            loss = loss + F.cross_entropy(got.flatten(0, 1), each.flatten())
            seen[name] = share_right(got, each)
        return loss, seen


def share_right(logits: Tensor, wanted: Tensor) -> float:
    """How often the largest logit is the wanted one."""
    return (logits.argmax(-1) == wanted).float().mean().item()


def train(
    step: Callable[[], tuple[Tensor, dict[str, float]]],
    modules: list[nn.Module],
    steps: int,
    lr: float,
    name: str,
) -> None:
    """AdamW with a short warm-up and a cosine."""
    parameters = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    start = time.monotonic()
    for i in range(steps):
        share = i / steps
        for group in optimizer.param_groups:
            decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
            group["lr"] = lr * min(1, (i + 1) / 50) * decay
        with torch.autocast("cpu", torch.bfloat16):
            loss, seen = step()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (i + 1) % 100 == 0 or i + 1 == steps:
            read = ", ".join(f"{k} {v:.3f}" for k, v in seen.items())
            spent = time.monotonic() - start
            print(
                f"{name} {i + 1}/{steps} {spent:.0f} s: loss {loss.item():.3f}, {read}", flush=True
            )


def main() -> None:
    """Train both towers of a folder, in place."""
    parser = argparse.ArgumentParser(description="Pretrain the towers of the small model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frame-steps", type=int, default=3000)
    parser.add_argument("--sound-steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    model = AVLlavaForConditionalGeneration.from_pretrained(given.folder, dtype=torch.float32)
    scenes = Scenes(given.seed)
    sight, ears = model.model.vision_tower, model.model.audio_tower
    stride = model.config.audio.pool_stride
    heads, reader = FrameHeads(sight.hidden_size), SoundHeads(ears.hidden_size)

    def look() -> tuple[Tensor, dict[str, float]]:
        pixels, want = scenes.frame_batch(96)
        return heads(sight(pixels).float(), want)

    def listen() -> tuple[Tensor, dict[str, float]]:
        n_tokens = ears.frames_per_chunk // stride
        waves, want = scenes.sound_batch(48, n_tokens, stride / ears.frame_rate_hz)
        inputs = ears.features(waves)
        heard, _ = ears(inputs.features, inputs.lengths)
        return reader(heard.float().unflatten(1, (n_tokens, stride)).mean(2), want)

    train(listen, [ears, reader], given.sound_steps, 2e-3, "sound")
    train(look, [sight, heads], given.frame_steps, given.lr, "frames")
    model.save_pretrained(given.folder)


if __name__ == "__main__":
    main()
