"""The slow way: build every token of a video in plain Python loops, straight from the settings."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from av_llava.settings import AggregatorSettings, PoolSettings, SelectSettings, StreamSettings


class Token(NamedTuple):
    vector: np.ndarray
    kind: int
    stream: int
    frame: int
    last_frame: int
    box: tuple[int, int, int, int]
    weight: int


NO_BOX = (-1, -1, -1, -1)


def aggregate(
    settings: AggregatorSettings, features: np.ndarray, marks: dict[str, np.ndarray]
) -> list[Token]:
    """Features [T, h, w, d] to tokens, one after the other."""
    frames = len(features)
    slow = select(settings.slow.select, frames)
    if settings.layout == "single":
        blocks = stream_items(settings.slow, features, slow, 2)
    else:
        fast = select(settings.fast.select, frames)
        if settings.layout == "by_frame":
            fast = [f for f in fast if f not in slow]
        slow_items = stream_items(settings.slow, features, slow, 0)
        fast_items = stream_items(settings.fast, features, fast, 1)
        if settings.layout == "slow_then_fast":
            blocks = slow_items + fast_items
        elif settings.layout == "fast_then_slow":
            blocks = fast_items + slow_items
        else:
            blocks = []
            for frame in range(frames):
                blocks += [item for item in slow_items if item[0] == frame]
                blocks += [item for item in fast_items if item[0] == frame]
    out: list[Token] = []
    for first, last, stream, rows in blocks:
        for row in rows:
            out += [Token(v, 0, stream, first, last, box, weight) for v, box, weight in row]
            if settings.newline == "row":
                out.append(Token(marks["newline"], 1, stream, first, last, NO_BOX, 0))
        if settings.newline == "frame":
            out.append(Token(marks["newline"], 2, stream, first, last, NO_BOX, 0))
        if settings.frame_end:
            out.append(Token(marks["frame_end"], 4, stream, first, last, NO_BOX, 0))
    if settings.newline == "video":
        out.append(Token(marks["newline"], 3, -1, -1, frames - 1, NO_BOX, 0))
    return out


def select(how: SelectSettings, frames: int) -> list[int]:
    if how.kind == "all":
        return list(range(frames))
    if how.kind == "every":
        return [f for f in range(frames) if f % how.step == 0]
    if how.kind == "given":
        return list(how.frames)
    if how.kind == "uniform":
        n = how.count if how.repeat else min(how.count, frames)
        return [math.floor(Fraction(i * frames, n)) for i in range(n)]
    if frames < how.min_frames:
        return list(range(frames))
    n = max(frames // how.step, how.min_frames)
    return [min(int(i * (frames / n)), frames - 1) for i in range(n)]


def stream_items(
    settings: StreamSettings, features: np.ndarray, frames: list[int], stream: int
) -> list[tuple[int, int, int, list]]:
    """(first frame, last frame, stream, rows of (vector, box, weight)) of every item."""
    grids = [pool(settings.pool, features[f]) for f in frames]
    items = []
    for group in groups(settings, len(frames)):
        rows = []
        for y in range(len(grids[0])):
            row = []
            for x in range(len(grids[0][0])):
                cells = [grids[i][y][x] for i in group]
                mean = sum(cell[0] for cell in cells) / len(cells)
                row.append((mean, cells[0][1], cells[0][2] * len(cells)))
            rows.append(row)
        items.append((frames[group[0]], frames[group[-1]], stream, rows))
    return items


def groups(settings: StreamSettings, n: int) -> list[list[int]]:
    how = settings.temporal
    if n == 0:
        return []
    if how.kind == "none":
        return [[i] for i in range(n)]
    if how.kind == "mean":
        return [list(range(n))]
    if how.kind == "adaptive":
        return adaptive(n, how.size)
    whole, rest = divmod(n, how.size)
    count = whole + (rest > 0 and how.tail != "drop")
    if count < how.min_frames:
        return adaptive(n, min(n, how.min_frames))
    if how.tail == "adaptive":
        return adaptive(n, count)
    return [[i for i in range(n) if i // how.size == g] for g in range(count)]


def adaptive(n: int, bins: int) -> list[list[int]]:
    """PyTorch's adaptive bins."""
    return [
        list(range(math.floor(Fraction(b * n, bins)), math.ceil(Fraction((b + 1) * n, bins))))
        for b in range(bins)
    ]


def windows(n: int, size: int, tail: str) -> list[list[int]]:
    found = [list(range(lo, min(lo + size, n))) for lo in range(0, n, size)]
    return [w for w in found if len(w) == size or tail == "partial"]


def pool(how: PoolSettings, grid: np.ndarray) -> list[list[tuple[np.ndarray, tuple, int]]]:
    """Rows of (vector, box, weight) of one frame [h, w, d]."""
    height, width, _ = grid.shape
    if how.kind == "bilinear" and how.stride > 1:
        return bilinear(grid, math.ceil(height / how.stride), math.ceil(width / how.stride))
    if how.kind.startswith("raster"):
        return [raster(how, grid)]
    if how.kind == "adaptive":
        rows, cols = how.size
        if how.clamp:
            rows, cols = min(rows, height), min(cols, width)
        ys, xs = adaptive(height, rows), adaptive(width, cols)
    elif how.kind.startswith("pair"):
        ys, xs = [[y] for y in range(height)], windows(width, 2, how.tail)
    else:
        side = 1 if how.kind == "identity" else how.stride
        ys, xs = windows(height, side, how.tail), windows(width, side, how.tail)
    join = max_of if how.kind.endswith("max") else mean_of
    return [
        [
            (
                join([grid[i, j] for i in y for j in x]),
                (y[0], y[-1] + 1, x[0], x[-1] + 1),
                len(y) * len(x),
            )
            for x in xs
        ]
        for y in ys
    ]


def raster(how: PoolSettings, grid: np.ndarray) -> list[tuple[np.ndarray, tuple, int]]:
    height, width, _ = grid.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    join = max_of if how.kind.endswith("max") else mean_of
    row = []
    for pair in windows(len(places), 2, how.tail):
        cells = [places[i] for i in pair]
        (y, x), (last_y, last_x) = cells[0], cells[-1]
        box = (y, y + 1, x, last_x + 1) if y == last_y else (y, last_y + 1, 0, width)
        row.append((join([grid[cell] for cell in cells]), box, len(cells)))
    return row


def bilinear(grid: np.ndarray, rows: int, cols: int) -> list:
    height, width, _ = grid.shape

    def taps(i: int, n: int, out: int) -> list[tuple[int, Fraction]]:
        centre = max(Fraction(2 * i + 1, 2) * Fraction(n, out) - Fraction(1, 2), Fraction(0))
        low = math.floor(centre)
        part = centre - low
        both = [(low, 1 - part), (min(low + 1, n - 1), part)]
        return [(index, share) for index, share in both if share]

    out = []
    for y in range(rows):
        row = []
        for x in range(cols):
            ty, tx = taps(y, height, rows), taps(x, width, cols)
            value = sum(grid[i, j] * float(a * b) for i, a in ty for j, b in tx)
            box = (ty[0][0], ty[-1][0] + 1, tx[0][0], tx[-1][0] + 1)
            row.append((value, box, (box[1] - box[0]) * (box[3] - box[2])))
        out.append(row)
    return out


def max_of(vectors: list[np.ndarray]) -> np.ndarray:
    return np.max(vectors, axis=0)


def mean_of(vectors: list[np.ndarray]) -> np.ndarray:
    return sum(vectors) / len(vectors)
