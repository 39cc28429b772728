"""transformers' calling convention: ids in which each medium already has a row for each token.

Contract: ids, mask and labels keep their shape. The media of a kind take the rows of their kind in
reading order of the batch, each just as many as its plan says; a medium never reaches from one
sample into the next. Every other position is text, padding too, with the embedding of its id, as in
transformers' LLaVA classes; the mask is the caller's. Start and end tokens of sound are ordinary
ids here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from av_llava import modalities
from av_llava.errors import UsageError
from av_llava.planning import MediaPlan, MediaPlanner
from av_llava.splice import Segment, SplicePlan

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ExpandedSplice(SplicePlan):
    """A plan whose rows are all positions that were given, and whose mask was given, too."""

    mask: np.ndarray | None = None
    """Bool, true on content; None means everywhere. [B, S]"""

    def attention_mask(self) -> Tensor:
        """Int64 mask as it was given, or ones. [B, S]"""
        if self.mask is None:
            return torch.ones(self.shape, dtype=torch.int64)
        return torch.from_numpy(self.mask.astype(np.int64))

    def position_ids(self) -> Tensor:
        """Int64 positions: 0..n-1 on content and 0 on padding. [B, S]"""
        mask = self.attention_mask()
        return (mask.cumsum(1) - 1) * mask

    def with_padding(self, side: str, length: int | None = None) -> NoReturn:
        """Not possible: the padding is part of the ids."""
        raise UsageError("Ids that came expanded keep the padding that they came with.")

    def truncated(self, max_length: int) -> NoReturn:
        """Not possible: the padding is part of the ids."""
        raise UsageError("Ids that came expanded keep the length that they came with.")


@dataclass(frozen=True)
class ExpandedInputs:
    """What stands beside expanded ids.

    Args:
        pixel_values: normalised tiles of all images of the batch: [N, n_tiles, 3, H, W] (images
            with fewer tiles than the largest are padded at the end), [N, 3, H, W], or one
            [n_tiles, 3, H, W] an image.
        image_sizes: (height, width) of the originals, one an image, in transformers' order.
        batch_num_images: images of each prompt, where that changes how they are cut.
        pixel_values_videos: normalised frames, [N, T, 3, H, W], one [T, 3, H, W] a video, or the
            frames [T, 3, H, W] of the only video.
        input_features: chunks of all clips, as the audio tower's extractor makes them.
        audio_lengths: samples at 16 kHz of each clip.
        modality_inputs: items of registered modalities, by name.
    """

    pixel_values: Tensor | Sequence[Tensor] | None = None
    image_sizes: Tensor | Sequence[Sequence[int]] | None = None
    batch_num_images: Tensor | Sequence[int] | None = None
    pixel_values_videos: Tensor | Sequence[Tensor] | None = None
    input_features: Tensor | None = None
    audio_lengths: Tensor | Sequence[int] | None = None
    modality_inputs: Mapping[str, Sequence[Tensor]] | None = None

    @property
    def tensors(self) -> dict[str, Any]:
        """What encoders take of it, by the names of ``prepare_inputs``."""
        named = {
            "pixel_values": self.pixel_values,
            "pixel_values_videos": self.pixel_values_videos,
            "input_features": self.input_features,
            "modality_inputs": self.modality_inputs,
        }
        return {name: value for name, value in named.items() if value is not None}

    def __bool__(self) -> bool:
        """Whether there is any medium."""
        return bool(self.tensors)


def open_expanded(
    planner: MediaPlanner,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    inputs: ExpandedInputs,
) -> tuple[MediaPlan, dict[str, Any]]:
    """Plan a batch of expanded ids.

    Args:
        planner: of the model.
        input_ids: ids with media ids. [B, S]
        attention_mask: [B, S], or [B, past + S] behind a cache; None means all content.
        labels: [B, S].
        inputs: the media.

    Returns:
        The plan and the tensors for ``prepare_inputs``.

    Raises:
        UsageError: ids and media do not match; the message names the medium.
    """
    images, tiles = _images(planner, inputs)
    videos, frames = _videos(inputs.pixel_values_videos)
    extras = {
        name: [modalities.get(name).n_tokens(item) for item in items]
        for name, items in (inputs.modality_inputs or {}).items()
    }
    media = plan_from_expanded(
        planner,
        input_ids,
        attention_mask,
        labels,
        images=images,
        videos=videos,
        audios=_clips(inputs),
        extras=extras,
    )
    n_chunks = sum(len(plan.chunks) for plan in media.audios)
    if inputs.input_features is not None and len(inputs.input_features) != n_chunks:
        raise UsageError(
            f"input_features holds {len(inputs.input_features)} chunk(s), but clips of "
            f"{_numbers(inputs.audio_lengths)} samples (audio_lengths) have {n_chunks}."
        )
    return media, replace(inputs, pixel_values=tiles, pixel_values_videos=frames).tensors


def plan_from_expanded(
    planner: MediaPlanner,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    images: Sequence[tuple[int, Size | None]] = (),
    videos: Sequence[int] = (),
    audios: Sequence[int] = (),
    extras: Mapping[str, Sequence[int]] | None = None,
) -> MediaPlan:
    """Plan a batch of expanded ids, whose media are known by number and size.

    Ids, mask and labels come to the host in one copy.

    Args:
        planner: of the model.
        input_ids: ids with media ids. [B, S]
        attention_mask: [B, S], or [B, past + S] behind a cache; None means all content.
        labels: [B, S]; on media rows they are ignored.
        images: (tiles, (width, height) of the original) of each image, in reading order.
        videos: frames of each video, in reading order.
        audios: samples at 16 kHz of each clip, in reading order.
        extras: tokens of each item of registered modalities, by name.

    Raises:
        UsageError: the ids have more or fewer rows for a medium than it needs.
    """
    ids, mask, host_labels = _on_host(input_ids, attention_mask, labels)
    image_plans = [planner.image(size, n_tiles) for n_tiles, size in images]
    video_plans = [planner.video(n_frames) for n_frames in videos]
    audio_plans = [planner.audio(n_samples) for n_samples in audios]
    counts = {
        "image": [plan.n_tokens for plan in image_plans],
        "video": [plan.n_tokens for plan in video_plans],
        "audio": [plan.n_tokens for plan in audio_plans],
        **{name: list(numbers) for name, numbers in (extras or {}).items()},
    }
    media_ids = planner.config.media_token_ids
    kinds = [kind for kind in media_ids if kind in counts]
    codes = np.zeros(ids.shape, dtype=np.int8)  # 0 is text, i + 1 is kinds[i]
    for i, kind in enumerate(kinds):
        codes[ids == media_ids[kind]] = i + 1
    _check_text(ids, codes)
    for i, kind in enumerate(kinds):
        _check_rows(kind, media_ids[kind], (codes == i + 1).sum(axis=1).tolist(), counts[kind])
    dealers = [_Dealer(kind, counts[kind]) for kind in kinds]
    row_labels = [None] * len(ids) if host_labels is None else list(host_labels)
    splice = ExpandedSplice.build(
        [_parts(*row, dealers) for row in zip(codes, ids, row_labels, strict=True)],
        {kind: numbers for kind, numbers in counts.items() if numbers},
        supervised=labels is not None,
    )
    assert isinstance(splice, ExpandedSplice)
    return MediaPlan(
        replace(splice, mask=mask),
        planner.aggregator,
        tuple(image_plans),
        tuple(video_plans),
        tuple(audio_plans),
    )


def _on_host(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Ids, mask and labels in one copy. Masks that are no [B, S] are not looked at."""
    if input_ids.ndim != 2:
        raise UsageError(f"input_ids must be [batch, length], not {list(input_ids.shape)}.")
    parts = {"input_ids": input_ids.detach()}
    length = input_ids.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        parts["attention_mask"] = attention_mask[:, -length:] != 0
    if labels is not None:
        parts["labels"] = labels.detach()
    for name, tensor in parts.items():
        if tensor.shape != input_ids.shape:
            raise UsageError(
                f"{name} has shape {list(tensor.shape)}, but input_ids has {list(input_ids.shape)}."
            )
    device = input_ids.device
    host = torch.stack([t.to(device, torch.int64) for t in parts.values()]).cpu().numpy()
    rows = dict(zip(parts, host, strict=True))
    mask = rows.get("attention_mask")
    return rows["input_ids"], None if mask is None else mask != 0, rows.get("labels")


