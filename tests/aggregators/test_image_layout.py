"""Merging of tiles: the reference's features, a literal oracle, planned equals emitted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from golden_data import golden, golden_dirs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from av_llava.aggregators.image_layout import ImagePlan, merge_tiles, plan_image
from av_llava.errors import UsageError
from av_llava.geometry import anyres_max_tiles, shrunk_grid, tile_grid, unpad_box
from av_llava.settings import ImageSettings

TINY = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
WIDE = tuple((w * 56, h * 56) for w in range(1, 5) for h in range(1, 5))
MERGES = ["flat", "spatial", "spatial_unpad", "spatial_nobase", "spatial_unpad_nobase"]
MERGES += ["spatial_maxpool2x2", "spatial_maxpool2x2_nobase", "spatial_unpad_maxpool2x2"]


def settings_from(config: dict) -> ImageSettings:
    pinpoints = config.get("image_grid_pinpoints") or ()
    return ImageSettings(
        aspect_ratio=config.get("image_aspect_ratio", "square"),
        patch_merge_type=config.get("mm_patch_merge_type", "flat"),
        grid_pinpoints=pinpoints if isinstance(pinpoints, str) else tuple(map(tuple, pinpoints)),
    )


def check(case: dict, features: torch.Tensor, finals: list, newline: torch.Tensor | None) -> None:
    chosen = settings_from(case["config"])
    side = int((features.shape[1] - case["extra_tokens"]) ** 0.5)
    sizes = case["sizes"] or [None] * len(finals)
    for size, n, tiles, wanted in zip(
        sizes, case["n_tiles"], features.split(case["n_tiles"]), finals, strict=True
    ):
        plan = plan_image(
            size,
            chosen,
            grid=(side, side),
            tile_size=case["tile"],
            n_tiles=n,
            extra_tokens=case["extra_tokens"],
            single_tensor=case["single_tensor"],
        )
        if wanted is None:  # a video
            continue
        merged = merge_tiles(tiles, plan, newline)
        assert plan.n_tokens == len(wanted)
        torch.testing.assert_close(merged, wanted, atol=1e-6, rtol=0)


BUNDLE = json.loads(golden("llava/image_layout.json").read_text())["cases"]


@pytest.mark.parametrize("name", BUNDLE)
def test_features_agree_with_the_reference(name):
    tensors = load_file(golden("llava/image_layout.safetensors"))
    case = BUNDLE[name]
    finals = [tensors[f"{name}.feat_final.{i}"] for i in range(len(case["n_tiles"]))]
    check(case, tensors[f"{name}.feat_projector"], finals, tensors.get(f"{name}.image_newline"))


def whole_cases() -> list[Path]:
    folders = [
        f
        for p in ("v1*", "ov*", "s2*", "mistral*", "lv_*image*")
        for f in golden_dirs(f"llava/{p}")
    ]
    return [f for f in folders if (f / "outputs.safetensors").exists()]


@pytest.mark.parametrize("folder", whole_cases(), ids=lambda f: f.name)
def test_whole_cases_agree_with_the_reference(folder):
    inputs, outputs = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "outputs"))
    config = json.loads((folder / "checkpoint/config.json").read_text())
    meta = json.loads((folder / "meta.json").read_text())
    tensor = "images_tensor" in inputs
    names = sorted(
        (k for k in inputs if k.startswith("images.")), key=lambda k: int(k.split(".")[1])
    )
    images = list(inputs["images_tensor"]) if tensor else [inputs[k] for k in names]
    features = outputs["feat_projector"]
    modalities = [*meta["modalities"], *["image"] * len(images)][: len(images)]
    finals = [
        outputs.get(f"feat_final.{i}") if modality == "image" else None
        for i, modality in enumerate(modalities)
    ]
    keeps_cls = config.get("mm_vision_select_feature") == "cls_patch"
    case = {
        "config": config,
        "n_tiles": [1 if i.ndim == 3 else len(i) for i in images],
        "tile": images[0].shape[-1],
        "sizes": inputs["image_sizes"].tolist() if "image_sizes" in inputs else None,
        "single_tensor": tensor,
        "extra_tokens": int(keeps_cls),
    }
    if all(final is None for final in finals):
        pytest.skip("no still image with features in this case")
    weights = load_file(folder / "checkpoint/model.safetensors")
    check_images(case, features, finals, weights.get("model.image_newline"))


def check_images(case, features, finals, newline):
    rows = features.split(case["n_tiles"])
    for i, wanted in enumerate(finals):
        if wanted is None:
            continue
        one = case | {
            "n_tiles": [case["n_tiles"][i]],
            "sizes": [case["sizes"][i]] if case["sizes"] else None,
        }
        check(one, rows[i], [wanted], newline)


# ---------------------------------------------------------------- literal oracle


def literal(features, size, chosen, grid, tile_size, newline):
    """The reference's rules, token by token."""
    merge, (h, w) = chosen.patch_merge_type, grid
    if merge == "flat":
        return [token for tile in features for token in tile]
    if len(features) == 1:
        return [*features[0], *([newline] if "unpad" in merge else [])]
    rows, columns = tile_grid(size, chosen, tile_size)
    board = {
        (r * h + y, c * w + x): features[1 + r * columns + c][y * w + x]
        for r in range(rows)
        for c in range(columns)
        for y in range(h)
        for x in range(w)
    }
    out = [] if "nobase" in merge else list(features[0])
    height, width = rows * h, columns * w
    if "maxpool2x2" in merge:
        for y in range(height // 2):
            for x in range(width // 2):
                four = [board[2 * y + i, 2 * x + j] for i in (0, 1) for j in (0, 1)]
                out.append(torch.stack(four).amax(0))
        return out
    if "unpad" not in merge:
        return out + [board[y, x] for y in range(height) for x in range(width)]
    top, bottom, left, right = unpad_box((height, width), size, chosen.unpad_rounding)
    kept = [[board[y, x] for x in range(left, right)] for y in range(top, bottom)]
    limit = anyres_max_tiles(chosen.aspect_ratio)
    shrunk = limit and shrunk_grid((bottom - top, right - left), h * w, limit)
    if shrunk:
        stacked = torch.stack([torch.stack(row) for row in kept]).permute(2, 0, 1)[None]
        small = F.interpolate(stacked, shrunk, mode="bilinear")[0].permute(1, 2, 0)
        kept = [list(row) for row in small]
    for row in kept:
        out += [*row, newline]
    return out


@settings(deadline=None, max_examples=150)
@given(
    size=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    aspect=st.sampled_from(["anyres", "anyres_max_1", "anyres_max_2", "anyres_max_9", "pad"]),
    merge=st.sampled_from(MERGES),
    grid=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    rounding=st.sampled_from(["llava", "hf"]),
)
def test_planned_is_emitted_and_is_the_literal_rule(size, aspect, merge, grid, rounding):
    chosen = ImageSettings(
        aspect_ratio=aspect, patch_merge_type=merge, grid_pinpoints=WIDE, unpad_rounding=rounding
    )
    plan = plan_image(size, chosen, grid=grid, tile_size=56)
    features = torch.randn(plan.n_tiles, plan.tokens_per_tile, 2)
    newline = torch.tensor([100.0, 200.0])
    merged = merge_tiles(features, plan, newline)
    assert merged.shape == (plan.n_tokens, 2)
    wanted = literal(features, size, chosen, grid, 56, newline)
    assert len(wanted) == plan.n_tokens
    if wanted:
        torch.testing.assert_close(merged, torch.stack(wanted), atol=1e-6, rtol=0)


def test_a_plan_is_a_hashable_value():
    chosen = ImageSettings(
        aspect_ratio="anyres", patch_merge_type="spatial_unpad", grid_pinpoints=TINY
    )
    plan = plan_image((200, 75), chosen, grid=(4, 4), tile_size=56)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert len({plan, plan_image((200, 75), chosen, grid=(4, 4), tile_size=56)}) == 1
    assert plan.needs_newline and plan.map_grid == (4, 10)


@pytest.mark.parametrize(
    ("size", "n_tiles", "n_tokens"),
    [  # published arithmetic of LLaVA-1.6, 24x24 patches a tile
        ((672, 672), 5, 576 + 48 * 49),
        ((1000, 300), 4, 576 + 22 * 73),  # 21 rows hold it; an odd margin is halved downwards
        ((336, 672), 3, 576 + 48 * 25),
    ],
)
def test_llava_16_counts(size, n_tiles, n_tokens):
    canvases = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    chosen = ImageSettings(
        aspect_ratio="anyres", patch_merge_type="spatial_unpad", grid_pinpoints=canvases
    )
    plan = plan_image(size, chosen, grid=(24, 24), tile_size=336)
    assert (plan.n_tiles, plan.n_tokens) == (n_tiles, n_tokens)


def test_one_view_is_never_merged():
    for merge in MERGES:
        chosen = ImageSettings(aspect_ratio="anyres", patch_merge_type=merge, grid_pinpoints=TINY)
        plan = plan_image(None, chosen, grid=(4, 4), tile_size=56, n_tiles=1)
        assert plan.n_tokens == 16 + ("unpad" in merge)
        with_cls = plan_image(None, chosen, grid=(4, 4), tile_size=56, n_tiles=1, extra_tokens=1)
        assert with_cls.n_tokens == plan.n_tokens + 1


def test_one_tensor_is_never_merged():
    chosen = ImageSettings(
        aspect_ratio="anyres", patch_merge_type="spatial_unpad", grid_pinpoints=TINY
    )
    plan = plan_image(None, chosen, grid=(4, 4), tile_size=56, n_tiles=1, single_tensor=True)
    features = torch.randn(1, 16, 3)
    assert torch.equal(merge_tiles(features, plan), features[0])


def test_highres_of_any_side_is_planned():
    chosen = ImageSettings(aspect_ratio="highres", patch_merge_type="spatial", grid_pinpoints="168")
    plan = plan_image((90, 50), chosen, grid=(4, 4), tile_size=56)
    assert (plan.n_tiles, plan.tiles, plan.n_tokens) == (10, (3, 3), 16 + 144)


def test_gradients_reach_the_tiles_and_the_newline():
    chosen = ImageSettings(
        aspect_ratio="anyres_max_1", patch_merge_type="spatial_unpad", grid_pinpoints=WIDE
    )
    plan = plan_image((200, 130), chosen, grid=(3, 3), tile_size=56)
    assert plan.resized is not None
    features = torch.randn(plan.n_tiles, 9, 2, requires_grad=True)
    newline = torch.randn(2, requires_grad=True)
    merge_tiles(features, plan, newline).sum().backward()
    assert features.grad.abs().sum() > 0
    assert torch.equal(newline.grad, torch.full((2,), float(plan.map_grid[0])))


def test_the_newline_takes_the_features_dtype():
    chosen = ImageSettings(patch_merge_type="spatial_unpad")
    plan = plan_image(None, chosen, grid=(2, 2), tile_size=56)
    merged = merge_tiles(torch.randn(1, 4, 3).bfloat16(), plan, torch.randn(3))
    assert merged.dtype == torch.bfloat16 and merged.shape == (5, 3)


def plan_of(merge: str = "spatial_unpad", aspect: str = "anyres", **more) -> ImagePlan:
    chosen = ImageSettings(aspect_ratio=aspect, patch_merge_type=merge, grid_pinpoints=TINY)
    return plan_image(
        **{"size_wh": (90, 160), "settings": chosen, "grid": (4, 4), "tile_size": 56} | more
    )


def test_views_that_do_not_fit_the_grid_are_an_error():
    # The reference falls back to 2x2 tiles here without a word.
    with pytest.raises(UsageError, match=r"90x160 pixels came as 4 views, .* 2x2 tiles, 5 in all"):
        plan_of(n_tiles=4)
    with pytest.raises(UsageError, match="came as 7 views"):
        plan_of(aspect="square", n_tiles=7)
    with pytest.raises(UsageError, match="at least one view"):
        plan_of(n_tiles=0)


def test_tiling_and_unpadding_need_the_size():
    with pytest.raises(UsageError, match="width and height"):
        plan_of(size_wh=None)
    with pytest.raises(UsageError, match="image_sizes"):
        plan_of(aspect="square", n_tiles=5, size_wh=None)
    assert plan_of("spatial", aspect="square", n_tiles=5, size_wh=None).n_tokens == 16 + 64


def test_the_class_token_does_not_fit_a_map():
    with pytest.raises(UsageError, match="without the class token"):
        plan_of(extra_tokens=1)
    assert plan_of("flat", extra_tokens=1).n_tokens == 5 * 17


def test_a_map_too_small_to_halve_is_an_error():
    with pytest.raises(UsageError, match="too small for maxpool2x2"):
        plan_of("spatial_maxpool2x2", size_wh=(40, 170), grid=(1, 1))


def test_features_that_were_not_planned_are_an_error():
    plan = plan_of()
    with pytest.raises(UsageError, match=r"planned as 5 views of 16 tokens, .* 4 views of 16"):
        merge_tiles(torch.zeros(4, 16, 2), plan, torch.zeros(2))
    with pytest.raises(UsageError, match="image_newline"):
        merge_tiles(torch.zeros(5, 16, 2), plan)
