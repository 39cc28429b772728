"""Stage 0b: teach the lower layers of the language model what happens in a clip, by linear readers
that are thrown away.

python scripts/tiny/pretrain_events.py FOLDER [--steps N]

Contract: changes the projectors, the learned marks, the embedding and the lower layers of the
language model of the checkpoint in FOLDER; the towers stay as they are. Scenes are drawn on the fly
and never repeat. Every token of a clip says what is so in its own part of the picture and at its
own time; every name that is written after the clip says what is so of the thing that it names
(`clip_targets`). No question is asked and none is answered.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from clip_targets import FLAGS, NAMES, RELATIONS, ClipTargets, TokenTargets
from pretrain_towers import PLACE, Scenes, halved_colour, share_right, train
from torch import Tensor, nn
from torch.nn import functional as F

from av_llava.auto import AVLlavaForConditionalGeneration, AVLlavaProcessor
from av_llava.chat import MediaPart, Message, TextPart
from av_llava.planning import MediaPlanner
from av_llava.prepared import BatchBuilder, Prepared
from av_llava.training.world import Scene
from av_llava.training.world.parts import COLOURS, DIRECTIONS, SHAPES, SOUNDS
from av_llava.training.world.picture import frames
from av_llava.training.world.sound import waveform

TOKEN_LAYERS, NAME_LAYERS = 2, 3
"""After so many layers of the language model, tokens of media and names are read."""
Loss = tuple[Tensor, dict[str, float]]


class Clips:
    """Lays clips with a picture out as the model sees them, names after each."""

    def __init__(self, processor: AVLlavaProcessor, seed: int) -> None:
        self.processor, self.rng = processor, np.random.default_rng(seed)
        self.planner = MediaPlanner(processor.config)
        self.options = processor.media_options()
        self.n_frames: int = processor.config.sampling.frames
        tokens = [processor.tokenizer.encode(f" {n}", add_special_tokens=False) for n in NAMES]
        assert all(len(ids) == 1 for ids in tokens)
        self.names = {ids[0]: name for ids, name in zip(tokens, NAMES, strict=True)}

    def batch(self, scenes: Sequence[Scene]) -> tuple[Prepared, dict[str, Tensor]]:
        """The clips, and what each token is to say."""
        builder = BatchBuilder(self.processor, self.planner, self.options, True)
        clips = [ClipTargets(scene, self.n_frames) for scene in scenes]
        for clip in clips:
            sound = torch.from_numpy(waveform(clip.scene)) if clip.scene.has_audio else "off"
            fps = (self.n_frames - 1) / float(clip.times[-1])
            sampling = replace(self.options.sampling, source_fps=fps)
            builder.options = replace(self.options, sampling=sampling, audio=sound)
            pictures = halved_colour(frames(clip.scene, clip.times))
            message = Message("user", (MediaPart("video", pictures), self.written_names()))
            builder.add([message], add_generation_prompt=False, supervised=False)
        prepared = builder.finish("right", supervised=False)
        return prepared, self.targets(prepared, clips)

    def written_names(self) -> TextPart:
        """All names in a new order."""
        order = self.rng.permutation(len(NAMES))
        return TextPart("\n" + "".join(f" {NAMES[i]}" for i in order))

    def targets(self, prepared: Prepared, clips: list[ClipTargets]) -> dict[str, Tensor]:
        """What each token of a batch is to say."""
        plan = prepared.media.splice
        targets = TokenTargets(plan.shape)
        targets.fill(prepared, clips)
        targets.fill_names(plan.input_ids(dict.fromkeys(plan.counts, -1), -1), clips, self.names)
        return targets.tensors()


@dataclass(frozen=True)
class Reading:
    """One thing that is read: classes (``groups`` times), yes or no, or places and times."""

    name: str
    kind: str
    """class, flag or number"""
    size: int
    """Classes of one group, flags, or numbers."""
    groups: int = 1
    first: int = 0
    """The target that is the first class."""


TOKEN_READINGS = (
    Reading("look", "class", len(COLOURS) + 1, len(SHAPES)),
    Reading("look", "class", len(COLOURS), len(SHAPES), first=1),
    Reading("place", "number", 2),
    Reading("way", "class", len(DIRECTIONS)),
    Reading("changes", "class", 3),
    Reading("flags", "flag", len(FLAGS)),
)
NAME_READINGS = (
    Reading("there", "class", 2),
    Reading("shape", "class", len(SHAPES)),
    Reading("colours", "class", len(COLOURS), 2),
    Reading("ends", "number", 4),
    Reading("when", "number", 1),
    Reading("course", "class", len(DIRECTIONS) + 1),
    Reading("relations", "flag", len(RELATIONS)),
    Reading("heard", "class", len(SOUNDS)),
    Reading("beeps", "class", 4),
)
FLAG_NAMES = {"flags": FLAGS, "relations": RELATIONS}


class Readers(nn.Module):
    """Linear readers of hidden states."""

    def __init__(self, width: int, readings: tuple[Reading, ...]) -> None:
        super().__init__()
        self.readings = readings
        self.norm = nn.RMSNorm(width)
        self.read = nn.Linear(width, sum(r.size * r.groups for r in readings))

    def forward(self, hidden: Tensor, want: dict[str, Tensor]) -> Loss:
        """Loss and accuracies; hidden [B, L, width]."""
        loss, seen = hidden.new_zeros([]), {}
        parts = self.read(self.norm(hidden)).split([r.size * r.groups for r in self.readings], -1)
        for reading, said in zip(self.readings, parts, strict=True):
            wanted = want[reading.name]
            if wanted.ndim == 2:
                wanted = wanted[..., None]
            if (wanted < reading.first).all():
                continue  # no clip of the batch has such a thing
            if reading.kind == "class":
                part, right = self._classes(said.unflatten(-1, (-1, reading.size)), wanted, reading)
            elif reading.kind == "flag":
                part, right = self._flags(said, wanted, FLAG_NAMES[reading.name])
            else:
                part, right = self._numbers(said, wanted, reading.name)
            loss, seen = loss + part, seen | right
        return loss, seen

    @staticmethod
    def _classes(logits: Tensor, wanted: Tensor, reading: Reading) -> Loss:
        asked = wanted >= reading.first
        chosen = wanted[asked] - reading.first
        right = share_right(logits[asked], chosen)
        name = reading.name if not reading.first else f"{reading.name} of what is there"
        return F.cross_entropy(logits[asked], chosen), {name: right}

    @staticmethod
    def _flags(logits: Tensor, wanted: Tensor, names: tuple[str, ...]) -> Loss:
        loss, seen = logits.new_zeros([]), {}
        for k, name in enumerate(names):
            asked = wanted[..., k] >= 0
            if not asked.any():
                continue
            said, true = logits[..., k][asked], wanted[..., k][asked]
            loss = loss + F.binary_cross_entropy_with_logits(said, true.float())
            right = ((said > 0) == (true > 0)).float()
            if 0 < true.sum() < len(true):  # both answers count as much, however rare one is
                seen[name] = (right[true > 0].mean() + right[true == 0].mean()).item() / 2
        return loss, seen

    @staticmethod
    def _numbers(said: Tensor, wanted: Tensor, name: str) -> Loss:
        asked = wanted >= 0
        missed = said[asked] - wanted[asked]
        return PLACE * missed.square().mean(), {f"{name} error": missed.abs().mean().item()}


def learn_events(
    model: AVLlavaForConditionalGeneration,
    batch: Callable[[], tuple[Prepared, dict[str, Tensor]]],
    steps: int,
    lr: float,
) -> None:
    """Train all but the towers and the upper layers of the language model."""
    parts, text = model.model, model.model.language_model
    layers, norm = text.layers, text.norm
    text.layers, text.norm = layers[:NAME_LAYERS], nn.Identity()
    width = text.config.hidden_size
    readers = [Readers(width, TOKEN_READINGS), Readers(width, NAME_READINGS)]
    learns = (parts.mm_projector, parts.mm_audio_projector, parts.media_tokens, text)

    def step() -> Loss:
        prepared, want = batch()
        out = parts(media=prepared.media, **prepared.tensors, output_hidden_states=True)
        of_tokens, seen = readers[0](out.hidden_states[TOKEN_LAYERS].float(), want)
        of_names, named = readers[1](out.last_hidden_state.float(), want)
        return of_tokens + of_names, seen | named

    model.train()
    train(step, [*learns, *readers], steps, lr, "events")
    text.layers, text.norm = layers, norm


def main() -> None:
    """Train the lower layers of a folder's language model, in place."""
    parser = argparse.ArgumentParser(description="Show the small model what happens in clips.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--clips", type=int, default=32, help="of a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    model = AVLlavaForConditionalGeneration.from_pretrained(
        given.folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.model.vision_tower.requires_grad_(False)
    model.model.audio_tower.requires_grad_(False)
    scenes = Scenes(given.seed)
    clips = Clips(AVLlavaProcessor.from_pretrained(given.folder), given.seed)

    def batch() -> tuple[Prepared, dict[str, Tensor]]:
        return clips.batch([scenes.next(lambda s: s.has_video) for _ in range(given.clips)])

    learn_events(model, batch, given.steps, given.lr)
    model.save_pretrained(given.folder)


if __name__ == "__main__":
    main()
