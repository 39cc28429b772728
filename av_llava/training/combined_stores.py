"""Stores made of other stores: one behind the other, or some rows of one.

Contract: as of :class:`av_llava.training.store.SampleStore`; nothing is copied but row numbers.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from av_llava.training.readers import Reading
from av_llava.training.samples import Sample

if TYPE_CHECKING:
    from av_llava.training.store import SampleStore


class ChainedStore:
    """Several stores, one after the other."""

    def __init__(self, stores: Sequence[SampleStore]) -> None:
        self.stores = list(stores)
        self._ends = np.cumsum([len(s) for s in self.stores]).tolist()

    @property
    def sources(self) -> tuple[str, ...]:
        """The files of all of them, each once."""
        return tuple(dict.fromkeys(name for store in self.stores for name in store.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        store, inner = self._at(index)
        return store[inner]

    def reading(self, index: int) -> Reading:
        """One sample and the notes about its row."""
        store, inner = self._at(index)
        return store.reading(inner)

    def where(self, index: int) -> str:
        """File and line of a sample."""
        store, inner = self._at(index)
        return store.where(inner)

    def digest(self) -> str:
        """SHA-256 of the digests of all of them."""
        return _joined([store.digest() for store in self.stores])

    def _at(self, index: int) -> tuple[SampleStore, int]:
        index = range(len(self))[index]
        which = bisect.bisect_right(self._ends, index)
        return self.stores[which], index - (self._ends[which - 1] if which else 0)


class ChosenStore:
    """Some samples of a store, in an order, also more than once.

    Args:
        store: the samples.
        rows: int64 [n]: numbers of the chosen ones.
        weight: factor of the weight of each.
    """

    def __init__(self, store: SampleStore, rows: np.ndarray, weight: float = 1.0) -> None:
        self.store, self.rows, self.weight = store, np.asarray(rows, np.int64), weight

    @property
    def sources(self) -> tuple[str, ...]:
        """The files of the store."""
        return self.store.sources

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self._weighted(self.store[int(self.rows[index])])

    def reading(self, index: int) -> Reading:
        """One sample and the notes about its row."""
        reading = self.store.reading(int(self.rows[index]))
        return replace(reading, sample=self._weighted(reading.sample))

    def where(self, index: int) -> str:
        """File and line of a sample."""
        return self.store.where(int(self.rows[index]))

    def digest(self) -> str:
        """SHA-256 of the store's digest, of the choice, and of the weight."""
        chosen = hashlib.sha256(self.rows.tobytes()).hexdigest()
        return _joined([self.store.digest(), chosen, repr(self.weight)])

    def _weighted(self, sample: Sample) -> Sample:
        if self.weight == 1.0:
            return sample
        return replace(sample, weight=sample.weight * self.weight)


def _joined(digests: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
