"""Questions about a scene with their answers: at most one about looks, one about events, one
about the sound.

Contract: `questions` is a pure function of the scene and the generator. Which kinds are asked
depends on the plot, never on what is the answer; no question of a clip tells the answer of another
(`_look` leaves out what the question about the event names); every answer is one short lower-case
word. `kinds.KINDS` says what each kind needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from av_llava.training.world.kinds import KINDS, Kind
from av_llava.training.world.parts import COLOURS, NUMBERS, SHAPES, SOUNDS, Scene, Thing

__all__ = ["KINDS", "Kind", "Question", "questions"]

Rng = np.random.Generator

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
    """The answers that this question leaves open, in no telling order."""


def questions(scene: Scene, rng: Rng) -> list[Question]:
    """Return the questions about a clip, in random order.

    Args:
        scene: any scene; a silent one gets no questions about sound, and so on.
        rng: chooses among the questions that can be asked, and their wordings.
    """
    asked: list[Question] = []
    told: frozenset[str] = frozenset()
    if scene.plot in _EVENTS:
        event, told = _EVENTS[scene.plot](scene, rng)
        asked.append(event)
    if scene.has_video:
        asked += _look(scene, rng, told)
    if scene.topic is not None:
        asked.append(_TOPICS[scene.topic](scene, rng))
    return [asked[i] for i in rng.permutation(len(asked))]


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


def _look(scene: Scene, rng: Rng, told: frozenset[str]) -> list[Question]:
    """One question about how things look, if there is one that nothing else answers.

    Only one, since two that refer to different things would tell that there are two.
    """
    lasting = [t for t in scene.things if t.turn is None]
    unnamed = [t for t in lasting if t.shape not in told]
    turned = {c for t in scene.things if t.turn for c in (t.colour, t.turn.colour)}
    kinds = ["colour"] * bool(lasting) + ["shape"] * bool(unnamed)
    presences = []
    if lasting:
        colours = {t.colour for t in lasting}
        presences.append(("colour", colours, set(COLOURS) - colours - turned))
    if unnamed:
        shapes = {t.shape for t in unnamed}
        presences.append(("shape", shapes, set(SHAPES) - shapes - told))
    kinds += ["yes_no_picture"] * bool(presences)
    if not kinds:
        return []
    kind = _one_of(rng, kinds)
    if kind == "colour":
        thing = _one_of(rng, lasting)
        return [_ask(rng, kind, "any", thing.colour, shape=thing.shape)]
    if kind == "shape":
        thing = _one_of(rng, unnamed)
        return [_ask(rng, kind, "any", thing.shape, colour=thing.colour)]
    what, there, absent = _one_of(rng, presences)
    yes = bool(rng.random() < 0.5)
    name = _one_of(rng, sorted(there if yes else absent))
    noun = f"{name} shape" if what == "colour" else name
    article = "an" if noun[0] in "aeiou" else "a"
    return [_ask(rng, kind, "any", "yes" if yes else "no", a_thing=f"{article} {noun}")]


# ------------------------------------------------------------------ sounds


def _what_sound(scene: Scene, rng: Rng) -> Question:
    return _ask(rng, "sound", "any", scene.sounds[0].kind)


def _beeps(scene: Scene, rng: Rng) -> Question:
    return _ask(rng, "beeps", "any", NUMBERS[scene.sounds[0].beeps - 1])


def _pitch(scene: Scene, rng: Rng) -> Question:
    return _ask(rng, "pitch", "any", "rising" if scene.sounds[0].rising else "falling")


def _presence(scene: Scene, rng: Rng) -> Question:
    kind = scene.sounds[0].kind
    yes = bool(rng.random() < 0.5)
    asked = kind if yes else _one_of(rng, [k for k in SOUNDS if k != kind])
    return _ask(rng, "yes_no_sound", "any", "yes" if yes else "no", a_sound=_A_SOUND[asked])


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
