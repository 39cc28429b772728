"""Which frames of a video are used: integer indices chosen by presentation time.

Contract: numpy only, nothing is decoded here. ``pts_s`` is always the table of real
presentation times in seconds, in display order; results are int64 indices into it and never
decrease. Three rules: by time (ours; on a constant frame rate it gives LLaVA's indices), LLaVA's
own rule (LLaVA-NeXT, ``process_video_with_decord``), and the middle of equal segments
(SlowFast-LLaVA, Apple).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from av_llava.errors import MediaError, UsageError
from av_llava.settings import SamplingSettings

# Containers with a coarse clock (Matroska: 1 ms) round a frame's time up or down by half a tick.
CLOCK_SLACK_S = 0.0006


def choose_frames(
    pts_s: npt.ArrayLike,
    settings: SamplingSettings,
    start_s: float | None = None,
    end_s: float | None = None,
    *,
    avg_fps: float | None = None,
) -> np.ndarray:
    """Choose frames of one video.

    Args:
        pts_s: presentation time of every frame, seconds [n], never decreasing.
        settings: how many frames, and by which rule.
        start_s: first second of the window; the beginning by default.
        end_s: end of the window (excluded); the end by default.
        avg_fps: the container's average frame rate, which LLaVA's rule is defined on; the
            table's mean rate by default.

    Returns:
        int64 [T], indices into ``pts_s``; T >= 1.

    Raises:
        UsageError: the window is empty or begins after the last frame.
        MediaError: no frame is on screen within the window.
    """
    table = _checked_table(pts_s)
    first, stop = window_indices(table, start_s, end_s)
    inside = table[first:stop]
    if settings.rule == "llava":
        rate = avg_fps or mean_fps(table)
        chosen = llava_frame_indices(
            len(inside), rate, settings.fps or 1, settings.frames or 0, settings.repeat_frames
        )[0]
    elif settings.rule == "middle":
        chosen = middle_of_segments(len(inside), settings.frames or len(inside))
    else:
        chosen = _by_time(inside, settings)
    return first + chosen


def window_indices(
    pts_s: npt.ArrayLike, start_s: float | None = None, end_s: float | None = None
) -> tuple[int, int]:
    """Return the index range ``[first, stop)`` of the frames in the window ``[start_s, end_s)``.

    A frame belongs to the window if it appears within it. A window between two frames gets the
    one frame that is on screen then.

    Raises:
        UsageError: ``start_s`` is not below ``end_s``, is negative, or lies after the last frame.
        MediaError: the window ends before the first frame appears.
    """
    table = _checked_table(pts_s)
    check_window(start_s, end_s)
    slack = _slack(table)
    begin = -np.inf if start_s is None else start_s
    end = np.inf if end_s is None else end_s
    if begin > table[-1] + max(_typical_gap(table), slack):
        raise UsageError(
            f"The window starts at {begin:.2f} s, after the last frame at {table[-1]:.2f} s. "
            f"Choose a start before it."
        )
    first = int(np.searchsorted(table, begin - slack, side="left"))
    stop = int(np.searchsorted(table, end - slack, side="left"))
    if stop == 0:
        raise MediaError(
            f"No frame is shown before {end:.2f} s: the picture begins at {table[0]:.2f} s. "
            f"Choose a later end."
        )
    # between two frames, the earlier one is on screen
    return min(first, stop - 1), stop


def check_window(start_s: float | None, end_s: float | None) -> None:
    """Raise UsageError unless ``0 <= start_s < end_s`` (None means open)."""
    for name, value in (("start", start_s), ("end", end_s)):
        if value is not None and not (np.isfinite(value) and value >= 0):
            raise UsageError(f"The window's {name} must be 0 or more seconds, not {value!r}.")
    begin_s = start_s or 0.0
    if end_s is not None and begin_s >= end_s:
        raise UsageError(f"The window's start ({begin_s} s) must be below its end ({end_s} s).")


def shown_at(pts_s: npt.ArrayLike, times_s: npt.ArrayLike) -> np.ndarray:
    """Return the index of the frame on screen at each time (the first frame before it appears).

    Args:
        pts_s: presentation times in seconds [n], never decreasing.
        times_s: times in seconds [m], any order.

    Returns:
        int64 [m].
    """
    table = _checked_table(pts_s)
    times = np.asarray(times_s, np.float64)
    if not np.isfinite(times).all():
        raise UsageError("Times of frames must be finite numbers of seconds.")
    found = np.searchsorted(table, times + _slack(table), side="right") - 1
    return np.maximum(found, 0).astype(np.int64)


def llava_frame_indices(
    total_frames: int,
    avg_fps: float,
    video_fps: float = 1,
    frames_upbound: int = 0,
    force_sample: bool = False,
) -> tuple[np.ndarray, list[float], float]:
    """Choose frames exactly as LLaVA-NeXT does, its arithmetic included.

    Without the bound LLaVA's "times" are ``index / round(avg_fps / video_fps)``, which are
    seconds only if ``video_fps`` is 1 and the rate is whole; they are returned as they are.

    Args:
        total_frames: frames of the video.
        avg_fps: average frame rate of the container.
        video_fps: frames per second to take.
        frames_upbound: largest number of frames; 0 for no bound.
        force_sample: spread exactly ``frames_upbound`` frames, repeating if there are fewer.

    Returns:
        int64 indices [T], LLaVA's times [T], and the video's duration in seconds.

    Raises:
        UsageError: no frames, or the step between frames rounds to zero.
    """
    if total_frames < 1 or not avg_fps > 0 or not video_fps > 0:
        raise UsageError(
            f"LLaVA's frame rule needs at least one frame and positive rates, "
            f"not {total_frames} frames at {avg_fps} fps sampled at {video_fps} fps."
        )
    step = round(avg_fps / video_fps)
    if step == 0:
        raise UsageError(
            f"LLaVA's frame rule takes every round({avg_fps:g} / {video_fps:g})-th frame, which is "
            f"every 0th: the video has {avg_fps:g} frames per second and {video_fps:g} are asked "
            f"for. Ask for at most {2 * avg_fps:g}, or use the sampling rule 'time'."
        )
    indices = np.arange(0, total_frames, step, dtype=np.int64)
    times = [i / step for i in indices.tolist()]
    if frames_upbound > 0 and (len(indices) > frames_upbound or force_sample):
        indices = np.linspace(0, total_frames - 1, frames_upbound, dtype=np.int64)
        times = [i / avg_fps for i in indices.tolist()]
    return indices, times, total_frames / avg_fps


def middle_of_segments(total_frames: int, n: int) -> np.ndarray:
    """Return the middle frame of each of ``min(n, total_frames)`` equal segments, int64.

    SlowFast-LLaVA's rule, integer rounding included.
    """
    if total_frames < 1 or n < 1:
        raise UsageError(f"Cannot cut {total_frames} frames into {n} segments.")
    n = min(n, total_frames)
    segment = (total_frames - 1) / n
    middles = [(round(segment * i) + round(segment * (i + 1))) // 2 for i in range(n)]
    return np.asarray(middles, np.int64)


def format_times(times_s: Sequence[float] | np.ndarray) -> str:
    """Return LLaVA-Video's list of times, such as ``0.00s,1.00s``."""
    return ",".join(f"{time_s:.2f}s" for time_s in times_s)


