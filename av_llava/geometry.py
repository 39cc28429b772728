"""Pure integer arithmetic of token counts: patches, pooled sides, audio frames to tokens.

Contract: no torch, no state; every other part that needs a count asks here, so that the number
of tokens is known before anything is decoded and is the same number everywhere.
"""

from __future__ import annotations

from av_llava.errors import UsageError

POOL_MODES = ("average", "max", "bilinear")


def pooled_side(side: int, stride: int, mode: str) -> int:
    """Length of one side of a patch grid after 2-D pooling.

    Average and max pooling drop the remainder (LLaVA-NeXT ``get_2dPool``), bilinear keeps it.
    """
    if stride <= 1:
        return side
    if mode == "bilinear":
        return -(-side // stride)
    if mode in ("average", "max"):
        if side < stride:
            raise UsageError(f"A grid side of {side} cannot be pooled with stride {stride}.")
        return side // stride
    raise UsageError(f"Unknown pooling mode {mode!r}. Known: {', '.join(POOL_MODES)}.")
