"""Video-ChatGPT's generative benchmark: long answers that only a judge can score.

Without a judge the overlap of words is given, which says little; the five published means are
``judge_correctness``, ``judge_detail``, ``judge_context`` (generic questions), ``judge_temporal``
and ``judge_consistency``, each here from 0 to 1 instead of 0 to 5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.mcq import clean
from av_llava_eval.open_ended import OpenTask
from av_llava_eval.reading import short_text
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, register

_JUDGE = """Judge an answer about a video by the right answer.

Question: {question}
Right answer: {expected}
Answer to judge: {said}

Give a whole number from 0 to 5 (best) for each of:
{criteria}

Reply with nothing but a Python dictionary: {{{form}}}."""
_MEANING = {
    "correctness": "what it says is true, and nothing is made up",
    "detail": "it covers all main points, with particulars instead of generalities",
    "context": "it fits what the video is about as a whole",
    "temporal": "the order of events is right",
    "consistency": "it says what the other answer to the same question says",
}


@register
class VideoChatGPT(OpenTask):
    """Generic questions: correctness, detail, context."""

    name = "videochatgpt_gen"
    title = "Video-ChatGPT (generic)"
    size = "500 videos"
    needs = ("generic_qa.json or Generic/test-*.parquet", "Test_Videos/NAME.mp4", "a judge")
    metric = "word F1 (no judge)"
    max_new_tokens = 1024
    ending = ""
    stem: ClassVar[str] = "generic"
    criteria: ClassVar[tuple[str, ...]] = ("correctness", "detail", "context")

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet file, or of the original's JSON with its ``Q`` and ``A``."""
        named = (f"{self.stem}_qa.json", f"{self.stem.capitalize()}/test-*.parquet")
        return _one_per_question(read_rows(find_file(root, *named)))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """Rows have no id; their number is theirs."""
        return Sample(
            id=f"{self.stem}_{doc.get('_row', index)}",
            group=doc["video_name"],
            question=doc["question"],
            answer=doc["answer"],
            video=find_medium(root, ("Test_Videos", "videos", ""), doc["video_name"]),
            meta={} if "pair" not in doc else {"pair": doc["pair"]},
        )

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """The question alone."""
        return sample.question

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """The words as they are."""
        said = clean(text or "")
        return Prediction(said, "text") if said else Prediction(None, "empty")

    def score(
        self, prediction: Prediction, sample: Sample, compat: str | None = None
    ) -> float | None:
        """Overlap of words with the right answer."""
        if not prediction.parsed:
            return None
        return short_text.word_f1(str(prediction.extracted), [str(sample.answer)])

    def extra_metrics(self, text: str, sample: Sample) -> dict[str, float]:
        """Nothing more without a judge."""
        return {}

    def chance(self, sample: Sample) -> float | None:
        """There is no guessing."""
        return None

    def judge_prompt(self, sample: Sample, text: str) -> str | None:
        """All criteria at once."""
        listed = "\n".join(f"- {c}: {_MEANING[c]}" for c in self.criteria)
        form = ", ".join(f"'{c}': …" for c in self.criteria)
        fields: dict[str, Any] = {"question": sample.question, "expected": sample.answer}
        return _JUDGE.format(**fields, said=text, criteria=listed, form=form)

    def read_verdict(self, verdict: str) -> Mapping[str, float] | None:
        """One number per criterion, all of them or none."""
        found = {
            c: re.search(rf"['\"]{c}['\"]\s*:\s*['\"]?([0-5])\b", verdict) for c in self.criteria
        }
        if not all(found.values()):
            return None
        return {f"judge_{c}": int(m[1]) / 5 for c, m in found.items() if m}


@register
class VideoChatGPTTemporal(VideoChatGPT):
    """Questions about the order of events."""

    name = "videochatgpt_temporal"
    title = "Video-ChatGPT (temporal)"
    size = "500 videos"
    needs = ("temporal_qa.json or Temporal/test-*.parquet", "Test_Videos/NAME.mp4", "a judge")
    stem = "temporal"
    criteria = ("temporal",)


@register
class VideoChatGPTConsistency(VideoChatGPT):
    """Two wordings of one question; each is judged by the same right answer."""

    name = "videochatgpt_consistency"
    title = "Video-ChatGPT (consistency)"
    size = "500 videos"
    needs = ("consistency_qa.json or Consistency/test-*.parquet", "Test_Videos/NAME.mp4", "a judge")
    stem = "consistency"
    criteria = ("consistency",)


def _one_per_question(rows: Iterable[Doc]) -> Iterator[Doc]:
    """Rows in one spelling; a row with two wordings becomes two."""
    number = 0
    for pair, row in enumerate(rows):
        base = {**row, "answer": row.get("answer", row.get("A"))}
        two = [row.get(k) for k in ("Q1", "Q2", "question_1", "question_2")]
        asked = [q for q in two if q and q != "None"]
        if asked:
            for question in asked:
                yield {**base, "question": question, "pair": pair, "_row": number}
                number += 1
        else:
            yield {**base, "question": row.get("question", row.get("Q")), "_row": number}
            number += 1
