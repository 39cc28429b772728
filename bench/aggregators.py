"""64 frames of 27×27 patches, 3584 wide, to tokens: ours against a loop over frames.

The loop is what LLaVA-like code does: take a frame, move channels first, pool, move them back,
append the newline, collect, concatenate. One thread, bfloat16.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from av_llava.aggregators import Aggregator, StreamPlan, TokenPlan, build
from bench.measure import Contestants, Row, check, race, rows_of, single_threaded

TITLE = "Aggregation"
RATIO = "× loop"
LOOP, OURS = "loop over frames", "av_llava"
Marks = dict[str, Tensor]
SPECS = ("llava_video", "llava_video_slowfast", "budget:2048")


def pooled(frame: Tensor, stream: StreamPlan) -> Tensor:
    """Pool one frame [h, w, d] to [rows, cols, d]."""
    pool = stream.pool
    if pool.kind == "identity":
        return frame
    image = frame.permute(2, 0, 1)[None].contiguous()
    if pool.kind == "adaptive":
        image = F.adaptive_avg_pool2d(image, (stream.rows, stream.cols))
    else:
        window = (1, 2) if pool.kind.startswith("pair") else (pool.stride, pool.stride)
        partial_tail = pool.tail == "partial"
        image = F.avg_pool2d(image, window, ceil_mode=partial_tail, count_include_pad=False)
    return image[0].permute(1, 2, 0).contiguous()


def loop(features: Tensor, plan: TokenPlan, marks: Marks) -> Tensor:
    """Frame by frame, in the order of the plan."""
    parts = []
    for item in plan.items:
        stream = plan.streams[item.stream]
        tokens = pooled(features[stream.frames[item.number]], stream)
        if plan.newline == "row":
            column = marks["newline"].expand(tokens.shape[0], 1, -1)
            tokens = torch.cat((tokens, column), dim=1)
        tokens = tokens.flatten(0, 1)
        if plan.newline == "frame":
            tokens = torch.cat((tokens, marks["newline"][None]))
        if plan.frame_end:
            tokens = torch.cat((tokens, marks["frame_end"][None]))
        parts.append(tokens)
    return torch.cat(parts)


def ours(aggregator: Aggregator, features: Tensor, plan: TokenPlan, marks: Marks) -> Tensor:
    """The library's way."""
    return aggregator(features, plan, marks).tokens


@single_threaded
def run(quick: bool) -> list[Row]:
    """All rows."""
    frames, width = (8, 64) if quick else (64, 3584)
    generator = torch.Generator().manual_seed(0)
    new = partial(torch.empty, dtype=torch.bfloat16)
    features = new(frames, 27, 27, width).normal_(generator=generator)
    marks = {name: new(width).normal_(generator=generator) for name in ("newline", "frame_end")}
    rows = []
    for spec in SPECS:
        aggregator = build(spec)
        plan = aggregator.plan(frames, 27, 27)
        contestants: Contestants = {
            LOOP: partial(loop, features, plan, marks),
            OURS: partial(ours, aggregator, features, plan, marks),
        }
        expected, found = contestants[LOOP](), contestants[OURS]()
        check(found.shape == expected.shape, f"{spec}: {found.shape} and {expected.shape}")
        # Sums are rounded to bfloat16 once, perhaps in another order.
        check(torch.allclose(found, expected, atol=0.02, rtol=0.02), f"{spec}: values")
        timings = race(contestants, rounds=2 if quick else 15, seconds=2)
        rows += rows_of(f"{spec}, {frames}×27×27×{width}, {len(found)} tokens", timings, LOOP)
    return rows
