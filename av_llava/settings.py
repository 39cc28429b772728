"""Typed settings of every part of the model, as plain frozen dataclasses.

Contract: no torch, no transformers. Every field has a default and a line that documents it;
``from_dict`` refuses unknown keys with a did-you-mean; ``to_dict`` gives JSON-ready values and
``from_dict(to_dict(s)) == s``. Checks of ranges and names happen once, in ``__post_init__``.
"""

from __future__ import annotations

import dataclasses
import re
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
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{name} must be a number, not {value!r}.")
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
    resize: str = "shortest_edge"
    """How pictures get the tower's size: shortest_edge (then a centre crop) or exact (distorts)."""
    resample: int = 3
    """Pillow's number of the resizing filter: 3 bicubic, 2 bilinear."""
    video_preprocess: str = "fast"
    """How video frames are resized: fast (uint8 antialiased, within one level of PIL) or pil."""
    max_batch: int = 64
    """Images or frames that go through the tower at once; more are taken in turns."""

    def __post_init__(self) -> None:
        check_choice("video preprocessing", self.video_preprocess, ("fast", "pil"))
        check_choice("way of resizing", self.resize, ("shortest_edge", "exact"))
        check_range("max_batch", self.max_batch, 1)
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise UsageError(f"{name} must hold three numbers: red, green, blue.")


@dataclass(frozen=True)
class ProjectorSettings(Settings):
    """The projector from tower width to language-model width."""

    kind: str = "mlp2x_gelu"
    """Key or pattern known to ``projectors.build_projector``."""


_ASPECTS = ("square", "pad", "anyres", "highres", "crop_split")
_MERGE_PARTS = ("unpad", "maxpool2x2", "nobase")


@dataclass(frozen=True)
class ImageSettings(Settings):
    """How still images are cut into tiles and how tile features are merged."""

    aspect_ratio: str = "square"
    """square, pad, anyres, anyres_max_N, highres (LLaVA's ``image_aspect_ratio``)."""
    patch_merge_type: str = "flat"
    """flat, or spatial with optional _unpad, _maxpool2x2, _nobase."""
    grid_pinpoints: tuple[tuple[int, int], ...] | str = ()
    """anyres: canvas sizes (width, height) in pixels, their literal as a string, or LLaVA's range
    string "(1x1),...,(6x6)"; highres: a string of sides in pixels, "448,672"."""
    crop_resolution: int | None = None
    """Side of the centre crop for crop_split, in pixels (kept for saving; not supported)."""
    split_resolution: int | None = None
    """Side of one part for crop_split, in pixels (kept for saving; not supported)."""
    several: str = "pad"
    """How each of several images of one prompt is cut where one would be tiled: pad (one view,
    padded, as LLaVA-NeXT trains), square (one view), or same (tiled like one)."""
    unpad_rounding: str = "llava"
    """How many patches unpadding keeps: llava (fraction cut off) or hf (rounded to 7 digits)."""

    def __post_init__(self) -> None:
        aspect, merge = self.aspect_ratio, self.patch_merge_type
        if aspect not in _ASPECTS and re.fullmatch(r"anyres_max_[1-9]\d*", aspect) is None:
            raise unknown_name("image aspect ratio", aspect, (*_ASPECTS, "anyres_max_N"))
        first, *parts = merge.split("_")
        if merge != "flat" and (first != "spatial" or set(parts) - set(_MERGE_PARTS)):
            known = (f"spatial_{part}" for part in _MERGE_PARTS)
            raise unknown_name("patch merge type", merge, ("flat", "spatial", *known))
        check_choice("rule for several images", self.several, ("pad", "square", "same"))
        check_choice("unpad rounding", self.unpad_rounding, ("llava", "hf"))

    def for_count(self, n_images: int) -> ImageSettings:
        """Return the settings for each image of a prompt that holds ``n_images``."""
        tiled = self.aspect_ratio == "highres" or self.aspect_ratio.startswith("anyres")
        if n_images < 2 or not tiled or self.several == "same":
            return self
        return self.replace(aspect_ratio=self.several)


