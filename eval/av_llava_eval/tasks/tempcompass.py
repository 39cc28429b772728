"""TempCompass: speed, direction, action, order and change of attributes, asked in four ways.

The rules of three of them need no judge; the default ones read more than the published ones, which
hand everything but "A", "A. …" and "A) …" to a judge; ``rule_or_judge`` is theirs, over the answers
that were read or judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from av_llava.errors import DataError
from av_llava_eval import mcq
from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import ChoiceTask, letter_of_text
from av_llava_eval.points import Record, group_scores, points
from av_llava_eval.reading import short_text, verdicts, yes_no
from av_llava_eval.sample import LETTERS, Prediction, Sample
from av_llava_eval.task import Doc, Task, register

JUDGE = Prediction(None, "judge")
"""The published rule asks a judge here; without one its score is 0."""
_CORRECT = """Question:
{question}
Right answer: {expected}
Answer to judge: {said}

Is the answer right? Reply with one word: Correct or Incorrect."""
_DESCRIBED = """Description of a video: {said}

Question: {question}
Right answer: {expected}

Would someone who knows only the description give the right answer, and no other? Reply with one \
word: Correct or Incorrect."""


class _TempCompass(Task):
    """What the four share: files, groups, and the metric's name."""

    splits = ("test",)
    groupings = ("dim",)
    styles: ClassVar[tuple[str, ...]] = ("default", "lmms")
    stem: ClassVar[str] = ""
    lmms_ending: ClassVar[str] = "Please directly give the best option:"
    our_ending: ClassVar[str] = "Answer with the right option only."

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet file, or of the original's JSON by video and dimension."""
        named = (f"questions/{self.stem}.json", f"{self.stem}.json", f"{self.stem}/test-*.parquet")
        file = find_file(root, *named)
        return _by_dimension(file) if file.suffix == ".json" else read_rows(file)

    def _sample(self, doc: Doc, index: int, root: Path, **fields: Any) -> Sample:
        return Sample(
            id=f"{self.stem}_{index}",
            group=doc["video_id"],
            video=find_medium(root, ("videos", "video"), doc["video_id"]),
            meta={"dim": doc["dim"], "asked": doc["question"], "expected": doc["answer"]},
            **fields,
        )

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """The question with its options as the annotations write it."""
        asked = str(sample.meta["asked"])
        if style == "lmms":
            return f"{asked}\n{self.lmms_ending}"
        return f"{asked}\n{self.our_ending}"

    def judge_prompt(self, sample: Sample, text: str) -> str | None:
        """Only for answers that the published rule cannot read."""
        if self.extract(text, sample, "lmms") != JUDGE:
            return None
        fields = {"question": sample.meta["asked"], "expected": sample.meta["expected"]}
        return _CORRECT.format(**fields, said=text)

    def read_verdict(self, verdict: str) -> Mapping[str, float] | None:
        """Correct or incorrect."""
        found = verdicts.correct(verdict)
        return None if found is None else {"rule_or_judge": float(found)}

    def extra_metrics(self, text: str, sample: Sample) -> dict[str, float]:
        """The published number: the published rule, and a judge for what it cannot read."""
        read = self.extract(text, sample, "lmms")
        score = None if read == JUDGE else self.score(read, sample, "lmms")
        return {} if score is None else {"rule_or_judge": score}

    def score(
        self, prediction: Prediction, sample: Sample, compat: str | None = None
    ) -> float | None:
        """Under ``compat`` an answer that needs a judge has 0."""
        if compat and prediction.how == JUDGE.how:
            return 0.0
        return super().score(prediction, sample)

    def score_sample(self, sample: Sample, text: str, compat: str | None = None) -> dict[str, Any]:
        """As everywhere, and whether the published rule asks a judge."""
        asks = self.extract(text, sample, "lmms") == JUDGE
        return {**super().score_sample(sample, text, compat), "needs_judge": asks}

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """Percent, over all and by dimension."""
        mean = sum(map(points, records)) / len(records) if records else 0.0
        groups = group_scores(records, "dim")
        by_dim = {f"{d}_accuracy": 100 * g["score"] for d, g in groups.items()}
        return {"avg_accuracy": 100 * mean, **by_dim}


@register
class MultiChoice(_TempCompass, ChoiceTask):
    """Two to four options in the question."""

    name = "tempcompass_multi_choice"
    title = "TempCompass (multi-choice)"
    size = "410 videos"
    needs = ("questions/multi-choice.json or multi-choice/test-*.parquet", "videos/ID.mp4")
    stem = "multi-choice"
    our_ending = "Answer with the option's letter from the given choices directly."

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``answer`` is the option with its letter."""
        lines = doc["question"].split("\n")
        options = mcq.strip_letters(lines[1:])
        letter = doc["answer"].strip()[:1]
        return self._sample(doc, index, root, question=lines[0], options=options, answer=letter)

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """The whole option, or how the answer begins."""
        if text == sample.meta["expected"] or text in ("A", "B", "C", "D"):
            return Prediction(text[:1], "letter")
        if text[:1] in LETTERS[:4] and text[1:2] in (".", ")") and text:
            return Prediction(text[0], "letter")
        return JUDGE


@register
class YesNo(_TempCompass):
    """Yes or no."""

    name = "tempcompass_yes_no"
    title = "TempCompass (yes/no)"
    size = "410 videos"
    needs = ("questions/yes_no.json or yes_no/test-*.parquet", "videos/ID.mp4")
    stem = "yes_no"
    lmms_ending = "Please answer yes or no:"
    our_ending = "Answer yes or no."

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``answer`` is yes or no."""
        if doc["answer"] not in ("yes", "no"):
            raise DataError(f"the answer {doc['answer']!r} is neither yes nor no")
        return self._sample(doc, index, root, question=doc["question"], answer=doc["answer"])

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """The word, or how the answer begins."""
        return yes_no.lmms(text or "") if compat else yes_no.read(text or "")

    def chance(self, sample: Sample) -> float | None:
        """One half."""
        return 0.5


