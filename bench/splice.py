"""The splice against a plain copy of its output, LLaVA's way and transformers' way.

Every contestant makes the embeddings of a batch from ids and the same features; each sample has
seven pieces of text (6 %), two videos, two sounds and two images, and samples differ in length by
up to 30 %. The reference is ``torch.empty_like(out).copy_(out)``: allocating and writing the same
bytes once, which is the least that any splice can do. One thread, bfloat16. With the backward
pass, the gradients of all features and text rows are made; that of the table would be the same
for all.

glibc gives large buffers back to the system when they are freed, and then every new one pays for
page faults, seven times the copy itself. So there are two passes, each in its own process: with
pages kept, where the work is seen, and with glibc's defaults, where most of the time is faults.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from av_llava.splice import Segment, SplicePlan, splice
from bench.measure import (
    Contestants,
    Row,
    check,
    in_child,
    print_rows,
    race,
    rows_of,
    single_threaded,
)

TITLE = "Splice"
RATIO = "× copy"
VOCAB = 32_000
MEDIA_IDS = {"video": VOCAB - 1, "audio": VOCAB - 2, "image": VOCAB - 3}
PAD_ID = 0
COPY, OURS, OURS_IDS = "copy of the output", "av_llava", "av_llava, plan from ids too"
LOOP, SCATTER = "concatenation loop (LLaVA)", "masked_scatter (transformers)"
SHAPES = ((1, 8192), (1, 32_768), (4, 8192), (16, 2048))
FORWARD_BOUND = {3584: 1.5, 896: 2.2}
BACKWARD_BOUND = {3584: 2.5, 896: 3.8}
MEMORY_BOUND = 1.1
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
ALLOCATORS = {"pages kept": KEPT, "malloc defaults": {}}

Embed = Callable[[Tensor], Tensor]


@dataclass
class Batch:
    """One batch in the forms that the contestants take, and its features."""

    plan: SplicePlan
    sentinel_ids: Tensor
    """One -200 a medium, padded with 0. [B, S]"""
    mask: Tensor
    """True on content of ``sentinel_ids``. [B, S]"""
    expanded_ids: Tensor
    """One id a row, padded with ``PAD_ID``. [B, L]"""
    items: list[list[tuple[str, int]]]
    features: dict[str, list[Tensor]]
    table: Tensor
    """Embedding matrix, frozen. [V, D]"""

    @property
    def in_order(self) -> list[Tensor]:
        """Features in the order of the prompts."""
        return [self.features[kind][item] for row in self.items for kind, item in row]

    def embed(self, ids: Tensor) -> Tensor:
        """Look ids up."""
        return F.embedding(ids, self.table)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; the plan stays on the host."""
        features = {k: [t.to(device) for t in items] for k, items in self.features.items()}
        tensors = [
            t.to(device) for t in (self.sentinel_ids, self.mask, self.expanded_ids, self.table)
        ]
        ids, mask, expanded, table = tensors
        return Batch(self.plan, ids, mask, expanded, self.items, features, table)


