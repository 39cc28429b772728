"""Eyes and ears that know nothing of how the world is drawn: they measure decoded media.

A slow oracle beside the fast path: `see` finds coloured blobs by nearest colour and names their
shapes by fill and balance; `hear` measures envelope and spectrum; `answer` reads a question's words
and answers it from these measurements alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

PAINTS = {
    "red": (220, 40, 40),
    "orange": (250, 145, 20),
    "yellow": (245, 230, 60),
    "green": (40, 185, 65),
    "blue": (50, 90, 240),
    "purple": (175, 60, 215),
    "white": (245, 245, 245),
}
NUMBERS = ("none", "one", "two", "three", "four")
LEAST_PIXELS = 35


@dataclass(frozen=True)
class Blob:
    colour: str
    shape: str
    x: float
    y: float


def see(frame: np.ndarray) -> list[Blob]:
    """Blobs of one frame, uint8 [height, width, 3]: what is bright and hangs together."""
    blobs = []
    for rows, columns in _pieces(frame.max(-1) > 125):
        if len(rows) >= LEAST_PIXELS:
            # The middle half of the pixels by brightness: the edge is mixed with the background.
            pixels = frame[rows, columns].astype(np.float32)
            inner = pixels[np.argsort(pixels.sum(1))[len(rows) // 2 :]].mean(0)
            colour = min(PAINTS, key=lambda n: float(abs(inner - PAINTS[n]).sum()))
            blobs.append(Blob(colour, shape_of(rows, columns), columns.mean(), rows.mean()))
    return blobs


def _pieces(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of each connected piece of a mask."""
    left = set(zip(*(index.tolist() for index in np.nonzero(mask)), strict=True))
    pieces = []
    while left:
        front = [left.pop()]
        piece = list(front)
        while front:
            row, column = front.pop()
            for near in (
                (row - 1, column),
                (row + 1, column),
                (row, column - 1),
                (row, column + 1),
            ):
                if near in left:
                    left.remove(near)
                    front.append(near)
                    piece.append(near)
        points = np.array(piece)
        pieces.append((points[:, 0], points[:, 1]))
    return pieces


