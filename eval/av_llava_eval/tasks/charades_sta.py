"""Charades-STA: when does what a sentence says happen?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from av_llava.errors import DataError
from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.points import Record, points
from av_llava_eval.reading import spans
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, Task, register

_BEFORE = (
    "Please find the visual event described by a sentence in the video, determining its starting "
    "and ending times. The format should be: 'The event happens in the start time - end time'. For "
    "example, The event 'person turn a light on' happens in the 24.3 - 30.4 seonds. Now I will "
    "give you the textual sentence: "
)
_AFTER = "Please return its start time and end time."
THRESHOLDS = (0.3, 0.5, 0.7)


@register
class CharadesSTA(Task):
    """The score is the overlap (intersection over union) with the right span."""

    name = "charades_sta"
    title = "Charades-STA"
    needs = ("charades_sta_test.txt or test-*.parquet", "Charades_v1_480/VIDEO.mp4")
    metric = "mean overlap"
    max_new_tokens = 50
    styles = ("default", "lmms")

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet file, or of the original's ``VIDEO start end##sentence.``"""
        file = find_file(root, "charades_sta_test.txt", "*test-*.parquet", "*/test-*.parquet")
        return _lines(file) if file.suffix == ".txt" else read_rows(file)

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``timestamp`` is in seconds."""
        start, end = (float(t) for t in doc["timestamp"])
        if not 0 <= start < end:
            raise DataError(f"the span {doc['timestamp']!r} has no duration")
        return Sample(
            id=f"{doc['video']}_{index}",
            group=doc["video"],
            question=doc["caption"],
            answer=[start, end],
            video=find_medium(root, ("Charades_v1_480", "Charades_v1", "videos"), doc["video"]),
            meta={"video": doc["video"], "caption": doc["caption"]},
        )

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """Asks for seconds."""
        if style == "lmms":
            return f"{_BEFORE}{sample.question}. {_AFTER}"
        return (
            f"When does this happen in the video: {sample.question.rstrip('.')}?\n"
            "Answer with the start and the end in seconds, such as: 24.3 - 30.4 seconds."
        )

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """One span."""
        return spans.lmms(text or "") if compat else spans.read(text or "")

    def score(
        self, prediction: Prediction, sample: Sample, compat: str | None = None
    ) -> float | None:
        """Overlap; without a span 0 under ``compat``, None otherwise."""
        if prediction.extracted is None:
            return None
        found = prediction.extracted[:1] if compat else [prediction.extracted]
        return spans.overlap(sample.answer, found[0]) if found else 0.0

    def extra_metrics(self, text: str, sample: Sample) -> dict[str, float]:
        """Whether the overlap reaches each threshold."""
        overlap = self.score(self.extract(text, sample), sample) or 0.0
        return {f"recall@{t}": float(overlap >= t) for t in THRESHOLDS}

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """Percent; of questions with the same film, sentence and span the last counts."""
        last = {json.dumps([r["meta"], r["answer"]], sort_keys=True): points(r) for r in records}
        scores = list(last.values())
        if not scores:
            return {}
        named = zip(("IOU@3", "IOU@5", "IOU@7"), THRESHOLDS, strict=True)
        out = {name: 100 * sum(s >= t for s in scores) / len(scores) for name, t in named}
        return {**out, "mIOU": 100 * sum(scores) / len(scores)}


def _lines(file: Path) -> list[Doc]:
    rows: list[Doc] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        head, mark, sentence = line.partition("##")
        parts = head.split()
        if not mark or len(parts) != 3:
            raise DataError(
                f"{file}, line {number}: not 'VIDEO start end##sentence', but {line!r}."
            )
        span = [parts[1], parts[2]]
        rows.append(
            {"video": f"{parts[0]}.mp4", "caption": sentence.rstrip("."), "timestamp": span}
        )
    return rows
