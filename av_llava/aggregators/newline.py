"""Put pooled patches and marks (newlines, frame ends) into one sequence.

Contract: one [n, d] buffer is allocated and every row of it is written once, by strided copies:
a stream whose items stand at regular distances takes one copy, whatever the number of frames.
Gradients go back the same way, in each input's dtype; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from av_llava.aggregators.plan import TokenPlan
from av_llava.errors import UsageError


class Block(NamedTuple):
    """Items at regular distances: ``repeats`` runs of ``length`` items."""

    first: int
    """First item."""
    repeats: int
    """Number of runs."""
    length: int
    """Items per run."""
    run_step: int
    """Rows from run to run."""
    item_step: int
    """Rows from item to item of a run."""
    start: int
    """Row of the first item."""


def assemble(
    streams: Sequence[Tensor], plan: TokenPlan, marks: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Order pooled patches as planned and insert the marks.

    Args:
        streams: one tensor a stream, [items, rows, cols, d]; of pruned streams [1, 1, kept, d].
        plan: what they were pooled for.
        marks: ``newline`` [d] and ``frame_end`` [d], those that the plan needs.

    Returns:
        [plan.n_tokens, d].
    """
    checked = checked_marks(plan, marks or {}, streams[0])
    if not plan.marks_needed and len(streams) == 1:
        return streams[0].flatten(0, 2)
    return _Assemble.apply(plan, checked.get("newline"), checked.get("frame_end"), *streams)


def checked_marks(plan: TokenPlan, marks: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Return the marks that the plan needs; a missing or misshapen one is an error."""
    found = {}
    for name in plan.marks_needed:
        if name not in marks:
            raise UsageError(missing_mark(name, marks))
        mark = marks[name]
        if mark.shape != like.shape[-1:] or mark.device != like.device:
            raise UsageError(
                f"The mark {name!r} must be of shape {list(like.shape[-1:])} on {like.device}, as "
                f"the features are, but is of shape {list(mark.shape)} on {mark.device}."
            )
        found[name] = mark
    return found


def missing_mark(name: str, have: Iterable[str]) -> str:
    """Return the sentence for a mark that is needed and not there."""
    return (
        f"The aggregator inserts the learned mark {name!r}, which is not there (there is: "
        f"{', '.join(sorted(have)) or 'none'}). Add it to the model, or choose an aggregator "
        f"without it."
    )


class _Assemble(torch.autograd.Function):
    """Copy rows to their places; the gradient gathers patches and sums marks."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: TokenPlan,
        newline: Tensor | None,
        frame_end: Tensor | None,
        *streams: Tensor,
    ) -> Tensor:
        ctx.plan = plan
        ctx.shapes = [stream.shape for stream in streams]
        ctx.mark_dtypes = [None if m is None else m.dtype for m in (newline, frame_end)]
        out = streams[0].new_empty((plan.n_tokens, streams[0].shape[-1]))
        for number, stream in enumerate(streams):
            for rows, patches in _patch_views(out, stream, plan, number):
                rows.copy_(patches)
        for mark, views in ((newline, _newline_views), (frame_end, _frame_end_views)):
            if mark is not None:
                for rows in views(out, plan):
                    rows.copy_(mark.expand_as(rows))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, grad, needed = ctx.plan, grad.contiguous(), ctx.needs_input_grad
        marks = [
            _summed(views(grad, plan), grad, dtype) if wanted and dtype is not None else None
            for wanted, dtype, views in zip(
                needed[1:3], ctx.mark_dtypes, (_newline_views, _frame_end_views), strict=True
            )
        ]
        streams: list[Tensor | None] = []
        for number, shape in enumerate(ctx.shapes):
            back = grad.new_empty(shape) if needed[3 + number] else None
            if back is not None:
                for rows, patches in _patch_views(grad, back, plan, number):
                    patches.copy_(rows)
            streams.append(back)
        return (None, *marks, *streams)


