"""Batches by true length under a budget of tokens, the same plan on every rank.

Contract: a batch sampler for ``DataLoader(batch_sampler=…)`` that is rank-aware itself: it must
not be sharded again. What it yields is a pure function of (lengths, settings, seed, epoch), so a
resumed run skips batches by not asking for them, and nothing is decoded. All epochs have the same
number of batches, which is that of every rank. No sample is left out.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from av_llava.errors import DataError, UsageError
from av_llava.settings import check_choice, check_range
from av_llava.training.batch_plan import (
    BatchShape,
    EpochPlan,
    first_count,
    natural_count,
    plan_epoch,
    round_count,
)

logger = logging.getLogger(__name__)

Lengths = np.ndarray | Callable[[int], np.ndarray]
TOO_LONG = ("error", "alone")


class PlannedBatch(list[int]):
    """Indices of the samples of one batch, and the epoch that they are for.

    Worker processes that outlive an epoch learn it from here.
    """

    def __init__(self, indices: list[int], epoch: int, number: int) -> None:
        super().__init__(indices)
        self.epoch = epoch
        self.number = number
        """Place of the batch in its epoch, counted on each rank."""


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Yields the batches of one rank.

    Args:
        lengths: tokens of each sample as the model sees them [n], or a function of the epoch
            that gives them (see :mod:`av_llava.training.dataset` on modality dropout).
        max_tokens: padded tokens of a batch.
        max_samples: samples of a batch.
        world_size: number of ranks.
        rank: of this process.
        seed: of the order.
        shuffle: False keeps the order of the data set where lengths allow it.
        buffer: optimiser steps whose samples are sorted by length together.
        accumulation: batches of one rank in an optimiser step.
        too_long: a sample longer than ``max_tokens`` is an ``error``, or gets a batch ``alone``.
        epochs: how many there will be; needed only when lengths change with the epoch.

    Raises:
        DataError: no samples, a length below 1, or samples longer than the budget.
    """

    def __init__(
        self,
        lengths: Lengths,
        *,
        max_tokens: int,
        max_samples: int | None = None,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        buffer: int = 50,
        accumulation: int = 1,
        too_long: str = "error",
        epochs: int = 1,
    ) -> None:
        _check(max_tokens, max_samples, world_size, rank, buffer, accumulation, too_long, epochs)
        self.shape = BatchShape(max_tokens, max_samples, world_size, accumulation)
        self.rank, self.seed, self.shuffle, self.buffer = rank, seed, shuffle, buffer
        self.too_long = too_long
        self.epoch = 0
        self._given = lengths
        self._plan: tuple[int, EpochPlan] | None = None
        self.n_batches = self._count(epochs)
        if self.plan.n_repeated:
            logger.warning(
                "%d samples are too few for equally many batches on %d ranks: %d of them are used "
                "twice in each epoch.",
                len(self.plan.lengths), world_size, self.plan.n_repeated,
            )  # fmt: skip

    # ---------------------------------------------------------------- what loaders ask

    def __len__(self) -> int:
        """Batches of each rank in every epoch."""
        return self.n_batches // self.shape.world_size

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches(0)

    def batches(self, first: int) -> Iterator[list[int]]:
        """The batches of this rank and epoch from the one of that number on."""
        epoch, plan = self.epoch, self.plan
        for step in range(first, len(plan.steps)):
            yield PlannedBatch(plan.batch(step, self.rank), epoch, step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next ``iter()``."""
        if epoch < 0:
            raise UsageError(f"An epoch is counted from 0, not {epoch}.")
        self.epoch = epoch

    @property
    def batch_sampler(self) -> TokenBudgetBatchSampler:
        """This sampler: transformers' Trainer looks here for the ``set_epoch`` that it calls."""
        return self

    # ---------------------------------------------------------------- the plan

    @property
    def plan(self) -> EpochPlan:
        """The present epoch's plan."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = self.epoch, self._made(self.epoch)
        return self._plan[1]

    @property
    def n_too_long(self) -> int:
        """Samples that have a batch of their own because they are longer than the budget."""
        return int((self.plan.lengths > self.shape.max_tokens).sum())

    def lengths(self, epoch: int) -> np.ndarray:
        """Tokens of each sample in an epoch. int64 [n]"""
        given = self._given(epoch) if callable(self._given) else self._given
        lengths = np.asarray(given, np.int64)
        if lengths.ndim != 1 or not len(lengths):
            raise DataError("There are no samples to make batches of.")
        if lengths.min() < 1:
            first = int(np.flatnonzero(lengths < 1)[0])
            raise DataError(
                f"Sample {first} has a length of {lengths[first]} tokens; at least 1 is needed."
            )
        if self.too_long == "error" and lengths.max() > self.shape.max_tokens:
            over = np.flatnonzero(lengths > self.shape.max_tokens)
            raise DataError(
                f"{len(over)} samples are longer than max_tokens = {self.shape.max_tokens:,}: the "
                f"longest is sample {int(lengths.argmax())} with {lengths.max():,} tokens. Raise "
                f"max_tokens, use fewer frames, or give them batches of their own "
                f"(too_long='alone')."
            )
        return lengths

    def state_dict(self) -> dict[str, Any]:
        """What must be the same for a resumed run to see the same batches."""
        shape = vars(self.shape)
        digest = hashlib.sha256(np.ascontiguousarray(self.lengths(0)).tobytes()).hexdigest()
        own = {"seed": self.seed, "shuffle": self.shuffle, "buffer": self.buffer}
        return {**shape, **own, "n_batches": self.n_batches, "lengths": digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with a state that was saved.

        Raises:
            DataError: a setting or the data differ, so that batches would not be the same.
        """
        now = self.state_dict()
        for name, value in now.items():
            if state.get(name) != value:
                raise DataError(
                    f"The run to be resumed made its batches with {name} = {state.get(name)!r}, "
                    f"this one with {value!r}: batches would repeat and others be left out. "
                    f"Use the same data and settings, or start a new run from its weights."
                )

    def _count(self, epochs: int) -> int:
        """Batches of all ranks, the same in every epoch."""
        lengths = self.lengths(0)
        count = first_count(lengths, self.shape, self.buffer, self.seed, self.shuffle)
        if callable(self._given):
            later = (natural_count(self.lengths(e), self.shape) for e in range(1, epochs))
            count = max([count, *later])
        return round_count(count, len(lengths), self.shape)

    def _made(self, epoch: int) -> EpochPlan:
        plan = plan_epoch(
            self.lengths(epoch),
            self.shape,
            n_batches=self.n_batches,
            seed=self.seed,
            epoch=epoch,
            buffer=self.buffer,
            shuffle=self.shuffle,
        )
        if plan is None:
            raise UsageError(
                f"The samples of epoch {epoch} do not fit the {self.n_batches} batches that were "
                f"planned. Say how many epochs there will be (epochs)."
            )
        return plan


def _check(
    max_tokens: int,
    max_samples: int | None,
    world_size: int,
    rank: int,
    buffer: int,
    accumulation: int,
    too_long: str,
    epochs: int,
) -> None:
    check_range("max_tokens", max_tokens, 1)
    check_range("max_samples", max_samples, 1)
    check_range("world_size", world_size, 1)
    check_range("rank", rank, 0, world_size - 1)
    check_range("buffer", buffer, 1)
    check_range("accumulation", accumulation, 1)
    check_range("epochs", epochs, 1)
    check_choice("answer to samples that are too long", too_long, TOO_LONG)
