"""Daily-Omni: films of 30 and 60 seconds whose questions join sound and picture in time.

The benchmark's scripts score in three ways, one per model; ``score_record(…, compat="lmms")`` gives
all three by name, and ``--compat lmms`` takes that of Qwen2.5-Omni. lmms-eval has no such task.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import ChoiceTask
from av_llava_eval.mcq import strip_letters
from av_llava_eval.points import Record
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, register


def _equal(said: str, right: str) -> bool:
    return said.strip().upper() == right.strip().upper()


def _first_letter(said: str, right: str) -> bool:
    match = re.match(r"\s*([A-D])", said.strip().upper())
    return match is not None and match[1] == right.strip().upper()


def _begins(said: str, right: str) -> bool:
    return said.upper().startswith(right.upper())


SCRIPTS = {
    "qwen2.5-omni script": _equal,
    "videollama2-av script": _first_letter,
    "ola script": _begins,
}
"""Which answers each of the benchmark's scripts takes for right."""


@register
class DailyOmni(ChoiceTask):
    """Four options."""

    name = "dailyomni"
    title = "Daily-Omni"
    size = "1197 questions, 684 videos"
    needs = ("qa.json", "Videos/ID/ID_video.mp4")
    groupings = ("type", "duration", "category")
    hears = True

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the JSON file."""
        return read_rows(find_file(root, "qa.json", "*/qa.json"))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """One folder per film."""
        film = doc["video_id"]
        return Sample(
            id=f"{film}_{index}",
            group=film,
            question=doc["Question"],
            options=strip_letters(doc["Choice"]),
            answer=doc["Answer"],
            video=find_medium(
                root, (f"Videos/{film}", f"videos/{film}", "Videos"), f"{film}_video"
            ),
            duration_s=_seconds(doc["video_duration"]),
            meta={
                "type": doc["Type"],
                "duration": doc["video_duration"],
                "category": doc.get("video_category"),
                "choices": list(doc["Choice"]),
            },
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """The wording of the benchmark's scripts, which print a Python list."""
        return (
            "\nYour task is to accurately answer multiple-choice questions based on the given "
            "video.\nSelect the single most accurate answer from the given choices.\nQuestion: "
            f"{sample.question}\nChoices: {sample.meta['choices']}\nYour answer should be a "
            "capital letter representing your choice: A, B, C, or D. Don't generate any other "
            "text.\n"
        )

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """The whole answer."""
        return Prediction(text.strip().upper(), "whole answer")

    def score_record(self, doc: Doc, prediction: str, compat: str | None = None) -> dict[str, Any]:
        """As everywhere; under ``compat`` the score is {script: right or wrong}."""
        record = super().score_record(doc, prediction or "", compat)
        if compat is None:
            return record
        said = prediction or ""
        by_script = {n: bool(said) and rule(said, doc["Answer"]) for n, rule in SCRIPTS.items()}
        return {**record, "score": by_script}

    def aggregate(self, records: Iterable[Record], compat: str | None = None) -> dict[str, Any]:
        """As everywhere; from scores by script also the percentage of each."""
        rows = list(records)
        scripts = [r["score"] for r in rows if isinstance(r.get("score"), dict)]
        first = next(iter(SCRIPTS))
        plain = [
            {**r, "score": float(r["score"][first])} if isinstance(r.get("score"), dict) else r
            for r in rows
        ]
        out = super().aggregate(plain, compat)
        if scripts:
            out["accuracy_by_original_script"] = _percent(scripts)
        return out


def _seconds(text: str) -> float | None:
    """``30s`` as a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)s", text)
    return float(match[1]) if match else None


def _percent(scores: Sequence[dict[str, bool]]) -> dict[str, float]:
    return {name: 100 * sum(s[name] for s in scores) / len(scores) for name in SCRIPTS}
