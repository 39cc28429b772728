"""MUSIC-AVQA: what is heard, seen, and both, in films of people who play instruments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from av_llava.errors import DataError
from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.open_ended import WORD_OR_PHRASE, OpenTask
from av_llava_eval.points import Record, points
from av_llava_eval.reading import short_text
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, register

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
VOCABULARY = (
    *("yes", "no", *_NUMBERS, "more than ten", "left", "middle", "right", "indoor", "outdoor"),
    *("simultaneously", "accordion", "acoustic_guitar", "bagpipe", "banjo", "bassoon", "cello"),
    *("clarinet", "congas", "drum", "electric_bass", "erhu", "flute", "guzheng", "piano", "pipa"),
    *("saxophone", "suona", "trumpet", "tuba", "ukulele", "violin", "xylophone"),
)
"""Answers of the benchmark; an answer that is one of them as it stands needs not be listed."""


@register
class MusicAVQA(OpenTask):
    """A closed set of short answers."""

    name = "music_avqa"
    title = "MUSIC-AVQA"
    size = "9185 questions (test)"
    needs = ("json/avqa-test.json or avqa-test.json", "videos/ID.mp4")
    splits = ("test", "val")
    groupings = ("modality", "type")
    metric = "accuracy"
    hears = True
    max_new_tokens = 16

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the JSON file; rows marked as deleted are left out."""
        name = f"avqa-{split}.json"
        rows = read_rows(find_file(root, name, f"json/{name}", f"data/json/{name}"))
        return [r for r in rows if not r.get("question_deleted")]

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``type`` and ``templ_values`` are JSON texts; the answer is spelled ``anser``."""
        kind = json.loads(doc["type"])
        values = iter(json.loads(doc["templ_values"]))
        try:
            question = re.sub(r"<[A-Za-z]+>", lambda _: next(values), doc["question_content"])
        except StopIteration as error:
            raise DataError(
                f"{doc['question_content']!r} has more gaps than values {doc['templ_values']}"
            ) from error
        return Sample(
            id=str(doc["question_id"]),
            group=doc["video_id"],
            question=question,
            answer=doc["anser"],
            video=find_medium(root, ("videos", "MUSIC-AVQA-videos", "video"), doc["video_id"]),
            meta={"modality": kind[0], "type": " ".join(kind)},
        )

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """The style ``lmms`` is the question alone, as VideoLLaMA2 asks it."""
        return sample.question if style == "lmms" else f"{sample.question}\n{WORD_OR_PHRASE}"

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """The only known answer in the text; under ``compat`` the text as VideoLLaMA2 takes it."""
        if compat:
            return Prediction((text or "").rstrip(" .").upper(), "text")
        return short_text.one_of(text or "", {*VOCABULARY, str(sample.answer)})

    def score(
        self, prediction: Prediction, sample: Sample, compat: str | None = None
    ) -> float | None:
        """Equality; lmms-eval has no such task, the rule is that of VideoLLaMA2's script."""
        if not prediction.parsed:
            return None
        right = str(sample.answer)
        return float(prediction.extracted == (right.upper() if compat else right))

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """Percent."""
        mean = sum(map(points, records)) / len(records) if records else 0.0
        return {"overall_accuracy": 100 * mean, "total_responses": len(records)}

    def judge_prompt(self, sample: Sample, text: str) -> str | None:
        """No judge is needed."""
        return None
