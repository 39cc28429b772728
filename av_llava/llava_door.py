"""LLaVA's calling convention: ids with sentinels, ``images`` in slots, six values back.

Contract: what ``prepare_inputs_labels_for_multimodal`` of LLaVA-NeXT returns, without its faults:
slots and sentinels must match, no sample is dropped, no image is re-used, no medium is cut.
One image slot a sentinel; a text-only sample may have one dummy slot, which is skipped.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_llava.aggregators import TokenPlan
from av_llava.aggregators.image_layout import ImagePlan
from av_llava.audio.placement import AudioPlan
from av_llava.errors import UsageError, unknown_name
from av_llava.planning import MediaPlan, MediaPlanner, MediumRef, TextChunk
from av_llava.settings import AUDIO_TOKEN_INDEX, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX

_MODALITIES = ("image", "video", "text")


@dataclass(frozen=True)
class Media:
    """The media arguments of LLaVA's functions.

    Args:
        images: normalised pixels: a list with [3, H, W], [n_tiles, 3, H, W] or, for a video,
            [T, 3, H, W] a slot; the same as one 5-D tensor; or one 4-D tensor with a single
            crop a slot, whose features are then used as they are.
        modalities: image, video or text, one for all slots or one a slot.
        image_sizes: (width, height) of the originals, one a slot.
        audios: 16 kHz mono waveforms, one a sentinel. [S]
        audio_lengths: valid samples of each.
    """

    images: Any = None
    modalities: str | Sequence[str] = ("image",)
    image_sizes: Sequence[tuple[int, int]] | None = None
    audios: Sequence[Tensor] | Tensor | None = None
    audio_lengths: Sequence[int] | None = None


@dataclass
class _Door:
    """A batch that came through the door: its plan and its tensors."""

    media: MediaPlan
    tensors: dict[str, Any]


def prepare(
    model: Any,
    input_ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: Any,
    labels: Tensor | None,
    media: Media,
) -> tuple[Any, ...]:
    """Splice, and return (None, position_ids, attention_mask, past_key_values, embeds, labels).

    As in the reference, mask, positions and labels come back as None where None was given, and
    everything comes back unchanged, with embeds None, when there is nothing to splice.
    """
    nothing = media.images is None and media.audios is None
    if nothing or _is_decode_step(input_ids, past_key_values):
        return input_ids, position_ids, attention_mask, past_key_values, None, labels
    sequence = model.config.sequence
    door = _open(model, input_ids, attention_mask, labels, media, sequence.padding_side)
    embeds = model.prepare_inputs(door.media, **door.tensors)
    plan, device = door.media.splice, embeds.device
    new_positions = None if position_ids is None else plan.position_ids().to(device)
    if model.training and sequence.position_skipping is not None:
        new_positions = _skipped_positions(plan.shape[1], sequence.position_skipping).to(device)
    new_mask = None
    if attention_mask is not None:
        new_mask = plan.attention_mask().to(device, attention_mask.dtype)
    new_labels = plan.labels()
    if new_labels is not None:
        new_labels = new_labels.to(device, labels.dtype)  # type: ignore[union-attr]
    return None, new_positions, new_mask, past_key_values, embeds, new_labels


def prompt(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, media: Media
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, L, D] and mask [B, L] for generation, padded on the left."""
    door = _open(model, input_ids, attention_mask, None, media, "left")
    embeds = model.prepare_inputs(door.media, **door.tensors)
    return embeds, door.media.splice.attention_mask().to(embeds.device)


def _is_decode_step(input_ids: Tensor, past_key_values: Any) -> bool:
    if input_ids.shape[1] != 1:
        return False
    return past_key_values is not None or not bool((input_ids < 0).any())


def _skipped_positions(length: int, gap: int) -> Tensor:
    """One row of positions with two random jumps (LLaVA-NeXT's ``use_pos_skipping``). [1, L]"""
    positions = torch.arange(length)[None]
    split = random.randint(0, length)
    left = random.randint(0, gap)
    right = random.randint(left, gap)
    positions[:, :split] += left
    positions[:, split:] += right
    return positions


