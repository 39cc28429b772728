"""What is measured while training: tokens, waiting for data, bad media, losses that are no number.

Contract: adding costs microseconds and never waits for a device; sums are taken (over ranks, too)
when they are logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from av_llava.errors import DataError
from av_llava.training.collate import BatchInfo

Gather = Callable[[Tensor], Tensor]
"""From [n] on each rank to [ranks, n]."""

_SHOWN_IDS = 8
_VALUES_KEPT = 32


@dataclass
class Meters:
    """Sums since the last log."""

    tokens: int = 0
    """Without padding."""
    padded: int = 0
    supervised: int = 0
    samples: int = 0
    bad: int = 0
    wait_s: float = 0.0
    """Time that the training process waited for batches."""
    read_s: float = 0.0
    """Time that workers took to make them."""
    rss_bytes: int = 0
    """Largest memory of a worker."""
    started: float = field(default_factory=time.perf_counter)
    n_bad: int = 0
    """Bad media since the run began."""

    def add(self, info: BatchInfo) -> None:
        """Take note of a batch."""
        self.tokens += sum(info.lengths)
        self.padded += info.padded
        self.supervised += sum(info.supervised)
        self.samples += len(info.ids)
        self.bad += len(info.bad)
        self.read_s += info.seconds
        self.rss_bytes = max(self.rss_bytes, info.rss_bytes)

    def take(self, gather: Gather | None = None) -> dict[str, float]:
        """Return the figures of all ranks since the last call, and begin anew."""
        now = time.perf_counter()
        own = [self.tokens, self.padded, self.supervised, self.samples, self.bad, self.wait_s,
               now - self.started, self.rss_bytes]  # fmt: skip
        rows = torch.tensor([own], dtype=torch.float64)
        if gather is not None:
            rows = gather(rows.float()).double()
        tokens, padded, supervised, samples, bad = rows[:, :5].sum(0).tolist()
        seconds = max(rows[:, 6].max().item(), 1e-9)
        self.n_bad += round(bad)
        out = {
            "tokens_per_s": round(tokens / seconds, 1),
            "samples_per_s": round(samples / seconds, 3),
            "supervised_tokens": supervised,
            "padding": round(1 - tokens / padded, 4) if padded else 0.0,
            "data_wait": round((rows[:, 5] / seconds).max().item(), 4),
            "bad_media": self.n_bad,
            "worker_rss_mb": round(rows[:, 7].max().item() / 1e6, 1),
        }
        self.tokens = self.padded = self.supervised = self.samples = self.bad = 0
        self.wait_s = self.read_s = 0.0
        self.rss_bytes = 0
        self.started = now
        return out


class LossWatch:
    """Stops a run whose loss or gradient is no number, and says for which samples.

    Args:
        at_once: look at every value at once, which waits for the device; else at some together.
    """

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once
        self._values: list[tuple[str, Any, BatchInfo | None, int]] = []
        self._last: BatchInfo | None = None

    def add(self, loss: Tensor, info: BatchInfo, step: int) -> None:
        """Take note of a loss.

        Raises:
            DataError: it, or a value before, is no number.
        """
        self._last = info
        self._add("loss", loss.detach(), info, step)

    def add_norm(self, norm: Any, step: int) -> None:
        """Take note of the norm of a step's gradients.

        Raises:
            DataError: it, or a value before, is no number.
        """
        if norm is not None:
            self._add("gradient norm", norm, self._last, step)

    def _add(self, what: str, value: Any, info: BatchInfo | None, step: int) -> None:
        self._values.append((what, value, info, step))
        if self.at_once or len(self._values) >= _VALUES_KEPT:
            self.check()

    def check(self) -> None:
        """Look at what was added.

        Raises:
            DataError: see :meth:`add`.
        """
        if not self._values:
            return
        kept, self._values = self._values, []
        values = torch.stack([torch.as_tensor(v).float() for _, v, _, _ in kept]).tolist()
        for value, (what, _, info, step) in zip(values, kept, strict=True):
            if not math.isfinite(value):
                whose = f", for {named(info)}" if info is not None else ""
                raise DataError(
                    f"The {what} of step {step} is {value}{whose}. Nothing was saved of it: the "
                    f"last checkpoint is from before. Look at these samples; if they are right, "
                    f"lower the learning rate, or use bf16 rather than fp16."
                )


def check_supervised(info: BatchInfo) -> None:
    """Refuse samples of which nothing would be learned.

    Raises:
        DataError: a sample has no supervised token.
    """
    for i, n in enumerate(info.supervised):
        if n == 0:
            raise DataError(
                f"{info.sources[i]}: nothing of the sample {info.ids[i]!r} is learned: it has no "
                f"answer of the assistant. Give it one, or leave it out."
            )


def named(info: BatchInfo) -> str:
    """The samples of a batch, for messages."""
    both: Sequence[tuple[str, str]] = list(zip(info.ids, info.sources, strict=True))
    shown = ", ".join(f"{i!r} ({s})" if s else repr(i) for i, s in both[:_SHOWN_IDS])
    more = f" and {len(both) - _SHOWN_IDS} more" if len(both) > _SHOWN_IDS else ""
    return f"{'sample' if len(both) == 1 else 'samples'} {shown}{more}"