@dataclass(frozen=True)
class AudioSettings(Settings):
    """The audio tower, its projector, and where sound stands among the frames.

    Mel bins and chunk length are not here: they belong to the tower and come from its config.
    """

    tower: str | None = None
    """Name or folder of the tower; None means that the model does not listen."""
    kind: str = "whisper"
    """Key of the registry ``audio.towers.AUDIO_TOWERS``: whisper, beats, dual."""
    mask_padding: bool = False
    """Hide the padding of a chunk from attention; published Whisper attends to it."""
    freq_pool: str = "flatten"
    """BEATs' frequency bands: flatten (8 tokens per 160 ms) or mean (one)."""
    projector: str = "stack_mlp"
    """Key or pattern of ``audio.projector.AUDIO_PROJECTORS``: linear, mlpNx_gelu, stack_mlp."""
    pool_mode: str = "stack"
    """How tower frames become one token: none, average, or stack (channels side by side)."""
    pool_stride: int = 10
    """Tower frames per token; 10 of Whisper's 50 a second make 5 tokens a second."""
    projector_hidden_size: int = 2048
    """Width between the two layers of stack_mlp."""
    projector_activation: str = "gelu"
    """Activation of stack_mlp: gelu, relu (Ola), silu."""
    chunk_newline: bool = False
    """A learned token after each chunk (Ola's ``speech_newline``)."""
    placement: str = "block"
    """Where a video's own sound stands: block (after the video) or interleave (by time)."""
    group_seconds: float | None = None
    """With interleave: frames of so many seconds, then their sound; None goes frame by frame."""
    use_start_end: bool = True
    """Mark where each sound begins and ends."""
    token_mode: str = "tokens"
    """What the marks are: tokens (of the tokenizer) or param (learned vectors in the projector)."""
    max_tokens: int = 3072
    """Upper bound of tokens per clip; above it the stride is raised, nothing is cut."""
    max_seconds: float = 600.0
    """Upper bound of sound per clip, in seconds; ``long_audio`` says what happens above."""
    long_audio: str = "keep"
    """Sound above ``max_seconds``: keep (its first part) or uniform (evenly spaced chunks)."""
    min_samples: int = 1600
    """Shortest sound in samples at 16 kHz; shorter clips are padded with silence, and a shorter
    rest after the last whole chunk is left out."""

    def __post_init__(self) -> None:
        check_choice("frequency pooling", self.freq_pool, ("flatten", "mean"))
        check_choice("audio pooling", self.pool_mode, ("none", "average", "stack"))
        check_choice("audio placement", self.placement, ("block", "interleave"))
        check_choice("audio token mode", self.token_mode, ("tokens", "param"))
        check_choice("rule for long audio", self.long_audio, ("keep", "uniform"))
        for name in ("pool_stride", "projector_hidden_size", "max_tokens", "min_samples"):
            check_range(name, getattr(self, name), 1)
        check_range("max_seconds", self.max_seconds, 0.1)
        check_range("group_seconds", self.group_seconds, 0.01)
        if self.projector == "stack_mlp" and self.pool_mode != "stack":
            raise UsageError(
                f"The audio projector 'stack_mlp' needs pool_mode 'stack', not {self.pool_mode!r}; "
                "set pool_mode to 'stack' or choose 'linear' or 'mlp2x_gelu'."
            )


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """Which frames of a video are used."""

    frames: int | None = 32
    """Upper bound of the number of frames; None keeps every sampled one."""
    fps: float | None = None
    """Frames per second to sample; None spreads ``frames`` uniformly over the span."""
    time_instruction: bool = False
    """Put LLaVA-Video's sentence about duration and frame times before the question."""
    rule: str = "time"
    """How frames are spread: time (equal distances of time), llava (LLaVA-NeXT's rule on frame
    numbers), middle (middle of equal segments, SlowFast-LLaVA)."""
    repeat_frames: bool = False
    """Give exactly ``frames`` frames, repeating some if there are fewer (``force_sample``)."""
    source_fps: float | None = None
    """Frame rate of a folder of frame images; 1 (with a warning) if None."""
    backend: str = "auto"
    """Decoder: auto, pyav, decord."""

    def __post_init__(self) -> None:
        check_range("frames", self.frames, 1)
        check_range("fps", self.fps, 1e-6)
        check_range("source_fps", self.source_fps, 1e-6)
        check_choice("sampling rule", self.rule, ("time", "llava", "middle"))
        check_choice("video backend", self.backend, ("auto", "pyav", "decord"))


@dataclass(frozen=True)
class SequenceSettings(Settings):
    """How text and media are laid out in one sequence."""

    padding_side: str = "right"
    """Side of the padding in training and in the LLaVA-compatible door; generation pads left."""
    max_length: int | None = None
    """Longest sequence in training, media included (LLaVA's ``tokenizer_model_max_length``)."""
    position_skipping: int | None = None
    """Largest random gap between positions in training (``pos_skipping_range``), or None."""
    media_tokens: tuple[str, ...] = ()
    """Learned vectors that the model owns: newline, frame_end."""
    use_image_start_end: bool = False
    """Stand <im_start> and <im_end> around each image (LLaVA's ``mm_use_im_start_end``)."""
    use_image_patch_token: bool = False
    """The tokenizer holds <im_patch> (LLaVA's ``mm_use_im_patch_token``)."""
    template: str | None = None
    """Key of ``chat.TEMPLATES``; None means that of the language model's family."""

    def __post_init__(self) -> None:
        check_choice("padding side", self.padding_side, ("left", "right"))
        for token in self.media_tokens:
            check_choice("media token", token, ("newline", "frame_end"))


