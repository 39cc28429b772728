"""Perception Test, multiple choice on the validation split: memory, physics, abstraction, words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from av_llava.errors import DataError
from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import LLAVA_ENDING, ChoiceTask, letter_of
from av_llava_eval.reading import lmms
from av_llava_eval.sample import LETTERS, Prediction, Sample
from av_llava_eval.task import Doc, register


@register
class PerceptionTest(ChoiceTask):
    """Three options."""

    name = "perceptiontest_val_mc"
    title = "Perception Test (validation)"
    needs = ("mc_question_val/validation-*.parquet or mc_question_valid.json", "videos/NAME.mp4")
    splits = ("validation",)
    groupings = ("area", "reasoning", "tag")
    fraction = "accuracy"

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet file, or of the original's JSON by video."""
        patterns = ("mc_question_val*/*.parquet", "validation-*.parquet", "mc_question_valid*.json")
        file = find_file(root, *patterns)
        return _original(file) if file.suffix == ".json" else read_rows(file)

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """Question ids count in each video."""
        return Sample(
            id=f"{doc['video_name']}_{doc['question_id']}",
            group=doc["video_name"],
            question=doc["question"],
            options=tuple(doc["options"]),
            answer=letter_of(doc["answer_id"]),
            video=find_medium(root, ("videos", "video"), doc["video_name"]),
            meta={"area": doc["area"], "reasoning": doc["reasoning"], "tag": list(doc["tag"])},
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """Every option after the second is called C."""
        lines = [f"{'ABC'[min(i, 2)]}. {text}" for i, text in enumerate(sample.options or ())]
        return "\n".join([sample.question, *lines, LLAVA_ENDING])

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """The first capital that stands alone, as a number; -1 without one."""
        read = lmms.isolated_letter(text)
        return Prediction(LETTERS.find(read.extracted or "?"), read.how)

    def lmms_answer(self, sample: Sample) -> Any:
        """The option's number."""
        return LETTERS.index(sample.answer)


def _original(file: Path) -> list[Doc]:
    try:
        videos = json.loads(file.read_text(encoding="utf-8"))
        return [
            {**q, "video_name": name, "question_id": str(q.get("id"))}
            for name, video in videos.items()
            for q in video["mc_question"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not as the benchmark has it, {{video: {{mc_question: […]}}}} "
            f"({type(error).__name__}: {error})."
        ) from error
