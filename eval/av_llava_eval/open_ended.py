"""What the open-ended benchmarks share: short answers scored offline, and a judge where wanted.

Contract: without a judge the score is exact match of normal forms, beside containment and overlap
of words; with one, its accuracy and mean score stand beside these, never in their place. The
judge's question is ours; its published wordings differ between harnesses, and so do the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from av_llava.errors import DataError
from av_llava_eval.annotations import find_file, read_rows
from av_llava_eval.points import Record
from av_llava_eval.reading import short_text, verdicts
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, Task

WORD_OR_PHRASE = "Answer the question using a single word or phrase."
"""The sentence that LLaVA checkpoints were trained with for short answers."""

_JUDGE = """Compare an answer about a video with the right one. They agree if they mean the same, \
also in other words.

Question: {question}
Right answer: {expected}
Answer to judge: {said}

Reply with nothing but a Python dictionary: {{'pred': 'yes' or 'no', 'score': 0 to 5}}. 'pred' \
says whether the answer is right, 'score' how well the two agree (5 is best, whole numbers only)."""


class OpenTask(Task):
    """A benchmark whose answers are a few words."""

    metric = "exact match"
    styles: ClassVar[tuple[str, ...]] = ("default", "lmms")
    max_new_tokens = 64
    ending: ClassVar[str] = WORD_OR_PHRASE
    """Stands after the question."""

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """Question and ending on two lines; in the style ``lmms`` on one."""
        return f"{sample.question}{' ' if style == 'lmms' else chr(10)}{self.ending}"

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """The normal form."""
        return short_text.read(text or "")

    def score(
        self, prediction: Prediction, sample: Sample, compat: str | None = None
    ) -> float | None:
        """Exact match with one of the right answers."""
        if not prediction.parsed:
            return None
        return short_text.exact(str(prediction.extracted), expected(sample))

    def extra_metrics(self, text: str, sample: Sample) -> dict[str, float]:
        """Containment and overlap of words."""
        right = expected(sample)
        return {
            "containment": short_text.contains(text or "", right),
            "word_f1": short_text.word_f1(text or "", right),
        }

    def judge_prompt(self, sample: Sample, text: str) -> str | None:
        """Whether both answers mean the same."""
        right = " / ".join(expected(sample))
        return _JUDGE.format(question=sample.question, expected=right, said=text)

    def read_verdict(self, verdict: str) -> Mapping[str, float] | None:
        """Accuracy and score; a word that is neither yes nor no cannot be read."""
        found = verdicts.yes_and_score(verdict)
        if found is None or found[0] not in ("yes", "no") or not 0 <= found[1] <= 5:
            return None
        return {"judge_accuracy": float(found[0] == "yes"), "judge_score": found[1] / 5}

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """lmms-eval's two numbers, from records that hold a judge's words as ``judge_review``."""
        said = [str(r["judge_review"]) for r in records if r.get("judge_review") is not None]
        read = [v for v in map(verdicts.yes_and_score, said) if v is not None]
        return verdicts.mean_and_accuracy(read)


def expected(sample: Sample) -> list[str]:
    """The answer, and another that the annotations also call right."""
    other = sample.meta.get("also_right")
    return [str(sample.answer), *([str(other)] if other else [])]


def read_pairs(root: Path, split: str = "test") -> list[Doc]:
    """Questions and answers of two files joined by ``question_id``, as Video-ChatGPT has them.

    Args:
        root: folder with ``test_q.json`` and ``test_a.json``.
        split: first part of their names.

    Raises:
        DataError: a file is missing, or a question has no answer.
    """
    questions = read_rows(find_file(root, f"{split}_q.json"))
    answers = {a.get("question_id"): a for a in read_rows(find_file(root, f"{split}_a.json"))}
    lonely = [q for q in questions if q.get("question_id") not in answers]
    if lonely:
        raise DataError(
            f"{root}/{split}_a.json has no answer to {len(lonely)} of {len(questions)} questions, "
            f"such as {json.dumps(lonely[0].get('question_id'))}."
        )
    return [{**answers[q.get("question_id")], **q} for q in questions]