POOL_KINDS = (
    "identity",
    "average",
    "max",
    "bilinear",
    "adaptive",
    "pair_max",
    "pair_average",
    "raster_max",
    "raster_average",
)
LAYOUTS = ("single", "by_frame", "slow_then_fast", "fast_then_slow", "by_time")
NEWLINES = ("none", "row", "frame", "video")
STAGES = ("pre", "post")


def check_whole(name: str, value: object, low: int) -> None:
    """Raise unless ``value`` is a whole number of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UsageError(f"{name} must be a whole number of at least {low}, not {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, not {value!r}.")


@dataclass(frozen=True)
class PoolSettings(Settings):
    """How the patch grid of one frame is pooled."""

    kind: str = "average"
    """identity; average, max, bilinear (windows of ``stride``); adaptive (average to ``size``);
    pair_max, pair_average (two neighbours in a row); raster_max, raster_average (two neighbours
    of the flattened grid, across row ends at odd widths, as Apple's code does)."""
    stride: int = 2
    """Window side and step of average, max and bilinear, in patches."""
    size: tuple[int, int] = (1, 1)
    """Rows and columns that adaptive pooling makes."""
    tail: str = "drop"
    """What average, max and pairs do with the last, smaller window: drop or partial (keep)."""
    clamp: bool = True
    """Never let adaptive pooling make more rows or columns than there are (else it repeats)."""

    def __post_init__(self) -> None:
        check_choice("spatial pooling", self.kind, POOL_KINDS)
        check_whole("pool stride", self.stride, 1)
        check_choice("pool tail", self.tail, ("drop", "partial"))
        check_flag("pool clamp", self.clamp)
        if not isinstance(self.size, tuple) or len(self.size) != 2:
            raise UsageError(f"The pool size must be two numbers, rows and columns: {self.size!r}.")
        for side in self.size:
            check_whole("pool size", side, 1)


@dataclass(frozen=True)
class TemporalSettings(Settings):
    """How the frames of one stream are averaged over time, after spatial pooling."""

    kind: str = "none"
    """none; average (groups of ``size`` frames); mean (one group); adaptive (``size`` groups)."""
    size: int = 1
    """Frames per group (average) or number of groups (adaptive, repeats when frames are fewer)."""
    tail: str = "partial"
    """Remainder of average: drop it, partial (a smaller group), adaptive (spread it evenly)."""
    min_frames: int = 1
    """If average would leave fewer groups, make min(frames, min_frames) even groups instead."""

    def __post_init__(self) -> None:
        check_choice("temporal reducer", self.kind, ("none", "average", "mean", "adaptive"))
        check_whole("temporal size", self.size, 1)
        check_choice("temporal tail", self.tail, ("drop", "partial", "adaptive"))
        check_whole("temporal min_frames", self.min_frames, 1)


@dataclass(frozen=True)
class SelectSettings(Settings):
    """Which of the given frames one stream shows."""

    kind: str = "all"
    """all; every (0, step, 2 step, ...); uniform (frame floor(i T / count)); sample (about one in
    ``step``, spread evenly, as SHI-Labs do); given (``frames``, or those passed to ``plan``)."""
    step: int = 1
    """Distance of every and sample, in frames."""
    count: int = 1
    """Number of frames of uniform; 0 leaves the stream empty."""
    repeat: bool = False
    """Let uniform repeat frames when the video has fewer than ``count`` (Apple's behaviour)."""
    min_frames: int = 1
    """sample keeps at least this many, or all when the video has fewer."""
    frames: tuple[int, ...] = ()
    """Frame indices of given, increasing."""

    def __post_init__(self) -> None:
        check_choice("frame selector", self.kind, ("all", "every", "uniform", "sample", "given"))
        check_whole("selector step", self.step, 1)
        check_whole("selector count", self.count, 0)
        check_flag("selector repeat", self.repeat)
        check_whole("selector min_frames", self.min_frames, 1)
        for frame in self.frames:
            check_whole("given frame", frame, 0)


@dataclass(frozen=True)
class StreamSettings(Settings):
    """One token stream: which frames, pooled how in space and in time."""

    select: SelectSettings = SelectSettings()
    """Which frames."""
    pool: PoolSettings = PoolSettings()
    """Pooling inside each frame."""
    temporal: TemporalSettings = TemporalSettings()
    """Averaging over frames."""


@dataclass(frozen=True)
class BudgetSettings(Settings):
    """At most so many visual tokens (aggregator kind ``budget``)."""

    tokens: int = 2048
    """Upper bound of a video's tokens, newlines and frame ends included."""
    pool: str = "average"
    """Pooling of the slow frames: average or max."""
    min_frames: int = 4
    """Frames (or all, if the video has fewer) below which the budget is refused."""

    def __post_init__(self) -> None:
        check_whole("budget tokens", self.tokens, 1)
        check_choice("budget pooling", self.pool, ("average", "max"))
        check_whole("budget min_frames", self.min_frames, 1)


@dataclass(frozen=True)
class PruneSettings(Settings):
    """Baselines that keep so many unpooled patches (aggregator kinds ``random``, ``uniform``)."""

    tokens: int = 2048
    """Upper bound of a video's tokens, newlines and frame ends included."""
    seed: int = 0
    """Seed of random; unused by uniform."""

    def __post_init__(self) -> None:
        check_whole("prune tokens", self.tokens, 1)
        check_whole("prune seed", self.seed, 0)


@dataclass(frozen=True)
class AggregatorSettings(Settings):
    """How a video's patch features become tokens; the defaults are those of our own training."""

    kind: str = "streams"
    """Key of the registry ``aggregators.AGGREGATORS``: streams, budget, random, uniform, or one
    registered from outside."""
    layout: str = "by_frame"
    """single (``slow`` is the only stream); by_frame (each frame once, slow or fast, in order);
    slow_then_fast, fast_then_slow (two blocks); by_time (a frame's slow then its fast tokens)."""
    slow: StreamSettings | None = StreamSettings(
        SelectSettings("every", step=4), PoolSettings("average", 2, tail="partial")
    )
    """The detailed stream; None for kinds that find it themselves."""
    fast: StreamSettings | None = StreamSettings(
        pool=PoolSettings("average", 4, tail="partial"),
    )
    """The coarse stream; None with layout single and for kinds that find it themselves."""
    newline: str = "frame"
    """Where the mark ``newline`` stands: none, row (after each row), frame (after each frame),
    video (once, at the end)."""
    frame_end: bool = False
    """Put the mark ``frame_end`` (LLaVA's faster_token) after every frame of every stream."""
    stage: str = "post"
    """Whether pooling stands before (pre) or after (post) the projector."""
    budget: BudgetSettings | None = None
    """Of kind budget."""
    prune: PruneSettings | None = None
    """Of kinds random and uniform."""
    argument: str = ""
    """Text after the colon of ``name:argument``, for kinds registered from outside."""

    def __post_init__(self) -> None:
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("newline position", self.newline, NEWLINES)
        check_flag("frame_end", self.frame_end)
        check_choice("pooling stage", self.stage, STAGES)
        if self.kind == "streams":
            self._check_streams()
        elif self.kind == "budget":
            self._check_only("budget")
            if self.layout == "single":
                raise UsageError("A budget needs two streams: choose a layout other than single.")
        elif self.kind in ("random", "uniform"):
            self._check_only("prune")
            if self.layout != "single":
                raise UsageError(f"Kind {self.kind} has one stream: set layout to single.")
            if self.newline == "row":
                raise UsageError(
                    f"Kind {self.kind} keeps no whole rows, so newline 'row' has no meaning: "
                    "use newline 'frame'."
                )

    @property
    def name(self) -> str:
        """What messages call the aggregator: its layout, or its kind if it is another one."""
        return self.layout if self.kind == "streams" else self.kind

    def _check_only(self, wanted: str) -> None:
        """Raise unless, of the parts that say how tokens are made, only ``wanted`` is set."""
        for part in ("slow", "fast", "budget", "prune"):
            if (getattr(self, part) is None) == (part == wanted):
                verb = "needs" if part == wanted else "takes no"
                raise UsageError(f"An aggregator of kind {self.kind} {verb} '{part}' settings.")

    def _check_streams(self) -> None:
        if self.slow is None or self.budget is not None or self.prune is not None:
            raise UsageError(
                "An aggregator of kind streams needs 'slow' settings and takes no 'budget' or "
                "'prune' settings."
            )
        if (self.fast is None) != (self.layout == "single"):
            raise UsageError(
                f"Layout {self.layout} {'needs' if self.fast is None else 'takes no'} 'fast' "
                "settings."
            )
        for stream in (self.slow, self.fast):
            if stream is None:
                continue
            if self.newline == "row" and stream.pool.kind.startswith("raster"):
                raise UsageError(
                    f"Pooling {stream.pool.kind} leaves no rows, so newline 'row' has no meaning: "
                    "use newline 'frame'."
                )
            if self.layout == "by_frame" and stream.temporal.kind != "none":
                raise UsageError(
                    "Layout by_frame shows each frame on its own, so it takes no temporal "
                    "reducer: use layout by_time or slow_then_fast."
                )
