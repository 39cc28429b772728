"""Normalisation of levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from av_llava.errors import UsageError
from av_llava.settings import CLIP_MEAN, CLIP_STD
from av_llava.vision import normalize_pixels

HALF = (0.5, 0.5, 0.5)


def reference(pixels: torch.Tensor, mean, std) -> np.ndarray:
    """Rescale and normalise as the numpy image processors of transformers 4 do."""
    image = (pixels.numpy() * 0.00392156862745098).astype(np.float32)
    mean, std = (np.array(v, dtype=image.dtype)[:, None, None] for v in (mean, std))
    return (image - mean) / std


@pytest.fixture(scope="module")
def levels() -> torch.Tensor:
    """Every level in every channel. [2, 3, 16, 16]"""
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    return torch.cat((ramp, ramp.flip(-1))).expand(2, 3, 16, 16)


@pytest.mark.parametrize(("mean", "std"), [(CLIP_MEAN, CLIP_STD), (HALF, HALF), (HALF, CLIP_STD)])
def test_every_level_is_bit_for_bit_the_reference(levels, mean, std):
    ours = normalize_pixels(levels, mean, std, torch.float32)
    assert np.array_equal(ours.numpy(), reference(levels, mean, std))


def test_the_memory_layout_does_not_matter(levels):
    frames = levels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    ours = normalize_pixels(frames, CLIP_MEAN, CLIP_STD, torch.float32)
    assert torch.equal(ours, normalize_pixels(levels, CLIP_MEAN, CLIP_STD, torch.float32))
    assert ours.is_contiguous()


def test_half_precision_is_rounded_once(levels):
    exact = normalize_pixels(levels, CLIP_MEAN, CLIP_STD, torch.float32)
    half = normalize_pixels(levels, CLIP_MEAN, CLIP_STD, torch.bfloat16)
    assert torch.equal(half, exact.to(torch.bfloat16))


def test_floats_are_only_cast():
    pixels = torch.randn(1, 3, 4, 4)
    assert normalize_pixels(pixels, CLIP_MEAN, CLIP_STD, torch.float32) is pixels
    half = normalize_pixels(pixels, CLIP_MEAN, CLIP_STD, torch.float16)
    assert torch.equal(half, pixels.half())


def test_the_input_is_left_alone(levels):
    before = levels.clone()
    normalize_pixels(levels, CLIP_MEAN, CLIP_STD, torch.float32)
    assert torch.equal(levels, before)


def test_wrong_pixels_are_refused(levels):
    with pytest.raises(UsageError, match="int64"):
        normalize_pixels(levels.long(), HALF, HALF, torch.float32)
    with pytest.raises(UsageError, match=r"\[2, 16, 16, 3\]"):
        normalize_pixels(levels.permute(0, 2, 3, 1), HALF, HALF, torch.float32)
