"""Questions about a scene with their answers.

Contract: `questions` is a pure function of the scene and the generator. Which kinds are asked
depends on the plot and on chance, never on what is the answer; no question of a clip tells the
answer of another; every answer is one short lower-case word. `kinds.KINDS` says what each kind
needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from av_llava.training.world.kinds import KINDS, Kind
from av_llava.training.world.parts import COLOURS, NUMBERS, SHAPES, SOUNDS, Scene, Thing

__all__ = ["KINDS", "Kind", "Question", "all_questions", "questions"]

Rng = np.random.Generator

_COUNT_SHARE, _PRESENCE_SHARE = 0.7, 0.4
"""How often things are counted, and asked for rather than about."""
_YES_NO = {True: "yes", False: "no"}
_A_SOUND = {
    "tone": "a tone",
    "chirp": "a chirp",
    "noise": "a noise",
    "bell": "a bell",
    "beeps": "a beep",
}


@dataclass(frozen=True)
class Question:
    """One question about a clip."""

    kind: str
    """A key of `KINDS`."""
    needs: frozenset[str]
    """Members of slow, fast, vision, audio."""
    question: str
    answer: str
    choices: tuple[str, ...]
    """The answers that this question leaves open, in an order that does not tell which."""


def questions(scene: Scene, rng: Rng) -> list[Question]:
    """Return questions about a clip that do not answer each other, in random order.

    Args:
        scene: any scene; a silent one gets no questions about sound, and so on.
        rng: chooses among the questions that can be asked, and their wordings.
    """
    asked: list[Question] = []
    told: frozenset[str] = frozenset()
    # Two questions about different things tell that there are two, so that counting is asked with
    # one of them at most.
    counted = scene.plot == "crowd" and rng.random() < _COUNT_SHARE
    if scene.plot in _EVENTS and (counted or scene.plot != "crowd"):
        event, told = _EVENTS[scene.plot](scene, rng)
        asked.append(event)
    if scene.has_video:
        asked += _looks(scene, rng, told, single=counted)
    if scene.topic is not None:
        asked.append(_TOPICS[scene.topic](scene, rng))
    return [asked[i] for i in rng.permutation(len(asked))]


def all_questions(scene: Scene, rng: Rng) -> list[Question]:
    """Return every question that has an answer in a scene, one wording of each, in fixed order.

    Unlike those of `questions`, some tell the answers of others ("How many beeps?" what the sound
    is), and the answers of a kind are not equally frequent.
    """
    asked = []
    if scene.plot in _EVENTS:
        asked.append(_EVENTS[scene.plot](scene, rng)[0])
    for thing in _lasting(scene):
        asked += [_colour_of(thing, rng), _shape_of(thing, rng)]
    for presence in _presences(scene, frozenset()):
        asked += [_is_there(presence, yes, rng) for yes in (True, False)]
    for sound in scene.sounds:
        # One beep could be taken for a short tone.
        asked += [_what_sound(scene, rng)] * (sound.beeps != 1)
        asked += [_is_heard(scene, yes, rng) for yes in (True, False)]
        asked += [_beeps(scene, rng)] * (sound.kind == "beeps")
        asked += [_pitch(scene, rng)] * (sound.kind == "chirp")
    return asked


# ------------------------------------------------------------------ events in the picture

Told = tuple[Question, frozenset[str]]
"""A question, and the shapes that its words name."""


def _count(scene: Scene, rng: Rng) -> Told:
    return _ask(rng, "count", "any", NUMBERS[len(scene.things) - 1]), frozenset()


def _direction(scene: Scene, rng: Rng) -> Told:
    (mover,) = (t for t in scene.things if t.motion is not None)
    assert mover.motion is not None
    answer = mover.motion.direction
    if rng.random() < 0.5:
        return _ask(rng, "direction", "plain", answer), frozenset()
    return _ask(rng, "direction", "named", answer, shape=mover.shape), frozenset({mover.shape})


def _first(scene: Scene, rng: Rng) -> Told:
    def since(thing: Thing) -> float:
        return thing.turn.time_s if thing.turn else thing.appears_s

    answer = min(scene.things, key=since).shape
    situation = "turn" if scene.things[0].turn else "appear"
    return _either(rng, "first", situation, scene, answer)


def _order(scene: Scene, rng: Rng) -> Told:
    (turning,) = (t for t in scene.things if t.turn is not None)
    assert turning.turn is not None
    answer = "before" if scene.sounds[0].onset_s < turning.turn.time_s else "after"
    question = _ask(rng, "order", "any", answer, shape=turning.shape)
    return question, frozenset({turning.shape})


def _mover(scene: Scene, rng: Rng) -> Told:
    onset_s = scene.sounds[0].onset_s
    (answer,) = (
        t.shape for t in scene.things if t.motion and t.motion.start_s <= onset_s < t.motion.end_s
    )
    return _either(rng, "mover", "any", scene, answer)


def _either(rng: Rng, kind: str, situation: str, scene: Scene, answer: str) -> Told:
    """Ask which of the scene's two shapes it is."""
    pair = [scene.things[i].shape for i in rng.permutation(2)]
    question = _ask(rng, kind, situation, answer, tuple(pair), one=pair[0], other=pair[1])
    return question, frozenset(pair)


