"""The wrong answers of a run, with pictures of their videos.

Contract: spread over the groups of the task's first grouping, so that no kind of question fills the
page. A video that is not there any more, or cannot be read, has no pictures; that is no error.
"""

from __future__ import annotations

import io
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from av_llava.errors import MediaError, UsageError
from av_llava.media import read_frames_at
from av_llava_eval.failures import OK
from av_llava_eval.points import group_values, points
from av_llava_eval.report.facts import Miss
from av_llava_eval.sample import Sample
from av_llava_eval.scoring import Record, Scored

logger = logging.getLogger(__name__)

HEIGHT, QUALITY = 144, 80


def find_misses(run: Scored, records: Sequence[Record], most: int, frames: int) -> Iterator[Miss]:
    """The first wrong answers of each group in turn, at most ``most``.

    Args:
        run: of the records.
        records: of one arm.
        most: answers.
        frames: pictures of each video; 0 reads no media.
    """
    samples = {s.id: s for s in run.samples}
    wrong = [r for r in records if r["labelled"] and points(r) < 1]
    for record in list(_spread(wrong, run.task.groupings[:1]))[:most]:
        yield _miss(record, samples[record["id"]], run.task.groupings, frames)


def _spread(records: Sequence[Record], groupings: Sequence[str]) -> Iterator[Record]:
    """One of each group in turn."""
    by_value: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        values = [v for field in groupings for v in group_values(record, field)]
        by_value[values[0] if values else ""].append(record)
    return (r for r in chain.from_iterable(zip_longest(*by_value.values())) if r is not None)


def _miss(record: Record, sample: Sample, groupings: Sequence[str], frames: int) -> Miss:
    extracted = record["extracted"]
    if record["status"] != OK:
        why = f"{record['status']}: {record.get('error', '')}"
    else:
        why = "unparsed" if extracted is None else "wrong"
    source = sample.video or sample.audio or next(iter(sample.images), None)
    pictures, times_s = _pictures(sample, record, frames)
    return Miss(
        id=sample.id,
        question=sample.question,
        options=sample.options or (),
        answer=_shown(sample.answer),
        said=_shown(extracted),
        raw=record["raw"] or "",
        why=why,
        source="" if source is None else source.name,
        groups={f: ", ".join(group_values(record, f)) for f in groupings if f in sample.meta},
        frames=pictures,
        times_s=times_s,
    )


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _pictures(
    sample: Sample, record: Record, most: int
) -> tuple[tuple[bytes, ...], tuple[float, ...]]:
    """Some of the frames that the model saw, or of the film where it saw none."""
    times = (record.get("used") or {}).get("frame_times_s") or []
    video = sample.video
    if not most or video is None or not video.is_file():
        return (), ()
    if not times:
        length_s = sample.end_s or sample.duration_s or 0.0
        times = np.linspace(sample.start_s or 0.0, length_s, most, endpoint=False).tolist()
    chosen = [times[i] for i in np.linspace(0, len(times) - 1, min(most, len(times))).astype(int)]
    pictures = _read(video, chosen)
    return tuple(pictures), tuple(chosen[: len(pictures)])


def _read(video: Path, times_s: Sequence[float]) -> list[bytes]:
    try:
        batch = read_frames_at(video, times_s, isolate=True)
    except (MediaError, UsageError) as error:
        logger.warning("No pictures of %s in the report: %s", video, error)
        return []
    return [_jpeg(frame) for frame in batch.frames]


def _jpeg(frame: np.ndarray) -> bytes:
    picture = Image.fromarray(frame)
    picture.thumbnail((HEIGHT * 4, HEIGHT))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
