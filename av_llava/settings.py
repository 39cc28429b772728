"""Typed settings of every part of the model, as plain frozen dataclasses.

Contract: no torch, no transformers. Every field has a default and a line that documents it;
``from_dict`` refuses unknown keys with a did-you-mean; ``to_dict`` gives JSON-ready values and
``from_dict(to_dict(s)) == s``. Checks of ranges and names happen once, in ``__post_init__``.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Self

from av_llava.errors import UsageError, unknown_name

# LLaVA's sentinels: one negative id stands for one medium in ids that are not yet expanded.
IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200
VIDEO_TOKEN_INDEX = -201
AUDIO_TOKEN_INDEX = -202

# Placeholders in prompts.
IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"
AUDIO_TOKEN = "<audio>"
AU_START_TOKEN = "<au_start>"
AU_END_TOKEN = "<au_end>"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _plain(value: Any) -> Any:
    """Turn a settings value into JSON-ready data."""
    if isinstance(value, Settings):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _typed(annotation: Any, value: Any) -> Any:
    """Turn JSON data back into the annotated type: nested settings, and lists into tuples."""
    options = [annotation, *typing.get_args(annotation)]
    for option in options:
        if isinstance(option, type) and issubclass(option, Settings) and isinstance(value, dict):
            return option.from_dict(value)
    if isinstance(value, list):
        return tuple(_typed(None, v) for v in value)
    return value


@dataclass(frozen=True)
class Settings:
    """Base of all settings: strict (de)serialisation and ``replace``."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from JSON data; an unknown key raises with the nearest known one."""
        hints = typing.get_type_hints(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in names:
                raise unknown_name(f"setting of {cls.__name__}", key, names)
        return cls(**{k: _typed(hints[k], v) for k, v in data.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data that ``from_dict`` accepts."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed (checked again)."""
        return dataclasses.replace(self, **changes)


def check_choice(kind: str, value: object, known: typing.Iterable[str]) -> None:
    """Raise the registry error unless ``value`` is one of ``known``."""
    known = tuple(known)
    if value not in known:
        raise unknown_name(kind, value, known)


def check_range(name: str, value: float | None, low: float, high: float | None = None) -> None:
    """Raise unless ``value`` is None or lies in ``[low, high]``."""
    if value is None:
        return
    if not value >= low or (high is not None and not value <= high):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UsageError(f"{name} must be {wanted}, not {value!r}.")


@dataclass(frozen=True)
class VisionSettings(Settings):
    """The vision tower and which of its features are used."""

    tower: str | None = None
    """Name or folder of the tower, as LLaVA's ``mm_vision_tower`` gives it."""
    kind: str = "clip"
    """Key of the registry ``vision.VISION_TOWERS``: clip, clip_s2, siglip."""
    select_layer: int = -2
    """Index into the hidden states (0 is the embedding, -1 the last layer)."""
    select_feature: str = "patch"
    """patch, cls_patch, or one of the slice variants (slicefour_*, slice_m25811_f6_*)."""
    s2_scales: tuple[int, ...] = ()
    """Image sides of the S2 tower, in pixels; the smallest is the tower's own."""
    image_mean: tuple[float, ...] = CLIP_MEAN
    """Per-channel mean of pixels scaled to 0..1, subtracted on the device."""
    image_std: tuple[float, ...] = CLIP_STD
    """Per-channel standard deviation of pixels scaled to 0..1."""
    video_preprocess: str = "fast"
    """How video frames are resized: fast (uint8 antialiased, within one level of PIL) or pil."""

    def __post_init__(self) -> None:
        check_choice("video preprocessing", self.video_preprocess, ("fast", "pil"))


@dataclass(frozen=True)
class ProjectorSettings(Settings):
    """The projector from tower width to language-model width."""

    kind: str = "mlp2x_gelu"
    """Key or pattern known to ``projectors.build_projector``."""


@dataclass(frozen=True)
class ImageSettings(Settings):
    """How still images are cut into tiles and how tile features are merged."""

    aspect_ratio: str = "square"
    """square, pad, anyres, anyres_max_N, highres (LLaVA's ``image_aspect_ratio``)."""
    patch_merge_type: str = "flat"
    """flat, or spatial with optional _unpad, _maxpool2x2, _nobase."""
    grid_pinpoints: tuple[tuple[int, int], ...] | str = ()
    """Canvas sizes (width, height) in pixels for anyres, or LLaVA's range string."""
    crop_resolution: int | None = None
    """Side of the whole-image crop for highres, in pixels."""
    split_resolution: int | None = None
    """Side of the split for highres, in pixels."""


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """Which frames of a video are used."""

    frames: int | None = 32
    """Upper bound of the number of frames; None keeps every sampled one."""
    fps: float | None = None
    """Frames per second to sample; None spreads ``frames`` uniformly over the span."""
    time_instruction: bool = False
    """Put LLaVA-Video's sentence about duration and frame times before the question."""
    backend: str = "auto"
    """Decoder: auto, pyav, decord."""

    def __post_init__(self) -> None:
        check_range("frames", self.frames, 1)
        check_range("fps", self.fps, 1e-6)
        check_choice("video backend", self.backend, ("auto", "pyav", "decord"))
