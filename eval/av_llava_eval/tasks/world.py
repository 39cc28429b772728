"""The project's own synthetic world: coloured shapes and sounds, twelve kinds of questions.

``av-llava data synth`` writes it. Its questions are asked as they are trained, without options, and
answered in one word; ``needs`` groups them by what they cannot be answered without: one frame
("slow"), many frames ("fast"), or sound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from av_llava.errors import DataError
from av_llava_eval.annotations import find_file, read_rows
from av_llava_eval.reading import short_text
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, Task, register


@register
class World(Task):
    """Rows of one question each, or conversations, whose turns are asked one by one."""

    name = "world"
    title = "Synthetic world"
    needs = ("SPLIT.json", "clips/… (av-llava data synth writes both)")
    splits = ("test", "val", "train")
    groupings = ("kind", "needs")
    hears = True

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of LLaVA's format with ``kind`` and ``needs``."""
        return _questions(read_rows(find_file(root, f"{split}.json")))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``choices`` are the answers that the question leaves open."""
        film, sound = doc.get("video"), doc.get("audio")
        if not film and not sound:
            raise DataError("neither a video nor an audio is named")
        choices = list(doc.get("choices") or ())
        if choices and doc["answer"] not in choices:
            raise DataError(f"the answer {doc['answer']!r} is none of {choices}")
        return Sample(
            id=str(doc["id"]),
            group=str(film or sound),
            question=doc["question"],
            answer=doc["answer"],
            video=root / film if film else None,
            audio=root / sound if sound else None,
            meta={"kind": doc["kind"], "needs": list(doc["needs"]), "choices": choices},
        )

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """The question alone."""
        return sample.question

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """The only choice that is named; without choices the text."""
        choices = sample.meta["choices"]
        return short_text.one_of(text or "", choices) if choices else short_text.read(text or "")

    def score(
        self, prediction: Prediction, sample: Sample, compat: str | None = None
    ) -> float | None:
        """Equality of normal forms."""
        if not prediction.parsed:
            return None
        said = short_text.normal(str(prediction.extracted))
        return short_text.exact(said, [str(sample.answer)])

    def chance(self, sample: Sample) -> float | None:
        """One in the number of choices."""
        return 1 / len(sample.meta["choices"]) if sample.meta["choices"] else None


def _questions(rows: Iterable[Doc]) -> Iterator[Doc]:
    for row in rows:
        if not isinstance(row.get("kind"), list):
            yield row
            continue
        said = [turn["value"] for turn in row.get("conversations", ())]
        if len(said) < 2 * len(row["kind"]):
            yield {k: v for k, v in row.items() if k != "question"}  # its question is missing
            continue
        pairs = zip(said[::2], said[1::2], strict=False)
        about = zip(pairs, row["kind"], row["needs"], strict=False)
        for number, ((asked, answer), kind, needs) in enumerate(about):
            question = asked.replace("<video>\n", "").replace("<audio>\n", "")
            one = {"id": f"{row['id']}-{number}", "question": question, "answer": answer}
            yield {**row, **one, "kind": kind, "needs": needs}
