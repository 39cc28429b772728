"""Choosing frames: LLaVA's published rows, a plain oracle, and properties on any time table."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from golden_data import golden
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import MediaError, UsageError
from av_llava.sampling import (
    CLOCK_SLACK_S,
    choose_frames,
    format_times,
    llava_frame_indices,
    mean_fps,
    middle_of_segments,
    shown_at,
    time_instruction,
    window_indices,
)
from av_llava.settings import SamplingSettings


def llava_rows() -> list[dict]:
    return json.loads(golden("llava/video_sampling.json").read_text())["rows"]


@st.composite
def time_tables(draw: st.DrawFn) -> np.ndarray:
    """Presentation times of 1 .. 60 frames: constant or variable rate, any start."""
    gaps = draw(st.lists(st.floats(0.004, 3.0), min_size=0, max_size=59))
    if draw(st.booleans()):
        gaps = [gaps[0] if gaps else 0.1] * len(gaps)
    start = draw(st.floats(0, 100))
    return np.cumsum([start, *gaps])


def test_every_llava_row() -> None:
    rows, refused = llava_rows(), 0
    for row in rows:
        arguments = [
            row[key]
            for key in ("total_frames", "avg_fps", "video_fps", "frames_upbound", "force_sample")
        ]
        if "exception" in row:
            refused += 1
            with pytest.raises(UsageError, match="every 0th"):
                llava_frame_indices(*arguments)
            continue
        indices, times, duration = llava_frame_indices(*arguments)
        assert len(indices) == row["num"]
        assert duration == row["video_time"]
        expected = row["idx"]
        if "..." in expected:
            head, tail = expected[: expected.index("...")], expected[expected.index("...") + 1 :]
            assert indices[: len(head)].tolist() == head
            assert indices[-len(tail) :].tolist() == tail
        else:
            assert indices.tolist() == expected
        if "frame_time" in row:
            assert format_times(times) == row["frame_time"]
        if "instruction" in row:
            assert time_instruction(duration, times) == row["instruction"]
    assert len(rows) == 144
    assert refused == 16


def test_time_instruction_has_no_space_before_please() -> None:
    assert time_instruction(2.0, [0.0, 1.5]) == (
        "The video lasts for 2.00 seconds, and 2 frames are uniformly sampled from it. These "
        "frames are located at 0.00s,1.50s.Please answer the following questions related to this "
        "video."
    )


@pytest.mark.parametrize(("total", "fps"), [(300, 30.0), (301, 29.97), (4321, 23.976), (48, 24.0)])
@pytest.mark.parametrize("frames", [1, 2, 8, 32, 64])
def test_uniform_by_time_is_llavas_choice_at_a_constant_rate(
    total: int, fps: float, frames: int
) -> None:
    for clock in (None, 1000):  # exact times, and Matroska's milliseconds
        pts = np.arange(total) / fps
        if clock:
            pts = np.round(pts * clock) / clock
        ours = choose_frames(pts, SamplingSettings(frames=frames, repeat_frames=True))
        theirs = llava_frame_indices(total, fps, 1, frames, True)[0]
        assert ours.tolist() == theirs.tolist()


def test_rule_llava_goes_through_settings() -> None:
    pts = np.arange(300) / 30
    settings = SamplingSettings(frames=8, fps=2, rule="llava", repeat_frames=True)
    chosen = choose_frames(pts, settings, avg_fps=30)
    assert chosen.tolist() == llava_frame_indices(300, 30, 2, 8, True)[0].tolist()
    unbounded = SamplingSettings(frames=None, fps=2, rule="llava")
    assert choose_frames(pts, unbounded).tolist() == list(range(0, 300, 15))


def on_screen(pts: np.ndarray, time: float) -> tuple[int, int]:
    """The slow oracle: the last frame that has appeared by then, and by a clock's tick later."""
    now, soon = (
        max((i for i in range(len(pts)) if pts[i] <= time + tick), default=0)
        for tick in (1e-9, CLOCK_SLACK_S)
    )
    return now, soon


@given(pts=time_tables(), frames=st.integers(1, 80), exactly=st.booleans())
def test_uniform_shows_what_is_on_screen_at_equal_times(
    pts: np.ndarray, frames: int, exactly: bool
) -> None:
    chosen = choose_frames(pts, SamplingSettings(frames=frames, repeat_frames=exactly))
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) >= (0 if exactly else 1)).all()
    assert len(chosen) == frames if exactly else len(chosen) <= min(frames, len(pts))
    assert chosen[0] == 0
    if frames >= len(pts) and not exactly:
        assert chosen.tolist() == list(range(len(pts)))
    elif frames > 1:
        assert chosen[-1] == len(pts) - 1
        for index, time in zip(chosen, np.linspace(pts[0], pts[-1], frames)):
            if exactly:
                earliest, latest = on_screen(pts, time)
                assert pts[earliest] - 1e-2 <= pts[index] <= pts[latest] + 1e-2


@given(pts=time_tables(), fps=st.floats(0.05, 20), cap=st.none() | st.integers(1, 40))
def test_fps_with_a_cap(pts: np.ndarray, fps: float, cap: int | None) -> None:
    chosen = choose_frames(pts, SamplingSettings(frames=cap, fps=fps))
    assert (np.diff(chosen) >= 1).all()
    assert chosen[0] == 0
    span = pts[-1] - pts[0]
    if cap is not None:
        assert len(chosen) <= cap
    if cap is None or math.floor((span + 1e-2) * fps) + 1 <= cap:
        wanted = [pts[0] + k / fps for k in range(math.floor((span - 1e-3) * fps) + 1)]
        for time in wanted:  # each asked time has its frame among the chosen
            near = [np.abs(pts[chosen] - pts[i]).min() for i in on_screen(pts, time)]
            assert min(near) <= 1e-3


