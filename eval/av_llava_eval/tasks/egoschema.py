"""EgoSchema: three minutes of a first-person film, five long options."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from av_llava.errors import DataError
from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import ChoiceTask, letter_of
from av_llava_eval.mcq import strip_letters
from av_llava_eval.reading import lmms
from av_llava_eval.sample import LETTERS, Prediction, Sample
from av_llava_eval.task import Doc, register


@register
class EgoSchemaSubset(ChoiceTask):
    """The 500 questions whose answers are public."""

    name = "egoschema_subset"
    title = "EgoSchema (subset)"
    size = "500 questions"
    needs = ("Subset/test-*.parquet, or questions.json + subset_answers.json", "videos/ID.mp4")
    fraction = "score"
    hidden: ClassVar[bool] = False
    """Whether rows may have no public answer."""

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet file, or of the original's two JSON files joined."""
        if (root / "questions.json").is_file():
            return _original(root, only_labelled=True)
        return read_rows(
            find_file(root, "Subset/test-*.parquet", "subset*.parquet", "subset*.json")
        )

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``answer`` counts from 0; missing or "None" where it is not public."""
        known = doc.get("answer") not in (None, "", "None", "N/A")
        if not known and not self.hidden:
            raise DataError("it has no answer; the subset is the part that has")
        return Sample(
            id=doc["video_idx"],
            group=doc["video_idx"],
            question=doc["question"],
            options=strip_letters(doc["option"]),
            answer=letter_of(doc["answer"]) if known else None,
            video=find_medium(root, ("videos", "good_clips_git", "video"), doc["video_idx"]),
        )

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """The earliest letter, as the option's number; options stand with their letters there."""
        texts = {a: f"{a}. {t}" for a, t in zip(LETTERS, sample.options or (), strict=False)}
        read = lmms.earliest(text, texts)
        return (
            read
            if read.extracted is None
            else replace(read, extracted=LETTERS.index(read.extracted))
        )

    def lmms_answer(self, sample: Sample) -> Any:
        """The option's number."""
        return LETTERS.index(sample.answer)


@register
class EgoSchema(EgoSchemaSubset):
    """All 5031 questions; a file for the benchmark's server instead of a score."""

    name = "egoschema"
    title = "EgoSchema (full)"
    size = "5031 questions"
    hidden = True
    needs = ("GENERATION/test-*.parquet, or questions.json", "videos/ID.mp4")

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet file, or of the original's JSON."""
        if (root / "questions.json").is_file():
            return _original(root, only_labelled=False)
        return read_rows(find_file(root, "GENERATION/test-*.parquet", "MC/test-*.parquet"))

    def submission(self, answers: Sequence[tuple[Sample, Prediction]]) -> tuple[str, str]:
        """{id: number of the option}; -1 where no answer could be read."""
        numbers = {s.id: LETTERS.find(str(p.extracted or "?")) for s, p in answers}
        return "egoschema_submission.json", json.dumps(numbers, indent=1)


def _original(root: Path, only_labelled: bool) -> list[Doc]:
    """The repository's files, in the column names of the parquet files."""
    answers: dict[str, Any] = {}
    file = root / "subset_answers.json"
    if file.is_file():
        answers = json.loads(file.read_text(encoding="utf-8"))
    rows: list[Doc] = []
    for row in read_rows(root / "questions.json"):
        if only_labelled and row.get("q_uid", "") not in {*answers, ""}:
            continue
        joined: dict[str, Any] = dict(row)
        if all(f"option {i}" in row for i in range(5)):
            joined["option"] = [row[f"option {i}"] for i in range(5)]
        if "q_uid" in row:
            joined |= {"video_idx": row["q_uid"], "answer": answers.get(row["q_uid"])}
        rows.append(joined)
    return rows
