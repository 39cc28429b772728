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

ORDER_SLOTS = 5
"""Moments at which a change, or the sound that comes before or after it, can begin."""
_FIRST_SLOT_S, _SLOT_S = 0.25, 0.6
ORDER_SOUND_S = 0.42
"""The longest sound that leaves a pause between a slot and the next."""
_USUAL_S = 3.0
"""The length of clip for which the times here are written; others stretch them."""


@dataclass(frozen=True)
class Staging:
    """A plot's outcome: the things, and where the sound has to lie."""

    things: tuple[Thing, ...]
    sound_from_s: float
    """The earliest onset."""
    sound_until_s: float
    """When the sound must have ended."""
    onset_s: float | None = None
    """The onset, if the plot fixes it; the sound is to be short then."""

    @property
    def span_s(self) -> float:
        """The time that there is for the sound."""
        return self.sound_until_s - self.sound_from_s


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
    cells = rng.permutation(9)[:number]
    things = []
    for look, cell in zip(_looks(rng, number), cells, strict=True):
        x, y = ((1 + 2 * int(c)) / 6 + _between(rng, -0.02, 0.02) for c in divmod(cell, 3))
        things.append(Thing(*look, _between(rng, 0.24, 0.28), (x, y)))
    return _anytime(things, duration_s)


def travel(rng: Rng, duration_s: float) -> Staging:
    """One thing crosses most of the picture; sometimes another stands by."""
    mover, bystander = _looks(rng, 2)
    direction = _one_of(rng, tuple(DIRECTIONS))
    lane = _one_of(rng, (0.26, 0.74)) + _between(rng, -0.06, 0.06)
    stretch = duration_s / _USUAL_S
    start_s = _between(rng, 0.15, 0.7) * stretch
    end_s = start_s + _between(rng, 1.4, 2.0) * stretch
    things = [_moving(rng, mover, _way(rng, direction, lane, start_s, end_s))]
    if rng.random() < 0.5:
        away = (0.74 if lane < 0.5 else 0.26) + _between(rng, -0.05, 0.05)
        place = _point(direction, _between(rng, 0.2, 0.8), away)
        things.append(Thing(*bystander, _between(rng, 0.24, 0.3), place))
    return _anytime(things, duration_s)


def sequence(rng: Rng, duration_s: float) -> Staging:
    """Two things appear, or change colour, one after the other."""
    stretch = duration_s / _USUAL_S
    first_s = _between(rng, 0.35, 1.1) * stretch
    times = [first_s, first_s + _between(rng, 0.7, 1.2) * stretch]
    rng.shuffle(times)
    places, looks = _two_places(rng), _looks(rng, 4)
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
    return _anytime(things, duration_s)


def change(rng: Rng, duration_s: float) -> Staging:
    """One thing changes colour one slot before or after the sound; another stands by."""
    slot = int(rng.integers(ORDER_SLOTS - 1))
    slots = [slot, slot + 1]
    rng.shuffle(slots)
    change_s, onset_s = (
        (_FIRST_SLOT_S + _SLOT_S * s) * duration_s / _USUAL_S + _between(rng, -0.02, 0.02)
        for s in slots
    )
    looks, places = _looks(rng, 3), _two_places(rng)
    turn = Turn(looks[2][1], change_s)
    turning = Thing(*looks[0], _between(rng, 0.28, 0.36), places[0], turn=turn)
    bystander = Thing(*looks[1], _between(rng, 0.24, 0.3), places[1])
    return Staging((turning, bystander), onset_s, onset_s + ORDER_SOUND_S, onset_s)


def turns(rng: Rng, duration_s: float) -> Staging:
    """Two things move, one after the other; the sound plays while one of them moves."""
    stretch = duration_s / _USUAL_S
    starts = [_between(rng, 0.15, 0.3) * stretch, _between(rng, 1.65, 1.8) * stretch]
    rng.shuffle(starts)
    pair = _one_of(rng, (("left", "right"), ("up", "down")))
    lanes = [0.26, 0.74]
    rng.shuffle(lanes)
    looks = _looks(rng, 2)
    things = []
    for i in range(2):
        lane = lanes[i] + _between(rng, -0.04, 0.04)
        end_s = starts[i] + 0.95 * stretch
        motion = _way(rng, _one_of(rng, pair), lane, starts[i], end_s)
        things.append(_moving(rng, looks[i], motion))
    heard_s = starts[int(rng.integers(2))]
    return Staging(tuple(things), heard_s + 0.05, heard_s + 0.9 * stretch)


PLOTS: dict[str, Callable[[Rng, float], Staging]] = {
    "crowd": crowd,
    "travel": travel,
    "sequence": sequence,
    "change": change,
    "turns": turns,
}
NEED_SOUND = ("change", "turns")
"""Plots that make sense only with a sound."""


def _anytime(things: list[Thing], duration_s: float) -> Staging:
    """A staging that leaves the sound free."""
    return Staging(tuple(things), 0.1, duration_s - 0.1)


def _looks(rng: Rng, number: int) -> list[tuple[str, str]]:
    """Pairs of a shape and a colour, all different."""
    shapes, colours = rng.permutation(len(SHAPES)), rng.permutation(len(COLOURS))
    names = tuple(COLOURS)
    return [(SHAPES[shapes[i]], names[colours[i]]) for i in range(number)]


def _moving(rng: Rng, look: tuple[str, str], motion: Motion) -> Thing:
    return Thing(*look, _between(rng, 0.26, 0.34), motion.start, motion=motion)


def _way(rng: Rng, direction: str, lane: float, start_s: float, end_s: float) -> Motion:
    """From near one edge to near the opposite one, at least half of the picture."""
    near = 0.19 + _between(rng, 0, 0.06)
    far = 0.81 - _between(rng, 0, 0.06)
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
