"""What an aggregator hands on: pooled streams, tokens, and where every token comes from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from av_llava.aggregators.plan import STREAM_IDS, StreamPlan, TokenPlan
from av_llava.errors import UsageError

if TYPE_CHECKING:
    from av_llava.aggregators.plan import Box

PATCH, ROW_NEWLINE, FRAME_NEWLINE, VIDEO_NEWLINE, FRAME_END = range(5)
"""Values of ``TokenMeta.kind``."""


@dataclass(frozen=True)
class Reduced:
    """Pooled patches, before they are put in order: one tensor [items, rows, cols, d] a stream.

    Pruned streams are [1, 1, kept, d].
    """

    streams: tuple[Tensor, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> Reduced:
        """Apply a function to every stream, e.g. the projector when pooling stands before it.

        Args:
            function: from [items, patches, d] to [items, patches, d'], patch by patch.
        """
        mapped = []
        for stream in self.streams:
            flat = stream.flatten(1, 2)
            out = function(flat)
            if out.shape[:2] != flat.shape[:2]:
                raise UsageError(
                    f"Pooling before the projector needs one that keeps every patch, but it made "
                    f"{list(out.shape)} of {list(flat.shape)}: set the pooling stage to 'post'."
                )
            mapped.append(out.unflatten(1, stream.shape[1:3]))
        return Reduced(tuple(mapped))


@dataclass(frozen=True, eq=False)
class TokenMeta:
    """Where every token comes from: one-dimensional tensors of length n, on the CPU.

    Columns are also found by name: ``meta["frame"]``.
    """

    kind: Tensor
    """0 patch, 1 row newline, 2 frame newline, 3 video newline, 4 frame end."""
    stream: Tensor
    """0 slow, 1 fast, 2 single; -1 for the newline of the video."""
    frame: Tensor
    """Frame among those given (the first of a group); -1 for the newline of the video."""
    t_start: Tensor
    """Seconds, float64; NaN when the plan has no times."""
    t_end: Tensor
    """Seconds at which the (last) frame gives way to the next one; NaN without times."""
    y0: Tensor
    """First patch row of the source; -1 for marks, like the other sides."""
    y1: Tensor
    """Patch row after the last."""
    x0: Tensor
    """First patch column."""
    x1: Tensor
    """Patch column after the last."""
    weight: Tensor
    """Source patches that are merged into the token; 0 for marks."""

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        tensor: Tensor = getattr(self, name)
        return tensor

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(field.name for field in dataclasses.fields(self))

    def to(self, device: torch.device | str) -> TokenMeta:
        """Copy to a device."""
        return TokenMeta(**{k: self[k].to(device, non_blocking=True) for k in self.names})


@dataclass(frozen=True, eq=False)
class AggregatedTokens:
    """The tokens of one video."""

    tokens: Tensor
    """[n, d]"""
    plan: TokenPlan
    """What they were made by."""

    @cached_property
    def meta(self) -> TokenMeta:
        """Where every token comes from; made when first asked for, and always on the CPU."""
        return token_meta(self.plan)

    def __len__(self) -> int:
        return len(self.tokens)


def token_meta(plan: TokenPlan) -> TokenMeta:
    """Tell where every token of a plan comes from."""
    n = plan.n_tokens
    columns = {f.name: torch.full((n,), -1) for f in dataclasses.fields(TokenMeta)}
    columns["weight"] = torch.zeros(n, dtype=torch.long)
    for name in ("t_start", "t_end"):
        columns[name] = torch.full((n,), math.nan, dtype=torch.float64)
    for number, stream in enumerate(plan.streams):
        if stream.kept is None:
            _fill_stream(columns, plan, number, stream)
        else:
            _fill_pruned(columns, plan, stream)
    if plan.newline == "video":
        columns["kind"][-1] = VIDEO_NEWLINE
        first, last = plan.frame_time(0), plan.frame_time(plan.frames - 1)
        if first is not None and last is not None:
            columns["t_start"][-1], columns["t_end"][-1] = first[0], last[1]
    return TokenMeta(**columns)


def _fill_stream(
    columns: dict[str, Tensor], plan: TokenPlan, number: int, stream: StreamPlan
) -> None:
    """Fill the rows of a stream whose items all look the same."""
    if not stream.n_items:
        return
    kinds = _item_kinds(plan, stream.rows, stream.cols)
    rows = torch.tensor(plan.starts(number))[:, None] + torch.arange(len(kinds))  # [items, block]
    columns["kind"][rows] = kinds
    columns["stream"][rows] = STREAM_IDS[stream.name]
    _fill_frames(columns, plan, stream, rows)
    patch = rows[:, kinds == PATCH]
    boxes, weights = _boxes(stream.boxes(plan.height, plan.width))
    for i, name in enumerate(("y0", "y1", "x0", "x1")):
        columns[name][patch] = boxes[:, i]
    sizes = torch.tensor([stream.group_size(i) for i in range(stream.n_items)])
    columns["weight"][patch] = sizes[:, None] * weights


def _item_kinds(plan: TokenPlan, rows: int, cols: int) -> Tensor:
    """Kinds of the tokens of one frame."""
    row = [PATCH] * cols + [ROW_NEWLINE] * (plan.newline == "row")
    ends = [FRAME_NEWLINE] * (plan.newline == "frame") + [FRAME_END] * plan.frame_end
    return torch.tensor(row * rows + ends)


def _boxes(boxes: list[tuple[Box, int]]) -> tuple[Tensor, Tensor]:
    """Boxes [patches, 4] and weights [patches]."""
    return torch.tensor([box for box, _ in boxes]), torch.tensor([weight for _, weight in boxes])


def _fill_frames(
    columns: dict[str, Tensor], plan: TokenPlan, stream: StreamPlan, rows: Tensor
) -> None:
    """Fill frame and time of rows [items, block]."""
    ranges = [stream.frame_range(i) for i in range(stream.n_items)]
    columns["frame"][rows] = torch.tensor([first for first, _ in ranges])[:, None]
    if plan.times is not None:
        times = [(plan.frame_time(first), plan.frame_time(last)) for first, last in ranges]
        spans = torch.tensor([(a[0], b[1]) for a, b in times if a and b], dtype=torch.float64)
        columns["t_start"][rows] = spans[:, :1]
        columns["t_end"][rows] = spans[:, 1:]


def _fill_pruned(columns: dict[str, Tensor], plan: TokenPlan, stream: StreamPlan) -> None:
    """Fill the rows of a stream of which only some patches are kept."""
    cells = stream.rows * stream.cols
    kept = torch.tensor(stream.kept)
    columns["stream"][: plan.items[-1].hi] = STREAM_IDS[stream.name]
    patches = []
    for item in plan.items:
        patches.append(torch.arange(item.lo, item.lo + item.n_patches))
        rows = torch.arange(item.lo, item.hi)[None]
        one = dataclasses.replace(stream, frames=stream.frames[item.number : item.number + 1])
        _fill_frames(columns, plan, one, rows)
        if plan.newline == "frame":
            columns["kind"][item.hi - 1 - plan.frame_end] = FRAME_NEWLINE
        if plan.frame_end:
            columns["kind"][item.hi - 1] = FRAME_END
    patch = torch.cat(patches)
    place = kept % cells
    y, x = place // stream.cols, place % stream.cols
    for name, values in (("y0", y), ("y1", y + 1), ("x0", x), ("x1", x + 1)):
        columns[name][patch] = values
    columns["kind"][patch] = PATCH
    columns["weight"][patch] = 1