def test_one_frame_per_second_of_ten_seconds() -> None:
    chosen = choose_frames(np.arange(300) / 30, SamplingSettings(fps=1, frames=64))
    assert chosen.tolist() == list(range(0, 300, 30))
    capped = choose_frames(np.arange(300) / 30, SamplingSettings(fps=1, frames=8))
    assert capped.tolist() == np.linspace(0, 299, 8, dtype=int).tolist()


def test_variable_rate_is_sampled_by_time_not_by_number() -> None:
    pts = np.concatenate([np.arange(0, 3, 0.1), np.arange(3, 6, 0.4)])  # 30 quick, 8 slow
    chosen = choose_frames(pts, SamplingSettings(frames=6))
    assert np.abs(pts[chosen] - np.linspace(0, pts[-1], 6)).max() <= 0.4
    assert (pts[chosen] >= 3).sum() == 3  # by number it would be one or two


@given(
    pts=time_tables(),
    window=st.tuples(st.integers(0, 120_000), st.integers(0, 120_000)),  # milliseconds
    frames=st.integers(1, 9),
)
def test_window_holds_only_its_own_frames(
    pts: np.ndarray, window: tuple[int, int], frames: int
) -> None:
    start, end = (time / 1000 for time in sorted(window))
    settings = SamplingSettings(frames=frames)
    inside = [i for i in range(len(pts)) if start <= pts[i] < end]
    if start == end:
        with pytest.raises(UsageError, match="below its end"):
            choose_frames(pts, settings, start, end)
        return
    try:
        chosen = choose_frames(pts, settings, start, end)
    except UsageError:
        assert start > pts[-1]
        return
    except MediaError:
        assert end <= pts[0] + 0.001
        return
    if len(inside) > 1:
        slack = 0.001
        assert (pts[chosen] >= start - slack).all()
        assert (pts[chosen] < end + slack).all()
    elif not inside:  # between two frames: the one on screen
        assert len(chosen) == 1
        assert pts[chosen[0]] <= start + 0.001


def test_window_borders() -> None:
    pts = np.arange(40) / 10
    assert window_indices(pts, 1.0, 2.0) == (10, 20)
    assert window_indices(pts, None, 0.05) == (0, 1)
    assert window_indices(pts, 1.05, 1.08) == (10, 11)  # no frame appears: frame 10 is on screen
    assert window_indices(pts, 3.95) == (39, 40)  # the last frame is still on screen


@pytest.mark.parametrize(
    ("start", "end", "error", "words"),
    [
        (2.0, 2.0, UsageError, "must be below its end"),
        (3.0, 2.0, UsageError, "must be below its end"),
        (None, 0.0, UsageError, "must be below its end"),
        (-1.0, None, UsageError, "0 or more"),
        (float("nan"), None, UsageError, "0 or more"),
        (90.0, None, UsageError, "after the last frame at 4.90 s"),
        (0.0, 0.5, MediaError, "picture begins at 1.00 s"),
    ],
)
def test_impossible_windows(
    start: float | None, end: float | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        choose_frames(1 + np.arange(40) / 10, SamplingSettings(), start, end)


def test_no_frames_and_broken_tables() -> None:
    with pytest.raises(MediaError, match="no frames"):
        choose_frames([], SamplingSettings())
    with pytest.raises(ValueError, match="never decrease"):
        choose_frames([0.0, 2.0, 1.0], SamplingSettings())
    with pytest.raises(UsageError, match="finite"):
        shown_at([0.0, 1.0], [float("inf")])


def test_shown_at_keeps_the_order_of_the_times() -> None:
    assert shown_at(np.arange(10) / 10, [0.55, -3, 0.0, 99, 0.29999]).tolist() == [5, 0, 0, 9, 3]


@given(total=st.integers(1, 500), n=st.integers(1, 80))
def test_middle_of_segments(total: int, n: int) -> None:
    chosen = middle_of_segments(total, n)
    assert len(chosen) == min(n, total)
    assert (np.diff(chosen) >= 0).all()
    assert 0 <= chosen[0] <= chosen[-1] < total
    segment = (total - 1) / len(chosen)
    for i, index in enumerate(chosen):  # within its segment, at most a rounding from its middle
        assert abs(index - segment * (i + 0.5)) <= 1.0


def test_middle_of_segments_published_values() -> None:
    # 10 of 50 frames: segments of 4.9 frames; the border 24.5 rounds to 24, as numpy rounds
    assert middle_of_segments(50, 10).tolist() == [2, 7, 12, 17, 22, 26, 31, 36, 41, 46]
    settings = SamplingSettings(frames=10, rule="middle")
    assert (
        choose_frames(np.arange(50) / 5, settings).tolist() == middle_of_segments(50, 10).tolist()
    )


def test_settings_refuse_nonsense() -> None:
    for bad in ({"frames": 0}, {"fps": 0.0}, {"rule": "midle"}, {"source_fps": -1.0}):
        with pytest.raises(UsageError):
            SamplingSettings(**bad)
    assert mean_fps([3.0]) == 1.0
