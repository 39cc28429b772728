"""Questions: right, balanced, varied, and not to be guessed from anything but what they need."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import pytest

from av_llava.training.world.kinds import KINDS
from av_llava.training.world.parts import COLOURS, DIRECTIONS, SHAPES, SOUNDS, Scene
from av_llava.training.world.plots import order_bound
from av_llava.training.world.questions import Question, all_questions
from av_llava.training.world.rows import ask
from av_llava.training.world.scene import generator, sample_scene

CLIPS = 12_000


@dataclass(frozen=True)
class Asked:
    scene: Scene
    question: Question
    others: tuple[Question, ...]
    place: int


@pytest.fixture(scope="module")
def asked() -> dict[str, list[Asked]]:
    """The questions about many clips, by kind."""
    found = defaultdict(list)
    for index in range(CLIPS):
        scene = sample_scene(5, index, "train")
        questions = ask(scene)
        for place, question in enumerate(questions):
            others = (*questions[:place], *questions[place + 1 :])
            found[question.kind].append(Asked(scene, question, others, place))
    return found


def label(item: Asked) -> int:
    """The answer as one of the choices that the question leaves open."""
    return sorted(item.question.choices).index(item.question.answer)


def wording(question: Question) -> str:
    """The question with the names of colours, shapes and sounds taken out."""
    names = "|".join((*COLOURS, *SHAPES, *(s.rstrip("s") for s in SOUNDS)))
    return re.sub(rf"\b(an? )?({names})\b", "_", question.question)


# ------------------------------------------------------------------ form


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_asked_often_and_in_many_words(
    asked: dict[str, list[Asked]], kind: str
) -> None:
    items = asked[kind]
    assert len(items) > CLIPS / 10
    words = Counter(wording(a.question) for a in items)
    assert len(words) >= 4
    assert min(words.values()) > 0.4 * len(items) / len(words)
    for item in items:
        question = item.question
        assert question.needs == KINDS[kind].needs
        assert len(question.choices) == KINDS[kind].choices and question.answer in question.choices
        assert set(question.choices) <= set(KINDS[kind].answers)
        assert re.fullmatch(r"[a-z]+", question.answer)
        assert question.question[0].isupper() and question.question[-1] in "?."
        assert "{" not in question.question and len(question.question.split()) <= 14


def test_needs_name_senses_and_details() -> None:
    for kind in KINDS.values():
        assert kind.needs <= {"vision", "slow", "fast", "audio"}
        assert ("vision" in kind.needs) == bool(kind.needs & {"slow", "fast"})
        assert len(kind.phrasings) == len(set(kind.phrasings)) >= 4
        assert 0 < kind.chance <= 0.5


def test_every_combination_of_needs_occurs() -> None:
    needs = {frozenset(k.needs) for k in KINDS.values()}
    for wanted in ({"vision", "slow"}, {"vision", "fast"}, {"audio"}, {"vision", "fast", "audio"}):
        assert frozenset(wanted) in needs


def test_no_clip_is_asked_what_it_cannot_show(asked: dict[str, list[Asked]]) -> None:
    for items in asked.values():
        for item in items:
            assert item.scene.has_audio or "audio" not in item.question.needs
            assert item.scene.has_video or "vision" not in item.question.needs


def test_every_clip_is_asked_something(asked: dict[str, list[Asked]]) -> None:
    clips = {a.scene.index for items in asked.values() for a in items}
    # Where both things change colour, a silent clip has one question, about which was first.
    assert len(clips) == CLIPS


def test_no_kind_is_asked_twice_of_one_thing(asked: dict[str, list[Asked]]) -> None:
    for items in asked.values():
        for item in items:
            assert item.question.question not in {o.question for o in item.others}


def test_questions_follow_the_generator() -> None:
    scene = sample_scene(0, 3, "train")
    assert ask(scene) == ask(scene)
    worded = {tuple(q.question for q in ask(sample_scene(0, i, "train"))) for i in range(40)}
    assert len(worded) > 35


# ------------------------------------------------------------------ balance


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_balanced(asked: dict[str, list[Asked]], kind: str) -> None:
    counts = Counter(a.question.answer for a in asked[kind])
    assert set(counts) == set(KINDS[kind].answers)
    fair = len(asked[kind]) / len(counts)
    assert all(0.8 * fair < n < 1.2 * fair for n in counts.values()), counts


def test_both_answers_to_whether_each_thing_is_there(asked: dict[str, list[Asked]]) -> None:
    """Neither answer is tied to what is asked for."""
    for kind, names in (("yes_no_picture", (*COLOURS, *SHAPES)), ("yes_no_sound", SOUNDS)):
        for name in names:
            noun = name.removesuffix("s") if kind == "yes_no_sound" else name
            about = [a for a in asked[kind] if re.search(rf"\b{noun}\b", a.question.question)]
            share = np.mean([a.question.answer == "yes" for a in about])
            assert len(about) > 150 and abs(share - 0.5) < 4 * 0.5 / np.sqrt(len(about)), name


# ------------------------------------------------------------------ shortcuts


def guessed(items: list[Asked], feature: Callable[[Asked], Hashable]) -> tuple[float, int]:
    """How often the likeliest answer for a feature's value is right, on clips not learned from."""
    half = len(items) // 2
    table: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for item in items[:half]:
        table[feature(item)][label(item)] += 1
    right = [
        label(item) == (table[feature(item)].most_common(1) or [(0, 0)])[0][0]
        for item in items[half:]
    ]
    return float(np.mean(right)), len(right)