def _open(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    media: Media,
    padding_side: str,
) -> _Door:
    """Match sentinels with slots and plan the batch."""
    planner: MediaPlanner = model.model.planner
    rows = _host_rows(input_ids, attention_mask, labels)
    slots = _Slots(media, [int(np.isin(r.ids, _VISUAL).sum()) for r in rows])
    waves = _waveforms(media)
    plans = _Plans(planner, slots, waves)
    samples = [_parts(i, row, slots, plans, planner) for i, row in enumerate(rows)]
    if plans.n_heard != len(waves):
        raise UsageError(
            f"The ids hold {plans.n_heard} audio placeholders ({AUDIO_TOKEN_INDEX}), but "
            f"{len(waves)} audios were given."
        )
    batch = planner.batch(
        samples,
        images=plans.images,
        videos=plans.videos,
        audios=plans.audios,
        padding_side=padding_side,
        supervised=labels is not None,
        max_length=model.config.sequence.max_length,
    )
    tensors: dict[str, Any] = {}
    if plans.images:
        tensors["pixel_values"] = plans.tiles
    if plans.videos:
        tensors["pixel_values_videos"] = plans.frames
    if plans.audios:
        tensors["input_features"] = model.model.audio_tower.features(waves, plans.audios).features
    return _Door(batch, tensors)


_VISUAL = (IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX)


