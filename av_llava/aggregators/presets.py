"""Named settings: the published layouts, our own, and Apple's strings.

Contract: a preset is :class:`AggregatorSettings`, or a function that returns them; its parameters
are the options of ``name:option=value``. Token counts are in research notes and tested.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from av_llava.errors import UsageError, unknown_name
from av_llava.geometry import POOL_MODES
from av_llava.settings import (
    AggregatorSettings,
    BudgetSettings,
    PoolSettings,
    PruneSettings,
    SelectSettings,
    StreamSettings,
    TemporalSettings,
    check_choice,
)

logger = logging.getLogger(__name__)

Preset = AggregatorSettings | Callable[..., AggregatorSettings]


def _single(
    pool: PoolSettings,
    newline: str = "none",
    *,
    select: SelectSettings | None = None,
    temporal: TemporalSettings | None = None,
    stage: str = "post",
) -> AggregatorSettings:
    """One stream."""
    stream = StreamSettings(select or SelectSettings(), pool, temporal or TemporalSettings())
    return AggregatorSettings(layout="single", slow=stream, fast=None, newline=newline, stage=stage)


def av_llava(k: int = 4, newline: str = "frame") -> AggregatorSettings:
    """Our own training: every k-th frame pooled by 2, the rest by 4, no patch lost."""
    own = AggregatorSettings(newline=newline)
    return own.replace(slow=own.slow and own.slow.replace(select=SelectSettings("every", step=k)))


def llava_video(
    pool: str = "average", stride: int = 2, newline: str = "row", stage: str = "post"
) -> AggregatorSettings:
    """LLaVA-Video: every frame pooled, a newline after every row of patches."""
    check_choice("pooling mode", pool, POOL_MODES)
    return _single(PoolSettings(pool, stride), newline, stage=stage)


def llava_video_bilinear(stride: int = 2) -> AggregatorSettings:
    """LLaVA-Video with bilinear pooling, which keeps the remainder of odd grids."""
    return llava_video("bilinear", stride)


def llava_video_slowfast(
    k: int = 3, pool: str = "average", stride: int = 2, newline: str = "row", stage: str = "post"
) -> AggregatorSettings:
    """LLaVA-Video with ``add_faster_video``: every k-th frame slow, the rest pooled by twice the
    stride, each frame followed by ``frame_end`` (LLaVA's faster_token).
    """
    check_choice("pooling mode", pool, POOL_MODES)
    return AggregatorSettings(
        layout="by_frame",
        slow=StreamSettings(SelectSettings("every", step=k), PoolSettings(pool, stride)),
        fast=StreamSettings(pool=PoolSettings(pool, 2 * stride)),
        newline=newline,
        frame_end=True,
        stage=stage,
    )


def llava_onevision(stride: int = 2) -> AggregatorSettings:
    """LLaVA-OneVision: bilinear pooling, one newline at the end of the video."""
    return llava_video("bilinear", stride, "video")


def llava_next_video(
    stage: str = "pre", pool: str = "average", stride: int = 2
) -> AggregatorSettings:
    """LLaVA-NeXT-Video: no newline; pooled before the projector in transformers (pre), after it
    in LLaVA-NeXT (post).
    """
    return llava_video(pool, stride, "none", stage)


def frame_newline(pool: str = "average", stride: int = 2) -> AggregatorSettings:
    """LLaVA-NeXT with ``mm_newline_position`` frame: one newline after each frame."""
    return llava_video(pool, stride, "frame")


_APPLE_POOLS = {
    "concat": PoolSettings("identity"),
    "spatial_1d_max_pool": PoolSettings("raster_max"),
    "spatial_1d_avg_pool": PoolSettings("raster_average"),
    "spatial_2d_max_pool": PoolSettings("max", 2),
    "spatial_2d_avg_pool": PoolSettings("average", 2),
}
APPLE_FORM = "slowfast-slow_<S>frms_<pool>-fast_<H>x<W>"
_APPLE_STRING = re.compile(r"slowfast-slow_(\d+)frms_(\w+)-fast_(\d+)x(\d+)")


def sf_llava(
    slow_frames: int = 10,
    rows: int = 4,
    cols: int = 4,
    pool: str = "spatial_1d_max_pool",
    legacy: bool = False,
) -> AggregatorSettings:
    """SF-LLaVA: ``slow_frames`` evenly spaced frames in pairs, then every frame at rows x cols.

    With ``legacy``, exactly as Apple's code: slow frames repeat when the video has fewer, and fast
    grids larger than the patch grid repeat patches. ``pool="pair_max"`` keeps pairs within rows at
    odd widths, where Apple's pool runs over row ends.
    """
    pools = {**_APPLE_POOLS, "pair_max": PoolSettings("pair_max", tail="partial")}
    check_choice("slow pooling", pool, pools)
    return AggregatorSettings(
        layout="slow_then_fast",
        slow=StreamSettings(
            SelectSettings("uniform", count=slow_frames, repeat=legacy), pools[pool]
        ),
        fast=StreamSettings(pool=PoolSettings("adaptive", size=(rows, cols), clamp=not legacy)),
        newline="none",
    )


def parse_apple(text: str) -> AggregatorSettings | None:
    """Read Apple's ``slowfast-...`` string, exactly as their code does; None for other text."""
    match = _APPLE_STRING.fullmatch(text)
    if match is None:
        return None
    slow, pool, rows, cols = match.groups()
    if pool not in _APPLE_POOLS:
        raise unknown_name("slow pooling", pool, _APPLE_POOLS)
    return sf_llava(int(slow), int(rows), int(cols), pool, legacy=True)


def shi_fast(variant: str = "s1t4", min_frames: int = 16, stride: int = 2) -> AggregatorSettings:
    """SHI-Labs' compressed stream: ``s<S>t<T>`` samples every S-th frame and averages T frames.

    Args:
        variant: s1t4, s1t6, s2t4 are the published ones.
        min_frames: groups that are left at least, if there are as many frames.
        stride: spatial pooling of every frame.
    """
    match = re.fullmatch(r"s([1-9]\d*)t([1-9]\d*)", variant)
    if match is None:
        raise UsageError(f"The variant of shi_fast must look like 's1t4', not {variant!r}.")
    sampling, size = (int(n) for n in match.groups())
    return _single(
        PoolSettings("average", stride),
        select=SelectSettings("sample", step=sampling, min_frames=min_frames),
        temporal=TemporalSettings("average", size, tail="drop", min_frames=min_frames),
    )


def pllava(frames: int = 16, side: int = 12) -> AggregatorSettings:
    """PLLaVA: adaptive average over time and space to frames x side x side."""
    return _single(
        PoolSettings("adaptive", size=(side, side)), temporal=TemporalSettings("adaptive", frames)
    )


def sf15_like(k: int = 4) -> AggregatorSettings:
    """Shaped like SF-LLaVA-1.5 (no weights are public): every k-th frame slow, all fast at 4x4."""
    return AggregatorSettings(
        layout="slow_then_fast",
        slow=StreamSettings(SelectSettings("every", step=k), PoolSettings("average", 2)),
        fast=StreamSettings(pool=PoolSettings("adaptive", size=(4, 4))),
        newline="none",
    )


def budget(
    tokens: int,
    layout: str = "slow_then_fast",
    newline: str = "none",
    frame_end: bool = False,
    pool: str = "average",
    min_frames: int = 4,
) -> AggregatorSettings:
    """At most ``tokens`` tokens a video, newlines and marks included."""
    return AggregatorSettings(
        kind="budget",
        layout=layout,
        slow=None,
        fast=None,
        newline=newline,
        frame_end=frame_end,
        budget=BudgetSettings(tokens, pool, min_frames),
    )


def random(tokens: int, seed: int = 0, newline: str = "none") -> AggregatorSettings:
    """Baseline: ``tokens`` patches drawn at random."""
    return _pruned("random", PruneSettings(tokens, seed), newline)


def uniform(tokens: int, newline: str = "none") -> AggregatorSettings:
    """Baseline: ``tokens`` evenly spaced patches."""
    return _pruned("uniform", PruneSettings(tokens), newline)


def _pruned(kind: str, prune: PruneSettings, newline: str) -> AggregatorSettings:
    return AggregatorSettings(
        kind=kind, layout="single", slow=None, fast=None, newline=newline, prune=prune
    )


PRESETS: dict[str, Preset] = {
    "default": AggregatorSettings(),
    "av_llava": av_llava,
    "llava_video": llava_video,
    "llava_video_bilinear": llava_video_bilinear,
    "llava_video_slowfast": llava_video_slowfast,
    "llava_onevision": llava_onevision,
    "llava_next_video": llava_next_video,
    "frame_newline": frame_newline,
    "sf_llava": sf_llava,
    "shi_fast": shi_fast,
    "pllava": pllava,
    "sf15_like": sf15_like,
    "budget": budget,
    "random": random,
    "uniform": uniform,
    **{name: _single(pool) for name, pool in _APPLE_POOLS.items()},
    "spatial_temporal_pool": _single(
        PoolSettings("adaptive", size=(12, 12), clamp=False),
        temporal=TemporalSettings("adaptive", 16),
    ),
    "temporal_global_pool": _single(PoolSettings("identity"), temporal=TemporalSettings("mean")),
}
"""Settings, or functions that make them, by name. Add your own; ``build`` finds it."""


_NEWLINE_POSITIONS = {"grid": "row", "frame": "frame", "one_token": "video", "no_token": "none"}


def settings_for(
    pool_mode: str,
    stride: int,
    newline_position: str,
    faster_stride: int | None = None,
    unpad: bool = True,
    stage: str = "post",
    flat: bool = False,
) -> AggregatorSettings:
    """Translate LLaVA-NeXT's configuration of a video.

    Args:
        pool_mode: ``mm_spatial_pool_mode``: average, max, bilinear.
        stride: ``mm_spatial_pool_stride``; honoured, though LLaVA-NeXT always pools by 2.
        newline_position: ``mm_newline_position``: grid, frame, one_token, no_token.
        faster_stride: ``faster_token_stride`` if ``add_faster_video``, else None.
        unpad: whether ``mm_patch_merge_type`` holds "unpad", so that there is a newline vector.
        stage: pooling before (pre) or after (post) the projector.
        flat: whether ``mm_patch_merge_type`` is flat, which leaves newlines out.
    """
    check_choice("newline position", newline_position, _NEWLINE_POSITIONS)
    newline = "none" if flat else _NEWLINE_POSITIONS[newline_position]
    if newline == "video" and not unpad:
        newline = "none"
    if newline != "none" and not unpad:
        raise UsageError(
            f"The newline position {newline_position!r} needs the learned newline, which only "
            "models have whose mm_patch_merge_type holds 'unpad'."
        )
    if faster_stride is None:
        return llava_video(pool_mode, stride, newline, stage)
    if newline != "row":
        logger.warning(
            "add_faster_video is set, but LLaVA-NeXT heeds it only with newlines after rows "
            "(mm_newline_position grid), not %r: this model sees every frame at one resolution.",
            newline_position,
        )
        return llava_video(pool_mode, stride, newline, stage)
    return llava_video_slowfast(faster_stride, pool_mode, stride, newline, stage)