def make_batch(width: int, n_samples: int, length: int, seed: int = 0) -> Batch:
    """Make a batch whose longest sample has ``length`` rows."""
    rng = np.random.default_rng(seed)
    counts: dict[str, list[int]] = {"video": [], "audio": [], "image": []}
    items: list[list[tuple[str, int]]] = []
    samples, ids = [], []
    for i in range(n_samples):
        rows = length - int(0.3 * length * i / max(n_samples - 1, 1))
        chunks = [rng.integers(1, VOCAB - 3, n) for n in _shares(int(0.06 * rows), 7)]
        sizes = {"image": max(rows // 20, 1), "audio": max(rows // 40, 1)}
        left = rows - sum(map(len, chunks)) - 2 * sum(sizes.values())
        videos = _shares(left, 2)
        parts: list = [(chunks[0], None)]
        flat, own = [chunks[0]], []
        for slot, kind in enumerate(("video", "audio", "image") * 2):
            n = videos[slot // 3] if kind == "video" else sizes[kind]
            own.append((kind, len(counts[kind])))
            parts += [Segment(kind, len(counts[kind]), 0, n), (chunks[slot + 1], None)]
            flat += [np.array([-200]), chunks[slot + 1]]
            counts[kind].append(n)
        samples.append(parts)
        items.append(own)
        ids.append(torch.from_numpy(np.concatenate(flat)))
    plan = SplicePlan.build(samples, counts)
    sentinel_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    new = partial(torch.empty, dtype=torch.bfloat16)
    return Batch(
        plan,
        sentinel_ids,
        mask.bool(),
        plan.input_ids(MEDIA_IDS, PAD_ID),
        items,
        {k: [new(n, width).normal_() for n in sizes] for k, sizes in counts.items()},
        new(VOCAB, width).normal_(),
    )


def _shares(total: int, n: int) -> list[int]:
    return [total * (i + 1) // n - total * i // n for i in range(n)]


def ours(batch: Batch, embed: Embed) -> Tensor:
    """The library, as the model calls it: the processor has made the plan."""
    return splice(embed, batch.plan, batch.features)


def ours_from_ids(batch: Batch, embed: Embed) -> Tensor:
    """The library through the LLaVA-compatible door: the plan is made from ids each time."""
    counts = {kind: [len(f) for f in items] for kind, items in batch.features.items()}
    plan = SplicePlan.from_ids(batch.sentinel_ids, batch.items, counts, attention_mask=batch.mask)
    return splice(embed, plan, batch.features)


def concatenation_loop(batch: Batch, embed: Embed) -> Tensor:
    """Sample by sample: split ids at sentinels, concatenate, pad, stack."""
    features = iter(batch.in_order)
    rows = []
    for padded, mask in zip(batch.sentinel_ids, batch.mask, strict=True):
        ids = padded[mask]
        cuts = [-1, *torch.where(ids == -200)[0].tolist(), len(ids)]
        chunks = [ids[a + 1 : b] for a, b in pairwise(cuts)]
        texts = embed(torch.cat(chunks)).split([len(c) for c in chunks])
        parts = [texts[0]]
        for text in texts[1:]:
            parts += [next(features), text]
        rows.append(torch.cat(parts))
    longest = max(map(len, rows))
    padding = [row.new_zeros(longest - len(row), row.shape[1]) for row in rows]
    return torch.stack([torch.cat(pair) for pair in zip(rows, padding, strict=True)])


def masked_scatter(batch: Batch, embed: Embed) -> Tensor:
    """Embed all ids, then scatter each kind of medium over its placeholder ids."""
    out = embed(batch.expanded_ids)
    for kind, media_id in MEDIA_IDS.items():
        values = torch.cat(batch.features[kind])
        mask = batch.expanded_ids == media_id
        if mask.sum() * out.shape[-1] != values.numel():
            raise ValueError("placeholders and features do not match")
        out = out.masked_scatter(mask.unsqueeze(-1), values)
    return out


METHODS = {OURS: ours, OURS_IDS: ours_from_ids, LOOP: concatenation_loop, SCATTER: masked_scatter}


def copied(out: Tensor) -> Tensor:
    """Allocate and write the same bytes."""
    return torch.empty_like(out).copy_(out)


def forward(batch: Batch, method: Callable[[Batch, Embed], Tensor]) -> Tensor:
    """Embeddings without a graph."""
    with torch.no_grad():
        return method(batch, batch.embed)


def forward_backward(
    batch: Batch, method: Callable[[Batch, Embed], Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of all features and text rows."""
    leaves: list[Tensor] = []

    def embed(ids: Tensor) -> Tensor:
        leaves.append(batch.embed(ids).requires_grad_())
        return leaves[-1]

    out = method(batch, embed)
    return torch.autograd.grad(out, [*batch.in_order, *leaves], grad)


def agree(batch: Batch, gradients: bool) -> Tensor:
    """Check that all methods give equal values (on content; others pad differently).

    Args:
        batch: what is spliced; its features will require gradients.
        gradients: compare those too.

    Returns:
        The spliced embeddings.
    """
    expected = forward(batch, concatenation_loop)
    content = batch.plan.attention_mask().bool()
    for name, method in METHODS.items():
        rows = content if name == SCATTER else ...
        check(torch.equal(forward(batch, method)[rows], expected[rows]), f"splice, {name}")
    for tensor in batch.in_order:
        tensor.requires_grad_()
    if gradients:
        n = len(batch.in_order)
        wanted = forward_backward(batch, concatenation_loop, expected)[:n]
        for name, method in METHODS.items():
            pairs = zip(forward_backward(batch, method, expected)[:n], wanted, strict=True)
            check(all(torch.equal(a, b) for a, b in pairs), f"gradients of the splice, {name}")
    return expected


@single_threaded
def time_rows(allocator: str, quick: bool) -> list[Row]:
    """Forward, and forward with backward, of all shapes in this process."""
    agree(make_batch(64, 3, 512), gradients=True)
    rows = []
    for width in (64, 32) if quick else (3584, 896):
        for n_samples, length in ((2, 512),) if quick else SHAPES:
            batch = make_batch(width, n_samples, length)
            out = agree(batch, gradients=False)
            where = f"{n_samples}×{length}×{width}, {allocator}"
            rows += timed(batch, out, where, quick)
    return rows


def timed(batch: Batch, out: Tensor, where: str, quick: bool) -> list[Row]:
    """Both passes of one batch whose spliced embeddings are ``out``."""
    rows = []
    for passes, bounds in (("forward", FORWARD_BOUND), ("forward+backward", BACKWARD_BOUND)):
        runs: Contestants = {COPY: partial(copied, out)}
        for name, method in METHODS.items():
            alone = partial(forward, batch, method)
            both = partial(forward_backward, batch, method, out)
            runs[name] = alone if passes == "forward" else both
        if "kept" not in where:
            del runs[SCATTER]  # minutes, and the other pass shows what it is like
        timings = race(
            {COPY: partial(copied, out)} | runs,
            rounds=2 if quick else 25,
            seconds=0.5,
            min_rounds=1,
        )
        width = out.shape[-1]
        bound = {OURS: bounds[width]} if width in bounds else {}
        rows += rows_of(f"{passes}, {where}", timings, COPY, bounds=bound)
    return rows


@single_threaded
def peak_extra_bytes(name: str, width: int, n_samples: int, length: int) -> tuple[int, int]:
    """Bytes of the output, and by how much the peak of resident memory rises to make it."""
    small = make_batch(8, n_samples, 64)
    forward(small, METHODS[name])  # whatever is made once
    batch = make_batch(width, n_samples, length)
    batch.table[0, 0].item()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    if _resident("VmHWM") - before > 1 << 22:
        raise RuntimeError("the peak of resident memory cannot be reset here")
    out = forward(batch, METHODS[name])
    return out.nbytes, _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes of a memory field of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def memory_rows(quick: bool) -> list[Row]:
    """Peak extra memory, each contestant in a process of its own (Linux only)."""
    if not Path("/proc/self/clear_refs").exists():
        return []
    shape = (1792, 2, 4096) if quick else (3584, 4, 8192)
    case = f"peak extra memory, forward, {shape[1]}×{shape[2]}×{shape[0]}"
    rows = []
    for name in METHODS:
        size, peak = in_child("bench.splice", ["memory", name, *map(str, shape)])
        bound = MEMORY_BOUND if name == OURS else None
        rows.append(Row(case, name, peak / 1e6, peak / 1e6, "MB", peak / size, "cost", bound))
    return rows


def run(quick: bool) -> list[Row]:
    """All rows."""
    rows = []
    for allocator, env in ALLOCATORS.items():
        found = in_child("bench.splice", ["time", allocator, *(["quick"] if quick else [])], env)
        rows += [Row(**row) for row in found]
    return rows + memory_rows(quick)


def main(arguments: list[str]) -> None:
    """Run one part in this process and print JSON."""
    if arguments[0] == "memory":
        print(list(peak_extra_bytes(arguments[1], *map(int, arguments[2:]))))
    else:
        print_rows(time_rows(arguments[1], "quick" in arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
