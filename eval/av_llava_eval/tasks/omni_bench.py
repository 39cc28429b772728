"""OmniBench: a picture and a sound together, four options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from av_llava_eval.annotations import AUDIO_ENDINGS, find_file, find_medium, read_rows
from av_llava_eval.choices import LLAVA_ENDING, ChoiceTask, letter_of_text, lettered
from av_llava_eval.points import Record, points
from av_llava_eval.reading import lmms
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, register

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@register
class OmniBench(ChoiceTask):
    """The repository's JSONL with its folders of pictures and sounds."""

    name = "omni_bench"
    title = "OmniBench"
    size = "1142 questions"
    needs = ("dataset/batch-5_*.jsonl or *.jsonl", "mm_data/image/…", "mm_data/audio/…")
    groupings = ("task_type", "audio_type")
    hears = True

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the JSONL file."""
        return read_rows(find_file(root, "dataset/*.jsonl", "*.jsonl", "*.json"))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """The answer is an option's text; keys have spaces, or underscores in older files."""
        number = str(doc["index"])
        sound = doc.get("audio_path") or number
        picture = doc.get("image_path") or number
        options = tuple(doc["options"])
        kinds = {f: doc.get(f.replace("_", " "), doc.get(f)) for f in self.groupings}
        return Sample(
            id=number,
            group=str(picture),
            question=doc["question"],
            options=options,
            answer=letter_of_text(doc["answer"], options),
            audio=find_medium(root, ("mm_data/audio", "audio"), str(sound), AUDIO_ENDINGS),
            images=(find_medium(root, ("mm_data/image", "image"), str(picture), _PICTURES),),
            meta=kinds,
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """With headings."""
        lines = "\n".join(lettered(sample.options or ()))
        return f"Question:\n{sample.question}\n\nOptions:\n{lines}\n\n{LLAVA_ENDING}"

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """Brackets, then spaces, then full stops."""
        return lmms.bracket_space_stop(text)

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """Percent, rounded."""
        mean = sum(map(points, records)) / len(records) if records else 0.0
        return {"accuracy": round(100 * mean, 5)}
