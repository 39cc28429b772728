"""AV-Odyssey: which sound belongs to which picture or film; media stand inside the question.

Its questions mix several media in one text, which the runner does not place: the scores and
prompts are here so that answers from elsewhere can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from av_llava_eval.annotations import find_file, read_rows
from av_llava_eval.choices import LLAVA_ENDING, ChoiceTask, by_letter, first_per_question, lettered
from av_llava_eval.mcq import strip_letters
from av_llava_eval.points import Record, points
from av_llava_eval.reading import lmms
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, register


@register
class AVOdyssey(ChoiceTask):
    """Four options, which may themselves be media."""

    name = "av_odyssey"
    title = "AV-Odyssey"
    size = "4555 questions"
    needs = ("*.parquet or *.json", "media as the rows name them")
    groupings = ("subfield", "data_type")
    hears = True

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the file."""
        return read_rows(find_file(root, "test-*.parquet", "*/test-*.parquet", "*.json*"))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """One sound and one film at most are given beside the question."""
        films, sounds = list(doc.get("video_path") or ()), list(doc.get("audio_path") or ())
        return Sample(
            id=str(doc["question_id"]),
            group=str(doc["question_id"]),
            question=doc["question"],
            options=strip_letters(doc["options"]),
            answer=doc["answer"],
            video=root / films[0] if films else None,
            audio=root / sounds[0] if sounds else None,
            images=tuple(root / p for p in doc.get("image_path") or ()),
            meta={
                "subfield": doc["subfield"],
                "data_type": doc["data_type"],
                "category": doc["subfield"],
                "question_id": str(doc["question_id"]),
            },
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """Media are numbered in the order in which they appear."""
        text = "\n".join([sample.question, *lettered(sample.options or ()), LLAVA_ENDING])
        number = count()
        return re.sub(r"\[(?:audio|video|img)\d+\]", lambda _: f"<media_{next(number)}>", text)

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """As WorldSense: any capital A to D, and "A" where there is none."""
        return lmms.any_letter(text, by_letter(sample.options or ()))

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """Only the first record of a question counts there."""
        kept = first_per_question(records)
        mean = sum(map(points, kept)) / len(kept) if kept else 0.0
        return {"av_odyssey_score": 100 * mean}
