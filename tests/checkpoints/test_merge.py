"""merge-lora: an adapter, LLaVA's LoRA or a projector put onto its base, tensor by tensor."""

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
from av_llava.checkpoints import merge
from av_llava.checkpoints.adapters import save_adapter
from av_llava.checkpoints.convert import convert
from av_llava.checkpoints.load import load_checkpoint
from av_llava.checkpoints.lora import LoraLayer
from av_llava.checkpoints.merge import merge_adapter
from av_llava.checkpoints.partial import load_partial
from av_llava.cli import main as cli
from av_llava.errors import CheckpointError

from .converting import assert_same_tensors, fingerprint, leftovers, tensors
from .folders import read_weights, write_weights
from .trained import PROJECTORS, answers, base_folder, hearing, lora, new_ids

KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rank-stabilised": {
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3},
    },
    "half": {"half": True},
}


def adapter_on(base, folder, kind="plain", **more):
    m = hearing(base)
    settings = {**KINDS[kind], **more}
    half = settings.pop("half", False)
    rows = {"embed_tokens": new_ids(m)}
    trained = lora(m, modules_to_save=PROJECTORS, trainable_token_indices=rows, **settings)
    for name, parameter in trained.named_parameters():
        if half and ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    save_adapter(trained, m.processor, folder, base=base)
    return folder


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    return base_folder(tmp_path / "base", tied=request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_checkpoint_is_what_merging_in_memory_gives(base, tmp_path, kind):
    adapter = adapter_on(base, tmp_path / "adapter", kind)
    before = fingerprint(base) | fingerprint(adapter)
    report = merge_adapter(adapter, None, tmp_path / "merged")
    assert report.difference is not None and report.difference <= 1e-4
    assert fingerprint(base) | fingerprint(adapter) == before
    made = load_checkpoint(tmp_path / "merged", device="cpu")
    wanted = av_llava.load(adapter, device="cpu", merge=True)
    for name, value in wanted.model.state_dict().items():
        torch.testing.assert_close(
            made.model.state_dict()[name], value, atol=2e-6 if kind != "half" else 1e-3, rtol=1e-5
        )
    shutil.rmtree(base)  # it stands alone
    ids = new_ids(wanted)
    torch.testing.assert_close(
        answers(load_checkpoint(tmp_path / "merged", device="cpu").model, ids),
        answers(wanted.model, ids),
        atol=1e-4 if kind != "half" else 2e-2,
        rtol=1e-4,
    )


def test_small_shards_and_other_types(base, tmp_path):
    adapter = adapter_on(base, tmp_path / "adapter")
    whole = merge_adapter(adapter, None, tmp_path / "one", verify=False)
    assert whole.difference is None
    merge_adapter(adapter, None, tmp_path / "many", shard_size="100kB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 5
    assert_same_tensors(tensors(tmp_path / "one"), tensors(tmp_path / "many"))
    report = merge_adapter(adapter, None, tmp_path / "half", dtype="bfloat16")
    assert "rounded" in report.notes[-1]
    made = tensors(tmp_path / "half")
    assert {v.dtype for v in made.values()} == {torch.bfloat16}
    for name, value in tensors(tmp_path / "one").items():
        assert torch.equal(made[name], value.bfloat16()), name  # rounded once
    assert load_checkpoint(tmp_path / "half", device="cpu").model.dtype == torch.bfloat16


def test_a_base_in_pickled_shards(base, tmp_path):
    adapter = adapter_on(base, tmp_path / "adapter")
    merge_adapter(adapter, None, tmp_path / "one", verify=False)
    write_weights(base, read_weights(base), kind="bin", shards=3)
    before = fingerprint(base)
    merge_adapter(adapter, None, tmp_path / "two")
    assert_same_tensors(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    assert fingerprint(base) == before
    again = av_llava.load(adapter, device="cpu", merge=True)
    assert torch.equal(
        answers(again.model), answers(load_checkpoint(tmp_path / "two", device="cpu").model)
    )


def test_an_oracle_of_the_sum(tmp_path):
    base = base_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter")
    merge_adapter(adapter, None, tmp_path / "merged", verify=False)
    before, after = tensors(base), tensors(tmp_path / "merged")
    factors = load_file(adapter / "adapter_model.safetensors")
    extra = load_file(adapter / "multimodal.safetensors")
    changed = 0
    for name, value in after.items():
        memory = name.replace("model.layers", "model.language_model.layers").removesuffix(".weight")
        down = factors.get(f"base_model.model.{memory}.lora_A.weight")
        if down is not None:
            up = factors[f"base_model.model.{memory}.lora_B.weight"]
            torch.testing.assert_close(
                value, before[name] + 6 / 4 * up @ down, atol=1e-6, rtol=1e-5
            )
            changed += 1
        elif name in extra:
            assert torch.equal(value, extra[name]), name
        else:
            assert torch.equal(value[: len(before[name])], before[name]), name
    assert changed == len(factors) // 2 == 6


def test_a_lora_on_the_embedding(tmp_path):
    base = base_folder(tmp_path / "base")
    m = hearing(base)
    trained = lora(m, target_modules=r".*language_model\.(embed_tokens|layers.*\.q_proj)")
    save_adapter(trained, m.processor, tmp_path / "adapter", base=base)
    assert merge_adapter(tmp_path / "adapter", None, tmp_path / "merged").difference <= 1e-4
    made = load_checkpoint(tmp_path / "merged", device="cpu")
    ids = new_ids(m)
    torch.testing.assert_close(
        answers(made.model, ids), answers(trained, ids), atol=1e-4, rtol=1e-4
    )
    tied = base_folder(tmp_path / "tied", tied=True)
    m = hearing(tied)
    trained = lora(m, target_modules=r".*language_model\.(embed_tokens|layers.*\.q_proj)")
    save_adapter(trained, m.processor, tmp_path / "tied_adapter", base=tied)
    with pytest.raises(CheckpointError, match="one matrix"):
        merge_adapter(tmp_path / "tied_adapter", None, tmp_path / "no")


# ---------------------------------------------------------------- LLaVA's folders


@pytest.fixture
def llava(tmp_path):
    """A LoRA folder as LLaVA's training script writes it, with its base and tower."""
    case = tmp_path / "case"
    shutil.copytree(golden("llava/layout_mm_projector_only"), case)
    folder = case / "checkpoint"
    model = LlamaForCausalLM.from_pretrained(case / "base")
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped = get_peft_model(model, config)
    torch.manual_seed(0)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    projector = torch.load(folder / "mm_projector.bin", weights_only=True)
    (folder / "mm_projector.bin").unlink()
    torch.save(
        {f"base_model.model.{k}": v for k, v in projector.items()},
        folder / "non_lora_trainables.bin",
    )
    return case


def test_llavas_lora_folders_are_merged_with_their_towers(llava, tmp_path):
    report = merge_adapter(llava / "checkpoint", llava / "base", tmp_path / "merged")
    assert report.difference <= 1e-4 and "6 modules" in report.notes[0]
    wanted = load_partial(llava / "checkpoint", llava / "base", device="cpu").model
    shutil.rmtree(llava)
    made = load_checkpoint(tmp_path / "merged", device="cpu").model
    torch.testing.assert_close(answers(made), answers(wanted), atol=1e-4, rtol=1e-4)


def test_a_projector_and_its_base_become_one_checkpoint(tmp_path):
    case = golden("llava/layout_mm_projector_only")
    report = convert(
        "merge-lora", case / "checkpoint", tmp_path / "whole", verify=True, base=str(case / "base")
    )
    assert report.difference == 0 and "put together" in report.notes[0]
    inputs = load_file(case / "inputs.safetensors")
    made = load_checkpoint(tmp_path / "whole", device="cpu").model
    with torch.no_grad():
        logits = made(inputs["input_ids"], images=inputs["images_tensor"].float()).logits
    wanted = load_file(case / "outputs.safetensors")["logits"]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- refusals


def test_a_dry_run_writes_nothing(base, tmp_path):
    adapter = adapter_on(base, tmp_path / "adapter")
    report = convert("merge-lora", adapter, tmp_path / "merged", dry_run=True)
    assert report.mapped > 100 and not report.problems
    assert any("368" in line for line in report.reshaped)
    assert not (tmp_path / "merged").exists() and not leftovers(tmp_path)


def test_a_wrong_sum_is_found(base, tmp_path, monkeypatch):
    adapter = adapter_on(base, tmp_path / "adapter")
    right = LoraLayer.merged
    monkeypatch.setattr(
        LoraLayer, "merged", lambda self, w: (piece * 1.001 for piece in right(self, w))
    )
    with pytest.raises(CheckpointError, match=r"not the weight of the base with the LoRA"):
        merge_adapter(adapter, None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not leftovers(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(merge, "largest_difference", lambda a, b: 0.5)
    with pytest.raises(CheckpointError, match=r"differs.*0\.5"):
        merge_adapter(adapter, None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


FAULTS = {
    "whole": "no parts",
    "exists": "exists",
    "in the base": "must not change",
    "another base": "another base",
    "another layer": "does not have",
    "half a pair": "both of its factors",
    "a convolution": "Conv2d",
    "quantised": "quantised",
    "another kind": "PREFIX_TUNING",
    "a variant": "use_qalora",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_merged_is_said(tmp_path, fault):
    base = base_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter")
    source, destination, given = adapter, tmp_path / "merged", None
    weights = adapter / "adapter_model.safetensors"
    state = load_file(weights)
    key = next(k for k in state if "layers.0.self_attn.q_proj.lora_A" in k)
    config = json.loads((adapter / "adapter_config.json").read_text())
    if fault == "whole":
        source = base
    elif fault == "exists":
        destination.mkdir()
    elif fault == "in the base":
        destination = base / "merged"
    elif fault == "another base":
        given = base_folder(tmp_path / "other", seed=3)
    elif fault == "half a pair":
        state.pop(key)
    elif fault == "another layer":
        state[key.replace("layers.0", "layers.7")] = state.pop(key)
    elif fault == "a convolution":
        name = "base_model.model.model.vision_tower.vision_tower.embeddings.patch_embedding"
        state |= {f"{name}.lora_A.weight": torch.zeros(2, 3, 7, 7)}
        state |= {f"{name}.lora_B.weight": torch.zeros(32, 2, 1, 1)}
    elif fault == "quantised":
        data = json.loads((base / "config.json").read_text())
        data["quantization_config"] = {"quant_method": "gptq"}
        (base / "config.json").write_text(json.dumps(data))
    elif fault == "another kind":
        config["peft_type"] = "PREFIX_TUNING"
    else:
        config["use_qalora"] = True
    save_file(state, weights)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=FAULTS[fault]):
        merge_adapter(source, given, destination)
    assert not leftovers(tmp_path)


def test_on_the_command_line(tmp_path, capsys):
    base = base_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter")
    words = ["convert", "merge-lora", str(adapter), str(tmp_path / "merged")]
    assert cli.run([*words, "--verify"]) == 0
    out = capsys.readouterr().out
    assert "difference" in out and "Attached and added" in out
    assert cli.run(words) == 4  # exists
    (tmp_path / "base").rename(tmp_path / "there")
    words[-1] = str(tmp_path / "again")
    assert cli.run(words) == 4
    assert "--base" in capsys.readouterr().err
    assert cli.run([*words, "--base", str(tmp_path / "there")]) == 0
