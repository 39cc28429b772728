"""Runs the encoders over a batch: each tower once, over all its media, in one order.

Contract: the vision tower sees the tiles of all images and the frames of all videos together, then
the audio tower all chunks of sound. What a tower gave earlier (:class:`TowerOutputs`) is used in
place of pixels and samples. Where a batch lacks a modality, its trained parts join the graph with
zero rows, so that all processes of a training run have one graph; where their weights are shared
out over the processes, a dummy runs in its place, so that all make the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from av_llava.aggregators import Aggregator, TokenPlan
from av_llava.aggregators.image_layout import ImagePlan, merge_tiles
from av_llava.aggregators.tokens import Reduced
from av_llava.audio.placement import AudioPlan
from av_llava.errors import UsageError
from av_llava.geometry import audio_tokens

Streams = tuple[Tensor, ...]
Keep = Callable[[str, int, Streams], None]
"""Called with kind, item, and what the tower gave for it."""


@dataclass
class TowerOutputs:
    """What frozen towers gave earlier for some media of a batch.

    Each is a tuple of tensors: of an image the patches of its tiles ([tiles, P, D],); of a video
    the patches of its frames ([T, P, D],), or, where the aggregator pools before the projector, the
    pooled streams; of sound the frames of its chunks ([chunks, L, D],). Items that are not named
    are encoded.
    """

    known: dict[tuple[str, int], Streams] = field(default_factory=dict)
    """By kind (image, video, audio) and item of the batch."""
    keep: Keep | None = None
    """Is given what towers are run for."""

    def of(self, kind: str, item: int) -> Streams | None:
        """What is known of one item."""
        return self.known.get((kind, item))

    def missing(self, kind: str, n: int) -> list[int]:
        """The items among ``n`` that must be encoded."""
        return [i for i in range(n) if (kind, i) not in self.known]

    def note(self, kind: str, item: int, outputs: Streams) -> None:
        """Hand over what a tower gave."""
        if self.keep is not None and (kind, item) not in self.known:
            self.keep(kind, item, outputs)


def is_sharded(module: nn.Module) -> bool:
    """Whether processes share out a module's weights, so that all must run it equally often."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    shards = (FSDPModule, FullyShardedDataParallel)
    return any(isinstance(m, shards) for m in module.modules()) or any(
        hasattr(p, "ds_id")
        for p in module.parameters()  # DeepSpeed ZeRO-3
    )


def is_trained(*modules: nn.Module) -> bool:
    """Whether a parameter of some modules trains."""
    return any(p.requires_grad for module in modules for p in module.parameters())


def rows(pixels: Tensor | Sequence[Tensor]) -> Tensor:
    """All tiles or frames in one tensor. [N, 3, H, W]"""
    if isinstance(pixels, Tensor):
        return pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    return torch.cat(list(pixels)) if len(pixels) > 1 else pixels[0]


# ---------------------------------------------------------------- sight


