"""What happens in a scene's picture: one function per plot, each a pure function of a generator.

Contract: a plot fixes which questions can be asked, and everything that is an answer is drawn
uniformly and independently within it. So neither the presence of a question nor another sense
tells the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from av_llava.training.world.parts import COLOURS, DIRECTIONS, SHAPES, Motion, Point, Thing, Turn

Rng = np.random.Generator

ORDER_SLOTS = 7
"""Moments at which a change, or the sound that comes before or after it, can begin."""
FIRST_SLOT_S, SLOT_S = 0.2, 0.54
ORDER_SOUND_S = 0.4
"""The longest sound that leaves a pause between a slot and the next."""


@dataclass(frozen=True)
class Staging:
    """A plot's outcome: the things, and where the sound has to lie."""

    things: tuple[Thing, ...]
    sound_from_s: float
    """The earliest onset."""
    sound_until_s: float
    """When the sound must have ended."""
    onset_s: float | None = None
    """The onset, if the plot fixes it."""


def order_bound() -> float:
    """Return how often the best guess from one sense alone tells before from after.

    Sound and change always begin in neighbouring slots, every pair of them as often, so that the
    time of one of them tells nothing, except in the first and the last slot. That much cannot be
    avoided in a clip that has a beginning and an end.
    """
    return 0.5 + 0.5 / (ORDER_SLOTS - 1)


def crowd(rng: Rng, duration_s: float) -> Staging:
    """One to four things stand still."""
    number = int(rng.integers(1, 5))
    looks = _looks(rng, number)
    cells = rng.permutation(9)[:number]
    things = []
    for (shape, colour), cell in zip(looks, cells, strict=True):
        place = tuple((1 + 2 * int(c)) / 6 + _between(rng, -0.02, 0.02) for c in divmod(cell, 3))
        things.append(Thing(shape, colour, _between(rng, 0.23, 0.28), (place[0], place[1])))
    return Staging(tuple(things), 0.1, duration_s - 0.1)


def travel(rng: Rng, duration_s: float) -> Staging:
    """One thing crosses most of the picture; sometimes another stands by."""
    (mover, bystander) = _looks(rng, 2)
    direction = _one_of(rng, tuple(DIRECTIONS))
    lane = _one_of(rng, (0.26, 0.74)) + _between(rng, -0.06, 0.06)
    start_s = _between(rng, 0.2, 1.0)
    motion = _way(rng, direction, lane, start_s, start_s + _between(rng, 1.8, 2.6), 0.06)
    things = [_moving(rng, mover, motion)]
    if rng.random() < 0.5:
        away = (0.74 if lane < 0.5 else 0.26) + _between(rng, -0.05, 0.05)
        place = _point(direction, _between(rng, 0.2, 0.8), away)
        things.append(Thing(*bystander, _between(rng, 0.24, 0.3), place))
    return Staging(tuple(things), 0.1, duration_s - 0.1)


def sequence(rng: Rng, duration_s: float) -> Staging:
    """Two things appear, or change colour, one after the other."""
    first_s = _between(rng, 0.5, 1.7)
    times = [first_s, first_s + _between(rng, 0.8, 1.5)]
    rng.shuffle(times)
    places = _two_places(rng)
    looks = _looks(rng, 4)
    appear = rng.random() < 0.5
    things = []
    for i in range(2):
        shape, colour = looks[i]
        size = _between(rng, 0.26, 0.34)
        if appear:
            things.append(Thing(shape, colour, size, places[i], appears_s=times[i]))
        else:
            turn = Turn(looks[i + 2][1], times[i])
            things.append(Thing(shape, colour, size, places[i], turn=turn))
    return Staging(tuple(things), 0.1, duration_s - 0.1)


def change(rng: Rng, duration_s: float) -> Staging:
    """One thing changes colour one slot before or after the sound; another stands by."""
    slot = int(rng.integers(ORDER_SLOTS - 1))
    slots = [slot, slot + 1]
    rng.shuffle(slots)
    change_s, onset_s = (
        FIRST_SLOT_S + SLOT_S * s + float(offset)
        for s, offset in zip(slots, rng.uniform(-0.04, 0.04, 2), strict=True)
    )
    looks = _looks(rng, 3)
    places = _two_places(rng)
    size, other = _between(rng, 0.28, 0.36), _between(rng, 0.24, 0.3)
    turning = Thing(*looks[0], size, places[0], turn=Turn(looks[2][1], change_s))
    bystander = Thing(*looks[1], other, places[1])
    return Staging((turning, bystander), onset_s, onset_s + ORDER_SOUND_S, onset_s)


def turns(rng: Rng, duration_s: float) -> Staging:
    """Two things move, one after the other; the sound plays while one of them moves."""
    starts = [_between(rng, 0.3, 0.5), _between(rng, 2.2, 2.4)]
    rng.shuffle(starts)
    along = _one_of(rng, ("horizontal", "vertical"))
    lanes = [0.26, 0.74]
    rng.shuffle(lanes)
    looks = _looks(rng, 2)
    things = []
    for i in range(2):
        pair = ("left", "right") if along == "horizontal" else ("up", "down")
        lane = lanes[i] + _between(rng, -0.04, 0.04)
        motion = _way(rng, _one_of(rng, pair), lane, starts[i], starts[i] + 1.3, 0.08)
        things.append(_moving(rng, looks[i], motion))
    heard = starts[int(rng.integers(2))]
    return Staging(tuple(things), heard + 0.1, heard + 1.2)


PLOTS: dict[str, Callable[[Rng, float], Staging]] = {
    "crowd": crowd,
    "travel": travel,
    "sequence": sequence,
    "change": change,
    "turns": turns,
}
NEED_SOUND = ("change", "turns")
"""Plots that make sense only with a sound."""


def _looks(rng: Rng, number: int) -> list[tuple[str, str]]:
    """Different shapes in different colours."""
    shapes, colours = rng.permutation(len(SHAPES)), rng.permutation(len(COLOURS))
    names = tuple(COLOURS)
    return [(SHAPES[shapes[i]], names[colours[i]]) for i in range(number)]


def _moving(rng: Rng, look: tuple[str, str], motion: Motion) -> Thing:
    return Thing(*look, _between(rng, 0.26, 0.34), motion.start, motion=motion)


def _way(
    rng: Rng, direction: str, lane: float, start_s: float, end_s: float, jitter: float
) -> Motion:
    """From near one edge to near the opposite one: 0.46 to 0.62 of the side."""
    near = 0.19 + _between(rng, 0, jitter)
    far = 0.81 - _between(rng, 0, jitter)
    if sum(DIRECTIONS[direction]) < 0:
        near, far = far, near
    start, end = _point(direction, near, lane), _point(direction, far, lane)
    return Motion(start, end, start_s, end_s, direction)


def _point(direction: str, along: float, across: float) -> Point:
    return (along, across) if DIRECTIONS[direction][0] else (across, along)


def _two_places(rng: Rng) -> list[Point]:
    """Two different quarters of the picture."""
    quarters = rng.permutation(4)[:2]
    return [
        (
            0.27 + 0.46 * (int(q) % 2) + _between(rng, -0.05, 0.05),
            0.27 + 0.46 * (int(q) // 2) + _between(rng, -0.05, 0.05),
        )
        for q in quarters
    ]


def _one_of(rng: Rng, options: tuple[Any, ...]) -> Any:
    return options[int(rng.integers(len(options)))]


def _between(rng: Rng, low: float, high: float) -> float:
    return float(rng.uniform(low, high))
