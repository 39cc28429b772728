"""Which samples make a batch, and which rank works on it when: one epoch as arrays.

Contract: pure numpy, a function of the lengths, the settings and (seed, epoch); every rank
computes the same plan. A batch costs its padded tokens: samples times the longest of them. Within
a buffer of shuffled samples, neighbours in length share a batch. Batches of equal cost stand in
one micro-step, one for each rank, so that no rank waits. No sample is left out; every rank gets
the same number of batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Sorting fewer samples than this leaves neighbours too different in length.
MIN_BUFFER_SAMPLES = 4096


@dataclass(frozen=True)
class BatchShape:
    """What a batch and a step may hold."""

    max_tokens: int
    """Padded tokens of one batch."""
    max_samples: int | None = None
    """Samples of one batch; None leaves only the tokens to limit them."""
    world_size: int = 1
    """Ranks that work side by side."""
    accumulation: int = 1
    """Batches of one rank in one optimiser step."""


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch: ``steps[s, r]`` is the batch of rank ``r`` in micro-step ``s``."""

    lengths: np.ndarray
    """int64 [n_samples], tokens of each sample."""
    order: np.ndarray
    """int64, samples batch after batch."""
    starts: np.ndarray
    """int64 [n_batches + 1], where each batch begins in ``order``."""
    steps: np.ndarray
    """int64 [n_steps, world_size], indices of batches."""
    n_repeated: int = 0
    """Samples that are used twice, because they are too few for as many batches on each rank."""

    def batch(self, step: int, rank: int) -> list[int]:
        """The samples of one rank in one micro-step."""
        number = self.steps[step, rank]
        return self.order[self.starts[number] : self.starts[number + 1]].tolist()

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [n_batches], samples of each batch."""
        return np.diff(self.starts)

    @cached_property
    def padded(self) -> np.ndarray:
        """int64 [n_batches], padded tokens of each batch."""
        return np.maximum.reduceat(self.lengths[self.order], self.starts[:-1]) * self.sizes

    @property
    def n_tokens(self) -> int:
        """Tokens of all samples, without padding."""
        return int(self.lengths[self.order].sum())

    @property
    def padding(self) -> float:
        """Share of padding in all batches."""
        return 1 - self.n_tokens / int(self.padded.sum())

    @property
    def idle(self) -> float:
        """Share of the ranks' time spent waiting for the slowest of each micro-step."""
        work = self.padded[self.steps]
        return 1 - float(work.sum() / (work.max(axis=1).sum() * work.shape[1]))

    @property
    def waste(self) -> float:
        """Share of the ranks' time without use: padding and waiting together."""
        work = self.padded[self.steps]
        return 1 - self.n_tokens / float(work.max(axis=1).sum() * work.shape[1])


def natural_count(lengths: np.ndarray, shape: BatchShape) -> int:
    """The fewest batches that hold all samples."""
    ordered = np.sort(lengths)[::-1]
    return len(_cut(ordered.tolist(), shape.max_tokens, shape.max_samples, len(ordered))) - 1


def buffer_samples(lengths: np.ndarray, shape: BatchShape, buffer: int) -> int:
    """How many samples ``buffer`` optimiser steps hold, at least `MIN_BUFFER_SAMPLES`."""
    per_batch = max(1.0, shape.max_tokens / max(1.0, float(lengths.mean())))
    if shape.max_samples is not None:
        per_batch = min(per_batch, shape.max_samples)
    step = shape.world_size * shape.accumulation
    return max(MIN_BUFFER_SAMPLES, int(buffer * step * per_batch))


def round_count(n_batches: int, n_samples: int, shape: BatchShape) -> int:
    """Batches of an epoch, so that all ranks and, if possible, all optimiser steps are full."""
    for step in (shape.world_size * shape.accumulation, shape.world_size):
        count = -(-n_batches // step) * step
        if count <= n_samples:
            return count
    return -(-n_batches // shape.world_size) * shape.world_size


def first_count(
    lengths: np.ndarray, shape: BatchShape, buffer: int, seed: int, shuffle: bool
) -> int:
    """Batches of the first epoch, before rounding."""
    order = _buffered(lengths, buffer_samples(lengths, shape, buffer), _generator(seed, 0), shuffle)
    size = buffer_samples(lengths, shape, buffer)
    return len(_cut(lengths[order].tolist(), shape.max_tokens, shape.max_samples, size)) - 1


def plan_epoch(
    lengths: np.ndarray,
    shape: BatchShape,
    *,
    n_batches: int,
    seed: int,
    epoch: int,
    buffer: int = 50,
    shuffle: bool = True,
) -> EpochPlan | None:
    """Plan one epoch in exactly ``n_batches`` batches.

    Args:
        lengths: int64 [n], tokens of each sample, at least 1; longer ones than the budget get a
            batch of their own.
        shape: budget and step.
        n_batches: a multiple of the world size.
        seed, epoch: choose the order.
        buffer: optimiser steps whose samples are sorted together.
        shuffle: False keeps the order of the data set where lengths allow it.

    Returns:
        The plan, or None when the samples do not fit so few batches.
    """
    rng = _generator(seed, epoch)
    lengths = np.asarray(lengths, np.int64)
    n_repeated = max(0, n_batches - len(lengths))
    size = buffer_samples(lengths, shape, buffer)
    while True:
        order = _buffered(lengths, size, rng, shuffle)
        if n_repeated:
            order = np.resize(order, n_batches)
            order = order[np.argsort(-lengths[order], kind="stable")]
        cuts = _cut_into(lengths[order].tolist(), shape, size, n_batches)
        if cuts is not None:
            break
        if size >= len(lengths):
            return None
        size *= 2
    starts = np.asarray(_split(cuts, lengths[order], n_batches), np.int64)
    padded = np.maximum.reduceat(lengths[order], starts[:-1]) * np.diff(starts)
    steps = _arranged(padded, order[starts[:-1]], shape, rng, shuffle, first=epoch == 0)
    return EpochPlan(lengths, order, starts, steps, n_repeated)


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, epoch])


