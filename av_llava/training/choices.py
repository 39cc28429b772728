"""Random numbers without a generator: a hash of (seed, epoch, sample, purpose).

Contract: every rank and every worker process gets the same number for the same sample, whatever
was drawn before, and in whatever order samples are read.
"""

from __future__ import annotations

import zlib

import numpy as np

_STEP, _FIRST, _SECOND = (
    np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def hashed(seed: int, epoch: int, samples: np.ndarray | int, purpose: str) -> np.ndarray:
    """Hash sample numbers (splitmix64, Steele and others 2014).

    Args:
        seed, epoch: of the run.
        samples: sample numbers [n], or one.
        purpose: what the number is for, so that choices do not depend on each other.

    Returns:
        uint64 [n], evenly spread.
    """
    state = np.atleast_1d(np.asarray(samples)).astype(np.uint64)
    for word in (seed & 0xFFFFFFFFFFFFFFFF, epoch, zlib.crc32(purpose.encode())):
        state = _mixed(state ^ _mixed(np.full_like(state, word)))
    return state


def fractions(seed: int, epoch: int, samples: np.ndarray | int, purpose: str) -> np.ndarray:
    """Like :func:`hashed`, as float64 in [0, 1). [n]"""
    return (hashed(seed, epoch, samples, purpose) >> np.uint64(11)) * 2.0**-53


def _mixed(state: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # numbers are meant to wrap around
        state = state + _STEP
        state = (state ^ (state >> np.uint64(30))) * _FIRST
        state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))
