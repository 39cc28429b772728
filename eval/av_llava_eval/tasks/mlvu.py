"""MLVU: nine kinds of questions about films of three minutes to two hours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import ChoiceTask, letter_of_text, lettered, split_question
from av_llava_eval.points import Record, group_scores
from av_llava_eval.reading import lmms
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, register

_FOLDERS = {
    "plotQA": "1_plotQA",
    "needle": "2_needle",
    "ego": "3_ego",
    "count": "4_count",
    "order": "5_order",
    "anomaly_reco": "6_anomaly_reco",
    "topic_reasoning": "7_topic_reasoning",
}
"""Task type → file and folder of the original layout (development split)."""


@register
class MLVUDev(ChoiceTask):
    """Development split: seven kinds with four options."""

    name = "mlvu_dev"
    title = "MLVU (dev)"
    needs = ("*dev*.parquet or json/1_plotQA.json …", "video/NAME.mp4 or video/1_plotQA/NAME.mp4")
    splits = ("dev",)
    groupings = ("task_type",)
    headline = "macro:task_type"
    kinds: tuple[str, ...] = tuple(_FOLDERS)

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet file, or of the original's file per kind."""
        if (root / "json").is_dir():
            return self._original(root)
        files = ("*dev*.parquet", "*/*dev*.parquet", "data/test-*.parquet", "mlvu_dev.json*")
        return read_rows(find_file(root, *files))

    def _original(self, root: Path) -> Iterator[Doc]:
        for kind, stem in _FOLDERS.items():
            for row in read_rows(find_file(root, f"json/{stem}.json")):
                yield {**row, "task_type": kind, "_folder": stem}

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """Options are lines of the question; the original has options and answer as texts."""
        if "_folder" in doc:
            question, options = doc["question"], tuple(doc["candidates"])
            answer, film = (
                letter_of_text(doc["answer"], options),
                f"{doc['_folder']}/{doc['video']}",
            )
        else:
            question, options = split_question(doc["question"])
            answer, film = doc["answer"], doc["video_name"]
        length = doc.get("duration")
        return Sample(
            id=str(doc.get("question_id", index)),
            group=film,
            question=question,
            options=options,
            answer=answer,
            video=find_medium(root, ("video", "videos", ""), film),
            duration_s=None if length is None else float(length),
            meta={"task_type": doc["task_type"]},
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """Ends with an open bracket."""
        lines = lettered(sample.options or (), "({}) {}")
        ending = ("Only give the best option.", "Best option: (")
        return "\n".join([sample.question, *lines, *ending])

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """The best-placed letter of four, although some questions have six."""
        return lmms.ranked(text, "ABCD")

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """A mean over the kinds of this split; a kind without questions counts as 0."""
        scores = group_scores(records, "task_type")
        found = [scores[k]["score"] for k in self.kinds if k in scores]
        return {"mlvu_percetion_score": 100 * sum(found) / len(self.kinds)}


@register
class MLVUTest(MLVUDev):
    """Test split: nine kinds, up to six options."""

    name = "mlvu_test"
    title = "MLVU (test)"
    needs = ("*test*.parquet or mlvu_test.json", "video/NAME.mp4")
    splits = ("test",)
    kinds = (
        *("anomaly_reco", "count", "ego", "needleQA", "order", "plotQA"),
        *("sportsQA", "topic_reasoning", "tutorialQA"),
    )

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet or JSON file."""
        return read_rows(find_file(root, "*test*.parquet", "*/*test*.parquet", "mlvu_test.json*"))

    def lmms_prompt(self, sample: Sample) -> str:
        """No instruction at all; letters beyond D are never read there."""
        return "\n".join([sample.question, *lettered(sample.options or (), "({}) {}")])
