"""From settings to one stream's plan: which frames, which groups in time, which pooled grid.

Contract: pure Python integers, no torch. Every rule is closed-form in the number of frames and
the grid, so counts are known before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from av_llava.aggregators.plan import StreamPlan
from av_llava.errors import UsageError
from av_llava.geometry import adaptive_bins, even_indices, pooled_side, window_bins
from av_llava.settings import PoolSettings, SelectSettings, StreamSettings, TemporalSettings


def stream_plan(
    name: str,
    settings: StreamSettings,
    frames: int,
    height: int,
    width: int,
    *,
    given: Sequence[int] | None = None,
    without: frozenset[int] = frozenset(),
) -> StreamPlan:
    """Plan one stream.

    Args:
        name: slow, fast or single.
        settings: of the stream.
        frames: number of frames given.
        height: rows of patches.
        width: columns of patches.
        given: frame indices for the selector ``given``, instead of those in the settings.
        without: frames that another stream shows.
    """
    chosen = choose_frames(settings.select, frames, given)
    if without:
        chosen = tuple(frame for frame in chosen if frame not in without)
    rows, cols = pooled_grid(settings.pool, height, width)
    groups = group_frames(settings.temporal, len(chosen)) if chosen else None
    return StreamPlan(name, chosen, groups, settings.pool, rows, cols)


def choose_frames(
    select: SelectSettings, frames: int, given: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the indices of the frames that a stream shows, in order."""
    if given is not None and select.kind != "given":
        raise UsageError(
            f"Frames were passed to the plan, but the stream selects {select.kind!r}: set its "
            "selector to 'given'."
        )
    if select.kind == "every":
        return tuple(range(0, frames, select.step))
    if select.kind == "uniform":
        return even_indices(frames, select.count if select.repeat else min(select.count, frames))
    if select.kind == "sample":
        return _sampled(select, frames)
    if select.kind == "given":
        return _given(select.frames if given is None else tuple(given), frames)
    return tuple(range(frames))


def _sampled(select: SelectSettings, frames: int) -> tuple[int, ...]:
    """SHI-Labs' sampling; in floating point, as theirs, so that the same frames are taken."""
    if frames < select.min_frames:
        return tuple(range(frames))
    count = max(frames // select.step, select.min_frames)
    stride = frames / count
    return tuple(min(int(i * stride), frames - 1) for i in range(count))


def _given(indices: tuple[int, ...], frames: int) -> tuple[int, ...]:
    if not indices:
        raise UsageError(
            "The selector 'given' has no frames: pass slow_frames to plan, or set them in the "
            "settings."
        )
    rising = all(a < b for a, b in pairwise(indices))
    if not rising or indices[0] < 0 or indices[-1] >= frames:
        raise UsageError(
            f"Given frames must increase and lie in 0..{frames - 1}, but are {list(indices)}."
        )
    return indices


def group_frames(temporal: TemporalSettings, n: int) -> tuple[tuple[int, int], ...] | None:
    """Cut ``n`` frames into groups to average: half-open ranges, or None for no grouping."""
    if temporal.kind == "none":
        return None
    if temporal.kind == "mean":
        return ((0, n),)
    if temporal.kind == "adaptive":
        return adaptive_bins(n, temporal.size)
    count = n // temporal.size if temporal.tail == "drop" else -(-n // temporal.size)
    if count < temporal.min_frames:
        return adaptive_bins(n, min(n, temporal.min_frames))
    if temporal.tail == "adaptive":
        return adaptive_bins(n, count)
    return window_bins(n, temporal.size, count)


def pooled_grid(pool: PoolSettings, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns after pooling; raster pairs come as one row.

    Raises:
        UsageError: nothing would be left of the grid.
    """
    if pool.kind == "identity":
        return height, width
    if pool.kind == "adaptive":
        rows, cols = pool.size
        return (min(rows, height), min(cols, width)) if pool.clamp else (rows, cols)
    kind, _, mode = pool.kind.partition("_")
    if kind == "raster":
        return 1, pooled_side(height * width, 2, mode, pool.tail)
    if kind == "pair":
        return height, pooled_side(width, 2, mode, pool.tail)
    return (
        pooled_side(height, pool.stride, pool.kind, pool.tail),
        pooled_side(width, pool.stride, pool.kind, pool.tail),
    )