def _host_rows(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> list[TextChunk]:
    """The content of each sample on the host; one copy of each tensor."""
    ids = input_ids.detach().to("cpu", torch.int64).numpy()
    host_labels = None if labels is None else labels.detach().to("cpu", torch.int64).numpy()
    keep = None if attention_mask is None else attention_mask.detach().to("cpu").numpy() != 0
    rows = []
    for i, row in enumerate(ids):
        kept = slice(None) if keep is None else keep[i]
        rows.append(TextChunk(row[kept], None if host_labels is None else host_labels[i][kept]))
    return rows


class _Slots:
    """The image slots of the batch, dealt to samples."""

    def __init__(self, media: Media, n_sentinels: list[int]) -> None:
        images = media.images
        # One 4-D tensor means: features as they are, no merging and no pooling.
        self.raw = isinstance(images, Tensor) and images.ndim == 4
        self.images: list[Tensor] = [] if images is None else list(images)
        n = len(self.images)
        with_dummies = sum(max(1, k) for k in n_sentinels)
        if n not in (with_dummies, sum(n_sentinels)) and images is not None:
            raise UsageError(
                f"The ids hold {sum(n_sentinels)} image or video placeholders in "
                f"{len(n_sentinels)} samples, which needs {sum(n_sentinels)} image slots (or "
                f"{with_dummies} with one dummy for each text-only sample), but {n} were given."
            )
        if images is None and any(n_sentinels):
            raise UsageError(
                f"The ids hold {sum(n_sentinels)} image or video placeholders, but no images "
                f"were given."
            )
        self.modalities = _broadcast(media.modalities, n)
        self.sizes = _sizes(media.image_sizes, n)
        dummies = n != sum(n_sentinels)
        self.first: list[int] = []
        at = 0
        for k in n_sentinels:
            self.first.append(at)
            at += max(1, k) if dummies else k

    def tensor(self, slot: int) -> Tensor:
        """Tiles or frames of a slot. [n, 3, H, W]"""
        image = self.images[slot]
        if image.ndim not in (3, 4):
            raise UsageError(
                f"Image slot {slot} has shape {tuple(image.shape)}; expected [3, H, W] or "
                f"[n, 3, H, W]."
            )
        return image[None] if image.ndim == 3 else image


def _broadcast(modalities: str | Sequence[str], n_slots: int) -> list[str]:
    given = [modalities] if isinstance(modalities, str) else list(modalities)
    for name in given:
        if name not in _MODALITIES:
            raise unknown_name("modality", name, _MODALITIES)
    if len(given) == 1:
        return given * n_slots
    if len(given) != n_slots:
        raise UsageError(
            f"modalities has {len(given)} entries, but there are {n_slots} image slots. Give one "
            f"for all, or one for each."
        )
    return given


def _sizes(sizes: Any, n_slots: int) -> list[tuple[int, int] | None]:
    if sizes is None:
        return [None] * n_slots
    given = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
    if len(given) != n_slots:
        raise UsageError(f"image_sizes has {len(given)} entries for {n_slots} image slots.")
    return [(int(w), int(h)) for w, h in given]


def _waveforms(media: Media) -> list[Tensor]:
    """The valid samples of each audio. [S]"""
    if media.audios is None:
        return []
    waves = [torch.as_tensor(a).flatten() for a in media.audios]
    if media.audio_lengths is None:
        return waves
    lengths = [int(n) for n in media.audio_lengths]
    if len(lengths) != len(waves):
        raise UsageError(f"audio_lengths has {len(lengths)} entries for {len(waves)} audios.")
    for i, (wave, n) in enumerate(zip(waves, lengths, strict=True)):
        if not 0 < n <= len(wave):
            raise UsageError(f"audio_lengths[{i}] is {n}, but audio {i} has {len(wave)} samples.")
    return [wave[:n] for wave, n in zip(waves, lengths, strict=True)]


class _Plans:
    """Plans and tensors of the media, in the order in which the prompts name them."""

    def __init__(self, planner: MediaPlanner, slots: _Slots, waves: list[Tensor]) -> None:
        self.planner, self.slots, self.waves = planner, slots, waves
        self.images: list[ImagePlan] = []
        self.videos: list[TokenPlan] = []
        self.audios: list[AudioPlan] = []
        self.tiles: list[Tensor] = []
        self.frames: list[Tensor] = []
        self.n_heard = 0

    def visual(self, slot: int, sentinel: int) -> MediumRef:
        """Plan the image or video of a slot."""
        tensor = self.slots.tensor(slot)
        video = self.slots.modalities[slot] == "video" or sentinel == VIDEO_TOKEN_INDEX
        if video and not self.slots.raw:
            self.videos.append(self.planner.video(len(tensor)))
            self.frames.append(tensor)
            return MediumRef("video", len(self.videos) - 1)
        size = self.slots.sizes[slot]
        self.images.append(self.planner.image(size, len(tensor), single_tensor=self.slots.raw))
        self.tiles.append(tensor)
        return MediumRef("image", len(self.images) - 1)

    def heard(self) -> MediumRef | None:
        """Plan the next audio; None when there is none left."""
        self.n_heard += 1
        if self.n_heard > len(self.waves):
            return None
        self.audios.append(self.planner.audio(len(self.waves[self.n_heard - 1])))
        return MediumRef("audio", self.n_heard - 1)


def _parts(
    sample: int, row: TextChunk, slots: _Slots, plans: _Plans, planner: MediaPlanner
) -> list[TextChunk | MediumRef]:
    """Cut one sample at its sentinels."""
    parts: list[TextChunk | MediumRef] = []
    at, slot = 0, slots.first[sample]
    for cut in np.flatnonzero(row.ids < 0):
        sentinel = int(row.ids[cut])
        parts.append(_chunk(row, at, int(cut)))
        at = int(cut) + 1
        if sentinel in _VISUAL:
            parts.append(plans.visual(slot, sentinel))
            slot += 1
        elif sentinel == AUDIO_TOKEN_INDEX:
            heard = plans.heard()
            if heard is not None:
                marked = planner.is_marked(row.ids, int(cut))
                parts.append(heard._replace(marked=marked))
        else:
            raise UsageError(
                f"Sample {sample} holds the negative id {sentinel}; known sentinels are "
                f"{IMAGE_TOKEN_INDEX} (image), {VIDEO_TOKEN_INDEX} (video) and "
                f"{AUDIO_TOKEN_INDEX} (audio)."
            )
    parts.append(_chunk(row, at, len(row.ids)))
    return parts


def _chunk(row: TextChunk, lo: int, hi: int) -> TextChunk:
    return TextChunk(row.ids[lo:hi], None if row.labels is None else row.labels[lo:hi])
