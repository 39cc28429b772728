"""AVHBench: does a model hear what it only sees, and see what it only hears?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from av_llava.errors import DataError
from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.points import Record
from av_llava_eval.reading import short_text, yes_no
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, Task, register

CAPTIONING = "AV Captioning"


@register
class AVHBench(Task):
    """Yes or no; the fourth task, captioning, is its own (``avhbench_captioning``)."""

    name = "avhbench"
    title = "AVHBench"
    needs = ("QA.json or json/ID.json", "video/ID.mp4")
    groupings = ("task", "label")
    headline = "macro:task"
    hears = True

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of one file, or of a file per film."""
        return (r for r in _rows(root) if r.get("task") != CAPTIONING)

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``label`` is Yes or No."""
        label = str(doc["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise DataError(f"the label {doc['label']!r} is neither Yes nor No")
        return Sample(
            id=f"{doc['video_id']}_{index}",
            group=str(doc["video_id"]),
            question=doc["text"],
            answer=label,
            video=find_medium(root, ("video", "videos", ""), str(doc["video_id"])),
            meta={"task": doc["task"], "label": label},
        )

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """Asks for one word."""
        return f"{sample.question}\nAnswer yes or no."

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """The word."""
        return yes_no.read(text or "")

    def chance(self, sample: Sample) -> float | None:
        """One half."""
        return 0.5

    def extra_metrics(self, text: str, sample: Sample) -> dict[str, float]:
        """Parts of precision and recall of yes, and its share; unparsed counts as not yes."""
        said = float(self.extract(text, sample).extracted == "yes")
        right = float(sample.answer == "yes")
        out = {"yes_share": said}
        if said:
            out["yes_precision"] = right
        if right:
            out["yes_recall"] = said
        return out

    def aggregate(self, records: Iterable[Record], compat: str | None = None) -> dict[str, Any]:
        """With F1 of yes."""
        out = super().aggregate(records, compat)
        metrics = out["metrics"]
        total = metrics.get("yes_precision", 0.0) + metrics.get("yes_recall", 0.0)
        product = metrics.get("yes_precision", 0.0) * metrics.get("yes_recall", 0.0)
        return {**out, "metrics": {**metrics, "yes_f1": 2 * product / total if total else 0.0}}


@register
class AVHBenchCaptioning(Task):
    """One sentence about what is seen and heard; overlap of words with the reference."""

    name = "avhbench_captioning"
    title = "AVHBench (captioning)"
    needs = AVHBench.needs
    metric = "word F1"
    max_new_tokens = 128
    hears = True

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """The rows that the other task leaves out."""
        return (r for r in _rows(root) if r.get("task") == CAPTIONING)

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``label`` is the reference."""
        return Sample(
            id=f"{doc['video_id']}_{index}",
            group=str(doc["video_id"]),
            question=doc["text"],
            answer=doc["label"],
            video=find_medium(root, ("video", "videos", ""), str(doc["video_id"])),
        )

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """The question as it is."""
        return sample.question

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """The normal form."""
        return short_text.read(text or "")

    def score(
        self, prediction: Prediction, sample: Sample, compat: str | None = None
    ) -> float | None:
        """Overlap of words."""
        if not prediction.parsed:
            return None
        return short_text.word_f1(str(prediction.extracted), [str(sample.answer)])


def _rows(root: Path) -> Iterator[Doc]:
    folder = root / "json"
    if folder.is_dir():
        files = sorted(folder.glob("*.json"))
        if not files:
            raise DataError(f"{folder} holds no annotation file ID.json.")
        for file in files:
            yield from read_rows(file)
    else:
        yield from read_rows(find_file(root, "QA.json", "qa.json", "*.json"))
