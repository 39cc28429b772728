"""LVBench: questions about films of an hour and more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import ChoiceTask, lettered, split_question
from av_llava_eval.mcq import strip_letters
from av_llava_eval.reading import lmms
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, register


@register
class LVBench(ChoiceTask):
    """Four options."""

    name = "lvbench"
    title = "LVBench"
    size = "1549 questions, 103 videos"
    needs = ("video_info.meta.jsonl or *.parquet", "video/KEY.mp4")
    groupings = ("question_type", "type")
    fraction = "lvbench_score_mean"

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet file, or of the original's lines, one per film."""
        patterns = ("video_info.meta.jsonl", "*.parquet", "data/*.parquet", "lvbench*.json*")
        return _questions(read_rows(find_file(root, *patterns)))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """In the original the options are lines of the question."""
        question, options = doc["question"], doc.get("options")
        if options is None or len(options) == 0:
            question, options = split_question(question)
        name = doc.get("video_path") or doc["key"]
        return Sample(
            id=str(doc["uid"]),
            group=str(doc.get("key", name)),
            question=question,
            options=strip_letters(options),
            answer=doc["answer"],
            video=find_medium(root, ("video", "videos", "all_videos", ""), name),
            meta={"question_type": list(doc["question_type"]), "type": doc.get("type")},
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """Options in brackets; no full stop."""
        lines = lettered(sample.options or (), "({}) {}")
        return "\n".join([sample.question, *lines, "Answer the question with the option letter"])

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """The best-placed letter of four."""
        return lmms.ranked(text, "ABCD")


def _questions(rows: Iterable[Doc]) -> Iterator[Doc]:
    for row in rows:
        if "qa" in row:
            about = {k: row[k] for k in ("key", "type") if k in row}
            yield from ({**q, **about} for q in row["qa"])
        else:
            yield row
