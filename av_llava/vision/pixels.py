"""From colour levels to the numbers that a tower was trained on.

Contract: this is the one place where the model normalises pixels, on the device where they are.
On the CPU in float32 the result is bit for bit that of the image processors that published
checkpoints were made with (scale to 0..1, subtract the mean, divide by the deviation).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from av_llava.errors import UsageError


def normalize_pixels(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Normalise uint8 colour levels; pixels that are floats already are only cast.

    The arithmetic is done in float32 whatever ``dtype`` is: in bfloat16 alone the 256 levels
    would fall together. The channels are scalars, so nothing is copied to the device for them.

    Args:
        pixels: [..., 3, H, W] uint8, or float and already normalised.
        mean: of each channel, for pixels scaled to 0..1.
        std: of each channel, for pixels scaled to 0..1.
        dtype: of the result.

    Raises:
        UsageError: when the pixels are integers other than uint8, or not in three channels.
    """
    if pixels.is_floating_point():
        return pixels.to(dtype)
    if pixels.dtype != torch.uint8:
        raise UsageError(
            f"Pixels must be uint8 levels or normalised floats, not {pixels.dtype}; "
            "give the frames as they were decoded."
        )
    if pixels.ndim < 3 or pixels.shape[-3] != 3:
        raise UsageError(f"Pixels must be [..., 3, height, width], not {list(pixels.shape)}.")
    # One contiguous copy, then in place: the convolution wants whole channels anyway.
    out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    out.copy_(pixels).div_(255)
    if len(set(mean)) == 1 and len(set(std)) == 1:
        return out.sub_(mean[0]).div_(std[0]).to(dtype)
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        out.select(-3, channel).sub_(m).div_(s)
    return out.to(dtype)