def time_instruction(duration_s: float, times_s: Sequence[float] | np.ndarray) -> str:
    """Return LLaVA-Video's sentences about duration and frame times, word for word.

    The missing space before "Please" is the trained text.
    """
    return (
        f"The video lasts for {duration_s:.2f} seconds, and {len(times_s)} frames are uniformly "
        f"sampled from it. These frames are located at {format_times(times_s)}."
        f"Please answer the following questions related to this video."
    )


def mean_fps(pts_s: npt.ArrayLike) -> float:
    """Return the mean frame rate of a table of presentation times (1 for a single frame)."""
    table = _checked_table(pts_s)
    span = table[-1] - table[0]
    return float((len(table) - 1) / span) if span > 0 else 1.0


def _by_time(inside: np.ndarray, settings: SamplingSettings) -> np.ndarray:
    """Choose among the window's times [n] at equal distances of time, not of frame number."""
    limit, exactly = settings.frames, settings.repeat_frames
    if settings.fps is not None and not (exactly and limit is not None):
        slack = _slack(inside)
        count = int((inside[-1] - inside[0] + slack) * settings.fps) + 1
        if limit is None or count <= limit:
            chosen = shown_at(inside, inside[0] + np.arange(count) / settings.fps)
            return chosen if exactly else np.unique(chosen)
    if limit is None or (limit >= len(inside) and not exactly):
        return np.arange(len(inside), dtype=np.int64)
    chosen = _spread(inside, limit)
    return chosen if exactly else np.unique(chosen)


def _spread(inside: np.ndarray, count: int) -> np.ndarray:
    """Choose ``count`` frames from first to last at equal distances of time."""
    last = len(inside) - 1
    even = np.linspace(inside[0], inside[-1], len(inside))
    if np.abs(inside - even).max() <= 2 * _slack(inside):
        # A constant rate but for the clock's rounding (of a frame, and of the first or last one):
        # numbers are exact where times are not.
        return np.linspace(0, last, count, dtype=np.int64)
    return shown_at(inside, np.linspace(inside[0], inside[-1], count))


def _checked_table(pts_s: npt.ArrayLike) -> np.ndarray:
    table = np.asarray(pts_s, np.float64)
    if table.ndim != 1 or not len(table):
        raise MediaError("The video has no frames.")
    if not np.isfinite(table).all() or (np.diff(table) < 0).any():
        raise ValueError("presentation times must be finite and never decrease")
    return table


def _typical_gap(table: np.ndarray) -> float:
    """Return the median distance of neighbouring frames in seconds (0 for a single frame)."""
    return float(np.median(np.diff(table))) if len(table) > 1 else 0.0


def _slack(table: np.ndarray) -> float:
    """Return how far in seconds a time may lie before a frame and still mean that frame."""
    gaps = np.diff(table)
    gaps = gaps[gaps > 0]
    return min(CLOCK_SLACK_S, float(gaps.min()) / 4) if len(gaps) else CLOCK_SLACK_S
