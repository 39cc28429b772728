"""Subtitles of benchmarks: SubRip files, LongVideoBench's JSON, and which lines frames show.

Contract: a :class:`Line` has its seconds and plain text. Files in other forms are a DataError that
names the line. The functions called ``lmms_…`` reproduce lmms-eval's prompts exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from av_llava.errors import DataError
from av_llava_eval.sample import Sample

_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2})(?:[,.](\d{1,3}))?")
_ARROW = re.compile(rf"^\s*({_TIME.pattern})\s*-->\s*({_TIME.pattern})")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|\{\\[^{}]*\}")
_WHITE = re.compile(r'<font color="white" size=".72c">(.*?)</font>')


@dataclass(frozen=True)
class Line:
    """What is said from ``start_s`` to ``end_s``; ``raw`` keeps the file's markup."""

    start_s: float
    end_s: float
    text: str
    raw: str = ""


def read_srt(path: Path) -> list[Line]:
    """Read a SubRip file.

    Raises:
        DataError: the file cannot be read, or holds no times.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="strict")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the subtitles cannot be read ({error}).") from error
    found: list[Line] = []
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        rows = block.strip("\n").split("\n")
        at = next((i for i, row in enumerate(rows) if "-->" in row), None)
        if at is None:
            continue
        match = _ARROW.match(rows[at])
        if match is None:
            number = text[: text.find(rows[at])].count("\n") + 1
            raise DataError(f"{path}, line {number}: {rows[at]!r} is no span of time.")
        raw = " ".join(rows[at + 1 :])
        plain = " ".join(_TAG.sub("", raw).split())
        found.append(Line(clock_s(match[1]), clock_s(match[6]), plain, raw))
    if not found and text.strip():
        raise DataError(
            f"{path} holds no subtitles: no line looks like 00:00:01,000 --> 00:00:02,000."
        )
    return found


def lines_of(sample: Sample) -> list[Line]:
    """The subtitles of a sample; none without a file, which is no failure.

    Raises:
        DataError: as :func:`read_srt`.
    """
    there = sample.subtitles is not None and sample.subtitles.exists()
    return read_srt(sample.subtitles) if there and sample.subtitles is not None else []


def with_lines(lines: Sequence[Line], question: str) -> str:
    """Subtitles before a question; the question alone without any."""
    said = "\n".join(x.text for x in lines if x.text)
    return f"The video's subtitles are:\n{said}\n\n{question}" if said else question


def clock_s(text: str) -> float:
    """Seconds of ``00:01:02,500``."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise DataError(f"{text!r} is no time; one looks like 00:01:02,500.")
    hours, minutes, whole, part = match.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(whole) + float(f"0.{part or 0}")


def read_longvideobench(path: Path, start_s: float, duration_s: float) -> list[Line]:
    """Read LongVideoBench's JSON; seconds count from the beginning of the clip.

    Args:
        path: list of ``{"start", "end", "line"}`` or ``{"timestamp": [start, end], "text"}``.
        start_s: when the clip begins in the film, ``starting_timestamp_for_subtitles``.
        duration_s: stands for an end that is missing.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: the subtitles cannot be read ({error}).") from error
    return longvideobench_lines(rows, start_s, duration_s, str(path))


def longvideobench_lines(
    rows: Sequence[Any], start_s: float, duration_s: float, name: str = "subtitles"
) -> list[Line]:
    """:func:`read_longvideobench` of rows already read."""
    found = []
    for number, row in enumerate(rows):
        try:
            if "timestamp" in row:
                start, end = row["timestamp"]
                end = end if isinstance(end, float) else duration_s
                text = row["text"]
            else:
                start, end = _hms(row["start"]), _hms(row["end"])
                text = row["line"]
            found.append(Line(start - start_s, end - start_s, text, text))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{name}[{number}] is no subtitle ({type(error).__name__}: {error}); one has "
                '"start", "end" and "line", or "timestamp" and "text".'
            ) from error
    return found


def _hms(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


# ------------------------------------------------------------------ as in lmms-eval


def lmms_white_lines(
    lines: Sequence[Line], video_fps: float, n_frames: int, frame_num: int = 32
) -> str:
    """The lines of Video-MME that evenly sampled frames show, one per row.

    Only text in a white font tag of size .72c is kept. A line counts where a frame lies in it, the
    bounds cut down to whole frames. The order is that of a Python set of small integers.

    Args:
        lines: with their markup in ``raw``.
        video_fps: frame rate that the container tells.
        n_frames: its number of frames.
        frame_num: frames that are sampled; -1 takes all.
    """
    lines = _one_per_span(lines)
    shown = _shown(lines, video_fps, n_frames, frame_num)
    texts = [_WHITE.findall(lines[i].raw) for i in list(set(shown))]
    return "\n".join(t[0] for t in texts if t)


def lmms_plain_lines(
    lines: Sequence[Line], video_fps: float, n_frames: int, frame_num: int = 32
) -> str:
    """The same for WorldSense: markup stays, and the order is that of the film."""
    lines = _one_per_span(lines)
    shown = _shown(lines, video_fps, n_frames, frame_num)
    return "\n".join(lines[i].raw for i in sorted(set(shown)))


def _one_per_span(lines: Sequence[Line]) -> list[Line]:
    """Of lines with the same times the last, at the place of the first."""
    return list({(x.start_s, x.end_s): x for x in lines}.values())


def _shown(lines: Sequence[Line], video_fps: float, n_frames: int, frame_num: int) -> list[int]:
    count = n_frames if frame_num == -1 else frame_num
    # As numpy.linspace(0, n_frames - 1, count, dtype=int) rounds.
    step = (n_frames - 1) / (count - 1) if count > 1 else 0.0
    frames = [int(i * step) for i in range(count - 1)] + [n_frames - 1 if count > 1 else 0]
    spans = [(int(x.start_s * video_fps), int(x.end_s * video_fps)) for x in lines]
    return [i for f in frames for i, (start, end) in enumerate(spans) if start <= f < end]


def frame_times(duration_s: float, max_num_frames: int = 16) -> list[float]:
    """The frames that lmms-eval interleaves with LongVideoBench's subtitles, in seconds."""
    if duration_s > max_num_frames:
        return [duration_s / max_num_frames * i for i in range(max_num_frames)]
    return [float(i) for i in range(int(duration_s))]


def seen_lines(lines: Sequence[Line], times: Sequence[float]) -> list[Line]:
    """The lines during which a frame lies; short ones count for half a second to either side."""
    return [x for x in lines if _covers(x, times)]


def _covers(line: Line, times: Sequence[float]) -> bool:
    start, end, middle = line.start_s, line.end_s, (line.start_s + line.end_s) / 2
    if end - start < 1:
        start, end = middle - 0.5, middle + 0.5
    return any(start < t < end for t in times)


def interleave(lines: Sequence[Line], times: Sequence[float], mark: str = "<image>") -> str:
    """Frames and subtitles in one order of time, one per row: each line after its middle's frame.

    Args:
        lines: subtitles in the file's order.
        times: seconds of the frames.
        mark: stands for a frame.
    """
    out: list[str] = []
    shown = 0
    for line in lines:
        middle = (line.start_s + line.end_s) / 2
        while shown < len(times) and times[shown] <= middle:
            out.append(mark)
            shown += 1
        if _covers(line, times):
            out.append(line.text)
    return "\n".join([*out, *[mark] * (len(times) - shown)])
