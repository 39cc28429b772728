"""NExT-QA, multiple choice: why, how and when in short films of everyday life."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from av_llava.errors import DataError
from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import ChoiceTask, by_letter, letter_of, lettered
from av_llava_eval.reading import lmms
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, register

MAP = "map_vid_vidorID.json"
KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}


@lru_cache(maxsize=4)
def video_names(root: Path) -> dict[str, str]:
    """Video id → name of its file, from the benchmark's map; empty without one."""
    file = root / MAP
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} is no map from ids to names of videos ({error}).") from error


def find_video(root: Path, video: object) -> Path:
    """The film of a row: by its id, or by the name that the map gives."""
    name = video_names(root).get(str(video), str(video))
    return find_medium(root, ("NExTVideo", "videos", "video"), name)


@register
class NextQA(ChoiceTask):
    """Five options."""

    name = "nextqa_mc"
    title = "NExT-QA (multiple choice)"
    needs = ("MC/test-*.parquet or test.csv", f"NExTVideo/VIDEO.mp4 (with {MAP} where nested)")
    splits = ("test", "val")
    groupings = ("kind", "type")
    fraction = "exact_match_mean"

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet or CSV file."""
        named = [f"{f}{split}{e}" for f in ("MC/", "mc/", "") for e in ("-*.parquet", ".csv")]
        return read_rows(find_file(root, *named))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """Question ids count from 0 in each video."""
        return Sample(
            id=f"{doc['video']}_{doc['qid']}",
            group=str(doc["video"]),
            question=doc["question"].strip(),
            options=tuple(doc[f"a{i}"].strip() for i in range(5)),
            answer=letter_of(doc["answer"]),
            video=find_video(root, doc["video"]),
            meta={"type": doc["type"], "kind": KINDS.get(doc["type"][:1], "other")},
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """No instruction at all."""
        return "\n".join([sample.question, *lettered(sample.options or ())])

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """MMMU's rule, which ends in a random letter."""
        return lmms.mmmu(text, by_letter(sample.options or ()))
