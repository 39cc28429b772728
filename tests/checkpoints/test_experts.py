"""Language models that are mixtures of experts: files hold each expert apart, memory does not."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import AutoModelForCausalLM

import av_llava
from av_llava.checkpoints.adapters import save_adapter
from av_llava.checkpoints.convert import convert
from av_llava.checkpoints.load import load_checkpoint
from av_llava.errors import CheckpointError
from av_llava.settings import ImageSettings

from .converting import assert_same_tensors, tensors
from .folders import edit_json

torch.set_num_threads(1)

KINDS = {
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
}
IDS = torch.tensor([[5, 6, 7, 300, 8]])


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    flat = ImageSettings(aspect_ratio="pad", patch_merge_type="flat")
    text = {"num_experts_per_tok": 2, **KINDS[request.param]}
    model, processor = tiny(request.param, text=text, audio=False, image=flat)
    folder = tmp_path_factory.mktemp(request.param) / "moe"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_each_expert_is_a_tensor_of_the_file_and_all_are_described(folder):
    names = tensors(folder)
    assert sum(".experts.3." in name for name in names) == 2 * 3
    found = av_llava.describe(folder)
    assert found["missing"] == found["unexpected"] == found["mismatched"] == []
    assert found["problems"] == [] and found["weights"]["tensors"] == len(names)


def test_the_language_model_alone_is_transformers_own(folder, tmp_path):
    report = convert("text-only", folder, tmp_path / "text", verify=True)
    assert report.difference == 0
    ours = load_checkpoint(folder, device="cpu", dtype="float32").model
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert torch.equal(logits(stock), logits(ours))


def test_to_transformers_and_back_is_exact(folder, tmp_path):
    convert("hf", folder, tmp_path / "hf", model_class="llava", verify=True)
    report = convert("llava", tmp_path / "hf", tmp_path / "back", verify=True)
    assert "newline" in " ".join(report.notes)  # left out for still images alone
    original = tensors(folder)
    del original["model.image_newline"]
    assert_same_tensors(tensors(tmp_path / "back"), original)


def test_other_shards_and_parts(folder, tmp_path):
    convert("llava", folder, tmp_path / "llava", shard_size="100kB", verify=True)
    assert_same_tensors(tensors(tmp_path / "llava"), tensors(folder))
    convert("surgery", folder, tmp_path / "parts")
    parts = tmp_path / "parts" / "mm_projector.safetensors"
    assert load_file(parts).keys() >= {"model.mm_projector.0.weight"}


def test_a_missing_expert_is_named(folder, tmp_path):
    convert("llava", folder, tmp_path / "cut", shard_size="1GB")
    state = load_file(tmp_path / "cut" / "model.safetensors")
    gone = next(name for name in state if ".experts.2." in name)
    del state[gone]
    save_file(state, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    assert av_llava.describe(tmp_path / "cut")["missing"] == [gone]
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
        convert("text-only", tmp_path / "cut", tmp_path / "text")


def test_a_projector_on_a_mixture_becomes_one_checkpoint(folder, tmp_path):
    own = load_checkpoint(folder, device="cpu", dtype="float32").model
    convert("text-only", folder, tmp_path / "base")
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "config.json").write_text((folder / "config.json").read_text())
    edit_json(parts / "config.json", dtype="float32")
    kept = {k: v for k, v in tensors(folder).items() if k.split(".")[1] in PARTS}
    torch.save(kept, parts / "mm_projector.bin")
    found = av_llava.describe(parts, base=tmp_path / "base")
    assert found["problems"] == [] and found["missing"] == []
    base = str(tmp_path / "base")
    report = convert("merge-lora", parts, tmp_path / "whole", base=base, verify=True)
    assert report.difference == 0
    assert_same_tensors(tensors(tmp_path / "whole"), tensors(folder))
    whole = load_checkpoint(tmp_path / "whole", device="cpu", dtype="float32").model
    assert torch.equal(logits(whole), logits(own))


PARTS = ("vision_tower", "mm_projector", "image_newline")


def test_what_cannot_be_done_is_said(folder, tmp_path):
    pytest.importorskip("gguf")
    for parts in ("all", "text"):
        with pytest.raises(CheckpointError, match="cannot be exported to GGUF"):
            convert("gguf", folder, tmp_path / "gguf", parts=parts)
    m = av_llava.load(folder, device="cpu")
    trained = get_peft_model(m.model, LoraConfig(r=2, target_modules=r".*self_attn\.q_proj"))
    with pytest.raises(CheckpointError, match="Adapters of mixtures of experts"):
        save_adapter(trained, m.processor, tmp_path / "adapter", base=folder)
    assert not (tmp_path / "gguf").exists() and not (tmp_path / "adapter").exists()