SHORTCUTS: dict[str, Callable[[Asked], Hashable]] = {
    "nothing": lambda a: 0,
    "wording": lambda a: wording(a.question),
    "the whole question": lambda a: a.question.question,
    "the other kinds": lambda a: tuple(sorted(o.kind for o in a.others)),
    "the number of questions and its place": lambda a: (len(a.others), a.place),
    "which media there are": lambda a: (a.scene.has_audio, a.scene.has_video),
    "the plot and the kinds": lambda a: (a.scene.plot, tuple(sorted(o.kind for o in a.others))),
    "the order of the choices": lambda a: a.question.choices,
    "the index": lambda a: a.scene.index % 16,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_no_shortcut_gives_the_answer(
    asked: dict[str, list[Asked]], kind: str, shortcut: str
) -> None:
    share, n = guessed(asked[kind], SHORTCUTS[shortcut])
    chance = KINDS[kind].chance
    assert share < chance + 4 * np.sqrt(chance * (1 - chance) / n), (share, n)


def test_the_guesser_finds_a_shortcut_that_is_there(asked: dict[str, list[Asked]]) -> None:
    assert guessed(asked["order"], lambda a: a.scene.sounds[0].onset_s < turn_s(a.scene))[0] == 1


# ------------------------------------------------------------------ senses


def turn_s(scene: Scene) -> float:
    return next(t.turn.time_s for t in scene.things if t.turn)


def sight(scene: Scene) -> list[float]:
    """Everything about the picture, as numbers."""
    values = [float(len(scene.things))]
    for i in range(4):
        thing = scene.things[i] if i < len(scene.things) else None
        values += [float(thing is not None and thing.shape == s) for s in SHAPES]
        values += [float(thing is not None and thing.colour == c) for c in COLOURS]
        motion, turn = (thing.motion, thing.turn) if thing else (None, None)
        values += [float(motion is not None and motion.direction == d) for d in DIRECTIONS]
        values += [motion.start_s if motion else -1.0, thing.appears_s if thing else -1.0]
        values += [*(thing.place if thing else (0.0, 0.0)), thing.size if thing else 0.0]
        # As a scale of half seconds, since before and after are not linear in time.
        values += [float(turn is not None and 0.5 * k <= turn.time_s < 0.5 * k + 0.5)
                   for k in range(8)]  # fmt: skip
    return values


def sound(scene: Scene) -> list[float]:
    """Everything about the sound, as numbers."""
    (event,) = scene.sounds
    values = [float(event.kind == s) for s in SOUNDS]
    values += [float(0.5 * k <= event.onset_s < 0.5 * k + 0.5) for k in range(8)]
    return [*values, event.onset_s, event.duration_s, event.level, float(event.rising),
            float(event.beeps), event.pitch_hz / 1000]  # fmt: skip


def regressed(items: list[Asked], features: Callable[[Scene], list[float]]) -> tuple[float, int]:
    """How often a ridge regression on features is right, on clips not learned from.

    Of questions about one of two shapes it says whether it is the scene's first thing.
    """

    def target(item: Asked) -> int:
        two = item.question.kind in ("first", "mover")
        return int(item.question.answer == item.scene.things[0].shape) if two else label(item)

    data = np.array([[1.0, *features(a.scene)] for a in items])
    labels = np.array([target(a) for a in items])
    half = len(items) // 2
    learned, wanted = data[:half], np.eye(labels.max() + 1)[labels[:half]]
    gram = learned.T @ learned + 1.0 * np.eye(data.shape[1])
    weights = np.linalg.solve(gram, learned.T @ wanted)
    right = (data[half:] @ weights).argmax(1) == labels[half:]
    return float(right.mean()), len(right)


@pytest.mark.parametrize("kind", [k for k in KINDS if "audio" in KINDS[k].needs])
def test_what_needs_sound_cannot_be_told_from_the_picture(
    asked: dict[str, list[Asked]], kind: str
) -> None:
    share, n = regressed(asked[kind], sight)
    bound = order_bound() if kind == "order" else KINDS[kind].chance
    assert share < bound + 4 * np.sqrt(bound * (1 - bound) / n), (share, n)


@pytest.mark.parametrize("kind", [k for k in KINDS if "vision" in KINDS[k].needs])
def test_what_needs_the_picture_cannot_be_told_from_the_sound(
    asked: dict[str, list[Asked]], kind: str
) -> None:
    heard = [a for a in asked[kind] if a.scene.has_audio]
    share, n = regressed(heard, sound)
    bound = order_bound() if kind == "order" else KINDS[kind].chance
    assert share < bound + 4 * np.sqrt(bound * (1 - bound) / n), (share, n)


@pytest.mark.parametrize(
    ("kind", "features"),
    [("first", sight), ("direction", sight), ("sound", sound), ("pitch", sound), ("beeps", sound)],
)
def test_the_regression_finds_what_is_there(
    asked: dict[str, list[Asked]], kind: str, features: Callable[[Scene], list[float]]
) -> None:
    heard = [a for a in asked[kind] if a.scene.has_audio]
    share, _ = regressed(heard, features)
    assert share > KINDS[kind].chance + 0.3


def test_one_sense_alone_tells_order_only_at_the_ends(asked: dict[str, list[Asked]]) -> None:
    """The bound that the docs state is what the best guess from one sense reaches."""
    for time in (lambda s: s.sounds[0].onset_s, turn_s):
        slots = [(round((time(a.scene) - 0.2) / 0.54), a.question.answer) for a in asked["order"]]
        counts = Counter(slots)
        best = sum(max(counts[slot, "before"], counts[slot, "after"]) for slot in range(7))
        assert best / len(slots) == pytest.approx(order_bound(), abs=0.03)
    assert order_bound() == pytest.approx(0.583, abs=0.001)


# ------------------------------------------------------------------ all questions


def test_all_questions_are_right_and_include_those_that_are_asked() -> None:
    for index in range(400):
        scene = sample_scene(9, index, "train")
        everything = all_questions(scene, generator(9, index, "train", "all"))
        known = {}
        for question in everything:
            assert question.answer in question.choices
            known.setdefault((question.kind, question.answer), question)
        for question in ask(scene):
            if question.kind in (
                "first",
                "mover",
                "colour",
                "shape",
                "count",
                "direction",
                "order",
            ):
                assert (question.kind, question.answer) in known
        heard = [q for q in everything if "audio" in q.needs]
        assert bool(heard) == scene.has_audio
