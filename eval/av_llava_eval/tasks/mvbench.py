"""MVBench: 20 subtasks about time, over the films of older datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from av_llava.errors import DataError
from av_llava_eval.annotations import find_medium, read_rows
from av_llava_eval.choices import ChoiceTask, letter_of_text, lettered
from av_llava_eval.points import Record, points
from av_llava_eval.reading import lmms
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.task import Doc, register

FOLDERS = {
    "action_sequence": ("star/Charades_v1_480", "star/Charades_segment"),
    "action_prediction": ("star/Charades_v1_480", "star/Charades_segment"),
    "action_antonym": ("ssv2_video", "ssv2_video_mp4"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",),
    "unexpected_action": ("FunQA_test/test",),
    "object_existence": ("clevrer/video_validation",),
    "object_interaction": ("star/Charades_v1_480", "star/Charades_segment"),
    "object_shuffle": ("perception/videos",),
    "moving_direction": ("clevrer/video_validation",),
    "action_localization": ("sta/sta_video", "sta/sta_video_segment"),
    "scene_transition": ("scene_qa/video",),
    "action_count": ("perception/videos",),
    "moving_count": ("clevrer/video_validation",),
    "moving_attribute": ("clevrer/video_validation",),
    "state_change": ("perception/videos",),
    "fine_grained_pose": ("nturgbd", "nturgbd_convert"),
    "character_order": ("perception/videos",),
    "egocentric_navigation": ("vlnqa",),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment"),
    "counterfactual_inference": ("clevrer/video_validation",),
}
"""Subtask → where its films lie, below ``video/``; ``_segment`` holds films already cut."""
FRAMES_PER_SECOND = 3.0
"""Of the folders of pictures in episodic_reasoning."""


@register
class MVBench(ChoiceTask):
    """All subtasks, or one as a split; the headline is their mean."""

    name = "mvbench"
    title = "MVBench"
    needs = ("json/SUBTASK.json", "video/… as the benchmark has it (films, or folders of pictures)")
    splits = ("all", *FOLDERS)
    groupings = ("sub_task",)
    headline = "macro:sub_task"

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows with their subtask as ``_sub_task``."""
        return self._rows(root, tuple(FOLDERS) if split == "all" else (split,))

    def _rows(self, root: Path, tasks: Sequence[str]) -> Iterator[Doc]:
        files = {t: root / "json" / f"{t}.json" for t in tasks}
        missing = [t for t, file in files.items() if not file.is_file()]
        if missing:
            raise DataError(
                f"{root} lacks {len(missing)} of {len(tasks)} subtasks of MVBench, such as "
                f"json/{missing[0]}.json. One subtask alone is run with --split SUBTASK."
            )
        for task, file in files.items():
            for number, row in enumerate(read_rows(file)):
                yield {**row, "_sub_task": task, "_row": number}

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """Bounds in seconds hold for films that are not already cut to them."""
        task = doc["_sub_task"]
        options = tuple(doc["candidates"])
        film = find_medium(root / "video", FOLDERS[task], doc["video"])
        cut = any(part.endswith("_segment") for part in film.parts)
        bounds = (None, None) if cut else (doc.get("start"), doc.get("end"))
        return Sample(
            id=f"{task}/{doc.get('_row', index)}",
            group=f"{task}/{doc['video']}",
            question=doc["question"],
            options=options,
            answer=letter_of_text(doc["answer"], options),
            video=film,
            start_s=bounds[0],
            end_s=bounds[1],
            source_fps=FRAMES_PER_SECOND if film.is_dir() else None,
            meta={"sub_task": task},
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """Options in brackets."""
        lines = lettered(sample.options or (), "({}) {}")
        ending = "Only give the best option."
        return "\n".join([f"Question:{sample.question}", "Option:", *lines, ending, ""])

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """A letter, or all words in lower case; the article "a" counts as A."""
        return Prediction(lmms.mvbench_word(text), "word")

    def lmms_answer(self, sample: Sample) -> Any:
        """The letter, as the same rule reads it."""
        return lmms.mvbench_word(str(sample.answer))

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """Empty answers do not count there."""
        said = [r for r in records if r.get("raw", r.get("prediction")) != ""]
        mean = sum(map(points, said)) / len(said) if said else 0.0
        return {"mvbench_accuracy": 100 * mean}
