"""LongVideoBench, validation: films up to an hour, with subtitles, questions that refer to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import LLAVA_ENDING, ChoiceTask, letter_of, lettered
from av_llava_eval.points import Record, points
from av_llava_eval.reading import lmms
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.subtitles import frame_times, interleave, read_longvideobench, seen_lines
from av_llava_eval.task import Doc, register

_PREFIXES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option is", "The correct option is", "Best answer:", "Best option:"),
)
FRAMES = 16
"""Frames that are interleaved with the subtitles."""


@register
class LongVideoBench(ChoiceTask):
    """The film alone; two to five options."""

    name = "longvideobench_val_v"
    title = "LongVideoBench (validation)"
    size = "1337 questions"
    needs: ClassVar[tuple[str, ...]] = ("lvb_val.json or validation-*.parquet", "videos/VIDEO_PATH")
    splits = ("validation",)
    groupings = ("duration_group", "question_category", "topic_category", "level")

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the JSON or parquet file."""
        return read_rows(find_file(root, "lvb_val.json", "validation-*.parquet", "*/validation-*"))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """Options stand in ``option0`` … (parquet) or ``candidates`` (JSON)."""
        given = doc.get("candidates")
        options = [doc[f"option{i}"] for i in range(5)] if given is None else list(given)
        listed = tuple(o for o in options if o not in (None, "N/A"))
        return Sample(
            id=doc["id"],
            group=doc["video_id"],
            question=doc["question"],
            options=listed,
            answer=letter_of(doc["correct_choice"]),
            video=find_medium(root, ("videos", "video"), doc["video_path"]),
            subtitles=find_medium(
                root, ("subtitles", "subtitle"), doc["subtitle_path"], (".json",)
            ),
            duration_s=float(doc["duration"]),
            meta={
                **{f: doc.get(f) for f in self.groupings},
                "subtitles_from_s": float(doc.get("starting_timestamp_for_subtitles") or 0),
            },
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """The ending is followed by a line break."""
        lines = lettered(sample.options or ())
        return "\n".join([sample.question, *lines, LLAVA_ENDING, ""])

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """The first capital A to E anywhere, existing option or not; else a random letter."""
        return lmms.first_capital(text, "ABCDE", _PREFIXES) or lmms.RANDOM

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """Rounded there."""
        mean = sum(map(points, records)) / len(records) if records else 0.0
        return {"lvb_acc": round(mean, 5)}


@register
class LongVideoBenchSubtitles(LongVideoBench):
    """The film, then those subtitles during which one of 16 even frames lies, with their times."""

    name = "longvideobench_val_i"
    title = "LongVideoBench with subtitles (validation)"
    needs = (*LongVideoBench.needs, "subtitles/SUBTITLE_PATH")

    def check(self, root: str | Path, split: str | None = None) -> list[str]:
        """Also the subtitles, which every film has."""
        out = super().check(root, split)
        files = {s.subtitles for s in self.scan(root, split).samples} if not out else set()
        missing = sorted(str(f) for f in files if f is not None and not f.exists())
        if missing:
            out.append(
                f"{len(missing)} of {len(files)} subtitles are missing, such as {missing[0]}."
            )
        return out

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """In the style ``lmms`` a row ``<image>`` stands for each of the frames."""
        assert sample.subtitles is not None and sample.duration_s is not None
        begin = float(sample.meta["subtitles_from_s"])
        lines = read_longvideobench(sample.subtitles, begin, sample.duration_s)
        times = frame_times(sample.duration_s, FRAMES)
        question = super().prompt(sample, style)
        if style == "lmms":
            return f"{interleave(lines, times)}\n{question}"
        said = "\n".join(f"[{x.start_s:.0f} s] {x.text}" for x in seen_lines(lines, times))
        return f"The video's subtitles are:\n{said}\n\n{question}" if said else question