_EVENTS: dict[str, Callable[[Scene, Rng], Told]] = {
    "crowd": _count,
    "travel": _direction,
    "sequence": _first,
    "change": _order,
    "turns": _mover,
}


# ------------------------------------------------------------------ looks


@dataclass(frozen=True)
class _Presence:
    """Colours or shapes that can be asked for."""

    noun: str
    there: tuple[str, ...]
    absent: tuple[str, ...]


def _looks(scene: Scene, rng: Rng, told: frozenset[str], single: bool) -> list[Question]:
    """Ask either about the looks of things or whether they are there.

    Not about both: a question about the red shape tells that it is there.

    Args:
        scene: a scene with things.
        rng: chooses.
        told: shapes that the question about the event names.
        single: ask one question at most.
    """
    lasting, presences = _lasting(scene), _presences(scene, told)
    if not lasting:
        return []
    if rng.random() < _PRESENCE_SHARE:
        return [_is_there(_one_of(rng, presences), bool(rng.random() < 0.5), rng)]
    asked = [_one_of(rng, lasting)] if single else lasting
    return [
        _shape_of(thing, rng)
        if thing.shape not in told and rng.random() < 0.5
        else _colour_of(thing, rng)
        for thing in asked
    ]


def _lasting(scene: Scene) -> list[Thing]:
    """The things that have one colour."""
    return [t for t in scene.things if t.turn is None]


def _presences(scene: Scene, told: frozenset[str]) -> list[_Presence]:
    """What can be asked for with either answer: colours first."""
    colours = {t.colour for t in _lasting(scene)}
    passing = {c for t in scene.things if t.turn for c in (t.colour, t.turn.colour)}
    shapes = {t.shape for t in scene.things} - told
    found = [
        _Presence("{} shape", _sorted(colours), _sorted(set(COLOURS) - colours - passing)),
        _Presence("{}", _sorted(shapes), _sorted(set(SHAPES) - shapes - told)),
    ]
    return [p for p in found if p.there and p.absent]


def _sorted(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names))


def _colour_of(thing: Thing, rng: Rng) -> Question:
    return _ask(rng, "colour", "any", thing.colour, shape=thing.shape)


def _shape_of(thing: Thing, rng: Rng) -> Question:
    return _ask(rng, "shape", "any", thing.shape, colour=thing.colour)


def _is_there(presence: _Presence, yes: bool, rng: Rng) -> Question:
    name = _one_of(rng, presence.there if yes else presence.absent)
    noun = presence.noun.format(name)
    thing = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    return _ask(rng, "yes_no_picture", "any", _YES_NO[yes], a_thing=thing)


# ------------------------------------------------------------------ sounds


def _what_sound(scene: Scene, rng: Rng) -> Question:
    return _ask(rng, "sound", "any", scene.sounds[0].kind)


def _beeps(scene: Scene, rng: Rng) -> Question:
    return _ask(rng, "beeps", "any", NUMBERS[scene.sounds[0].beeps - 1])


def _pitch(scene: Scene, rng: Rng) -> Question:
    return _ask(rng, "pitch", "any", "rising" if scene.sounds[0].rising else "falling")


def _presence(scene: Scene, rng: Rng) -> Question:
    return _is_heard(scene, bool(rng.random() < 0.5), rng)


def _is_heard(scene: Scene, yes: bool, rng: Rng) -> Question:
    kind = scene.sounds[0].kind
    asked = kind if yes else _one_of(rng, [k for k in SOUNDS if k != kind])
    return _ask(rng, "yes_no_sound", "any", _YES_NO[yes], a_sound=_A_SOUND[asked])


_TOPICS: dict[str, Callable[[Scene, Rng], Question]] = {
    "sound": _what_sound,
    "beeps": _beeps,
    "pitch": _pitch,
    "presence": _presence,
}


# ------------------------------------------------------------------ wording


def _ask(
    rng: Rng,
    kind: str,
    situation: str,
    answer: str,
    choices: tuple[str, ...] | None = None,
    **names: str,
) -> Question:
    """Word a question of a kind; `names` fill its blanks."""
    wordings = KINDS[kind].wordings[situation]
    words = _one_of(rng, wordings).format(**names)
    return Question(kind, KINDS[kind].needs, words, answer, choices or KINDS[kind].answers)


def _one_of(rng: Rng, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]
