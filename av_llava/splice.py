"""Put media features between text embeddings: plan on the host, copy once on the device.

Contract: a :class:`SplicePlan` holds integers only and is made on the host, by the processor or
from ids with LLaVA's sentinels. :func:`splice` allocates one output buffer, calls the embedding
module once on the text rows, copies media rows in strided slices and zeros only the padding. It
reads nothing back from the device. Segments name their medium and its rows, never a counter, so
any order of media in a prompt is possible. Follows what LLaVA's
``prepare_inputs_labels_for_multimodal`` computes, not how.

Dimension letters: B samples, L padded length, N rows, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from av_llava.errors import BudgetError, UsageError
from av_llava.settings import IGNORE_INDEX

logger = logging.getLogger(__name__)

TEXT = "text"
# More separate copies than this into one CUDA buffer cost more than one indexed copy.
_MAX_CUDA_SLICES = 16


class Segment(NamedTuple):
    """Rows ``[lo, hi)`` of one medium, or of the plan's text ids when ``kind`` is ``text``."""

    kind: str
    item: int
    lo: int
    hi: int

    @property
    def n_rows(self) -> int:
        """How many rows of the output this segment fills."""
        return self.hi - self.lo


@dataclass(frozen=True, eq=False)
class SplicePlan:
    """Which row of a padded batch comes from where. Integers only, host only.

    Args:
        samples: for each sample its segments in prompt order.
        text_ids: int64 ids of all text rows of the batch, sample after sample. [N_text]
        counts: for each kind of medium the number of rows of each item of the batch.
        text_labels: int64 labels of the text rows, or None when there are none. [N_text]
        padding_side: ``right`` or ``left``.
        length: padded length; None means that of the longest sample.
        packed: lengths of the parts of each row that must not see each other; None: rows are whole.
    """

    samples: tuple[tuple[Segment, ...], ...]
    text_ids: np.ndarray
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    text_labels: np.ndarray | None = None
    padding_side: str = "right"
    length: int | None = None
    packed: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise UsageError(f"padding_side must be 'left' or 'right', not {self.padding_side!r}.")
        if self.length is not None and self.length < max(self.lengths, default=0):
            raise UsageError(
                f"A padded length of {self.length} is shorter than the longest sample "
                f"({max(self.lengths)} rows)."
            )

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each sample without padding."""
        return tuple(sum(s.n_rows for s in segments) for segments in self.samples)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L) of the padded batch."""
        return len(self.samples), self.length or max(self.lengths, default=0)

    def offset(self, sample: int) -> int:
        """First content column of a sample."""
        return self.shape[1] - self.lengths[sample] if self.padding_side == "left" else 0

    def n_tokens(self, kind: str, sample: int | None = None) -> int:
        """Rows of one kind, in one sample or in the whole batch."""
        samples = self.samples if sample is None else (self.samples[sample],)
        return sum(s.n_rows for segments in samples for s in segments if s.kind == kind)

    def attention_mask(self) -> Tensor:
        """Int64 mask, 1 on content. [B, L]"""
        mask = torch.zeros(self.shape, dtype=torch.int64)
        for i, n in enumerate(self.lengths):
            mask[i, self.offset(i) : self.offset(i) + n] = 1
        return mask

    def position_ids(self) -> Tensor:
        """Int64 positions: 0..n-1 on each row, or each of its parts, and 0 on padding. [B, L]"""
        ids = torch.zeros(self.shape, dtype=torch.int64)
        for i, whole in enumerate(self.lengths):
            at = self.offset(i)
            for n in (whole,) if self.packed is None else self.packed[i]:
                ids[i, at : at + n] = torch.arange(n)
                at += n
        return ids

    def labels(self) -> Tensor | None:
        """Int64 labels with -100 on media and padding, or None without text labels. [B, L]"""
        if self.text_labels is None:
            return None
        return self._laid_out(self.text_labels, dict.fromkeys(self.counts, IGNORE_INDEX), -100)

    def input_ids(self, media_ids: Mapping[str, int], pad_id: int) -> Tensor:
        """Expanded ids: ``media_ids[kind]`` on every row of a medium. [B, L]"""
        return self._laid_out(self.text_ids, media_ids, pad_id)

    def _laid_out(self, text: np.ndarray, media: Mapping[str, int], pad: int) -> Tensor:
        out = np.full(self.shape, pad, dtype=np.int64)
        for i, segments in enumerate(self.samples):
            at = self.offset(i)
            for s in segments:
                values = text[s.lo : s.hi] if s.kind == TEXT else media[s.kind]
                out[i, at : at + s.n_rows] = values
                at += s.n_rows
        return torch.from_numpy(out)

    def with_padding(self, side: str, length: int | None = None) -> SplicePlan:
        """The same content with another padding."""
        return replace(self, padding_side=side, length=length)

    @classmethod
    def build(
        cls,
        samples: Sequence[Sequence[tuple[np.ndarray | Sequence[int], Any] | Segment]],
        counts: Mapping[str, Sequence[int]],
        *,
        supervised: bool = False,
        padding_side: str = "right",
    ) -> SplicePlan:
        """Assemble a plan from text chunks and media segments.

        Args:
            samples: for each sample, in prompt order, either a media :class:`Segment` or a pair
                (ids, labels) of a text chunk; labels may be None when not supervised.
            counts: rows of each item by kind.
            supervised: whether the text chunks carry labels.
            padding_side: see the class.
        """
        rows: list[tuple[Segment, ...]] = []
        ids: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        at = 0
        for parts in samples:
            segments: list[Segment] = []
            for part in parts:
                if isinstance(part, Segment):
                    if part.n_rows:
                        segments.append(part)
                    continue
                chunk = np.asarray(part[0], dtype=np.int64)
                if len(chunk) == 0:
                    continue
                ids.append(chunk)
                if supervised:
                    labels.append(np.asarray(part[1], dtype=np.int64))
                segments.append(Segment(TEXT, 0, at, at + len(chunk)))
                at += len(chunk)
            rows.append(_merged(segments))
        empty = np.zeros(0, dtype=np.int64)
        return cls(
            samples=tuple(rows),
            text_ids=np.concatenate(ids) if ids else empty,
            counts={kind: tuple(n) for kind, n in counts.items()},
            text_labels=(np.concatenate(labels) if labels else empty) if supervised else None,
            padding_side=padding_side,
        )

    @classmethod
    def from_ids(
        cls,
        input_ids: Tensor,
        items: Sequence[Sequence[tuple[str, int]]],
        counts: Mapping[str, Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str = "right",
        max_length: int | None = None,
    ) -> SplicePlan:
        """Make the plan from ids in which one negative sentinel stands for one medium.

        The ids (and mask and labels) are brought to the host in one copy each.

        Args:
            input_ids: ids with sentinels. [B, S]
            items: for each sample, (kind, item) of its sentinels in order.
            counts: rows of each item by kind.
            attention_mask: 1 on content; None means all content. [B, S]
            labels: labels of the ids. [B, S]
            padding_side: of the result; that of the input is read from the mask.
            max_length: cut samples after this many rows, as LLaVA's
                ``tokenizer_model_max_length``. Text may be cut, media may not.

        Raises:
            UsageError: sentinels and media do not match.
            BudgetError: the cut would fall on a medium.
        """
        host_ids = input_ids.detach().to("cpu", torch.int64).numpy()
        host_labels = None if labels is None else labels.detach().to("cpu", torch.int64).numpy()
        mask = None if attention_mask is None else attention_mask.detach().to("cpu").numpy() != 0
        if len(items) != len(host_ids):
            raise UsageError(f"{len(host_ids)} rows of ids, but media for {len(items)} samples.")
        samples = []
        for i, row in enumerate(host_ids):
            keep = slice(None) if mask is None else mask[i]
            row_labels = None if host_labels is None else host_labels[i][keep]
            parts = _split_at_sentinels(i, row[keep], row_labels, items[i], counts)
            samples.append(parts)
        plan = cls.build(samples, counts, supervised=labels is not None, padding_side=padding_side)
        return plan if max_length is None else plan.truncated(max_length)

    def truncated(self, max_length: int) -> SplicePlan:
        """Keep the first ``max_length`` rows of each sample; what is cut must be text.

        Raises:
            BudgetError: the cut would fall on a medium, or drop one.
        """
        if max(self.lengths, default=0) <= max_length:
            return self
        samples = [self._head(i, max_length) for i in range(len(self.samples))]
        return SplicePlan.build(
            samples,
            self.counts,
            supervised=self.text_labels is not None,
            padding_side=self.padding_side,
        )

    def _head(self, sample: int, max_length: int) -> list[Any]:
        """The parts of one sample up to ``max_length`` rows."""
        parts: list[Any] = []
        left, total = max_length, self.lengths[sample]
        for s in self.samples[sample]:
            if s.kind == TEXT:
                rows = slice(s.lo, min(s.hi, s.lo + left))
                labels = None if self.text_labels is None else self.text_labels[rows]
                parts.append((self.text_ids[rows], labels))
            elif s.n_rows > left:
                raise BudgetError(
                    f"Sample {sample} needs {total} positions, but the limit is {max_length}, "
                    f"which would cut {s.kind} {s.item} ({self.counts[s.kind][s.item]} tokens). "
                    f"Use fewer frames, a token budget, or a larger limit "
                    f"(tokenizer_model_max_length)."
                )
            else:
                parts.append(s)
            left -= min(left, s.n_rows)
        if total > max_length:
            logger.warning(
                "Sample %d: %d of %d positions were cut from the end of its text to keep the "
                "limit of %d.",
                sample,
                total - max_length,
                total,
                max_length,
            )
        return parts


def _merged(segments: list[Segment]) -> tuple[Segment, ...]:
    """Join neighbours that continue each other."""
    out: list[Segment] = []
    for s in segments:
        if out and out[-1][:2] == s[:2] and out[-1].hi == s.lo:
            out[-1] = out[-1]._replace(hi=s.hi)
        else:
            out.append(s)
    return tuple(out)


def _split_at_sentinels(
    sample: int,
    ids: np.ndarray,
    labels: np.ndarray | None,
    items: Sequence[tuple[str, int]],
    counts: Mapping[str, Sequence[int]],
) -> list[Any]:
    """Cut one row of ids into text chunks and media segments."""
    cuts = np.flatnonzero(ids < 0)
    if len(cuts) != len(items):
        raise UsageError(
            f"Sample {sample} has {len(cuts)} media placeholders in its ids, "
            f"but {len(items)} media were given for it."
        )
    parts: list[Any] = []
    at = 0
    for cut, (kind, item) in zip(cuts, items, strict=True):
        parts.append((ids[at:cut], None if labels is None else labels[at:cut]))
        parts.append(Segment(kind, item, 0, counts[kind][item]))
        at = int(cut) + 1
    parts.append((ids[at:], None if labels is None else labels[at:]))
    return parts


class _Copy(NamedTuple):
    """Copy ``n_runs`` runs of ``n`` rows from ``src`` (contiguous) to every ``stride`` rows."""

    source: int
    src: int
    dst: int
    n: int
    n_runs: int
    stride: int


def _copies(plan: SplicePlan, index: Mapping[tuple[str, int], int]) -> list[_Copy]:
    """List the copies, with runs at a regular distance joined into one strided copy."""
    length = plan.shape[1]
    by_source: dict[int, list[_Copy]] = {}
    for i, segments in enumerate(plan.samples):
        at = i * length + plan.offset(i)
        for s in segments:
            source = index[s.kind, s.item]
            runs = by_source.setdefault(source, [])
            last = runs[-1] if runs else None
            if last is not None and _continues(last, s, at):
                runs[-1] = last._replace(n_runs=last.n_runs + 1, stride=at - _last_start(last))
            else:
                runs.append(_Copy(source, s.lo, at, s.n_rows, 1, 0))
            at += s.n_rows
    return [c for runs in by_source.values() for c in runs]


def _last_start(copy: _Copy) -> int:
    return copy.dst + (copy.n_runs - 1) * copy.stride


def _continues(last: _Copy, segment: Segment, at: int) -> bool:
    """Whether ``segment`` placed at row ``at`` extends the run ``last``."""
    if segment.n_rows != last.n or segment.lo != last.src + last.n_runs * last.n:
        return False
    return last.n_runs == 1 or at - _last_start(last) == last.stride


def _dst_view(buffer: Tensor, c: _Copy) -> Tensor:
    """The rows of ``buffer`` [B*L, D] that a copy fills, as [n_runs, n, D] or [n, D]."""
    if c.n_runs == 1:
        return buffer[c.dst : c.dst + c.n]
    width = buffer.shape[1]
    return buffer.as_strided(
        (c.n_runs, c.n, width),
        (c.stride * width, width, 1),
        buffer.storage_offset() + c.dst * width,
    )


def _src_view(source: Tensor, c: _Copy) -> Tensor:
    n = c.n * c.n_runs
    rows = source if n == source.shape[0] else source[c.src : c.src + n]
    return rows if c.n_runs == 1 else rows.view(c.n_runs, c.n, -1)


class _Layout:
    """The copies of one plan for one list of sources, and the index form for CUDA."""

    def __init__(self, plan: SplicePlan, names: Sequence[tuple[str, int]]) -> None:
        self.plan = plan
        copies = _copies(plan, {name: i for i, name in enumerate(names)})
        self.by_source: list[list[_Copy]] = [[] for _ in names]
        for c in copies:
            self.by_source[c.source].append(c)

    def destination(self, source: int, device: torch.device) -> Tensor:
        """Output row of each row of a source, as one device tensor. [N]"""
        rows = [
            np.arange(c.n)[None, :] + (c.dst + np.arange(c.n_runs)[:, None] * c.stride)
            for c in self.by_source[source]
        ]
        host = torch.from_numpy(np.concatenate([r.reshape(-1) for r in rows]))
        return _upload(host, device)

    def sources(self, source: int) -> np.ndarray:
        """Row of the source for each row of :meth:`destination`. [N]"""
        return np.concatenate(
            [np.arange(c.src, c.src + c.n * c.n_runs) for c in self.by_source[source]]
        )


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy host integers to a device without waiting for it."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _indexed(buffer: Tensor, copies: list[_Copy]) -> bool:
    """Whether one indexed copy beats many slices."""
    return buffer.is_cuda and len(copies) > _MAX_CUDA_SLICES


class _Splice(torch.autograd.Function):
    """Slice copies forward; views (or gathers) of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, text: Tensor, *media: Tensor) -> Tensor:  # type: ignore[override]
        batch, length = layout.plan.shape
        out = text.new_empty((batch * length, text.shape[1]))
        sources = (text, *media)
        for i, source in enumerate(sources):
            copies = layout.by_source[i]
            if _indexed(out, copies):
                rows = source.to(out.device, out.dtype, non_blocking=True)
                if not _covers(copies, len(rows)):
                    rows = rows[_upload(torch.from_numpy(layout.sources(i)), out.device)]
                out.index_copy_(0, layout.destination(i, out.device), rows)
            else:
                for c in copies:
                    _dst_view(out, c).copy_(_src_view(source, c), non_blocking=True)
        _zero_padding(out.view(batch, length, -1), layout.plan)
        ctx.layout = layout
        ctx.like = [(s.shape, s.dtype, s.device) for s in sources]
        return out.view(batch, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad = grad.contiguous().view(-1, grad.shape[-1])
        grads = [
            _gathered(grad, ctx.layout, i, *ctx.like[i]) if needed else None
            for i, needed in enumerate(ctx.needs_input_grad[1:])
        ]
        return None, *grads


def _gathered(
    grad: Tensor,
    layout: _Layout,
    source: int,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Gradient of one source: the rows of ``grad`` [B*L, D] that it filled."""
    copies = layout.by_source[source]
    used = sum(c.n * c.n_runs for c in copies)
    if len(copies) == 1 and used == shape[0] and copies[0].n_runs == 1:
        return _dst_view(grad, copies[0]).to(device, dtype, non_blocking=True)
    if used == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    if _indexed(grad, copies) and _covers(copies, shape[0]):
        return grad.index_select(0, layout.destination(source, grad.device)).to(device, dtype)
    make = torch.empty if used == shape[0] else torch.zeros
    out = make(shape, dtype=dtype, device=device)
    for c in copies:
        _src_view(out, c).copy_(_dst_view(grad, c), non_blocking=True)
    return out


def _covers(copies: list[_Copy], n_rows: int) -> bool:
    """Whether the copies take all rows of a source in order."""
    ends = [c.src + c.n * c.n_runs for c in copies]
    starts = [c.src for c in copies[1:]]
    return copies[0].src == 0 and ends[:-1] == starts and ends[-1] == n_rows


def _zero_padding(out: Tensor, plan: SplicePlan) -> None:
    """Zero the rows of ``out`` [B, L, D] that hold no content."""
    length = plan.shape[1]
    for i, n in enumerate(plan.lengths):
        if n < length:
            pad = slice(0, length - n) if plan.padding_side == "left" else slice(n, length)
            out[i, pad].zero_()


def _check(plan: SplicePlan, features: Mapping[str, Sequence[Tensor]], width: int) -> None:
    """Compare planned and actual rows on the host."""
    for kind, counts in plan.counts.items():
        given = features.get(kind, ())
        if len(given) != len(counts):
            raise UsageError(
                f"The prompt plans {len(counts)} {kind} item(s), but features of "
                f"{len(given)} were given."
            )
        for item, (planned, tensor) in enumerate(zip(counts, given, strict=True)):
            if tensor.shape[0] != planned:
                raise UsageError(
                    f"{kind} {item}: {planned} tokens were planned, but its features have "
                    f"{tensor.shape[0]} rows."
                )
    for kind, tensors in features.items():
        for item, tensor in enumerate(tensors):
            if tensor.ndim != 2 or tensor.shape[1] != width:
                raise UsageError(
                    f"{kind} {item}: features have shape {tuple(tensor.shape)}, "
                    f"expected [rows, {width}] (the language model's width)."
                )
            if kind not in plan.counts and tensor.shape[0]:
                raise UsageError(f"{kind} {item} has features, but no place in the prompt.")


def splice(
    embed: Callable[[Tensor], Tensor],
    plan: SplicePlan,
    features: Mapping[str, Sequence[Tensor]],
    device: torch.device | str | None = None,
) -> Tensor:
    """Embed the text rows and put the media rows between them.

    Args:
        embed: the embedding *module*; called once with int64 ids [N_text], gives [N_text, D].
        plan: what goes where.
        features: for each kind of medium, the features of its items [rows, D]. Kinds that the
            plan does not know must have zero rows: they only join the graph.
        device: where the text ids go; by default the device of the first feature, else that of
            the embedding's parameters.

    Returns:
        Spliced embeddings in the dtype of the text embeddings; padding is zero. [B, L, D]

    Raises:
        UsageError: planned and actual rows or widths differ; the message names the item.
    """
    if device is None:
        tensors = [t for items in features.values() for t in items]
        parameters = iter(embed.parameters()) if isinstance(embed, torch.nn.Module) else iter(())
        first = next(iter(tensors), None)
        device = (first if first is not None else next(parameters)).device
        if device.type == "meta" and hasattr(embed, "_hf_hook"):
            device = torch.device("cpu")  # offloaded: accelerate's hook takes the ids from there
    text = embed(_upload(torch.from_numpy(plan.text_ids), torch.device(device)))
    _check(plan, features, text.shape[1])
    names = [(TEXT, 0)]
    tensors = []
    for kind, items in features.items():
        for item, tensor in enumerate(items):
            names.append((kind, item))
            tensors.append(tensor)
    return _Splice.apply(_Layout(plan, names), text, *tensors)
