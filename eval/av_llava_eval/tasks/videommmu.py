"""Video-MMMU: lectures of 30 subjects; what was seen, what was understood, and what can be done."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from av_llava.errors import DataError
from av_llava_eval import mcq
from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import ChoiceTask
from av_llava_eval.points import Record
from av_llava_eval.reading import lmms, open_mmmu
from av_llava_eval.sample import LETTERS, Prediction, Sample
from av_llava_eval.task import Doc, register

FOLDERS = ("Art", "Business", "Humanities", "Medicine", "Science", "Engineering")
NOTHING = "No Answer Found."


@register
class VideoMMMU(ChoiceTask):
    """Options (up to ten), or an open answer; one split per kind of question."""

    name = "videommmu"
    title = "Video-MMMU"
    needs = ("Perception/test-*.parquet, Comprehension/…, Adaptation/…", "DISCIPLINE/ID.mp4")
    splits = ("Adaptation", "Comprehension", "Perception")
    groupings = ("subject", "question_type")
    max_new_tokens = 1024

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet or JSON file of one kind."""
        return read_rows(find_file(root, f"{split}/test-*.parquet", f"{split}.json*"))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """The id holds the subject: ``validation_Physics_7``."""
        match = re.fullmatch(r"[^_]+_(.+?)_\d+", doc["id"])
        if match is None:
            raise DataError(f"the id {doc['id']!r} is not split_SUBJECT_number")
        kind = doc.get("question_type", "None")
        choice = kind != "open" and len(doc["options"]) > 0
        return Sample(
            id=doc["id"],
            group=doc["id"],
            question=doc["question"],
            options=mcq.strip_letters(doc["options"]) if choice else None,
            answer=doc["answer"],
            video=find_medium(root, (*FOLDERS, "videos", ""), doc["id"]),
            meta={"subject": match[1], "question_type": kind},
        )

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """Open questions ask for the answer at the end."""
        if sample.options:
            return super().prompt(sample, style)
        return f"{sample.question}\nEnd your reply with a line 'Answer: …' that holds the answer."

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """A letter, or candidates for the answer of an open question."""
        said = text or ""
        if not sample.options and sample.meta["question_type"] != "multiple-choice":
            return open_mmmu.read(said if compat else mcq.clean(said), compat)
        return super().extract(said, sample, compat)

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """The ranked rule over all letters; its own words where it finds nothing."""
        read = lmms.ranked(text, LETTERS[: len(sample.options or ())])
        return read if read.extracted else Prediction(NOTHING, read.how)

    def score(
        self, prediction: Prediction, sample: Sample, compat: str | None = None
    ) -> float | None:
        """Open answers hold the right number or text."""
        if isinstance(prediction.extracted, list):
            return open_mmmu.score(prediction.extracted, sample.answer)
        if prediction.extracted == open_mmmu.MISSING and not sample.options:
            return None
        return super().score(prediction, sample, compat)

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """Empty answers to open questions do not count there; rounded."""
        kept = [float(r["score"]) for r in records if r.get("score") is not None]
        return {"mmmu_acc": round(sum(kept) / len(kept), 5) if kept else 0.0}
