"""Rows of a data set about the synthetic world, in LLaVA's format.

Contract: pure functions of a scene. "conversation" rows carry all questions of a clip as turns,
for training; "question" rows one each with the choices, for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from av_llava.training.world.parts import Scene
from av_llava.training.world.questions import Question, questions
from av_llava.training.world.scene import generator

CLIPS = "clips"
"""The folder of the media files, beside the JSON file."""


def clip_name(scene: Scene) -> str:
    """Return the name of a scene's media file."""
    return scene.key + scene.suffix


def ask(scene: Scene) -> list[Question]:
    """Return the questions that a data set asks about a scene."""
    return questions(scene, generator(scene.seed, scene.index, scene.split, "questions"))


def conversation_rows(scene: Scene) -> list[dict[str, Any]]:
    """Return one row with all the questions; `kind` and `needs` are lists, one item a question."""
    asked = ask(scene)
    turns = [turn for i, question in enumerate(asked) for turn in _turns(scene, question, i == 0)]
    row = _row(scene, scene.key, turns)
    return [
        row | {"kind": [q.kind for q in asked], "needs": [sorted(q.needs) for q in asked]},
    ]


def question_rows(scene: Scene) -> list[dict[str, Any]]:
    """Return a row for each question, with its answer and the choices."""
    return [
        _row(scene, f"{scene.key}-{number}", _turns(scene, question, True))
        | {
            "kind": question.kind,
            "needs": sorted(question.needs),
            "question": question.question,
            "answer": question.answer,
            "choices": list(question.choices),
        }
        for number, question in enumerate(ask(scene))
    ]


FORMS: dict[str, Callable[[Scene], list[dict[str, Any]]]] = {
    "conversation": conversation_rows,
    "question": question_rows,
}


def _row(scene: Scene, name: str, turns: list[dict[str, str]]) -> dict[str, Any]:
    medium = "video" if scene.has_video else "audio"
    return {"id": name, medium: f"{CLIPS}/{clip_name(scene)}", "conversations": turns}


def _turns(scene: Scene, question: Question, first: bool) -> list[dict[str, str]]:
    mark = ("<video>\n" if scene.has_video else "<audio>\n") if first else ""
    return [
        {"from": "human", "value": mark + question.question},
        {"from": "gpt", "value": question.answer},
    ]