def _check_text(ids: np.ndarray, codes: np.ndarray) -> None:
    """Raise when a negative id is left that stands for no medium of the batch."""
    wrong = (ids < 0) & (codes == 0)
    if wrong.any():
        sample, at = (int(i) for i in np.argwhere(wrong)[0])
        raise UsageError(
            f"Sample {sample} holds the id {ids[sample, at]} at position {at}, which is neither in "
            f"the vocabulary nor the id of a medium (config.image_token_id, video_token_id, "
            f"audio_token_id)."
        )


def _check_rows(kind: str, media_id: int, found: Sequence[int], planned: Sequence[int]) -> None:
    """Compare the rows of one kind in each sample with what its media need, in reading order."""
    item = 0
    for sample, n_rows in enumerate(found):
        left = n_rows
        while left:
            if item == len(planned):
                raise UsageError(
                    f"Sample {sample} has {left} rows of {kind} ids ({media_id}) for which no "
                    f"{kind} was given: {sum(found)} were found in the batch, and "
                    f"{sum(planned)} are planned for {len(planned)} {kind}(s)."
                )
            if planned[item] > left:
                raise UsageError(
                    f"{kind} {item} is planned with {planned[item]} tokens, but sample {sample} "
                    f"has {left} rows of {kind} ids ({media_id}) left for it; of {n_rows} found "
                    f"there, media before it take {n_rows - left}. "
                    + _hint(kind, planned[item], left)
                )
            left -= planned[item]
            item += 1
    if any(planned[item:]):
        raise UsageError(
            f"{kind} {item} is planned with {planned[item]} tokens, but no rows of {kind} ids "
            f"({media_id}) are left for it: {sum(found)} were found in the batch, and "
            f"{sum(planned)} are planned for {len(planned)} {kind}(s)."
        )


