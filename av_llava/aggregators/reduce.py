"""Execute the pooling of a plan, in one piece or as features come in.

Contract: spatial pooling works frame by frame, so pieces of consecutive frames give exactly what
the whole would; averaging over time follows when all frames have been pooled.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import torch
from torch import Tensor

from av_llava.aggregators.plan import StreamPlan, TokenPlan
from av_llava.aggregators.pool2d import average_groups, device_index, pool_grid, take
from av_llava.aggregators.tokens import Reduced
from av_llava.errors import UsageError


def reduce_chunks(chunks: Iterable[Tensor], plan: TokenPlan) -> Reduced:
    """Pool pieces of consecutive frames, each [t, h, w, d] or [t, h * w, d]."""
    pooled: list[list[Tensor]] = [[] for _ in plan.streams]
    seen = 0
    for chunk in chunks:
        grid = checked_grid(chunk, plan)
        stop = seen + len(grid)
        if stop > plan.frames:
            break
        for parts, stream in zip(pooled, plan.streams, strict=True):
            parts.append(_pooled(grid, stream, seen, stop))
        seen = stop
    else:
        stop = seen
    if stop != plan.frames:
        raise UsageError(
            f"The plan is for {plan.frames} frames, but features of "
            f"{'more' if stop > plan.frames else f'only {stop}'} came."
        )
    return Reduced(tuple(_over_time(p, s) for p, s in zip(pooled, plan.streams, strict=True)))


def checked_grid(features: Tensor, plan: TokenPlan) -> Tensor:
    """Return features as [t, h, w, d]; a count that is not h * w is an error."""
    if features.ndim == 3:
        if features.shape[1] != plan.height * plan.width:
            raise UsageError(
                f"The plan is for {plan.height}x{plan.width} = {plan.height * plan.width} patches "
                f"a frame, but there are {features.shape[1]}. If one of them is the CLS token, set "
                "the vision tower's select_feature to 'patch'."
            )
        return features.unflatten(1, (plan.height, plan.width))
    if features.ndim != 4:
        raise UsageError(
            f"Features must be [frames, height, width, d] or [frames, patches, d], not "
            f"{list(features.shape)}."
        )
    if features.shape[1:3] != (plan.height, plan.width):
        raise UsageError(
            f"The plan is for {plan.height}x{plan.width} patches a frame, but the features have "
            f"{features.shape[1]}x{features.shape[2]}."
        )
    return features


def _pooled(grid: Tensor, stream: StreamPlan, start: int, stop: int) -> Tensor:
    """Pool the stream's frames among frames ``start`` to ``stop``: [frames, rows, cols, d]."""
    if stream.kept is not None:
        cells = stream.rows * stream.cols
        lo, hi = (bisect_left(stream.kept, frame * cells) for frame in (start, stop))
        index = [i - start * cells for i in stream.kept[lo:hi]]
        flat = grid.flatten(0, 2)
        return flat.index_select(0, device_index(index, flat.device))
    lo, hi = (bisect_left(stream.frames, frame) for frame in (start, stop))
    wanted = [frame - start for frame in stream.frames[lo:hi]]
    if 2 * len(wanted) > len(grid) and stream.pool.kind != "identity":
        # Picking frames copies them: pooled ones are cheaper to copy, if most are wanted.
        return take(pool_grid(grid, stream.pool), wanted)
    return pool_grid(take(grid, wanted), stream.pool)


def _over_time(parts: list[Tensor], stream: StreamPlan) -> Tensor:
    """Join the pieces of one stream and average over time."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if stream.kept is not None:
        return whole[None, None]
    return whole if stream.groups is None else average_groups(whole, stream.groups)
