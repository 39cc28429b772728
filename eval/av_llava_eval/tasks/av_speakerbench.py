"""AV-SpeakerBench: who speaks, when, and how many; the same questions with and without sound."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from av_llava_eval.annotations import find_file, read_rows
from av_llava_eval.choices import ChoiceTask, lettered
from av_llava_eval.mcq import strip_letters
from av_llava_eval.reading import lmms
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, register


@register
class SpeakerBench(ChoiceTask):
    """Sound and picture."""

    name = "av_speakerbench_audiovisual"
    title = "AV-SpeakerBench (audio-visual)"
    needs = ("*.csv, *.json or *.parquet", "media as the rows name them")
    groupings = ("task_id",)
    percent = "av_speakerbench_score"
    hears = True
    instruction: ClassVar[str] = (
        "Select the best answer to the following multiple-choice question based on the audiovisual "
        "clip. Respond with only the letter (A, B, C, or D) of the correct option."
    )
    medium: ClassVar[str] = "audio_visual_path"

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the file."""
        return read_rows(find_file(root, "*.parquet", "*/test-*.parquet", "*.csv", "*.json*"))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """``choices`` is a list, or the text of a Python list."""
        given = doc["choices"]
        options = ast.literal_eval(given) if isinstance(given, str) else list(given)
        file = root / doc[self.medium]
        sound = self.medium == "audio_path"
        return Sample(
            id=str(doc["question_id"]),
            group=str(doc[self.medium]),
            question=doc["question"],
            options=strip_letters([str(o).strip() for o in options]),
            answer=str(doc["answer"]).strip().upper(),
            video=None if sound else file,
            audio=file if sound else None,
            meta={"task_id": doc["task_id"]},
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """Instruction first."""
        lines = lettered(sample.options or ())
        return "\n".join([self.instruction, sample.question, *lines, "The best answer is:"])

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """The first word that is a letter, the article "a" too; else the first letter."""
        return lmms.first_token(text, sample.letters)


@register
class SpeakerBenchAudio(SpeakerBench):
    """Sound only."""

    name = "av_speakerbench_audio"
    title = "AV-SpeakerBench (audio)"
    instruction = (
        "Select the best answer to the following multiple-choice question based on the audio clip. "
        "Focus on the audio and respond with only the letter (A, B, C, or D)."
    )
    medium = "audio_path"


@register
class SpeakerBenchVisual(SpeakerBench):
    """Picture only."""

    name = "av_speakerbench_visual"
    title = "AV-SpeakerBench (visual)"
    instruction = (
        "Select the best answer to the following multiple-choice question based on the silent "
        "visual clip. Rely on the visuals only and respond with the letter (A, B, C, or D)."
    )
    medium = "visual_path"
    hears = False
