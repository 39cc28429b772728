"""random and uniform: an exact number of untouched patches, in order."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from av_llava.aggregators import build
from av_llava.errors import BudgetError

torch.set_num_threads(1)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["random", "uniform"]),
    tokens=st.integers(1, 120),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    newline=st.sampled_from(["none", "frame", "video"]),
    frame_end=st.booleans(),
)
def test_kept_patches(
    kind: str, tokens: int, sizes: tuple[int, int, int], newline: str, frame_end: bool
) -> None:
    frames, height, width = sizes
    aggregator = build(f"{kind}:{tokens}", newline=newline, frame_end=frame_end)
    marks = frames * ((newline == "frame") + frame_end) + (newline == "video")
    if tokens <= marks:
        with pytest.raises(BudgetError, match=f"'{kind}:{marks + 1}' or more"):
            aggregator.plan(*sizes)
        return
    plan = aggregator.plan(*sizes)
    assert plan.n_tokens == min(tokens, marks + frames * height * width)
    flat = torch.arange(float(frames * height * width))
    features = torch.stack([flat, -flat], 1).unflatten(0, sizes)
    vectors = {"newline": torch.full((2,), 1e6), "frame_end": torch.full((2,), 2e6)}
    out = aggregator(features, plan, vectors)
    meta, values = out.meta, out.tokens[:, 0]
    patch = meta.kind == 0
    kept = values[patch].long()
    assert (kept.diff() > 0).all()
    assert torch.equal(kept, (meta.frame * height * width + meta.y0 * width + meta.x0)[patch])
    assert torch.equal(meta.y1[patch] - meta.y0[patch], torch.ones_like(kept))
    assert (meta.weight == patch.long()).all()
    assert (values[(meta.kind == 2) | (meta.kind == 3)] == 1e6).all()
    assert (values[meta.kind == 4] == 2e6).all()
    assert len(values) == plan.n_tokens
    ends = meta.frame[meta.kind == (4 if frame_end else 2)]
    if frame_end or newline == "frame":
        assert ends.tolist() == list(range(frames))
    spans = plan.spans()
    assert [s.lo for s in spans] == [0, *[s.hi for s in spans[:-1]]]
    halves = aggregator.reduce_chunks([features[:1], features[1:]], plan)
    assert torch.equal(aggregator.assemble(halves, plan, vectors).tokens, out.tokens)


def test_random_is_seeded() -> None:
    first = build("random:64").plan(8, 24, 24)
    assert first == build("random:64").plan(8, 24, 24)
    other = build("random:64,seed=1").plan(8, 24, 24)
    assert first != other
    assert first.n_tokens == other.n_tokens == 64


def test_uniform_is_even() -> None:
    kept = build("uniform:64").plan(8, 24, 24).streams[0].kept
    gaps = {b - a for a, b in pairwise(kept)}
    assert gaps == {8 * 24 * 24 // 64}


def test_counts_equal_those_of_the_budget() -> None:
    budget = build("budget:2048").plan(64, 27, 27).n_tokens
    for kind in ("random", "uniform"):
        assert build(f"{kind}:{budget}").plan(64, 27, 27).n_tokens == budget


def test_gradients_reach_kept_patches_only() -> None:
    aggregator = build("random:5,newline=frame")
    plan = aggregator.plan(2, 3, 3)
    features = torch.randn(2, 3, 3, 4, requires_grad=True)
    newline = torch.zeros(4, requires_grad=True)
    aggregator(features, plan, {"newline": newline}).tokens.sum().backward()
    touched = features.grad.flatten(0, 2).any(-1).nonzero().flatten().tolist()
    assert touched == list(plan.streams[0].kept)
    assert newline.grad.tolist() == [2.0] * 4
