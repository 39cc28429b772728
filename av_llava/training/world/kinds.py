"""The kinds of questions about the synthetic world: what each needs, its answers, its wordings.

Contract: plain data. `needs` says which sense and which detail a kind cannot do without: "vision"
(a picture) with "slow" (detail of one frame) or "fast" (many frames), and "audio" (sound).
"""

from __future__ import annotations

from dataclasses import dataclass

from av_llava.training.world.parts import COLOURS, DIRECTIONS, NUMBERS, SHAPES, SOUNDS

SLOW, FAST = frozenset({"vision", "slow"}), frozenset({"vision", "fast"})
HEARING = frozenset({"audio"})
BOTH = FAST | HEARING


@dataclass(frozen=True)
class Kind:
    """One kind of question."""

    about: str
    """What is asked, for the documentation."""
    needs: frozenset[str]
    answers: tuple[str, ...]
    """Every answer that occurs."""
    choices: int
    """How many of them one question leaves open; chance is one in that many."""
    wordings: dict[str, tuple[str, ...]]
    """Ways to ask, by situation."""

    @property
    def chance(self) -> float:
        """The share of right answers that guessing reaches."""
        return 1 / self.choices

    @property
    def phrasings(self) -> tuple[str, ...]:
        """All ways to ask."""
        return tuple(words for group in self.wordings.values() for words in group)


def _kind(
    about: str,
    needs: frozenset[str],
    answers: tuple[str, ...],
    *wordings: str,
    choices: int | None = None,
    **situations: tuple[str, ...],
) -> Kind:
    groups = {"any": wordings} if wordings else situations
    return Kind(about, needs, answers, choices or len(answers), groups)


_YES_NO = ("yes", "no")

KINDS: dict[str, Kind] = {
    "colour": _kind(
        "the colour of a shape",
        SLOW,
        tuple(COLOURS),
        "What colour is the {shape}?",
        "Which colour does the {shape} have?",
        "The {shape} is what colour?",
        "Name the colour of the {shape}.",
    ),
    "shape": _kind(
        "which shape has a colour",
        SLOW,
        SHAPES,
        "What shape is the {colour} object?",
        "Which shape is {colour}?",
        "What is the shape of the {colour} thing?",
        "Name the shape that is {colour}.",
    ),
    "count": _kind(
        "how many shapes there are",
        SLOW,
        NUMBERS,
        "How many shapes are there?",
        "How many objects do you see?",
        "What is the number of shapes?",
        "Count the shapes in the video.",
    ),
    "direction": _kind(
        "which way a shape moves",
        FAST,
        tuple(DIRECTIONS),
        plain=(
            "Which way does the shape move?",
            "In which direction does something move?",
            "Where is the moving shape going?",
            "What is the direction of the motion?",
        ),
        named=(
            "Which way does the {shape} move?",
            "In which direction does the {shape} go?",
            "Where is the {shape} moving to?",
            "What is the direction of the {shape}?",
        ),
    ),
    "first": _kind(
        "which of two shapes appeared, or changed colour, first",
        FAST,
        SHAPES,
        appear=(
            "Which shape appeared first?",
            "What appeared first, the {one} or the {other}?",
            "Which shape was there before the other?",
            "Which came first, the {one} or the {other}?",
        ),
        turn=(
            "Which shape changed colour first?",
            "What changed colour first, the {one} or the {other}?",
            "Which shape got a new colour before the other?",
            "Which turned first, the {one} or the {other}?",
        ),
        choices=2,
    ),
    "sound": _kind(
        "what sound is heard",
        HEARING,
        SOUNDS,
        "What sound do you hear?",
        "Which sound is played?",
        "What can be heard?",
        "Name the sound.",
    ),
    "beeps": _kind(
        "how many beeps there are",
        HEARING,
        NUMBERS,
        "How many beeps do you hear?",
        "How many times does it beep?",
        "What is the number of beeps?",
        "Count the beeps.",
    ),
    "pitch": _kind(
        "whether the pitch rises or falls",
        HEARING,
        ("rising", "falling"),
        "Is the pitch rising or falling?",
        "Is the sound falling or rising?",
        "Which way does the pitch go, rising or falling?",
        "Does the chirp go up or down, is it falling or rising?",
    ),
    "order": _kind(
        "whether the sound comes before or after the change of colour",
        BOTH,
        ("before", "after"),
        "Does the sound come before or after the change of colour?",
        "Is the sound heard after or before the {shape} changes colour?",
        "When is the sound, before or after the {shape} gets a new colour?",
        "Relative to the change of colour, does the sound come after or before?",
    ),
    "mover": _kind(
        "which of two shapes moved when the sound played",
        BOTH,
        SHAPES,
        "Which shape moved when the sound played?",
        "What was moving during the sound, the {one} or the {other}?",
        "Which shape moved while the sound was heard?",
        "During the sound, which moved, the {one} or the {other}?",
        choices=2,
    ),
    "yes_no_picture": _kind(
        "whether a colour or a shape is there",
        SLOW,
        _YES_NO,
        "Is there {a_thing}?",
        "Do you see {a_thing}?",
        "Does the video show {a_thing}?",
        "Can {a_thing} be seen?",
    ),
    "yes_no_sound": _kind(
        "whether a kind of sound is heard",
        HEARING,
        _YES_NO,
        "Is there {a_sound}?",
        "Do you hear {a_sound}?",
        "Does {a_sound} sound?",
        "Can {a_sound} be heard?",
    ),
}
