"""ActivityNet-QA: short answers about films of three minutes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.open_ended import OpenTask, read_pairs
from av_llava_eval.sample import Sample
from av_llava_eval.task import Doc, register


@register
class ActivityNetQA(OpenTask):
    """Nine types of questions, all in lower case and without a mark."""

    name = "activitynetqa"
    title = "ActivityNet-QA"
    size = "8000 questions, 800 videos"
    needs = ("test_q.json + test_a.json, or test-*.parquet", "all_test/v_NAME.mp4")
    groupings = ("type",)

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet file, or of the two JSON files joined."""
        if (root / "test_q.json").is_file():
            return read_pairs(root)
        return read_rows(find_file(root, "*test-*.parquet", "*/test-*.parquet"))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``video_name`` is the id without the ``v_`` of the file."""
        return Sample(
            id=str(doc["question_id"]),
            group=doc["video_name"],
            question=doc["question"].capitalize() + "?",
            answer=doc["answer"],
            video=find_medium(root, ("all_test", "videos", ""), f"v_{doc['video_name']}"),
            meta={"type": str(doc["type"])},
        )
