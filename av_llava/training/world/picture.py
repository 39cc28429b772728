"""A scene's picture: smooth-edged shapes over a dark background, as uint8 frames.

Contract: numpy only, a pure function of the scene and the times. Edges are smoothed over one
pixel, so that slow motions move smoothly and small shapes keep their form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from av_llava.errors import UsageError
from av_llava.training.world.parts import COLOURS, Background, Scene, Seen

_STAR_POINTS, _STAR_INNER = 5, 0.42


def frame_times(scene: Scene) -> np.ndarray:
    """Return the times of the clip's frames in seconds, float64 [T]."""
    return np.arange(round(scene.duration_s * scene.fps)) / scene.fps


def frames(scene: Scene, times_s: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: one with a picture.
        times_s: when; all frames of the clip by default.

    Returns:
        uint8 [T, size, size, 3], RGB.

    Raises:
        UsageError: the scene has no picture.
    """
    if not scene.has_video:
        raise UsageError(f"Scene {scene.key} is sound only; it has no frames.")
    times = frame_times(scene) if times_s is None else np.asarray(times_s, np.float64)
    base = background(scene.background, scene.size, scene.noise_seed)
    out = np.empty((len(times), scene.size, scene.size, 3), np.uint8)
    latest: list[Seen] | None = None
    for i, time_s in enumerate(times):
        seen = scene.things_at(float(time_s))
        out[i] = out[i - 1] if seen == latest else _draw(base, seen)  # mostly nothing moves
        latest = seen
    return out


def background(look: Background, size: int, seed: int) -> np.ndarray:
    """Draw what is behind the things, float32 [size, size, 3] of 0..255."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    along = np.cos(look.angle) * axis[None, :] + np.sin(look.angle) * axis[:, None]
    if look.kind == "plain":
        share = np.zeros((size, size), np.float32)
    elif look.kind == "gradient":
        share = (along - along.min()) / (along.max() - along.min())
    elif look.kind == "stripes":
        share = 0.5 + 0.5 * np.sin(2 * np.pi * 4 * along)
    else:
        coarse = np.random.default_rng(seed).random((4, 4), np.float32)
        share = np.kron(coarse, np.ones((-(-size // 4),) * 2, np.float32))[:size, :size]
    first, second = (np.array(c, np.float32) for c in (look.colour, look.other))
    return first + share[..., None].astype(np.float32) * (second - first)


def _draw(base: np.ndarray, things: Sequence[Seen]) -> np.ndarray:
    """Draw the things over a background; uint8 [size, size, 3]."""
    canvas, side = base.copy(), len(base)
    for thing in things:
        x, y = thing.place
        radius = thing.size * side / 2
        rows, row_axis = _window(y * side, radius, side)
        columns, column_axis = _window(x * side, radius, side)
        distance = SHAPE_DISTANCES[thing.shape](column_axis[None, :], row_axis[:, None], radius)
        cover = np.clip(0.5 - distance, 0, 1)[..., None].astype(np.float32)  # [h, w, 1]
        patch = canvas[rows, columns]
        patch += cover * (np.array(COLOURS[thing.colour], np.float32) - patch)
    return (canvas + 0.5).astype(np.uint8)


def _window(centre: float, radius: float, side: int) -> tuple[slice, np.ndarray]:
    """Return the pixels that a shape touches on one axis, and their distance from its centre."""
    low = max(0, int(centre - radius - 1))
    high = min(side, int(centre + radius + 2))
    return slice(low, high), np.arange(low, high) + 0.5 - centre


def _circle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.hypot(x, y) - radius


def _square(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) - 0.88 * radius


def _triangle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Point up: base at y = radius, tip at y = -radius."""
    slope = np.sqrt(5)  # of sides that rise 2 while they run 1
    return np.maximum(y - radius, (2 * abs(x) - (y + radius)) / slope)


def _cross(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    thin, long = 0.34 * radius, radius
    bars = (np.maximum(abs(x) - a, abs(y) - b) for a, b in ((long, thin), (thin, long)))
    return np.minimum(*bars)


def _star(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Five points, one of them up: the distance to the nearest edge's line."""
    sector = 2 * np.pi / _STAR_POINTS
    angle = abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)  # 0 at a point
    length = np.hypot(x, y)
    along, across = length * np.cos(angle), length * np.sin(angle)
    # The edge goes from the point (radius, 0) to the notch between two points.
    notch = _STAR_INNER * radius * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    edge = notch - np.array([radius, 0.0])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (along - radius) * normal[0] + across * normal[1]


SHAPE_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
}
"""(x, y, radius) in pixels from the centre -> about the distance from the edge, negative inside."""
