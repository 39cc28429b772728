"""Multi-scale CLIP."""

from __future__ import annotations

import pytest
import torch
from golden_data import COMPACT, FULL
from safetensors.torch import load_file
from torch.nn import functional as F

from av_llava.errors import UsageError
from av_llava.vision import ClipTower

from .tiny import tiny_clip, tower_from

FOLDERS = [f for r in (COMPACT, FULL) if (f := r / "llava" / "tower_clip_s2").exists()]


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_features_agree_with_the_reference(folder):
    inputs, outputs = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "outputs"))
    assert outputs
    for key, wanted in outputs.items():
        scales = tuple(int(s) for s in key.split(","))
        tower = tower_from(folder / "clip", kind="clip_s2", s2_scales=scales)
        torch.testing.assert_close(tower(inputs[key]), wanted, atol=1e-5, rtol=0)
        assert tower.hidden_size == wanted.shape[-1]


def slow(tower, pixels):
    """One square after another, without any rearrangement."""
    columns = []
    for scale in tower.scales:
        split, side = scale // 56, 4
        resized = F.interpolate(pixels.float(), (scale, scale), mode="bicubic")
        board = torch.zeros(len(pixels), 16, split * side, split * side)
        for i in range(split):
            for j in range(split):
                square = resized[:, :, i * 56 : i * 56 + 56, j * 56 : j * 56 + 56]
                features = ClipTower.encode(tower, square).transpose(1, 2).unflatten(2, (4, 4))
                board[:, :, i * side : i * side + side, j * side : j * side + side] = features
        pooled = board.unflatten(2, (side, split)).unflatten(4, (side, split)).mean((3, 5))
        columns.append(pooled)
    return torch.cat(columns, 1).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("batch", [1, 64])
def test_features_are_those_of_square_by_square(batch):
    tower = tiny_clip(kind="clip_s2", s2_scales=(56, 112, 168))
    pixels = torch.randn(3, 3, 168, 168)
    with torch.no_grad():
        wanted = slow(tower, pixels)
    torch.testing.assert_close(tower(pixels, max_batch=batch), wanted, atol=1e-5, rtol=0)


def test_the_inner_model_never_sees_more_squares_than_allowed():
    tower = tiny_clip(kind="clip_s2", s2_scales=(56, 112))
    sizes = []
    tower.vision_tower.embeddings.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    tower(torch.randn(5, 3, 112, 112), max_batch=8)
    assert max(sizes) == 8 and sum(sizes) == 5 * (1 + 4)


def test_levels_are_scaled_after_normalisation_in_float32():
    tower = tiny_clip(kind="clip_s2", s2_scales=(56, 112))
    levels = torch.randint(0, 256, (1, 3, 112, 112), dtype=torch.uint8)
    assert torch.equal(tower(levels), tower(tower.normalize(levels, torch.float32)))
    half = tower.to(torch.bfloat16)(levels)
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_counts():
    tower = tiny_clip(kind="clip_s2", s2_scales=(112, 56))
    assert tower.scales == (56, 112)
    assert (tower.input_size, tower.image_size, tower.grid) == (112, 56, (4, 4))
    assert tower.hidden_size == 32 and tower.num_patches == 16


def test_slices_and_scales_multiply_the_width():
    tower = tiny_clip(
        layers=7, kind="clip_s2", s2_scales=(56, 112), select_feature="slicefour_patch"
    )
    assert tower.hidden_size == 16 * 4 * 2
    assert tower(torch.randn(1, 3, 112, 112)).shape == (1, 16, 128)


@pytest.mark.parametrize("scales", [(), (56, 84), (112, 168), (28, 56)])
def test_scales_must_be_multiples_of_the_towers_size(scales):
    with pytest.raises(UsageError, match="S2 scales"):
        tiny_clip(kind="clip_s2", s2_scales=scales)


def test_the_class_token_cannot_be_kept():
    with pytest.raises(UsageError, match="class token"):
        tiny_clip(kind="clip_s2", s2_scales=(56, 112), select_feature="cls_patch")
