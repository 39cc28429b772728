"""At most N tokens: never more, nothing wasted, never less for a larger N."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from av_llava.aggregators import build
from av_llava.aggregators.budget import Allocation, allocate
from av_llava.errors import BudgetError
from av_llava.settings import AggregatorSettings

torch.set_num_threads(1)

layouts = st.sampled_from(["slow_then_fast", "fast_then_slow", "by_time", "by_frame"])
newlines = st.sampled_from(["none", "row", "frame", "video"])
chosen = st.builds(
    lambda layout, newline, end, pool: {
        "layout": layout,
        "newline": newline,
        "frame_end": end,
        "pool": pool,
    },
    layouts,
    newlines,
    st.booleans(),
    st.sampled_from(["average", "max"]),
)
grids = st.tuples(st.integers(1, 130), st.integers(1, 30), st.integers(1, 30))


def spend(tokens: int, grid: tuple[int, int, int], options: dict) -> Allocation | None:
    try:
        return allocate(build("budget", tokens=tokens, **options).settings, *grid)
    except BudgetError:
        return None


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20_000), grids, chosen)
def test_never_above_and_little_unused(
    tokens: int, grid: tuple[int, int, int], options: dict
) -> None:
    found = spend(tokens, grid, options)
    assume(found is not None)
    frames, height, width = grid
    plan = build("budget", tokens=tokens, **options).plan(*grid)
    assert plan.n_tokens == found.n_tokens <= tokens
    slow, fast = plan.streams
    if found.frames == frames:
        # Every frame is shown, in the fast stream unless it is slow and each frame stands once.
        shown = set(fast.frames)
        if options["layout"] == "by_frame":
            assert not shown & set(slow.frames)
            shown |= set(slow.frames)
        assert shown == set(range(frames))
    else:
        assert found.slow_frames == 0
        assert fast.rows == fast.cols == 1
    cells = height * width
    assert (found.slow_frames == frames and slow.rows * slow.cols == cells) or (
        fast.rows * fast.cols == cells
        or tokens - plan.n_tokens < height * (width + 1) + 2  # the largest cost of a slow frame
    )


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 400), grids, chosen)
def test_more_budget_never_gives_fewer_tokens(
    tokens: int, more: int, grid: tuple[int, int, int], options: dict
) -> None:
    less, greater = spend(tokens, grid, options), spend(tokens + more, grid, options)
    if less is not None:
        assert greater is not None
        assert less.n_tokens <= greater.n_tokens
        assert less.frames <= greater.frames
        assert less == spend(tokens, grid, options)


@pytest.mark.parametrize("frames", [3, 8, 16, 64])
def test_every_budget_of_one_video(frames: int) -> None:
    """All N: exact bound, monotone, and unused less than the next slow frame costs."""
    options = {"layout": "slow_then_fast", "newline": "none"}
    last = 0
    for tokens in range(4, 8_000):
        found = spend(tokens, (frames, 24, 24), options)
        assert last <= found.n_tokens <= tokens
        last = found.n_tokens
        if found.slow_frames < frames:
            next_one = found.rung.slow_cost
        else:
            # Every frame is slow, so the next step is a finer slow frame.
            next_one = {64: 144, 144: 288, 288: 576, 576: 10**6}[found.rung.slow_cost]
        assert tokens - found.n_tokens < next_one


@pytest.mark.parametrize(
    ("tokens", "fast", "slow", "slow_grid", "used"),
    [
        (1024, 3, 5, (9, 9), 981),
        (2048, 4, 5, (14, 14), 2004),
        (4096, 4, 8, (27, 14), 4048),
        (8192, 4, 18, (27, 14), 7828),
        (16384, 4, 21, (27, 27), 16333),
        (300, 1, 2, (9, 9), 226),
        (64, 1, 0, None, 64),
    ],
)
def test_ladder(tokens: int, fast: int, slow: int, slow_grid: tuple | None, used: int) -> None:
    """64 frames of 27x27: the fast grid shrinks, slow frames get coarser, then fewer."""
    plan = build(f"budget:{tokens}").plan(64, 27, 27)
    assert plan.n_tokens == used
    assert plan.streams[1].rows == fast
    assert plan.streams[1].frames == tuple(range(64))
    assert plan.streams[0].n_items == slow
    if slow_grid:
        assert (plan.streams[0].rows, plan.streams[0].cols) == slow_grid


def test_frames_are_left_out_last_and_evenly() -> None:
    plan = build("budget:16").plan(64, 27, 27)
    assert plan.n_tokens == 16
    assert plan.streams[1].frames == tuple(range(0, 64, 4))
    long = build("budget:2048").plan(10_000, 27, 27)
    assert long.n_tokens == 2048
    assert "7952 frames left out" in long.describe()


@pytest.mark.parametrize("newline", ["none", "row", "frame", "video"])
def test_smallest_budget_is_named_and_works(newline: str) -> None:
    with pytest.raises(BudgetError) as caught:
        build("budget:1", newline=newline, frame_end=True).plan(64, 27, 27)
    needed = int(str(caught.value).split("budget:")[1].split("'")[0])
    plan = build(f"budget:{needed}", newline=newline, frame_end=True).plan(64, 27, 27)
    assert plan.n_tokens == needed
    assert len(plan.streams[1].frames) == 4
    with pytest.raises(BudgetError, match=f"budget:{needed}"):
        build(f"budget:{needed - 1}", newline=newline, frame_end=True).plan(64, 27, 27)


def test_short_videos_may_have_fewer_frames_than_the_minimum() -> None:
    assert build("budget:2").plan(2, 27, 27).n_tokens == 2
    assert build("budget:9,min_frames=9").plan(50, 27, 27).n_tokens == 9
    with pytest.raises(BudgetError, match="does not hold 10 of 50 frames"):
        build("budget:9,min_frames=10").plan(50, 27, 27)


def test_a_large_budget_shows_everything_whole() -> None:
    plan = build("budget:100000").plan(8, 24, 24)
    assert plan.streams[0].n_items == 8
    assert (plan.streams[0].rows, plan.streams[0].cols) == (24, 24)
    tiny = build("budget:100000").plan(8, 3, 3)
    assert tiny.n_tokens == 8 * 9


@pytest.mark.parametrize("layout", ["slow_then_fast", "fast_then_slow", "by_time", "by_frame"])
@pytest.mark.parametrize("newline", ["none", "row", "frame", "video"])
def test_emitted_equals_planned(layout: str, newline: str) -> None:
    aggregator = build("budget:500", layout=layout, newline=newline, frame_end=True)
    plan = aggregator.plan(20, 9, 12)
    marks = {"newline": torch.full((4,), math.pi), "frame_end": torch.full((4,), math.e)}
    out = aggregator(torch.randn(20, 9, 12, 4), plan, marks)
    assert len(out.tokens) == plan.n_tokens <= 500
    assert int((out.meta.kind == 4).sum()) == len(plan.items)


def test_settings_say_what_the_budget_is() -> None:
    made = build("budget:2048,newline=frame").settings
    assert made.budget is not None
    assert made.budget.tokens == 2048
    assert AggregatorSettings.from_dict(made.to_dict()) == made
    assert build("budget:2048", stage="pre").settings.stage == "pre"