def _summed(views: Iterable[Tensor], grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the gradient over all places of a mark, at least in float32."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(grad.shape[-1], dtype=wide)
    for rows in views:
        total += rows.sum(tuple(range(rows.ndim - 1)), dtype=wide)
    return total.to(dtype)


def _patch_views(
    buffer: Tensor, stream: Tensor, plan: TokenPlan, number: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of equal shape: places in the [n, d] buffer, and the pooled patches of a stream."""
    part = plan.streams[number]
    if part.kept is not None:
        done = 0
        for item in plan.items:
            yield buffer[item.lo : item.lo + item.n_patches], stream[0, 0, done:][: item.n_patches]
            done += item.n_patches
        return
    pitch = part.cols + (plan.newline == "row")
    for block in regular_blocks(plan.starts(number)):
        rows = _strided(buffer, block, 0, ((part.rows, pitch), (part.cols, 1)))
        count = block.repeats * block.length
        yield rows, stream[block.first :][:count].unflatten(0, (block.repeats, block.length))


def _newline_views(buffer: Tensor, plan: TokenPlan) -> Iterator[Tensor]:
    """Places of the newline in the [n, d] buffer."""
    if plan.newline == "video":
        yield buffer[-1:]
    elif plan.newline == "frame":
        yield from _item_ends(buffer, plan, 1 + plan.frame_end)
    elif plan.newline == "row":
        for number, part in enumerate(plan.streams):
            for block in regular_blocks(plan.starts(number)):
                yield _strided(buffer, block, part.cols, ((part.rows, part.cols + 1),))


def _frame_end_views(buffer: Tensor, plan: TokenPlan) -> Iterator[Tensor]:
    """Places of the frame end in the [n, d] buffer."""
    yield from _item_ends(buffer, plan, 1)


def _item_ends(buffer: Tensor, plan: TokenPlan, before: int) -> Iterator[Tensor]:
    """The row ``before`` rows before the end of every item."""
    for number in range(len(plan.streams)):
        ends = tuple(item.hi - before for item in plan.items if item.stream == number)
        for block in regular_blocks(ends):
            yield _strided(buffer, block, 0, ())


def _strided(
    buffer: Tensor, block: Block, offset: int, inner: tuple[tuple[int, int], ...]
) -> Tensor:
    """View of a contiguous [n, d] buffer: [repeats, length, *inner counts, d].

    Args:
        buffer: the [n, d] buffer.
        block: where the items begin.
        offset: rows from the begin of an item.
        inner: counts and row steps inside an item.
    """
    d = buffer.shape[-1]
    dims = ((block.repeats, block.run_step), (block.length, block.item_step), *inner)
    return buffer.as_strided(
        (*(count for count, _ in dims), d),
        (*(step * d for _, step in dims), 1),
        buffer.storage_offset() + (block.start + offset) * d,
    )


@lru_cache(maxsize=1024)
def regular_blocks(starts: tuple[int, ...]) -> tuple[Block, ...]:
    """Cover increasing row numbers by as few two-level arithmetic progressions as is simple."""
    runs: list[Block] = []
    at = 0
    while at < len(starts):
        stop, step = at + 1, 0
        if stop < len(starts):
            step = starts[stop] - starts[at]
            while stop < len(starts) and starts[stop] - starts[stop - 1] == step:
                stop += 1
        runs.append(Block(at, 1, stop - at, 0, step, starts[at]))
        at = stop
    blocks: list[Block] = []
    for run in runs:
        last = blocks[-1] if blocks else None
        if last is not None and (last.length, last.item_step) == (run.length, run.item_step):
            step = run.start - (last.start + (last.repeats - 1) * last.run_step)
            if last.repeats == 1 or step == last.run_step:
                blocks[-1] = last._replace(repeats=last.repeats + 1, run_step=step)
                continue
        blocks.append(run)
    return tuple(blocks)