def _hint(kind: str, planned: int, left: int) -> str:
    if left < planned and left <= 2:
        return (
            "Ids with one id a medium are LLaVA's way: give the pixels as images= (and sound as "
            "audios=) there."
        )
    more = " For several images in one prompt, batch_num_images matters." if kind == "image" else ""
    return (
        "Ids that were cut (max_length, truncation) and sizes of other media are the usual "
        f"reasons.{more}"
    )


class _Dealer:
    """Gives the rows of one kind to its media, one after another."""

    def __init__(self, kind: str, counts: Sequence[int]) -> None:
        self.kind, self.counts = kind, counts
        self.item = self.row = 0

    def take(self, n_rows: int) -> list[Segment]:
        """The next ``n_rows`` rows."""
        out: list[Segment] = []
        while n_rows:
            n = min(n_rows, self.counts[self.item] - self.row)
            out.append(Segment(self.kind, self.item, self.row, self.row + n))
            n_rows -= n
            self.row += n
            if self.row == self.counts[self.item]:
                self.item, self.row = self.item + 1, 0
        return out


def _parts(
    codes: np.ndarray, ids: np.ndarray, labels: np.ndarray | None, dealers: Sequence[_Dealer]
) -> list[Any]:
    """Cut one sample where the kind of its rows changes."""
    edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    parts: list[Any] = []
    for lo, hi in pairwise(edges):
        if lo == hi:  # a batch of no columns
            continue
        if codes[lo]:
            parts += dealers[codes[lo] - 1].take(hi - lo)
        else:
            parts.append((ids[lo:hi], None if labels is None else labels[lo:hi]))
    return parts


# ---------------------------------------------------------------- counts of the media


def _numbers(values: Tensor | Sequence[Any] | None) -> list[Any]:
    if values is None:
        return []
    return values.tolist() if isinstance(values, Tensor) else [*values]


