"""Projector-only folders, LLaVA's LoRA folders and our own adapters, on their bases."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from golden_data import golden
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import av_llava
from av_llava.checkpoints.partial import load_partial
from av_llava.errors import CheckpointError

torch.set_num_threads(1)


@pytest.fixture
def projector_case():
    return golden("llava/layout_mm_projector_only")


def logits(loaded, case):
    inputs = load_file(case / "inputs.safetensors")
    with torch.no_grad():
        return loaded.model(inputs["input_ids"], images=inputs["images_tensor"].float()).logits


def test_a_projector_on_its_base_gives_the_references_logits(projector_case):
    loaded = load_partial(projector_case / "checkpoint", projector_case / "base", device="cpu")
    wanted = load_file(projector_case / "outputs.safetensors")
    torch.testing.assert_close(
        logits(loaded, projector_case), wanted["logits"], atol=1e-4, rtol=1e-4
    )
    projector = loaded.model.model.mm_projector
    with torch.no_grad():
        for p in projector.parameters():
            p.copy_(p.half().float())  # the reference's builder rounds the projector so
    torch.testing.assert_close(
        logits(loaded, projector_case), wanted["logits_projector_cast_fp16"], atol=1e-4, rtol=1e-4
    )


def test_load_and_load_pretrained_model_take_a_base(projector_case):
    m = av_llava.load(projector_case / "checkpoint", device="cpu", base=projector_case / "base")
    _, model, _, context = av_llava.load_pretrained_model(
        projector_case / "checkpoint", projector_case / "base", "any-name", device="cpu"
    )
    assert context == 2048
    assert torch.equal(
        logits(m, projector_case), logits(type("L", (), {"model": model}), projector_case)
    )


def test_a_missing_or_wrong_base_is_named(projector_case, tmp_path):
    with pytest.raises(CheckpointError, match="names no base"):
        load_partial(projector_case / "checkpoint", device="cpu")
    whole = golden("llava/v15_flat_batch3_right") / "checkpoint"
    with pytest.raises(CheckpointError, match="whole model"):
        av_llava.load(whole, device="cpu", base=projector_case / "base")
    other = LlamaForCausalLM(
        LlamaForCausalLM.config_class(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"\(320, 32\).*\(320, 64\)"):
        load_partial(projector_case / "checkpoint", tmp_path / "other", device="cpu")


def test_a_newline_beside_the_projector_is_taken(projector_case, tmp_path):
    shutil.copytree(projector_case, tmp_path / "case")
    folder = tmp_path / "case" / "checkpoint"
    state = torch.load(folder / "mm_projector.bin", weights_only=True)
    newline = torch.arange(64.0)
    torch.save({**state, "model.image_newline": newline}, folder / "mm_projector.bin")
    loaded = load_partial(folder, tmp_path / "case" / "base", device="cpu")
    assert torch.equal(loaded.model.model.media_tokens()["newline"], newline)
    torch.save({**state, "model.image_newlime": newline}, folder / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="image_newlime"):
        load_partial(folder, tmp_path / "case" / "base", device="cpu")


@pytest.fixture
def lora_case(projector_case, tmp_path):
    """A LLaVA LoRA folder as its training script writes it, and the merged weights."""
    shutil.copytree(projector_case, tmp_path / "case")
    case = tmp_path / "case"
    folder = case / "checkpoint"
    base = LlamaForCausalLM.from_pretrained(case / "base")
    targets = ["q_proj", "v_proj", "down_proj"]
    wrapped = get_peft_model(
        base,
        LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=targets,
            rank_pattern={"model.layers.1.self_attn.q_proj": 2},
        ),
    )
    torch.manual_seed(0)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    projector = torch.load(folder / "mm_projector.bin", weights_only=True)
    (folder / "mm_projector.bin").unlink()
    extra = {f"base_model.model.{k}": v for k, v in projector.items()}
    torch.save(extra, folder / "non_lora_trainables.bin")
    merged = wrapped.merge_and_unload().state_dict()
    return case, merged


def test_a_lora_folder_equals_the_merged_weights(lora_case):
    case, merged = lora_case
    loaded = load_partial(case / "checkpoint", case / "base", device="cpu")
    state = loaded.model.model.language_model.state_dict()
    for key, value in state.items():
        torch.testing.assert_close(value, merged[f"model.{key}"], atol=1e-6, rtol=1e-5)
    apart = load_partial(case / "checkpoint", case / "base", device="cpu", merge=False)
    torch.testing.assert_close(logits(apart, case), logits(loaded, case), atol=1e-4, rtol=1e-4)
    plain = load_file(case / "outputs.safetensors")["logits"]
    assert not torch.allclose(logits(loaded, case), plain, atol=1e-2)


def test_a_lora_never_lands_on_a_tower(lora_case):
    case, _ = lora_case
    apart = load_partial(case / "checkpoint", case / "base", device="cpu", merge=False)
    changed = {n for n, _ in apart.model.named_parameters() if "lora_" in n}
    assert changed and all("language_model" in n for n in changed)


def test_the_base_may_be_named_by_the_adapter(lora_case):
    case, _ = lora_case
    file = case / "checkpoint" / "adapter_config.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "base_model_name_or_path": str(case / "base")}))
    a = load_partial(case / "checkpoint", device="cpu")
    b = load_partial(case / "checkpoint", case / "base", device="cpu")
    assert torch.equal(logits(a, case), logits(b, case))


@pytest.mark.parametrize("fault", ["kind", "module", "shape", "gone", "projector"])
def test_adapters_that_do_not_fit_are_named(lora_case, fault):
    case, _ = lora_case
    folder = case / "checkpoint"
    weights = folder / "adapter_model.safetensors"
    state = load_file(weights)
    key = next(k for k in state if "lora_A" in k)
    words = {"kind": "PREFIX_TUNING", "gone": "adapter_model", "projector": "mm_projector"}
    if fault == "kind":
        data = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(
            json.dumps({**data, "peft_type": "PREFIX_TUNING"})
        )
    elif fault == "gone":
        weights.unlink()
    elif fault == "projector":
        (folder / "non_lora_trainables.bin").unlink()
    else:
        value = state.pop(key)
        words |= {"module": "made for another base", "shape": "made for another base"}
        state[key.replace("layers.0", "layers.9") if fault == "module" else key] = (
            value if fault == "module" else torch.zeros(4, 7)
        )
        save_file(state, weights)
    with pytest.raises(CheckpointError, match=words[fault]):
        load_partial(folder, case / "base", device="cpu")
