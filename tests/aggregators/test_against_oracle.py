"""Every random setting gives what plain loops give, and what was planned."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import oracle, strategies
from av_llava.aggregators import Aggregator, TokenPlan, build
from av_llava.aggregators.tokens import AggregatedTokens
from av_llava.settings import AggregatorSettings

torch.set_num_threads(1)
D = 3
FIELDS = ("y0", "y1", "x0", "x1")


def features_of(sizes: tuple[int, int, int], seed: int = 0, d: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, d, generator=generator, dtype=torch.float64)


def marks_of(d: int = D) -> dict[str, torch.Tensor]:
    return {
        "newline": torch.full((d,), 100.0, dtype=torch.float64),
        "frame_end": torch.full((d,), 200.0, dtype=torch.float64),
    }


def run(chosen: AggregatorSettings, sizes: tuple[int, int, int], times: list[float] | None = None):
    aggregator = build(chosen)
    plan = aggregator.plan(*sizes, times=times)
    return aggregator, plan, aggregator(features_of(sizes), plan, marks_of())


@settings(max_examples=300, deadline=None)
@given(strategies.settings(), strategies.sizes)
def test_tokens_and_metadata(chosen: AggregatorSettings, sizes: tuple[int, int, int]) -> None:
    times = [0.5 * i for i in range(sizes[0])]
    _, plan, out = run(chosen, sizes, times)
    vectors = {name: mark.numpy() for name, mark in marks_of().items()}
    want = oracle.aggregate(chosen, features_of(sizes).numpy(), vectors)
    assert len(want) == plan.n_tokens == len(out) == len(plan) == len(out.meta)
    np.testing.assert_allclose(out.tokens.numpy(), [t.vector for t in want], rtol=1e-12)
    meta = out.meta
    assert meta.kind.tolist() == [t.kind for t in want]
    assert meta.stream.tolist() == [t.stream for t in want]
    assert meta.frame.tolist() == [t.frame for t in want]
    assert meta.weight.tolist() == [t.weight for t in want]
    boxes = torch.stack([meta[name] for name in FIELDS], 1)
    assert boxes.tolist() == [list(t.box) for t in want]
    end = 0.5 if sizes[0] > 1 else 0.0
    assert meta.t_start.tolist() == [0.5 * max(t.frame, 0) for t in want]
    assert meta.t_end.tolist() == [0.5 * t.last_frame + end for t in want]


@settings(max_examples=100, deadline=None)
@given(strategies.settings(), strategies.sizes)
def test_invariants(chosen: AggregatorSettings, sizes: tuple[int, int, int]) -> None:
    aggregator, plan, out = run(chosen, sizes)
    assert aggregator.marks_needed == plan.marks_needed
    check_marks_and_boxes(plan, out)
    check_spans(plan, out)
    check_round_trips(aggregator, plan)
    order = [2, 0, 1]
    permuted = {name: mark[order] for name, mark in marks_of().items()}
    swapped = aggregator(features_of(sizes)[..., order], plan, permuted).tokens
    torch.testing.assert_close(swapped, out.tokens[:, order], rtol=0, atol=1e-12)


def check_marks_and_boxes(plan: TokenPlan, out: AggregatedTokens) -> None:
    kind = out.meta.kind
    newlines = (kind >= 1) & (kind <= 3)
    assert (out.tokens[newlines] == 100.0).all()
    assert (out.tokens[kind == 4] == 200.0).all()
    assert (out.tokens[kind == 0].abs() < 50).all()
    assert int((kind == 4).sum()) == (len(plan.items) if plan.frame_end else 0)
    patch = kind == 0
    for low, high, side in (("y0", "y1", plan.height), ("x0", "x1", plan.width)):
        assert (out.meta[low][patch] >= 0).all()
        assert (out.meta[low][patch] < out.meta[high][patch]).all()
        assert (out.meta[high][patch] <= side).all()
    fast = [s for s in plan.streams if s.name == "fast"]
    if fast and plan.layout != "by_frame":
        shown = set(out.meta.frame[out.meta.stream == 1].tolist())
        assert fast[0].frames == tuple(range(plan.frames))
        assert shown == {fast[0].frame_range(i)[0] for i in range(fast[0].n_items)}
    if plan.layout == "by_frame":
        shown = out.meta.frame[out.meta.frame >= 0]
        assert (shown.diff() >= 0).all()
        assert set(shown.tolist()) == set(range(plan.frames))


def check_spans(plan: TokenPlan, out: AggregatedTokens) -> None:
    row = 0
    for span in plan.spans():
        assert span.lo == row < span.hi
        row = span.hi
        assert 0 <= span.frame_lo < span.frame_hi <= plan.frames
        assert span.t_start is None and span.t_end is None
        if span.stream != "mark":
            assert set(out.meta.frame[span.lo : span.hi].tolist()) == {span.frame_lo}
    assert row == plan.n_tokens
    timed = [span.frame_lo for span in plan.spans() if span.timed]
    assert timed == sorted(timed)
    assert all(math.isnan(t) for t in out.meta.t_start.tolist())


def check_round_trips(aggregator: Aggregator, plan: TokenPlan) -> None:
    data = aggregator.settings.to_dict()
    assert AggregatorSettings.from_dict(data) == aggregator.settings
    assert build(data).settings == aggregator.settings
    assert TokenPlan.from_dict(plan.to_dict()) == plan


@settings(max_examples=100, deadline=None)
@given(strategies.settings(), strategies.sizes, st.lists(st.integers(0, 9), max_size=4))
def test_pieces_give_the_whole(
    chosen: AggregatorSettings, sizes: tuple[int, int, int], cuts: list[int]
) -> None:
    aggregator, plan, out = run(chosen, sizes)
    edges = [0, *sorted(min(c, sizes[0]) for c in cuts), sizes[0]]
    features = features_of(sizes)
    pieces = [features[a:b] for a, b in pairwise(edges)]
    reduced = aggregator.reduce_chunks(iter(pieces), plan)
    assert torch.equal(aggregator.assemble(reduced, plan, marks_of()).tokens, out.tokens)


@settings(max_examples=60, deadline=None)
@given(strategies.settings(), strategies.sizes)
def test_gradients(chosen: AggregatorSettings, sizes: tuple[int, int, int]) -> None:
    """The gradient of a weighted sum, against that of the same rows gathered by indexing."""
    aggregator = build(chosen)
    plan = aggregator.plan(*sizes)
    features = features_of(sizes).requires_grad_()
    marks = {name: mark.requires_grad_() for name, mark in marks_of().items()}
    reduced = aggregator.reduce(features, plan)
    weights = features_of((plan.n_tokens, 1, 1), seed=1).flatten(1)
    leaves = [features, *(marks[name] for name in plan.marks_needed)]
    # A gradient that is a view of something larger, as slicing a sequence gives.
    padded = torch.cat([torch.zeros(2, D, dtype=torch.float64), weights])
    out = aggregator.assemble(reduced, plan, marks).tokens
    got = torch.autograd.grad(out, leaves, padded[2:], retain_graph=True)
    naive = gathered(plan, reduced.streams, marks)
    assert torch.equal(naive, out)
    want = torch.autograd.grad(naive, leaves, weights)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def gathered(
    plan: TokenPlan, streams: tuple[torch.Tensor, ...], marks: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Assemble one row at a time."""
    rows = []
    for item in plan.items:
        stream = streams[item.stream][item.number]
        for row in stream:
            rows += list(row)
            rows += [marks["newline"]] * (plan.newline == "row")
        rows += [marks["newline"]] * (plan.newline == "frame")
        rows += [marks["frame_end"]] * plan.frame_end
    rows += [marks["newline"]] * (plan.newline == "video")
    return torch.stack(rows)
