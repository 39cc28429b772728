"""What to do when the memory of a GPU ran out: the largest setting that would likely fit.

Contract: an estimate, and said to be one. Memory beyond the weights grows at least in proportion
to the frames (each brings its tokens through every layer), so what failed at n frames fits at
n × room / need frames; the size that could not be had counts into the need.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from av_llava.cli.options import Request

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SAFETY = 0.8
"""Share of the estimate that is recommended: fragmentation, and other programs on the GPU."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    total: int
    weights: int
    peak: int
    """Most that was held at once, weights included."""


def asked_bytes(message: str) -> int:
    """Read from torch's message how much was asked for last; 0 if it does not say."""
    match = re.search(r"Tried to allocate ([\d.]+) (\w+)", message)
    if match is None or match[2] not in _UNITS:
        return 0
    return round(float(match[1]) * _UNITS[match[2]])


def scale(memory: Memory, asked: int) -> float:
    """Return the share of the request that would likely fit, above 0 and at most a half."""
    need = max(memory.peak - memory.weights, 0) + asked
    room = max(memory.total - memory.weights, 0)
    if need <= 0:
        return 0.5
    # The true need is larger than what was reached, so at most half is recommended.
    return min(0.5, SAFETY * room / need)


def advice(message: str, memory: Memory | None, frames: int | None, request: Request) -> str:
    """Say what ran out and what would likely fit.

    Args:
        message: of the error.
        memory: of the GPU, or None where it is not known.
        frames: that the request allowed, or None.
        request: the options of the request.
    """
    first = message.strip().splitlines()[0] if message.strip() else "out of memory"
    share = 0.5 if memory is None else scale(memory, asked_bytes(message))
    said = f"The request does not fit into memory ({first.rstrip('.')})."
    if request.max_visual_tokens is not None:
        fitting = max(1, int(request.max_visual_tokens * share))
        return f"{said} Likely to fit: --max-visual-tokens {fitting}."
    if frames is not None and frames > 1:
        return f"{said} Likely to fit: --frames {max(1, int(frames * share))}."
    return f"{said} Use a smaller dtype, a shorter span (--start, --end), or a larger device."
