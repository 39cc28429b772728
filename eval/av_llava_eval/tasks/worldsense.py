"""WorldSense: films whose questions need sound and picture together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from av_llava.errors import DataError
from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import ChoiceTask, by_letter, first_per_question, lettered
from av_llava_eval.mcq import strip_letters
from av_llava_eval.points import Record, points
from av_llava_eval.reading import lmms
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.subtitles import lines_of, lmms_plain_lines, read_srt, seen_lines, with_lines
from av_llava_eval.task import Doc, register

_SYSTEM = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, "
    "select the best option that accurately addresses the question."
)
_SOUND = "These are the frames of a video and the corresponding audio. "
_FRAMES = "These are the frames of a video. "
_SELECT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond "
    "with only the letter (A, B, C, or D) of the correct option."
)


@register
class WorldSense(ChoiceTask):
    """Three or four options, 26 kinds of questions, eight domains."""

    name = "worldsense"
    title = "WorldSense"
    size = "3172 questions, 1662 videos"
    needs: ClassVar[tuple[str, ...]] = (
        "worldsense_qa.json, *.jsonl or test-*.parquet",
        "videos/VIDEO.mp4",
    )
    groupings = ("task_type", "task_domain", "duration", "audio_class")
    hears = True

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the file, or of the original's JSON by video, with ``task0``, ``task1`` …"""
        patterns = ("worldsense*.json*", "*test-*.parquet", "*/test-*.parquet")
        file = find_file(root, *patterns)
        return _original(file) if file.suffix == ".json" else read_rows(file)

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """Media are given with their folders."""
        return Sample(
            id=str(doc["index"]),
            group=str(doc.get("video", doc["video_path"])),
            question=doc["question"],
            options=strip_letters(doc["candidates"]),
            answer=doc["answer"],
            video=find_medium(root, ("", "videos"), doc["video_path"]),
            subtitles=root / doc["subtitle_path"] if doc.get("subtitle_path") else None,
            duration_s=_seconds(str(doc.get("video_duration", ""))),
            meta={
                **{f: doc[f] for f in self.groupings},
                "category": doc["task_type"],
                "question_id": str(doc["index"]),
            },
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """Always speaks of four letters."""
        lines = lettered(sample.options or ())
        return "\n".join([_SYSTEM, _SOUND + _SELECT, sample.question, *lines, ""])

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """Any capital A to D in any word; "A" where there is none."""
        return lmms.any_letter(text, by_letter(sample.options or ()))

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """Only the first record of a question counts there."""
        kept = first_per_question(records)
        mean = sum(map(points, kept)) / len(kept) if kept else 0.0
        return {"worldsense_score": 100 * mean}


def _seconds(text: str) -> float | None:
    """``60s`` as a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)s", text)
    return float(match[1]) if match else None


def _original(file: Path) -> list[Doc]:
    try:
        videos = json.loads(file.read_text(encoding="utf-8"))
        rows: list[Doc] = []
        for name, video in videos.items():
            about = {k: v for k, v in video.items() if not k.startswith("task")}
            media = {"video_path": f"videos/{name}.mp4", "subtitle_path": f"subtitles/{name}.srt"}
            for key in sorted(k for k in video if k.startswith("task")):
                own = {"index": f"{name}_{key}", "video": name}
                rows.append({**about, **media, **own, **video[key]})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not as the benchmark has it, {{video: {{task0: {{…}}, …}}}} "
            f"({type(error).__name__}: {error})."
        ) from error
    return rows


@register
class WorldSenseWithSubtitles(WorldSense):
    """Subtitles instead of sound."""

    name = "worldsense_w_subtitle"
    title = "WorldSense with subtitles"
    needs = (*WorldSense.needs, "subtitles/VIDEO.srt")
    hears = False
    styles = ("default", "lmms", "frames")
    frame_styles = ("frames",)

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """All lines; in the style ``lmms`` those that 32 even frames show."""
        lines = lines_of(sample)
        if style == "lmms":
            there = lines and sample.video is not None and sample.video.exists()
            said = self._seen(sample) if there else "No subtitles available"
            block = f'{_FRAMES}This video\'s subtitles are listed below:\n"{said}"\n{_SELECT}'
            options = lettered(sample.options or ())
            return "\n".join([_SYSTEM, block, sample.question, *options, ""])
        return with_lines(lines, super().prompt(sample, style))

    def prompt_of_frames(self, sample: Sample, style: str, times_s: Sequence[float]) -> str:
        """The lines of the frames that the model sees."""
        return with_lines(seen_lines(lines_of(sample), times_s), super().prompt(sample, style))

    def _seen(self, sample: Sample) -> str:
        from av_llava.media import probe

        assert sample.subtitles is not None and sample.video is not None
        film = probe(sample.video).video
        if film is None or not film.avg_fps or not film.n_frames:
            raise DataError(f"{sample.video} does not say how many frames it has.")
        return lmms_plain_lines(read_srt(sample.subtitles), film.avg_fps, film.n_frames)
