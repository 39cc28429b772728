"""AVQA: questions with four options about real sounds and what makes them (VGG-Sound's clips)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import ChoiceTask, letter_of
from av_llava_eval.sample import Sample
from av_llava_eval.task import Doc, register


@register
class AVQA(ChoiceTask):
    """``question_relation`` says whether sound, picture or both are needed."""

    name = "avqa"
    title = "AVQA"
    needs = ("val_qa.json", "videos/VIDEO_NAME.mp4")
    splits = ("val", "train")
    groupings = ("question_relation", "question_type")
    styles = ("default",)
    hears = True

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the JSON or JSONL file."""
        return read_rows(find_file(root, f"{split}_qa.json*", f"*/{split}_qa.json*"))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``answer`` counts from 0."""
        return Sample(
            id=str(doc["id"]),
            group=doc["video_name"],
            question=doc["question_text"],
            options=tuple(doc["multi_choice"]),
            answer=letter_of(doc["answer"]),
            video=find_medium(root, ("videos", "video", "AVQA"), doc["video_name"]),
            meta={f: doc.get(f) for f in self.groupings},
        )
