"""Pooling and assembly as tensor code: copies, gradients, dtypes, stages, odd inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from av_llava.aggregators import build
from av_llava.aggregators.newline import regular_blocks
from av_llava.aggregators.pool2d import average_groups, pool_grid, take
from av_llava.errors import UsageError
from av_llava.settings import POOL_KINDS, PoolSettings

torch.set_num_threads(1)
MARKS = {"newline": torch.tensor([1.0, 2.0]), "frame_end": torch.tensor([3.0, 4.0])}


@given(st.lists(st.integers(1, 4), min_size=1, max_size=40))
def test_blocks_cover_every_item_once(gaps: list[int]) -> None:
    starts = tuple(sum(gaps[:i]) for i in range(len(gaps)))
    covered = {}
    for block in regular_blocks(starts):
        for run in range(block.repeats):
            for i in range(block.length):
                number = block.first + run * block.length + i
                assert number not in covered
                covered[number] = block.start + run * block.run_step + i * block.item_step
    assert tuple(covered[i] for i in range(len(starts))) == starts


@pytest.mark.parametrize("k", [1, 2, 3, 4, 10])
def test_regular_streams_take_few_copies(k: int) -> None:
    """One copy a stream and perhaps one for the last, shorter run, whatever the frames."""
    plan = build(f"llava_video_slowfast:{k}").plan(1000, 24, 24)
    for number in range(len(plan.streams)):
        assert len(regular_blocks(plan.starts(number))) <= 2


@pytest.mark.parametrize(
    "spec",
    ["llava_video_slowfast:k=2", "av_llava", "sf_llava", "llava_onevision", "pllava:2,2",
     "shi_fast:s1t2,min_frames=1", "budget:40,newline=frame", "random:20,newline=frame"],
)  # fmt: skip
def test_gradcheck(spec: str) -> None:
    aggregator = build(spec)
    plan = aggregator.plan(5, 4, 5)
    features = torch.randn(5, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    newline = torch.randn(2, dtype=torch.float64, requires_grad=True)
    end = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        marks = {"newline": tensors[1], "frame_end": tensors[2]}
        return aggregator(tensors[0], plan, marks).tokens

    assert torch.autograd.gradcheck(run, (features, newline, end))


def test_frozen_inputs_get_no_gradient() -> None:
    aggregator = build("llava_video_slowfast")
    plan = aggregator.plan(4, 8, 8)
    newline = MARKS["newline"].clone().requires_grad_()
    out = aggregator(torch.randn(4, 8, 8, 2), plan, {**MARKS, "newline": newline})
    out.tokens.sum().backward()
    rows = int((out.meta.kind == 1).sum())
    assert newline.grad.tolist() == [rows, rows]
    with torch.no_grad():
        assert not aggregator(torch.randn(4, 8, 8, 2), plan, MARKS).tokens.requires_grad


def test_mark_gradients_are_summed_in_float32() -> None:
    """1001 rows of 1.0 sum to 256 in bfloat16, and to 1000 if only the sum is rounded."""
    aggregator = build("frame_newline:stride=1")
    plan = aggregator.plan(1001, 1, 1)
    newline = torch.zeros(2, requires_grad=True)
    features = torch.zeros(1001, 1, 1, 2, dtype=torch.bfloat16)
    out = aggregator(features, plan, {"newline": newline}).tokens
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert newline.grad.dtype == torch.float32
    assert newline.grad.tolist() == [1001.0, 1001.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "spec",
    ["llava_video_slowfast", "llava_onevision", "sf_llava", "pllava", "shi_fast", "budget:200"],
)
def test_dtypes(spec: str, dtype: torch.dtype) -> None:
    aggregator = build(spec)
    plan = aggregator.plan(6, 9, 9)
    features = torch.randn(6, 9, 9, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = aggregator(features, plan, MARKS).tokens
    assert out.dtype == dtype
    want = aggregator(features.double(), plan, MARKS).tokens
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", POOL_KINDS)
@pytest.mark.parametrize("tail", ["drop", "partial"])
def test_layout_of_memory_does_not_matter(kind: str, tail: str) -> None:
    pool = PoolSettings(kind, 2, (3, 4), tail)
    features = torch.randn(4, 7, 9, 5, dtype=torch.float64)
    elsewhere = features.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert torch.equal(elsewhere, features)
    torch.testing.assert_close(
        pool_grid(elsewhere, pool), pool_grid(features, pool), rtol=0, atol=1e-14
    )
    assert pool_grid(features[:0], pool).shape == (0, *pool_grid(features, pool).shape[1:])


def test_pooling_loses_no_patch_at_odd_sides() -> None:
    """The last, smaller window is a mean over its own patches."""
    features = torch.ones(1, 5, 7, 1)
    for kind in ("average", "max", "pair_average", "pair_max", "raster_average", "raster_max"):
        pooled = pool_grid(features, PoolSettings(kind, 2, tail="partial"))
        assert torch.equal(pooled, torch.ones_like(pooled))
    features[0, -1, -1] = 100.0
    corner = pool_grid(features, PoolSettings("average", 2, tail="partial"))[0, -1, -1]
    assert corner.item() == 100.0
    assert pool_grid(features, PoolSettings("average", 2))[0].max() == 1.0


def test_taking_frames_is_a_view_when_even() -> None:
    features = torch.randn(10, 2)
    for indices in ([0, 1, 2], [1, 4, 7], [9], list(range(10))):
        taken = take(features, indices)
        assert torch.equal(taken, features[indices])
        assert taken.untyped_storage().data_ptr() == features.untyped_storage().data_ptr()
    for indices in ([0, 0, 1], [2, 1, 0], [0, 1, 3], []):
        assert torch.equal(
            take(features, indices), features[torch.tensor(indices, dtype=torch.long)]
        )


def test_group_means() -> None:
    features = torch.randn(7, 2, 2, 3, dtype=torch.float64)
    groups = [(0, 3), (2, 4), (4, 7), (6, 7)]
    want = torch.stack([features[lo:hi].mean(0) for lo, hi in groups])
    torch.testing.assert_close(average_groups(features, groups), want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("spec", ["llava_next_video", "av_llava", "random:30", "shi_fast:s1t2"])
def test_pooling_before_the_projector(spec: str) -> None:
    aggregator = build(spec, stage="pre")
    plan = aggregator.plan(5, 6, 6)
    features = torch.randn(5, 6, 6, 3)
    projector = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    reduced = aggregator.reduce(features, plan)
    out = aggregator.assemble(reduced.map(projector), plan, MARKS)
    plain = aggregator.assemble(reduced, plan, {"newline": torch.zeros(3)})
    patch = out.meta.kind == 0
    torch.testing.assert_close(out.tokens[patch], projector(plain.tokens[patch]))
    assert (out.tokens[~patch] == MARKS["newline"]).all()


def test_projector_that_drops_patches_cannot_follow_pooling() -> None:
    aggregator = build("llava_next_video")
    plan = aggregator.plan(2, 4, 4)
    reduced = aggregator.reduce(torch.zeros(2, 4, 4, 3), plan)
    with pytest.raises(UsageError, match="set the pooling stage to 'post'"):
        reduced.map(lambda x: x[:, ::2])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_videos_of_a_batch_do_not_meet(lengths: list[int]) -> None:
    """One aggregator, several videos: each result is that of the video alone."""
    aggregator = build("llava_video_slowfast:k=2")
    videos = [torch.randn(n, 8, 8, 2) for n in lengths]
    plans = [aggregator.plan(n, 8, 8) for n in lengths]
    together = [aggregator.reduce(v, p) for v, p in zip(videos, plans, strict=True)]
    for video, plan, reduced in zip(videos, plans, together, strict=True):
        alone = build("llava_video_slowfast:k=2")
        want = alone(video, alone.plan(len(video), 8, 8), MARKS).tokens
        assert torch.equal(aggregator.assemble(reduced, plan, MARKS).tokens, want)


def test_metadata_is_found_by_name_and_moves() -> None:
    aggregator = build("llava_onevision")
    out = aggregator(torch.zeros(2, 4, 4, 2), aggregator.plan(2, 4, 4), MARKS)
    assert out.meta["kind"] is out.meta.kind
    assert out.meta.to("cpu").kind.tolist() == out.meta.kind.tolist() == [0] * 8 + [3]
    with pytest.raises(KeyError):
        out.meta["colour"]
    assert all(len(out.meta[name]) == 9 for name in out.meta.names)


# Inputs that break other implementations.


def test_no_frames() -> None:
    with pytest.raises(ValueError, match=r"no frames in clip\.mp4"):
        build("llava_video").plan(0, 24, 24, name="clip.mp4")
    with pytest.raises(UsageError, match="0x4"):
        build("llava_video").plan(3, 0, 4)
    with pytest.raises(TypeError):
        build("llava_video").plan(2.5, 4, 4)
    empty = {"select": {"kind": "uniform", "count": 0}}
    with pytest.raises(UsageError, match="select none of the 3 frames"):
        build("sf_llava", slow=empty, fast=empty).plan(3, 4, 4)


@pytest.mark.parametrize(
    ("spec", "count"),
    [("sf_llava", 288 + 16), ("sf_llava:legacy=true", 2880 + 16), ("shi_fast", 144),
     ("llava_video_slowfast", 157), ("av_llava", 145), ("pllava", 2304),
     ("temporal_global_pool", 576)],
)  # fmt: skip
def test_one_frame(spec: str, count: int) -> None:
    aggregator = build(spec)
    plan = aggregator.plan(1, 24, 24)
    assert plan.n_tokens == count
    out = aggregator(torch.randn(1, 24, 24, 2), plan, MARKS).tokens
    assert len(out) == count
    if spec == "sf_llava:legacy=true":
        copies = out[:2880].unflatten(0, (10, 288))
        assert (copies == copies[:1]).all()


def test_fewer_frames_than_slow_frames_or_their_stride() -> None:
    assert build("sf_llava").plan(6, 24, 24).streams[0].frames == tuple(range(6))
    assert build("sf_llava:legacy=true").plan(6, 24, 24).streams[0].frames == (
        0, 0, 1, 1, 2, 3, 3, 4, 4, 5,
    )  # fmt: skip
    plan = build("llava_video_slowfast:10").plan(3, 8, 8)
    assert plan.streams[0].frames == (0,)
    assert plan.streams[1].frames == (1, 2)


def test_frames_that_do_not_divide() -> None:
    base = build("shi_fast:s1t4,min_frames=1,stride=1").settings.to_dict()
    features = torch.arange(7.0).view(7, 1, 1, 1)
    for tail, want in (("drop", [1.5]), ("partial", [1.5, 5.0]), ("adaptive", [1.5, 4.5])):
        base["slow"]["temporal"]["tail"] = tail
        aggregator = build(base)
        out = aggregator(features, aggregator.plan(7, 1, 1))
        assert out.tokens.flatten().tolist() == want
    drop = build("shi_fast:s1t4,min_frames=1,stride=1").plan(50, 9, 9)
    assert drop.n_tokens == 12 * 81


@pytest.mark.parametrize(
    "spec", ["sf_llava", "llava_video_slowfast", "av_llava", "pllava", "shi_fast"]
)
def test_grids_that_are_not_square(spec: str) -> None:
    """18x32 has as many patches as 24x24, and must not be taken for it."""
    aggregator = build(spec)
    features = torch.randn(4, 18, 32, 2)
    plan = aggregator.plan(4, 18, 32)
    wide = aggregator(features, plan, MARKS)
    high = aggregator(features.transpose(1, 2), aggregator.plan(4, 32, 18), MARKS)
    assert torch.equal(wide.tokens, aggregator(features.flatten(1, 2), plan, MARKS).tokens)
    if "slowfast" in spec or spec == "sf_llava":
        assert len(wide) != len(high) or not torch.equal(wide.tokens, high.tokens)
    with pytest.raises(UsageError, match="18x32 patches a frame, but the features have 24x24"):
        aggregator(torch.randn(4, 24, 24, 2), plan, MARKS)


def test_grid_smaller_than_the_target() -> None:
    assert build("sf_llava").plan(2, 3, 3).n_tokens == 2 * 4 + 2 * 9
    assert build("sf_llava:legacy=true,slow_frames=2").plan(2, 3, 3).n_tokens == 2 * 4 + 2 * 16
    with pytest.raises(UsageError, match="side of 3 cannot be pooled with stride 4"):
        build("llava_video:stride=4").plan(2, 3, 3)
    assert build("llava_video_bilinear:stride=4").plan(2, 3, 3).n_tokens == 2 * 2
    assert build("av_llava").plan(2, 3, 3).n_tokens == 5 + 2
    with pytest.raises(UsageError, match="cannot be pooled"):
        build("sf_llava").plan(2, 1, 1)


def test_cls_token_left_in() -> None:
    aggregator = build("sf_llava")
    with pytest.raises(UsageError, match=r"577\. If one of them is the CLS .*select_feature"):
        aggregator(torch.zeros(2, 577, 4), aggregator.plan(2, 24, 24))
    with pytest.raises(UsageError, match=r"not \[2, 576\]"):
        aggregator(torch.zeros(2, 576), aggregator.plan(2, 24, 24))


@pytest.mark.parametrize(("n", "word"), [(2, "only 2"), (4, "more")])
def test_wrong_number_of_frames(n: int, word: str) -> None:
    aggregator = build("llava_video")
    with pytest.raises(UsageError, match=f"plan is for 3 frames, but features of {word}"):
        aggregator(torch.zeros(n, 4, 4, 2), aggregator.plan(3, 4, 4), MARKS)


def test_ten_thousand_frames() -> None:
    """Planning stays quick, and pooling needs no more than a piece at a time."""
    aggregator = build("llava_video_slowfast")
    plan = aggregator.plan(10_000, 4, 4)
    assert plan.n_tokens == 3334 * 7 + 6666 * 3
    pieces = (torch.full((1000, 4, 4, 2), float(i)) for i in range(10))
    out = aggregator.assemble(aggregator.reduce_chunks(pieces, plan), plan, MARKS)
    patch = out.meta.kind == 0
    assert torch.equal(out.tokens[patch, 0], (out.meta.frame[patch] // 1000).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", ["llava_video", "av_llava", "sf_llava", "budget:120"])
def test_bad_numbers_stay_where_they_are(spec: str, value: float) -> None:
    """They spread to the tokens whose box holds them, and to no other."""
    aggregator = build(spec)
    plan = aggregator.plan(4, 8, 8)
    features = torch.zeros(4, 8, 8, 2)
    features[2, 5, 3] = value
    out = aggregator(features, plan, MARKS)
    meta = out.meta
    holds = (meta.kind == 0) & (meta.frame == 2)
    holds &= (meta.y0 <= 5) & (meta.y1 > 5) & (meta.x0 <= 3) & (meta.x1 > 3)
    assert holds.any()
    assert torch.equal(~torch.isfinite(out.tokens[:, 0]), holds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "spec", ["llava_video_slowfast", "sf_llava", "pllava", "budget:300", "random:99"]
)
def test_cuda_agrees_and_never_waits(spec: str) -> None:
    aggregator = build(spec)
    plan = aggregator.plan(9, 12, 12)
    features = torch.randn(9, 12, 12, 2)
    want = aggregator(features, plan, MARKS).tokens
    on_device = features.cuda().requires_grad_()
    marks = {name: mark.cuda() for name, mark in MARKS.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = aggregator(on_device, plan, marks).tokens
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), want, rtol=1e-5, atol=1e-6)