@register
class CaptionMatching(_TempCompass, ChoiceTask):
    """Which of two sentences describes the film: "Sentence 1: …", "Option A: …", "Caption B: …"."""

    name = "tempcompass_caption_matching"
    title = "TempCompass (caption matching)"
    size = "410 videos"
    needs = ("questions/caption_matching.json or caption_matching/test-*.parquet", "videos/ID.mp4")
    stem = "caption_matching"

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """The options' labels differ from question to question; A is the first here."""
        lines = doc["question"].split("\n")
        texts = tuple(line.partition(": ")[2] for line in lines[1:])
        if not all(texts):
            raise DataError(f"the question {lines[0][:40]!r} has an option without a label")
        answer = letter_of_text(doc["answer"], lines[1:])
        return self._sample(doc, index, root, question=lines[0], options=texts, answer=answer)

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """By label or text; our rule in either case and with words around it."""
        labels = [o.partition(": ")[0] for o in str(sample.meta["asked"]).split("\n")[1:]]
        texts = sample.options or ()
        if compat:
            return _matched(text or "", labels, texts)
        return _named(text or "", labels, texts)


@register
class Captioning(_TempCompass):
    """A free description, by which a judge answers a question with options.

    Without a judge: whether the description names the right option and no other.
    """

    name = "tempcompass_captioning"
    title = "TempCompass (captioning)"
    size = "410 videos"
    needs = ("questions/captioning.json or captioning/test-*.parquet", "videos/ID.mp4", "a judge")
    stem = "captioning"
    metric = "right option named"
    max_new_tokens = 256

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``mc_question`` and ``mc_answer`` are for the judge."""
        options = mcq.strip_letters(doc["mc_question"].split("\n")[1:])
        at = LETTERS.find(doc["mc_answer"].strip()[:1] or "?")
        if not 0 <= at < len(options):
            raise DataError(f"the answer {doc['mc_answer']!r} is none of {len(options)} options")
        whole = {**doc, "answer": doc["mc_answer"]}
        found = self._sample(whole, index, root, question=doc["question"], answer=options[at])
        meta = {**found.meta, "mc_question": doc["mc_question"], "choices": list(options)}
        return replace(found, meta=meta)

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """The question as it is."""
        return sample.question

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """The only option that the description names."""
        return short_text.one_of(text or "", sample.meta["choices"])

    def score(
        self, prediction: Prediction, sample: Sample, compat: str | None = None
    ) -> float | None:
        """Whether it is the right one."""
        return float(prediction.extracted == sample.answer) if prediction.parsed else None

    def extra_metrics(self, text: str, sample: Sample) -> dict[str, float]:
        """The published number is the judge's alone."""
        return {}

    def judge_prompt(self, sample: Sample, text: str) -> str | None:
        """Whether the description leads to the right option."""
        return _DESCRIBED.format(
            said=text, question=sample.meta["mc_question"], expected=sample.meta["expected"]
        )


def _by_dimension(file: Path) -> list[Doc]:
    try:
        videos = json.loads(file.read_text(encoding="utf-8"))
        return [
            {**row, "video_id": str(video), "dim": dim}
            for video, dims in videos.items()
            for dim, rows in dims.items()
            for row in rows
        ]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not as the benchmark has it, {{video: {{dimension: […]}}}} ({error})."
        ) from error


def _matched(text: str, labels: Sequence[str], texts: Sequence[str]) -> Prediction:
    """The published rule: exactly an option, its text, or its label; later kinds win."""
    found = None
    after = text.split(") ")[1] if ") " in text else None
    for i, (label, option) in enumerate(zip(labels, texts, strict=True)):
        if text == f"{label}: {option}":
            found = i
    for i, option in enumerate(texts):
        if option in (text, after):
            found = i
    names = [*labels, *map(_short, labels)]
    for i, label in enumerate(names):
        if label in (text, text.replace(".", "")):
            found = i % len(labels)
    return JUDGE if found is None else Prediction(LETTERS[found], "matched")


def _short(label: str) -> str:
    for word in ("Sentence ", "Option ", "Caption "):
        label = label.replace(word, "")
    return label


def _named(text: str, labels: Sequence[str], texts: Sequence[str]) -> Prediction:
    """Our rule: the only label or the only text that the answer names."""
    said = mcq.plain_words(mcq.clean(text))
    if not said:
        return Prediction(None, "empty")
    short = [mcq.plain_words(_short(label)) for label in labels]
    if said in short:
        return Prediction(LETTERS[short.index(said)], "label")
    named = [i for i, x in enumerate(labels) if f" {mcq.plain_words(x)} " in f" {_spaced(said)} "]
    if len(named) == 1:
        return Prediction(LETTERS[named[0]], "label")
    inside = [i for i, x in enumerate(texts) if mcq.plain_words(x) in said]
    if len(inside) == 1:
        return Prediction(LETTERS[inside[0]], "option text")
    return Prediction(None, "several" if named or inside else "unparsed")


def _spaced(text: str) -> str:
    return " ".join(word.strip(".,:;()*\"'") for word in text.split())