def visual_features(
    model: Any,
    images: tuple[Any, Sequence[ImagePlan]],
    videos: tuple[Any, Sequence[TokenPlan]],
    aggregator: Aggregator | None,
    outputs: TowerOutputs | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Features of still images and videos.

    Args:
        model: the headless model.
        images: tiles of all images [N, 3, H, W], or a list of them; and one plan an image.
        videos: frames of all videos, or a list of them; and one plan a video.
        aggregator: executes the videos' plans.
        outputs: what the tower gave earlier; only the other items have tiles and frames.

    Returns:
        One [n_tokens, D] an image, and one a video.
    """
    outputs = outputs or TowerOutputs()
    before = aggregator is not None and aggregator.settings.stage == "pre"
    (tiles, image_plans), (frames, video_plans) = images, videos
    items = _items("image", tiles, [p.n_tiles for p in image_plans], outputs)
    items += _items("video", frames, [p.frames for p in video_plans], outputs)
    patches = _patches(model, items, outputs, before)
    projector, marks = model.mm_projector, model.media_tokens(None)
    stills, films = [], []
    for still in image_plans:
        tokens = _joined(next(patches))
        tokens = projector(tokens) if before else tokens
        stills.append(merge_tiles(tokens, still, marks.get("newline")))
    for i, plan in enumerate(video_plans):
        assert aggregator is not None
        pieces, pooled = next(patches), outputs.of("video", i) if before else None
        if pooled is not None:
            reduced = Reduced(tuple(_at(model, stream) for stream in pooled))
        else:
            grids = (f.unflatten(1, grid_of(plan, f.shape[1])) for f in pieces)
            reduced = aggregator.reduce_chunks(grids, plan)
        if before:
            outputs.note("video", i, reduced.streams)
            reduced = reduced.map(projector)
        films.append(aggregator.assemble(reduced, plan, marks).tokens)
    return stills, films


@dataclass
class _Item:
    """An image or a video: its pixels, or what the tower gave for it earlier."""

    kind: str
    number: int
    pixels: Tensor | None
    known: Streams | None


def _items(kind: str, pixels: Any, counts: Sequence[int], outputs: TowerOutputs) -> list[_Item]:
    missing = outputs.missing(kind, len(counts))
    if missing and pixels is None:
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        raise UsageError(f"The prompt holds {kind}s, but {name} was not given.")
    parts = iter(rows(pixels).split([counts[i] for i in missing])) if missing else iter(())
    wanted = set(missing)
    return [
        _Item(kind, i, next(parts) if i in wanted else None, outputs.of(kind, i))
        for i in range(len(counts))
    ]


def _patches(
    model: Any, items: Sequence[_Item], outputs: TowerOutputs, before: bool
) -> Iterator[Iterable[Tensor]]:
    """Patches of each item, projected unless ``before``, in pieces of consecutive frames.

    What fits the tower at once is encoded at once, over all items; long videos go piece by piece,
    so that only pooled patches are kept. A tower that is shared out is called once in any case.
    """
    tower, projector = model.vision_tower, model.mm_projector
    pixels = [i.pixels for i in items if i.pixels is not None]
    limit = model.config.vision.max_batch
    sharded = tower is not None and is_sharded(tower)
    whole = sharded or (sum(len(p) for p in pixels) <= limit and _alike(pixels))
    if not whole:
        yield from _piecewise(model, items, outputs, before, limit)
        return
    if sharded and not pixels:  # all known here, but perhaps not elsewhere
        absent_sight(model)
    most = {"max_batch": sum(len(p) for p in pixels)} if sharded else {}
    encoded = iter(())
    if pixels:
        encoded = iter(model.encode_patches(rows(pixels), **most).split([len(p) for p in pixels]))
    found: list[Tensor] = []
    for item in items:
        if item.known is None:
            found.append(next(encoded))
            if not (before and item.kind == "video"):
                outputs.note(item.kind, item.number, (found[-1],))
        elif not (before and item.kind == "video"):
            found.append(_at(model, item.known[0]))
        else:
            found.append(item.known[0][:0])  # pooled already
    if not before and found:
        found = list(projector(rows(found)).split([len(f) for f in found]))
    for features in found:
        yield [features]


def _piecewise(
    model: Any, items: Sequence[_Item], outputs: TowerOutputs, before: bool, limit: int
) -> Iterator[Iterable[Tensor]]:
    """The same item by item; each video in pieces."""

    def pieces(item: _Item) -> Iterator[Tensor]:
        done = []
        if item.known is not None:
            source: Iterable[Tensor] = item.known[:1]
        else:
            assert item.pixels is not None
            source = (model.encode_patches(p) for p in item.pixels.split(limit))
        raw = not (before and item.kind == "video")
        for patches in source:
            if raw and item.known is None and outputs.keep is not None:
                done.append(patches)
            patches = _at(model, patches)
            yield patches if before else model.mm_projector(patches)
        if done:
            outputs.note(item.kind, item.number, (torch.cat(done),))

    for item in items:
        yield pieces(item)


def _alike(pixels: Sequence[Tensor]) -> bool:
    """Whether pixels can stand in one tensor."""
    return len({(p.dtype, p.shape[1:], p.device) for p in pixels}) <= 1


def _joined(pieces: Iterable[Tensor]) -> Tensor:
    parts = list(pieces)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _at(model: Any, features: Tensor) -> Tensor:
    """Features where the projector is, in the type that the tower gives."""
    tower = model.vision_tower
    return features.to(tower.device, non_blocking=True) if tower is not None else features


def grid_of(plan: TokenPlan, n_patches: int) -> tuple[int, int]:
    """The plan's grid, checked against the patches that came."""
    if plan.height * plan.width != n_patches:
        raise UsageError(
            f"The video was planned for a grid of {plan.height}x{plan.width} patches, but the "
            f"tower gave {n_patches} a frame. Videos need the select feature 'patch' (no CLS)."
        )
    return plan.height, plan.width


# ---------------------------------------------------------------- hearing


def audio_features(
    model: Any,
    input_features: Any,
    plans: Sequence[AudioPlan],
    outputs: TowerOutputs | None = None,
) -> list[Tensor]:
    """Features of sound, trimmed of padding: one [n_tokens, D] a clip.

    Args:
        model: the headless model.
        input_features: the chunks of all clips that are not known.
        plans: one a clip.
        outputs: what the tower gave earlier.
    """
    tower = model.audio_tower
    if tower is None:
        raise UsageError("This model has no audio tower: it cannot take sound.")
    outputs = outputs or TowerOutputs()
    missing = outputs.missing("audio", len(plans))
    if missing and input_features is None:
        raise UsageError("The prompt holds sound, but input_features was not given.")
    if len(missing) == len(plans) and outputs.keep is None:
        frames = _encoded_sound(tower, input_features, plans)
        return model.mm_audio_projector(frames, plans)
    clips: dict[int, Tensor] = {}
    if not missing and is_sharded(tower):
        absent_sound(model)
    if missing:
        chosen = [plans[i] for i in missing]
        encoded = _encoded_sound(tower, input_features, chosen)
        parts = encoded.split([len(p.frames) for p in chosen])
        for i, part in zip(missing, parts, strict=True):
            clips[i] = part
            outputs.note("audio", i, (part[:, : _frames_used(plans[i])],))
    length = max([c.shape[1] for c in clips.values()], default=0)
    for i in range(len(plans)):
        known = outputs.of("audio", i)
        if known is not None:
            clips[i] = known[0].to(tower.device, non_blocking=True)
            length = max(length, known[0].shape[1])
    padded = [
        nn.functional.pad(clips[i], (0, 0, 0, length - clips[i].shape[1]))
        for i in range(len(plans))
    ]
    return model.mm_audio_projector(torch.cat(padded), plans)


def _frames_used(plan: AudioPlan) -> int:
    """Frames of each chunk that the projector may look at: whole tokens, padding included."""
    return max(audio_tokens(n, plan.stride) * plan.stride for n in plan.frames)


def _encoded_sound(tower: Any, features: Any, plans: Sequence[AudioPlan]) -> Tensor:
    lengths = torch.tensor([n for plan in plans for n in plan.chunk_lengths])
    return tower(features, lengths)[0]


# ---------------------------------------------------------------- what a batch lacks


def absent_sight(model: Any) -> list[Tensor]:
    """Zero rows of the vision tower and its projector, for a batch without pictures. [0, D]"""
    tower, projector = model.vision_tower, model.mm_projector
    if tower is None:
        return []
    if not (is_sharded(tower) or is_sharded(projector)):
        return absent_parts(model, tower, projector)
    size = tower.input_size
    pixels = torch.zeros((1, 3, size, size), dtype=torch.uint8)
    return [model.encode_images(pixels).flatten(0, 1)[:0]]


def absent_sound(model: Any) -> list[Tensor]:
    """Zero rows of the audio tower and its projector, for a batch without sound. [0, D]"""
    tower, projector = model.audio_tower, model.mm_audio_projector
    if tower is None:
        return []
    if not (is_sharded(tower) or is_sharded(projector)):
        return absent_parts(model, tower, projector)
    inputs = tower.features([torch.zeros(model.config.audio.min_samples)])
    frames, _ = tower(inputs.features, inputs.lengths)
    return [projector.dummy(frames)]


def absent_parts(model: Any, *modules: nn.Module) -> list[Tensor]:
    """In training, zero rows that depend on every parameter that trains. [0, D]

    Nothing is run: other processes only wait for gradients, which are zero.
    """
    if not model.training:
        return []
    width = model.media_tokens.width
    return [
        p.reshape(-1)[:0].unsqueeze(1).expand(0, width)
        for module in modules
        for p in module.parameters()
        if p.requires_grad
    ]