def _buffered(
    lengths: np.ndarray, size: int, rng: np.random.Generator, shuffle: bool
) -> np.ndarray:
    """Samples in random order, each buffer of ``size`` sorted from long to short."""
    n = len(lengths)
    order = rng.permutation(n) if shuffle else np.arange(n)
    return order[np.lexsort((-lengths[order], np.arange(n) // size))]


def _cut(lengths: list[int], budget: int, most: int | None, size: int) -> list[int]:
    """Cut lengths, falling within each buffer of ``size``, into batches; where each begins."""
    cuts, at, n = [0], 0, len(lengths)
    most = n if most is None else most
    while at < n:
        count = min(max(budget // lengths[at], 1), most, size - at % size, n - at)
        at += count
        cuts.append(at)
    return cuts


def _cut_into(lengths: list[int], shape: BatchShape, size: int, n_batches: int) -> list[int] | None:
    """Cut into at most ``n_batches``, with the smallest budget that allows it.

    So all batches are about equally full, instead of all but the last ones.
    """
    cuts = _cut(lengths, shape.max_tokens, shape.max_samples, size)
    if len(cuts) - 1 > n_batches:
        return None
    low, high = 0, shape.max_tokens  # too small, large enough
    while high - low > max(1, high // 1024):
        middle = (low + high) // 2
        tried = _cut(lengths, middle, shape.max_samples, size)
        if len(tried) - 1 > n_batches:
            low = middle
        else:
            high, cuts = middle, tried
    return cuts


def _split(cuts: list[int], lengths: np.ndarray, n_batches: int) -> list[int]:
    """Halve the fullest batches until there are ``n_batches``."""
    while (missing := n_batches - (len(cuts) - 1)) > 0:
        starts = np.asarray(cuts, np.int64)
        sizes = np.diff(starts)
        cost = np.where(sizes > 1, lengths[starts[:-1]] * sizes, 0)
        chosen = np.argsort(-cost, kind="stable")[:missing]
        chosen = chosen[sizes[chosen] > 1]
        middles = starts[chosen] + sizes[chosen] // 2
        cuts = np.sort(np.concatenate([starts, middles])).tolist()
    return cuts


def _arranged(
    padded: np.ndarray,
    leaders: np.ndarray,
    shape: BatchShape,
    rng: np.random.Generator,
    shuffle: bool,
    first: bool,
) -> np.ndarray:
    """Put batches of like cost into micro-steps and give them to ranks. [n_steps, world_size]

    Args:
        padded: cost of each batch.
        leaders: a sample of each batch, which orders them when nothing is shuffled.
        shape: the step.
        rng, shuffle: the order of the steps.
        first: put the heaviest step first, so that running out of memory shows at once.
    """
    world = shape.world_size
    ties = rng.permutation(len(padded)) if shuffle else np.argsort(leaders, kind="stable")
    by_cost = ties[np.argsort(-padded[ties], kind="stable")] if shuffle or world > 1 else ties
    steps = by_cost.reshape(-1, world)
    if shuffle:
        order = rng.permutation(len(steps))
        if first:
            order = np.concatenate([[0], order[order != 0]])
        steps = steps[order]
    elif world > 1:
        steps = steps[np.argsort(leaders[steps].min(axis=1), kind="stable")]
    return _balanced(steps, padded, shape.accumulation, rng)


def _balanced(
    steps: np.ndarray, padded: np.ndarray, accumulation: int, rng: np.random.Generator
) -> np.ndarray:
    """Choose ranks so that each has done equal work after every optimiser step."""
    n_steps, world = steps.shape
    if world == 1:
        return steps
    out = np.empty_like(steps)
    n_groups = -(-n_steps // accumulation)
    done = rng.random((n_groups, world))  # below one token: breaks ties between ranks
    for k in range(accumulation):
        rows = steps[k::accumulation]  # from heavy to light
        rows = np.take_along_axis(rows, np.argsort(-padded[rows], axis=1, kind="stable"), axis=1)
        ranks = np.argsort(done[: len(rows)], axis=1, kind="stable")
        placed = np.empty_like(rows)
        np.put_along_axis(placed, ranks, rows, axis=1)
        out[k::accumulation] = placed
        done[: len(rows)] += padded[placed]
    return out
