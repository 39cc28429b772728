"""Pooling of patch grids in space and of frames in time.

Contract: grids are [m, h, w, d] with explicit sides (never a square root of a token count), the
result is [m, rows, cols, d], differentiable, in the input's dtype, and nothing waits for the
device. Average, max and bilinear agree with LLaVA-NeXT's ``get_2dPool``, adaptive with
``AdaptiveAvgPool2d``, raster pairs with ``MaxPool1d(2)`` / ``AvgPool1d(2)`` on the flat grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from av_llava.aggregators.streams import pooled_grid
from av_llava.settings import PoolSettings


def pool2d(features: Tensor, mode: str, stride: int) -> Tensor:
    """Pool frames as LLaVA-NeXT does.

    Args:
        features: [m, h, w, d].
        mode: average, max (both drop the remainder) or bilinear (keeps it).
        stride: window side.

    Returns:
        [m, rows, cols, d].
    """
    return pool_grid(features, PoolSettings(mode, stride))


def pool_grid(features: Tensor, pool: PoolSettings) -> Tensor:
    """Pool every frame of [m, h, w, d] to [m, rows, cols, d]."""
    m, height, width, d = features.shape
    rows, cols = pooled_grid(pool, height, width)
    if m == 0:
        return features.new_empty((0, rows, cols, d))
    if pool.kind == "adaptive":
        return _adaptive(features, rows, cols)
    if pool.kind.startswith("raster"):
        features = features.reshape(m, 1, height * width, d)
        window = (1, 2)
    elif pool.kind.startswith("pair"):
        window = (1, 2)
    elif pool.kind == "identity" or pool.stride == 1:
        return features
    else:
        window = (pool.stride, pool.stride)
    if pool.kind == "bilinear":
        return _bilinear(features, rows, cols)
    if pool.kind.endswith("max"):
        return _max(features, window, rows, cols)
    return _average(features, window, pool.tail == "partial")


def _channels_first(features: Tensor) -> Tensor:
    """View [m, h, w, d] as [m, d, h, w] without a copy; pooling then keeps channels last."""
    return features.permute(0, 3, 1, 2)


def _average(features: Tensor, window: tuple[int, int], partial: bool) -> Tensor:
    pooled = F.avg_pool2d(
        _channels_first(features), window, window, ceil_mode=partial, count_include_pad=False
    )
    return pooled.permute(0, 2, 3, 1)


def _max(features: Tensor, window: tuple[int, int], rows: int, cols: int) -> Tensor:
    """Maximum over windows; ``amax`` over a view is several times faster than ``max_pool2d``."""
    height, width = features.shape[1:3]
    high, wide = window
    if rows * high > height or cols * wide > width:
        pooled = F.max_pool2d(_channels_first(features), window, window, ceil_mode=True)
        return pooled.permute(0, 2, 3, 1)
    whole = features[:, : rows * high, : cols * wide]
    return whole.unflatten(2, (cols, wide)).unflatten(1, (rows, high)).amax((2, 4))


def _bilinear(features: Tensor, rows: int, cols: int) -> Tensor:
    pooled = F.interpolate(_channels_first(features), size=(rows, cols), mode="bilinear")
    return pooled.permute(0, 2, 3, 1)


def _adaptive(features: Tensor, rows: int, cols: int) -> Tensor:
    # A contiguous copy would be bit-equal to the published code in float32 (this differs by
    # 6e-8), but takes 30 times as long.
    return F.adaptive_avg_pool2d(_channels_first(features), (rows, cols)).permute(0, 2, 3, 1)


def take(features: Tensor, indices: Sequence[int]) -> Tensor:
    """Rows ``indices`` of the first dimension: a view when they are evenly spaced."""
    if not indices:
        return features[:0]
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step > 0 and tuple(indices) == tuple(range(indices[0], indices[-1] + 1, step)):
        return features[indices[0] : indices[-1] + 1 : step]
    return features.index_select(0, device_index(indices, features.device))


def device_index(indices: Sequence[int], device: torch.device) -> Tensor:
    """Index tensor on a device, copied without waiting for it."""
    return torch.tensor(indices, dtype=torch.long).to(device, non_blocking=True)


def average_groups(features: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Mean over frames of every half-open range in ``groups``.

    Args:
        features: [m, rows, cols, d].
        groups: ranges into the first dimension; they may overlap.

    Returns:
        [len(groups), rows, cols, d].
    """
    sizes = sorted({hi - lo for lo, hi in groups})
    if len(sizes) == 1:
        return _mean_of(features, groups, sizes[0])
    # Adaptive ranges differ by one frame or two, so this is a loop over a few sizes.
    order: list[int] = []
    parts: list[Tensor] = []
    for size in sizes:
        members = [i for i, (lo, hi) in enumerate(groups) if hi - lo == size]
        order += members
        parts.append(_mean_of(features, [groups[i] for i in members], size))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return take(torch.cat(parts), inverse)


def _mean_of(features: Tensor, groups: Sequence[tuple[int, int]], size: int) -> Tensor:
    """Mean of groups of one size."""
    rows = [frame for lo, hi in groups for frame in range(lo, hi)]
    picked = take(features, rows)
    return picked if size == 1 else picked.unflatten(0, (len(groups), size)).mean(1)
