"""Video-MME: 900 films of three lengths, three questions with four options each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from av_llava.errors import DataError
from av_llava_eval.annotations import find_file, find_medium, read_rows
from av_llava_eval.choices import LLAVA_ENDING, ChoiceTask, lettered
from av_llava_eval.mcq import strip_letters
from av_llava_eval.reading import lmms
from av_llava_eval.sample import Prediction, Sample
from av_llava_eval.subtitles import Line, lines_of, lmms_white_lines, seen_lines, with_lines
from av_llava_eval.task import Doc, register

_INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video and the "
    "subtitles. Respond with only the letter (A, B, C, or D) of the correct option."
)
_HEADER = "This video's subtitles are listed below: \n"


@register
class VideoMME(ChoiceTask):
    """Frames only; the same questions with sound under ``--audio on``."""

    name = "videomme"
    title = "Video-MME"
    size = "2700 questions, 900 videos"
    needs: ClassVar[tuple[str, ...]] = (
        "videomme/test-*.parquet (or .json, .jsonl)",
        "data/VIDEOID.mp4",
    )
    groupings = ("duration", "domain", "sub_category", "task_type")
    percent = "videomme_perception_score"

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet file."""
        patterns = ("videomme/test-*.parquet", "test-*.parquet", "*.parquet", "videomme.json*")
        return read_rows(find_file(root, *patterns))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """Video and subtitles are named by ``videoID``."""
        film = doc["videoID"]
        return Sample(
            id=doc["question_id"],
            group=film,
            question=doc["question"],
            options=strip_letters(doc["options"]),
            answer=doc["answer"],
            video=find_medium(root, ("data", "video", "videos"), film),
            subtitles=find_medium(root, ("subtitle", "subtitles"), film, (".srt",)),
            meta={f: doc[f] for f in self.groupings},
        )

    def lmms_prompt(self, sample: Sample) -> str:
        """Speaks of subtitles although there are none, as there."""
        lines = lettered(sample.options or ())
        return "\n".join([_INSTRUCTION, sample.question, *lines, "", LLAVA_ENDING])

    def lmms_extract(self, text: str, sample: Sample) -> Prediction:
        """The best-placed letter of four."""
        return lmms.ranked(text, "ABCD")


@register
class VideoMMEWithSubtitles(VideoMME):
    """With the subtitles before the question; 744 of the 900 films have some."""

    name = "videomme_w_subtitle"
    title = "Video-MME with subtitles"
    size = "2700 questions, 900 videos, 744 subtitles"
    needs = (*VideoMME.needs, "subtitle/VIDEOID.srt")
    styles = ("default", "lmms", "frames")
    frame_styles = ("frames",)

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """All lines of the film; in the style ``lmms`` those that 32 even frames show."""
        lines = lines_of(sample)
        if style == "lmms":
            # A film that is missing is a failure of its questions, not of the run.
            there = lines and sample.video is not None and sample.video.exists()
            return subtitle_prompt(sample, _seen(sample, lines) if there else None)
        return with_lines(lines, super().prompt(sample, style))

    def prompt_of_frames(self, sample: Sample, style: str, times_s: Sequence[float]) -> str:
        """The lines of the frames that the model sees, as the benchmark's authors ask for."""
        return with_lines(seen_lines(lines_of(sample), times_s), super().prompt(sample, style))

    def check(self, root: str | Path, split: str | None = None) -> list[str]:
        """Also whether there are subtitles at all; not every film has some."""
        out = super().check(root, split)
        files = {s.subtitles for s in self.scan(root, split).samples} if not out else set()
        if files and not any(f is not None and f.exists() for f in files):
            out.append(f"None of {len(files)} films has subtitles, such as {min(map(str, files))}.")
        return out


@register
class VideoMMEWithSound(VideoMME):
    """The same questions, asked with the films' own sound unless ``--audio`` says otherwise."""

    name = "videomme_w_audio"
    title = "Video-MME with sound"
    hears = True


def subtitle_prompt(sample: Sample, said: str | None) -> str:
    """lmms-eval's wording.

    Args:
        said: the lines that are shown; None if there is no file of subtitles.
    """
    block = "No subtitles available" if said is None else said
    ending = "The best answer is:"
    lines = [block, _INSTRUCTION, sample.question, *lettered(sample.options or ()), ending]
    return _HEADER + "\n".join(lines)


def _seen(sample: Sample, lines: Sequence[Line]) -> str:
    from av_llava.media import probe

    assert sample.video is not None
    film = probe(sample.video).video
    if film is None or not film.avg_fps or not film.n_frames:
        raise DataError(f"{sample.video} does not say how many frames it has.")
    return lmms_white_lines(lines, film.avg_fps, film.n_frames)
