"""OmniVideoBench: films up to half an hour; each answer needs steps through sound and sight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from av_llava.errors import DataError
from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import ChoiceTask, lettered
from av_llava_eval.mcq import strip_letters
from av_llava_eval.points import Record, points
from av_llava_eval.reading.spans import seconds
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, register

_BOUNDS = ((60, "0-1 min"), (300, "1-5 min"), (600, "5-10 min"), (float("inf"), "10-30 min"))


@register
class OmniVideoBench(ChoiceTask):
    """Four options; thirteen kinds of questions; speech, sounds or music."""

    name = "omnivideobench"
    title = "OmniVideoBench"
    size = "1000 questions, 628 videos"
    needs = ("data.json", "videos/VIDEO.mp4")
    groupings = ("question_type", "audio_type", "video_type", "length")
    hears = True

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """The questions of each film, with what is said of the film."""
        return _questions(read_rows(find_file(root, "data.json", "*.json", "*/data.json")))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """Options have their letters, with or without a space."""
        length = seconds(doc["duration"])
        return Sample(
            id=f"{doc['video']}_{doc.get('_question', index)}",
            group=doc["video"],
            question=doc["question"],
            options=strip_letters(doc["options"]),
            answer=doc["correct_option"],
            video=find_medium(root, ("videos", "video", ""), doc["video"]),
            duration_s=length,
            meta={
                **{f: doc[f] for f in self.groupings if f != "length"},
                "length": next(name for bound, name in _BOUNDS if length <= bound),
            },
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """The wording of the benchmark's own scripts; lmms-eval has no such task."""
        lines = "\n".join(lettered(sample.options or ()))
        return (
            "You are given a video. Based on the content of the video, answer the following "
            f"question:\n\nQuestion:\n{sample.question}\n\nOptions:\n{lines}\n\nAnswer with the "
            "option's letter directly(e.g., A, B, C, or D).If your access to the video content is "
            "limited, at least one option that is more likely than the others must be chosen."
            "Mustn't give any other reason for can not choose!"
        )

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """The whole answer, which must be the letter."""
        return Prediction(text.strip().upper(), "whole answer")

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """Percent."""
        mean = sum(map(points, records)) / len(records) if records else 0.0
        return {"accuracy": 100 * mean}


def _questions(films: Iterable[Doc]) -> Iterator[Doc]:
    for number, film in enumerate(films):
        if not isinstance(film.get("questions"), list):
            raise DataError(f"film {number} of the annotations has no list of questions")
        about = {k: v for k, v in film.items() if k != "questions"}
        for i, question in enumerate(film["questions"]):
            yield {**about, **question, "_question": i}
