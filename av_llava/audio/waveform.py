"""Check a waveform once, where it enters: float samples, one channel, finite values.

Contract: what leaves here is a contiguous float32 tensor of shape [S] with finite values.
Digital silence and samples beyond ±1 pass unchanged; NaN and infinity become silence with a
warning, or an error when ``strict``.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from torch import Tensor

from av_llava.errors import MediaError, UsageError

logger = logging.getLogger(__name__)

Waveform = Tensor | np.ndarray


def check_waveform(waveform: Waveform, *, strict: bool = False, name: str = "the sound") -> Tensor:
    """Return ``waveform`` as a float32 tensor [S] on its own device.

    Args:
        waveform: float samples [S] of one channel, an array or a tensor.
        strict: refuse NaN and infinity instead of replacing them with silence.
        name: what the messages call it, e.g. the path of the file.

    Raises:
        UsageError: integers (their full scale is unknown here) or more than one channel.
        MediaError: no samples, or values that are not finite when ``strict``.
    """
    samples = torch.from_numpy(waveform) if isinstance(waveform, np.ndarray) else waveform
    if not samples.is_floating_point():
        raise UsageError(
            f"The samples of {name} are {samples.dtype}; give floating-point samples between -1 "
            "and 1 (16-bit integers divided by 32768)."
        )
    if samples.ndim != 1:
        raise UsageError(
            f"A waveform is one channel of shape [samples], but {name} has shape "
            f"{tuple(samples.shape)}; mix its channels into one first."
        )
    if samples.shape[0] == 0:
        raise MediaError(f"There are no samples in {name}; leave it out, or give a longer range.")
    samples = samples.to(torch.float32).contiguous()
    return _finite(samples, strict, name)


def _finite(samples: Tensor, strict: bool, name: str) -> Tensor:
    """Replace NaN and infinity by zeros, with a count in the message."""
    if math.isfinite(float(samples.sum())):  # 20 times cheaper than looking at each sample
        return samples
    bad = int((~torch.isfinite(samples)).sum())
    if not bad:
        return samples
    what = f"{bad} of {samples.shape[0]} samples of {name} are NaN or infinite"
    if strict:
        raise MediaError(f"{what}; decode the file again or repair it.")
    logger.warning("%s; they are replaced with silence.", what)
    return torch.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0)