def shape_of(rows: np.ndarray, columns: np.ndarray) -> str:
    """Name a blob: a square fills its box, a circle 0.79 of it, the others about half."""
    top, left = rows.min(), columns.min()
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    box = np.zeros((height, width), bool)
    box[rows - top, columns - left] = True
    fill = box.mean()
    if fill > 0.9:
        return "square"
    if fill > 0.68:
        return "circle"
    # Where it is widest, from the top (0) to the bottom (1).
    widths = box.sum(1)
    middle_column = box[:, width // 2 - 1 : width // 2 + 1].mean()
    if widths[-3:].mean() > 0.8 * width:
        return "triangle"
    return "cross" if middle_column > 0.9 and box[height // 2 - 1].mean() > 0.9 else "star"


def tracks(frames: np.ndarray) -> list[list[Blob]]:
    return [see(frame) for frame in frames]


@dataclass(frozen=True)
class Heard:
    kind: str
    onset_s: float
    pieces: int
    rising: bool


def hear(waveform: np.ndarray, rate_hz: int) -> Heard:
    """Measure the one sound event of a waveform, float32 [S]."""
    hop = rate_hz // 100
    n = len(waveform) // hop
    level = np.sqrt((waveform[: n * hop].reshape(n, hop) ** 2).mean(1))
    loud = level > max(0.012, 0.05 * level.max())
    edges = np.flatnonzero(np.diff(np.r_[0, loud.astype(int), 0]))
    spans = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= 3]
    first, last = spans[0][0], spans[-1][1]
    part = waveform[first * hop : last * hop]
    lengths = [b - a for a, b in spans]
    window = 1024
    starts = range(0, max(1, len(part) - window), 160)
    spectra = np.array(
        [abs(np.fft.rfft(part[s : s + window] * np.hanning(len(part[s : s + window])), window))
         for s in starts]
    )  # fmt: skip
    power = (spectra**2).mean(0) + 1e-9
    flatness = np.exp(np.log(power[13:450]).mean()) / power[13:450].mean()
    peaks = spectra.argmax(1) * rate_hz / window
    third = max(1, len(peaks) // 4)
    slope = np.median(peaks[-third:]) / max(1.0, np.median(peaks[:third]))
    return Heard(_kind(spans, lengths, flatness, slope, level[first:last], power), first / 100,
                 len(spans), slope > 1)  # fmt: skip


def _kind(
    spans: list[tuple[int, int]],
    lengths: list[int],
    flatness: float,
    slope: float,
    level: np.ndarray,
    power: np.ndarray,
) -> str:
    if len(spans) > 1 or lengths[0] <= 19:
        return "beeps"
    if flatness > 0.08:
        return "noise"
    if slope > 1.5 or slope < 0.67:
        return "chirp"
    half = len(level) // 2
    return "bell" if level[half : 2 * half].mean() < 0.6 * level[:half].mean() else "tone"


@dataclass(frozen=True)
class Clip:
    """What was measured of a media file."""

    seen: list[list[Blob]]
    times_s: np.ndarray
    heard: Heard | None


def answer(kind: str, question: str, clip: Clip) -> str:
    """Answer a question of a kind from its words and what was measured; "?" if that cannot be."""
    words = question.lower().replace("?", "").replace(",", "").replace(".", "")
    try:
        return ANSWERS[kind](words, clip)
    except (KeyError, IndexError, ValueError):  # what is asked about was not found
        return "?"


def _by_shape(clip: Clip) -> dict[str, list[tuple[float, Blob]]]:
    """The blobs of each shape with their times; without glimpses."""
    found: dict[str, list[tuple[float, Blob]]] = {}
    for time_s, blobs in zip(clip.times_s, clip.seen, strict=True):
        for blob in blobs:
            found.setdefault(blob.shape, []).append((float(time_s), blob))
    return {shape: seen for shape, seen in found.items() if len(seen) >= 6}


def _word(words: str, names: tuple[str, ...] | list[str]) -> str:
    (found,) = (n for n in names if re.search(rf"\b{n}s?\b", words))
    return found


SHAPES = ("circle", "square", "triangle", "cross", "star")


def _colour(words: str, clip: Clip) -> str:
    return _by_shape(clip)[_word(words, SHAPES)][-1][1].colour


def _shape(words: str, clip: Clip) -> str:
    colour = _word(words, list(PAINTS))
    shapes = [b.shape for blobs in clip.seen for b in blobs if b.colour == colour]
    return max(set(shapes), key=shapes.count)


def _count(words: str, clip: Clip) -> str:
    return NUMBERS[len(clip.seen[len(clip.seen) // 2])]


def _way(seen: list[tuple[float, Blob]]) -> tuple[float, float]:
    (_, first), (_, last) = seen[0], seen[-1]
    return last.x - first.x, last.y - first.y


def _direction(words: str, clip: Clip) -> str:
    ways = [_way(seen) for seen in _by_shape(clip).values()]
    x, y = max(ways, key=lambda w: abs(w[0]) + abs(w[1]))
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _change_s(seen: list[tuple[float, Blob]]) -> float | None:
    for (_, before), (time_s, after) in pairwise(seen):
        if before.colour != after.colour:
            return time_s
    return None


def _first(words: str, clip: Clip) -> str:
    since = {s: _change_s(seen) or seen[0][0] for s, seen in _by_shape(clip).items()}
    return min(since, key=lambda s: since[s])


def _order(words: str, clip: Clip) -> str:
    assert clip.heard is not None
    (change_s,) = (t for s in _by_shape(clip).values() if (t := _change_s(s)) is not None)
    return "before" if clip.heard.onset_s < change_s else "after"


def _mover(words: str, clip: Clip) -> str:
    assert clip.heard is not None
    start, end = clip.heard.onset_s, clip.heard.onset_s + 0.5

    def moved(seen: list[tuple[float, Blob]]) -> float:
        near = [blob for time_s, blob in seen if start <= time_s <= end]
        return abs(near[-1].x - near[0].x) + abs(near[-1].y - near[0].y)

    shapes = _by_shape(clip)
    return max(shapes, key=lambda s: moved(shapes[s]))


def _is_there(words: str, clip: Clip) -> str:
    names = [n for n in (*PAINTS, *SHAPES) if re.search(rf"\b{n}\b", words)]
    blobs = [b for frame in clip.seen for b in frame]
    there = sum(names[0] in (b.colour, b.shape) for b in blobs)
    return "yes" if there >= 4 else "no"


def _sound(words: str, clip: Clip) -> str:
    assert clip.heard is not None
    return clip.heard.kind


def _beeps(words: str, clip: Clip) -> str:
    assert clip.heard is not None
    return NUMBERS[clip.heard.pieces]


def _pitch(words: str, clip: Clip) -> str:
    assert clip.heard is not None
    return "rising" if clip.heard.rising else "falling"


def _is_heard(words: str, clip: Clip) -> str:
    assert clip.heard is not None
    asked = _word(words, ("tone", "chirp", "noise", "bell", "beep"))
    return "yes" if clip.heard.kind.startswith(asked) else "no"


ANSWERS = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "direction": _direction,
    "first": _first,
    "order": _order,
    "mover": _mover,
    "yes_no_picture": _is_there,
    "sound": _sound,
    "beeps": _beeps,
    "pitch": _pitch,
    "yes_no_sound": _is_heard,
}
