"""What the multiple-choice benchmarks share: prompts, letters, and lmms-eval's way with them.

Contract: a task that derives from :class:`ChoiceTask` gives its samples ``options`` and a letter as
``answer``; by default it is read and scored by ``mcq``. For ``compat="lmms"`` it says which of the
rules in ``reading.lmms`` lmms-eval uses, and what the metric is called there. Where lmms-eval has
no such benchmark, the rule is that of the benchmark's own script, or ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from av_llava.errors import DataError
from av_llava_eval import mcq
from av_llava_eval.points import Record, points
from av_llava_eval.reading import lmms
from av_llava_eval.sample import LETTERS, Prediction, Sample
from av_llava_eval.task import Task

LLAVA_ENDING = "Answer with the option's letter from the given choices directly."
"""The sentence that LLaVA checkpoints were trained with."""


class ChoiceTask(Task):
    """A benchmark whose questions have options."""

    styles: ClassVar[tuple[str, ...]] = ("default", "lmms")
    percent: ClassVar[str] = ""
    """Name of lmms-eval's metric, where it is 100 times the mean score."""
    fraction: ClassVar[str] = ""
    """The same, where it is the mean score."""

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """Question, lettered options and LLaVA's own ending; or lmms-eval's wording."""
        if style == "lmms":
            return self.lmms_prompt(sample)
        return "\n".join([sample.question, *lettered(sample.options or ()), LLAVA_ENDING])

    def lmms_prompt(self, sample: Sample) -> str:
        """The wording of lmms-eval; here it is the same."""
        return self.prompt(sample)

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """The letter; by lmms-eval's rule, or by ours."""
        said = text or ""
        options = sample.options or ()
        return self.lmms_extract(said, sample) if compat else mcq.extract(said, options)

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """What lmms-eval reads; ours, where it has no such benchmark."""
        return mcq.extract(text, sample.options or ())

    def score(
        self, prediction: Prediction, sample: Sample, compat: str | None = None
    ) -> float | None:
        """1 for the right letter. A random draw counts as its expectation."""
        if compat is None:
            return super().score(prediction, sample)
        if prediction.how == lmms.RANDOM.how:
            return 1 / len(sample.options or "?")
        return float(prediction.extracted == self.lmms_answer(sample))

    def lmms_answer(self, sample: Sample) -> Any:
        """What a right answer is extracted as there."""
        return sample.answer

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """The metric of lmms-eval, by its name there."""
        if not records:
            return {}
        mean = sum(map(points, records)) / len(records)
        named = {self.percent: 100 * mean, self.fraction: mean}
        return {name: value for name, value in named.items() if name}


def lettered(options: Sequence[str], form: str = "{}. {}") -> list[str]:
    """One line per option: ``A. a cat``."""
    return [form.format(a, text) for a, text in zip(LETTERS, options, strict=False)]


def letter_of(index: Any) -> str:
    """The letter of option 0, 1, …; the annotations count in numbers or texts of numbers.

    Raises:
        DataError: it is no such number.
    """
    try:
        number = int(index)
    except (TypeError, ValueError) as error:
        raise DataError(f"the answer {index!r} is not the number of an option") from error
    if not 0 <= number < len(LETTERS):
        raise DataError(f"the answer {number} is not the number of an option")
    return LETTERS[number]


def letter_of_text(answer: str, options: Sequence[str]) -> str:
    """The letter of the option with this text, for annotations that give the text.

    Raises:
        DataError: no option has it.
    """
    if answer in options:
        return LETTERS[list(options).index(answer)]
    plain = [mcq.plain_words(option) for option in options]
    if plain.count(mcq.plain_words(answer)) == 1:
        return LETTERS[plain.index(mcq.plain_words(answer))]
    raise DataError(f"the answer {answer!r} is none of {len(options)} options")


def by_letter(texts: Sequence[str]) -> dict[str, str]:
    """{letter: text}."""
    return dict(zip(LETTERS, texts, strict=False))


def split_question(text: str) -> tuple[str, tuple[str, ...]]:
    """Question and options of annotations that write both into one text.

    Args:
        text: a question, then one line per option: ``(A) …``, ``A. …`` or ``A) …``.

    Raises:
        DataError: it has fewer than two lines that look like options.
    """
    lines = text.split("\n")
    for first in range(1, len(lines)):
        options = [mcq.strip_letter(line, i) for i, line in enumerate(lines[first:])]
        whole = all(o != line.strip() for o, line in zip(options, lines[first:], strict=True))
        if whole and len(options) >= 2:
            return "\n".join(lines[:first]), tuple(options)
    raise DataError(
        f"the question {text[:60]!r} holds no options such as '(A) …' in lines of their own"
    )


def first_per_question(records: Sequence[Record], field: str = "question_id") -> list[Record]:
    """Of records with one question's id the first: so lmms-eval counts for some tasks."""
    seen: dict[tuple[Any, Any], Record] = {}
    for record in records:
        meta: Mapping[str, Any] = record.get("meta") or {}
        seen.setdefault((meta.get("category"), meta.get(field)), record)
    return list(seen.values())
