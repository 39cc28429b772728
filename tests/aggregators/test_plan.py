"""Plans as values: hashable, JSON-able, readable, and true to time."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from av_llava.aggregators import Span, TokenPlan, build
from av_llava.errors import BudgetError, UsageError

torch.set_num_threads(1)


def test_a_plan_is_a_value() -> None:
    aggregator = build("llava_video_slowfast")
    times = [0.1 * i for i in range(20)]
    plan = aggregator.plan(20, 24, 27, times)
    again = aggregator.plan(np.int64(20), 24, 27, np.array(times))
    assert plan == again
    assert hash(plan) == hash(again)
    assert plan != aggregator.plan(20, 24, 27)
    assert plan.spans()
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    assert hash(copy) == hash(plan)
    assert TokenPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("spec", ["random:50,newline=frame", "shi_fast:s2t4", "budget:300"])
def test_json_keeps_groups_and_kept_patches(spec: str) -> None:
    plan = build(spec).plan(20, 8, 9)
    copy = TokenPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert copy == plan
    assert copy.spans() == plan.spans()


def test_description() -> None:
    text = build("llava_video_slowfast").plan(64, 24, 24).describe()
    assert text.splitlines() == [
        "64 frames of 24×24 patches → 5260 tokens (by frame)",
        "  slow: 22 frames × 12×12 patches (average pooling) + 12 newlines each + 1 frame end each"
        " = 3454 tokens",
        "  fast: 42 frames × 6×6 patches (average pooling) + 6 newlines each + 1 frame end each"
        " = 1806 tokens",
    ]
    assert "1 newline at the end of the video" in build("llava_onevision").plan(4, 6, 6).describe()
    assert (
        "4 groups of 10 frames"
        in build("shi_fast:s1t3,min_frames=4,stride=1").plan(10, 3, 3).describe()
    )
    assert "× 288 patches (raster max pooling)" in build("sf_llava").plan(4, 24, 24).describe()
    assert "9 patches kept of 128" in build("uniform:9").plan(2, 8, 8).describe()
    assert (
        "budget 128: 0 tokens unused, 872 frames left out"
        in build("budget:128").plan(1000, 8, 8).describe()
    )


def test_spans_of_frames_each_once() -> None:
    plan = build("llava_video_slowfast:k=2").plan(3, 8, 8, [0.0, 0.5, 2.0])
    assert plan.spans() == [
        Span("slow", 0, 1, 0.0, 0.5, 0, 21, True),
        Span("fast", 1, 2, 0.5, 2.0, 21, 28, True),
        Span("slow", 2, 3, 2.0, 3.5, 28, 49, True),
    ]
    assert plan.time_spans() == plan.spans()


def test_spans_of_two_blocks() -> None:
    spec = "slowfast-slow_2frms_concat-fast_1x1"
    plan = build(spec, newline="video").plan(4, 2, 2, [0.0, 1.0, 2.0, 3.0])
    slow = [Span("slow", 0, 1, 0.0, 1.0, 0, 4, False), Span("slow", 2, 3, 2.0, 3.0, 4, 8, False)]
    fast = [Span("fast", i, i + 1, i, i + 1.0, 8 + i, 9 + i, True) for i in range(4)]
    assert plan.spans() == [*slow, *fast, Span("mark", 0, 4, 0.0, 4.0, 12, 13, False)]
    assert plan.time_spans() == fast
    turned = build(spec, layout="fast_then_slow").plan(4, 2, 2)
    assert [s.stream for s in turned.spans()] == ["fast"] * 4 + ["slow"] * 2
    woven = build(spec, layout="by_time").plan(4, 2, 2)
    assert [(s.stream, s.frame_lo) for s in woven.spans()] == [
        ("slow", 0), ("fast", 0), ("fast", 1), ("slow", 2), ("fast", 2), ("fast", 3),
    ]  # fmt: skip
    assert [s.frame_lo for s in woven.spans() if s.timed] == [0, 1, 2, 3]


def test_spans_of_groups_and_of_frames_left_out() -> None:
    plan = build("shi_fast:s1t2,min_frames=1,stride=1").plan(5, 2, 2, [0, 1, 2, 3, 4])
    assert [span[1:5] for span in plan.spans()] == [(0, 2, 0.0, 2.0), (2, 4, 2.0, 4.0)]
    thin = build("shi_fast:s2t1,min_frames=1,stride=1").plan(5, 2, 2, [0, 1, 2, 3, 4])
    assert [span[1:5] for span in thin.spans()] == [(0, 1, 0.0, 1.0), (2, 3, 2.0, 3.0)]
    assert [span[1:5] for span in thin.time_spans()] == [(0, 1, 0.0, 2.0), (2, 3, 2.0, 3.0)]
    assert build("shi_fast").plan(5, 2, 2).time_spans()[0].t_end is None


def test_one_frame_takes_no_time() -> None:
    plan = build("llava_video").plan(1, 4, 4, [3.0])
    assert plan.spans()[0][3:5] == (3.0, 3.0)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0, 1.0], "3 frames in clip.mp4, but 2 frame times"),
        ([0.0, 2.0, 1.0], "must not decrease, but frame 2 is at 1.0 s after 2.0 s"),
        ([0.0, float("nan"), 1.0], "frame 1 of clip.mp4 is nan"),
        ([0.0, 1.0, float("inf")], "is inf"),
    ],
)
def test_wrong_times(times: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build("llava_video").plan(3, 4, 4, times, name="clip.mp4")


def test_equal_and_uneven_times_do_not_change_counts() -> None:
    aggregator = build("av_llava")
    even = aggregator.plan(3, 4, 4, [0, 1, 2])
    uneven = aggregator.plan(3, 4, 4, [0, 0, 7.5])
    assert even.n_tokens == uneven.n_tokens == aggregator.plan(3, 4, 4).n_tokens
    out = aggregator(torch.zeros(3, 4, 4, 2), uneven, {"newline": torch.zeros(2)})
    assert out.meta.t_start[-1] == 7.5
    assert out.meta.t_end[-1] == 15.0


def test_given_slow_frames() -> None:
    settings = build("sf_llava").settings.to_dict()
    settings["slow"]["select"] = {"kind": "given"}
    aggregator = build(settings)
    plan = aggregator.plan(6, 4, 4, slow_frames=torch.tensor([1, 4]))
    assert plan.streams[0].frames == (1, 4)
    fixed = {**settings, "slow": {"select": {"kind": "given", "frames": [0, 5]}}}
    assert build(fixed).plan(6, 4, 4).streams[0].frames == (0, 5)
    for wrong, message in (
        ([4, 1], "must increase"),
        ([6], r"0\.\.5"),
        ([], "no frames"),
        (None, "no frames"),
    ):
        with pytest.raises(UsageError, match=message):
            aggregator.plan(6, 4, 4, slow_frames=wrong)
    with pytest.raises(UsageError, match="set its selector to 'given'"):
        build("sf_llava").plan(6, 4, 4, slow_frames=[1])
    for spec in ("budget:99", "random:9"):
        with pytest.raises(UsageError, match="slow"):
            build(spec).plan(6, 4, 4, slow_frames=[1])


def test_limit_names_the_count_and_the_budget() -> None:
    aggregator = build("llava_video")
    assert aggregator.plan(8, 24, 24, limit=1248).n_tokens == 1248
    with pytest.raises(BudgetError, match=r"make 1248 tokens, but only 1247 fit.*'budget:1247'"):
        aggregator.plan(8, 24, 24, limit=1247)


def test_marks_are_checked_by_name() -> None:
    aggregator = build("llava_video_slowfast")
    assert aggregator.marks_needed == ("newline", "frame_end")
    aggregator.check_marks(["frame_end", "newline", "other"])
    with pytest.raises(UsageError, match=r"'frame_end', which is not there \(there is: newline\)"):
        aggregator.check_marks(["newline"])
    assert build("sf_llava").marks_needed == ()
    plan = aggregator.plan(2, 8, 8)
    features = torch.zeros(2, 8, 8, 4)
    with pytest.raises(UsageError, match="'newline'"):
        aggregator(features, plan)
    with pytest.raises(UsageError, match=r"shape \[4\] on cpu.*shape \[3\]"):
        aggregator(features, plan, {"newline": torch.zeros(3), "frame_end": torch.zeros(4)})
