"""CLIP and SigLIP towers against the reference's features and the transformers library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_data import COMPACT, FULL, golden_dirs
from safetensors.torch import load_file
from torch import nn

from av_llava.errors import UsageError
from av_llava.settings import VisionSettings
from av_llava.vision import VISION_TOWERS, build_vision_tower, normalize_pixels

from .tiny import tiny_clip, tiny_siglip, tower_from

ROOTS = [root / "llava" for root in (COMPACT, FULL) if (root / "llava").is_dir()]
CLOSE = {"atol": 1e-5, "rtol": 0}


def roots_with(relative: str) -> list[Path]:
    return [root / relative for root in ROOTS if (root / relative).exists()]


@pytest.mark.parametrize("folder", roots_with("tower_clip_variants"), ids=str)
def test_clip_features_agree_with_the_reference(folder):
    pixels = load_file(folder / "inputs.safetensors")["pixels"]
    outputs = load_file(folder / "outputs.safetensors")
    checked = 0
    for key, wanted in outputs.items():
        layers, feature, layer = key.split(".")
        if feature == "list_input":
            continue
        tower = tower_from(
            folder / f"clip_{layers[1:]}layers", select_feature=feature, select_layer=int(layer)
        )
        features = tower(pixels)
        torch.testing.assert_close(features, wanted, **CLOSE)
        assert features.shape[1:] == (tower.num_patches, tower.hidden_size)
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize("folder", roots_with("tower_siglip"), ids=str)
@pytest.mark.parametrize("llava", [True, False], ids=["trimmed", "complete"])
def test_siglip_features_agree_with_the_reference(folder, llava):
    outputs = load_file(folder / "outputs.safetensors")
    for side in (56, 70):
        if f"s{side}" not in outputs:
            continue
        tower = tower_from(folder / f"siglip{side}", llava=llava, kind="siglip")
        features = tower(outputs[f"s{side}.pixels"])
        torch.testing.assert_close(features, outputs[f"s{side}"], **CLOSE)
        assert len(tower.vision_tower.encoder.layers) == (3 if llava else 4)
        assert hasattr(tower.vision_tower, "head") != llava


def whole_cases() -> list[Path]:
    folders = golden_dirs("llava/v1*") + golden_dirs("llava/ov*") + golden_dirs("llava/s2_*")
    return [f for f in folders if (f / "outputs.safetensors").exists()]


@pytest.mark.parametrize("folder", whole_cases(), ids=lambda f: f.name)
def test_checkpoint_towers_give_the_references_features(folder):
    """The tower inside the checkpoint where there is one, else the one that it names."""
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    inputs, outputs = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "outputs"))
    if "feat_tower" not in outputs:
        pytest.skip("no tower features in this case")
    name = config["mm_vision_tower"]
    siglip = "siglip" in name
    tower = tower_from(
        folder / name,
        llava=True,
        kind="siglip" if siglip else "clip_s2" if config.get("s2") else "clip",
        select_layer=config["mm_vision_select_layer"],
        select_feature=config["mm_vision_select_feature"],
        s2_scales=tuple(int(s) for s in str(config.get("s2_scales") or "").split(",") if s),
    )
    prefix = "model.vision_tower.vision_tower.vision_model."
    state = load_file(folder / "checkpoint" / "model.safetensors")
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if inside:
        tower.vision_tower.load_state_dict(inside)  # strict: no key missing, none left over
    images = [inputs[k] for k in sorted(inputs) if k.startswith("images")]
    pixels = torch.cat([i[None] if i.ndim == 3 else i for i in images]).float()
    torch.testing.assert_close(tower(pixels), outputs["feat_tower"], **CLOSE)


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
def test_states_are_those_of_transformers(make, layer):
    tower = make(select_layer=layer)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        states = tower.vision_tower(pixels, output_hidden_states=True).hidden_states
    wanted = states[layer][:, 1:] if tower.has_cls else states[layer]
    torch.testing.assert_close(tower(pixels), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("layer", "n_run"), [(-1, 4), (-2, 3), (0, 0), (1, 1)])
def test_layers_after_the_last_needed_are_not_run(layer, n_run):
    tower = tiny_clip(select_layer=layer)
    calls = []
    for i, block in enumerate(tower.vision_tower.encoder.layers):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    tower(torch.randn(1, 3, 56, 56))
    assert calls == list(range(n_run))
    assert len(tower.vision_tower.encoder.layers) == 4  # yet their parameters are there to save


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_idle_parameters_are_just_those_without_gradient(make, layer):
    tower = make(select_layer=layer).train()
    tower(torch.randn(1, 3, 56, 56)).sum().backward()
    without = {name for name, p in tower.named_parameters() if p.grad is None}
    assert {name for name, _ in tower.idle_parameters()} == without


def test_names_are_llavas_below_the_attribute():
    names = set(tiny_clip().state_dict())
    assert "vision_tower.embeddings.class_embedding" in names
    assert "vision_tower.pre_layrnorm.weight" in names
    assert "vision_tower.encoder.layers.3.self_attn.k_proj.weight" in names
    assert all(name.startswith("vision_tower.") for name in names)


@pytest.mark.parametrize("kind", VISION_TOWERS)
def test_towers_are_built_from_config_alone_on_the_meta_device(kind):
    real = tiny_siglip() if kind == "siglip" else tiny_clip()
    settings = VisionSettings(kind=kind, s2_scales=(56, 112) if kind == "clip_s2" else ())
    with torch.device("meta"):
        tower = build_vision_tower(real.config, settings)
    assert {k: v.shape for k, v in tower.state_dict().items()} == {
        k: v.shape for k, v in real.state_dict().items()
    }
    assert all(p.is_meta for p in tower.parameters())


def test_a_meta_tower_runs_once_it_is_filled():
    real = tiny_clip()
    with torch.device("meta"):
        tower = build_vision_tower(real.config, real.settings).eval()
    pixels = torch.zeros(1, 3, 56, 56, device="meta")
    assert tower(pixels).shape == (1, 16, 16)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_turns_do_not_change_the_result(batch, trained):
    tower = tiny_clip().requires_grad_(trained)
    pixels = torch.randint(0, 256, (7, 3, 56, 56), dtype=torch.uint8)
    sizes = []
    tower.vision_tower.embeddings.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    features = tower(pixels, max_batch=batch)
    torch.testing.assert_close(features, tower(pixels, max_batch=7), atol=1e-6, rtol=0)
    assert max(sizes[:-1]) == min(batch, 7) and sum(sizes[:-1]) == 7
    assert features.requires_grad == trained


def test_the_setting_bounds_the_batch():
    tower = tiny_clip(max_batch=2)
    sizes = []
    tower.vision_tower.embeddings.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    tower(torch.randn(5, 3, 56, 56))
    assert sizes == [2, 2, 1]


def test_no_images_give_no_features():
    assert tiny_clip()(torch.zeros(0, 3, 56, 56)).shape == (0, 16, 16)


def test_levels_are_normalised_inside():
    tower = tiny_clip()
    levels = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    s = tower.settings
    floats = normalize_pixels(levels, s.image_mean, s.image_std, torch.float32)
    assert torch.equal(tower(levels), tower(floats))


def test_the_result_has_the_callers_dtype():
    tower = tiny_clip().to(torch.bfloat16)
    pixels = torch.randn(1, 3, 56, 56)
    assert tower(pixels).dtype == torch.float32
    assert tower(pixels.bfloat16()).dtype == torch.bfloat16
    assert tower(torch.zeros(1, 3, 56, 56, dtype=torch.uint8)).dtype == torch.bfloat16


def test_a_frozen_tower_records_nothing():
    tower = tiny_clip().requires_grad_(False)
    pixels = torch.randn(1, 3, 56, 56)
    assert not tower(pixels).requires_grad
    assert tower(pixels.requires_grad_()).requires_grad  # someone looks at the pixels themselves
    tower.vision_tower.encoder.layers[0].mlp.fc1.requires_grad_(True)
    assert tower(pixels.detach()).requires_grad
    with torch.no_grad():
        assert not tower(pixels).requires_grad


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_computes_again_and_agrees():
    pixels = torch.randn(2, 3, 56, 56)
    gradients, calls = [], []
    for checkpointing in (False, True):
        tower = tiny_clip().train()
        if checkpointing:
            tower.vision_tower.gradient_checkpointing_enable()
        seen: list[nn.Module] = []
        tower.vision_tower.encoder.layers[0].mlp.register_forward_pre_hook(
            lambda m, i, seen=seen: seen.append(m)
        )
        tower(pixels).square().sum().backward()
        calls.append(len(seen))
        gradients.append(tower.vision_tower.embeddings.patch_embedding.weight.grad)
    assert calls == [1, 2]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)


def test_the_attention_implementation_is_the_configs():
    outputs = []
    pixels = torch.randn(1, 3, 56, 56)
    for implementation in ("sdpa", "eager"):
        tower = tiny_clip(config={"attn_implementation": implementation})
        assert tower.config._attn_implementation == implementation
        outputs.append(tower(pixels))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    assert tiny_clip().config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("make", "feature", "tokens"),
    [(tiny_clip, "patch", 16), (tiny_clip, "cls_patch", 17), (tiny_siglip, "cls_patch", 16)],
)
def test_counts(make, feature, tokens):
    tower = make(select_feature=feature)
    assert tower.num_patches == tokens
    assert tower.extra_tokens == tokens - 16
    assert tower.grid == (4, 4) and tower.num_patches_per_side == 4
    assert (tower.image_size, tower.patch_size, tower.input_size) == (56, 14, 56)
    assert tower.hidden_size == 16
    assert tower(torch.randn(1, 3, 56, 56)).shape == (1, tokens, 16)


@pytest.mark.parametrize("shape", [(3, 56, 56), (1, 3, 56, 57), (1, 1, 56, 56), (1, 56, 56, 3)])
def test_pixels_of_another_shape_are_refused(shape):
    with pytest.raises(UsageError, match=r"\[images, 3, 56, 56\]"):
        tiny_clip()(torch.zeros(shape))


def test_kind_and_config_must_fit():
    config = tiny_siglip().config
    with pytest.raises(UsageError, match="'clip_vision_model', not 'siglip_vision_model'"):
        build_vision_tower(config, VisionSettings(kind="clip"))
    with pytest.raises(UsageError, match="Unknown vision tower 'clips'"):
        build_vision_tower(config, VisionSettings(kind="clips"))


def test_towers_can_be_added_from_outside(monkeypatch):
    class Mine(nn.Module):
        def __init__(self, config, settings):
            super().__init__()

    monkeypatch.setitem(VISION_TOWERS, "mine", Mine)
    assert isinstance(build_vision_tower(tiny_clip().config, VisionSettings(kind="mine")), Mine)


def test_the_text_of_a_tower_says_what_it_gives():
    assert "states=(3,) of 5" in repr(tiny_clip())