def _images(
    planner: MediaPlanner, inputs: ExpandedInputs
) -> tuple[list[tuple[int, Size | None]], Tensor | list[Tensor] | None]:
    """(tiles, (width, height)) of each image, and the tiles of all, without padded ones."""
    pixels = inputs.pixel_values
    if pixels is None:
        return [], None
    sizes = [(int(width), int(height)) for height, width in _numbers(inputs.image_sizes)]
    if not isinstance(pixels, Tensor):
        images = [image[None] if image.ndim == 3 else image for image in pixels]
        n_tiles = [len(image) for image in images]
        return _with_sizes(n_tiles, sizes), images
    if pixels.ndim not in (4, 5):
        raise UsageError(
            f"pixel_values must be [images, tiles, 3, H, W], [images, 3, H, W] or a list, not "
            f"{list(pixels.shape)}."
        )
    if pixels.ndim == 4:
        return _with_sizes(_stacked(planner, pixels, sizes, inputs), sizes), pixels
    most = pixels.shape[1]
    n_tiles = [most] * len(pixels)
    if most > 1:
        n_tiles = _planned_tiles(planner, sizes or [None] * len(pixels), inputs)
        if len(n_tiles) != len(pixels) or max(n_tiles) != most:
            raise UsageError(
                f"pixel_values holds {len(pixels)} image(s) of up to {most} tiles, but by "
                f"image_sizes they are {len(n_tiles)} of {n_tiles} tiles."
            )
    if all(n == most for n in n_tiles):
        return _with_sizes(n_tiles, sizes), pixels.flatten(0, 1)
    kept = [image[:n] for image, n in zip(pixels, n_tiles, strict=True)]
    return _with_sizes(n_tiles, sizes), torch.cat(kept)


def _stacked(
    planner: MediaPlanner, pixels: Tensor, sizes: list[Size], inputs: ExpandedInputs
) -> list[int]:
    """Tiles of each image of [N, 3, H, W]: one each, or those of all images one after another."""
    if len(sizes) in (0, len(pixels)):
        return [1] * len(pixels)
    n_tiles = _planned_tiles(planner, sizes, inputs)
    if sum(n_tiles) != len(pixels):
        raise UsageError(
            f"pixel_values holds {len(pixels)} tiles, but by image_sizes there are {n_tiles}."
        )
    return n_tiles


def _planned_tiles(
    planner: MediaPlanner, sizes: Sequence[Size | None], inputs: ExpandedInputs
) -> list[int]:
    """Tiles that the model's layout makes of each image."""
    together = [1] * len(sizes)
    if inputs.batch_num_images is not None:
        groups = [int(n) for n in _numbers(inputs.batch_num_images)]
        together = [n for n in groups for _ in range(n)]
        if len(together) != len(sizes):
            raise UsageError(
                f"batch_num_images counts {len(together)} images, but there are {len(sizes)}."
            )
    return [
        planner.image(size, n_images=n).n_tiles for size, n in zip(sizes, together, strict=True)
    ]


def _with_sizes(n_tiles: Sequence[int], sizes: Sequence[Size]) -> list[tuple[int, Size | None]]:
    if not sizes:
        return [(n, None) for n in n_tiles]
    if len(sizes) != len(n_tiles):
        raise UsageError(f"image_sizes has {len(sizes)} entries for {len(n_tiles)} images.")
    return list(zip(n_tiles, sizes, strict=True))


def _videos(
    frames: Tensor | Sequence[Tensor] | None,
) -> tuple[list[int], Tensor | list[Tensor] | None]:
    """Frames of each video, and the frames of all."""
    if frames is None:
        return [], None
    if not isinstance(frames, Tensor):
        return [len(video) for video in frames], list(frames)
    if frames.ndim == 4:
        return [len(frames)], frames
    if frames.ndim != 5:
        raise UsageError(
            f"pixel_values_videos must be [videos, frames, 3, H, W], [frames, 3, H, W] or a list, "
            f"not {list(frames.shape)}."
        )
    return [frames.shape[1]] * len(frames), frames.flatten(0, 1)


def _clips(inputs: ExpandedInputs) -> list[int]:
    """Samples of each clip."""
    if inputs.input_features is None:
        return []
    if inputs.audio_lengths is None:
        raise UsageError(
            "input_features needs audio_lengths, the samples at 16 kHz of each clip: how many "
            "tokens a clip becomes depends on how much of its chunks is sound."
        )
    return [int(n) for n in _numbers(inputs.audio_lengths)]
