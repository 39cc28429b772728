"""One self-contained folder in LLaVA's names: what save_pretrained would write, without loading."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from golden_data import golden
from safetensors.torch import load_file
from tiny import tiny

from av_llava.checkpoints.convert import convert
from av_llava.checkpoints.load import load_checkpoint
from av_llava.errors import BudgetError, CheckpointError
from av_llava.inspection import describe

from .converting import assert_same_tensors, fingerprint, tensors
from .folders import (
    LV,
    OV,
    V15,
    V16,
    copy_case,
    edit_config,
    edit_weights,
    read_weights,
    write_weights,
)
from .stock_llava import stock_folder, stock_model

torch.set_num_threads(1)

NAMES = [V15, V16, OV, LV, "layout_sharded_bin", "s2_single", "mistral_anyres_unpad_landscape"]


def saved_by_loading(source, folder):
    """What the slow way writes: load everything, save everything."""
    loaded = load_checkpoint(source, device="cpu")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def settings_in(folder):
    data = json.loads((folder / "config.json").read_text())
    data.pop("_name_or_path", None)
    for network in ("text_config", "vision_config", "audio_config"):
        (data[network] or {}).pop("dtype", None)  # the outer one counts
    return data


@pytest.mark.parametrize("case", NAMES)
def test_it_is_what_loading_and_saving_writes(tmp_path, case):
    source = golden(f"llava/{case}") / "checkpoint"
    report = convert("llava", source, tmp_path / "out", verify=True)
    slow = saved_by_loading(source, tmp_path / "slow")
    assert report.difference == 0
    assert_same_tensors(tensors(slow), tensors(tmp_path / "out"))
    assert settings_in(slow) == settings_in(tmp_path / "out")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        one, two = (json.loads((f / name).read_text()) for f in (slow, tmp_path / "out"))
        assert one == two, name
    assert report.mapped == len(tensors(slow)) and set(report.files) == {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")
    }


@pytest.mark.parametrize("case", [V15, OV])
def test_the_folder_needs_nothing_beside_it(tmp_path, case):
    source = copy_case(case, tmp_path / "case")
    inputs = load_file(golden(f"llava/{case}") / "inputs.safetensors")
    convert("llava", source, tmp_path / "out")
    before = load_checkpoint(source, device="cpu").model
    shutil.rmtree(tmp_path / "case")
    report = describe(tmp_path / "out")
    assert report["missing"] == report["unexpected"] == []
    assert report["vision_tower"]["weights"] == "inside the checkpoint"
    after = load_checkpoint(tmp_path / "out", device="cpu").model
    text = inputs["input_ids"].clamp(min=0)
    with torch.no_grad():
        assert torch.equal(before(text).logits, after(text).logits)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_our_own_folders_with_ears(tmp_path, kind):
    model, processor = tiny(kind)
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    report = convert("llava", tmp_path / "source", tmp_path / "out", verify=True, shard_size="50kB")
    assert report.difference == 0 and len(report.files) > 8
    assert_same_tensors(tensors(tmp_path / "source"), tensors(tmp_path / "out"))
    assert settings_in(tmp_path / "source") == settings_in(tmp_path / "out")
    state = load_checkpoint(tmp_path / "out", device="cpu").model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_shards_of_both_kinds_give_the_same(tmp_path):
    source = copy_case(V16, tmp_path / "case")
    state = read_weights(source)
    convert("llava", source, tmp_path / "one")
    for kind in ("bin", "safetensors"):
        write_weights(source, state, kind, shards=3)
        convert("llava", source, tmp_path / kind, verify=True)
        assert_same_tensors(tensors(tmp_path / "one"), tensors(tmp_path / kind))


def test_tensors_keep_their_own_types(tmp_path):
    source = copy_case(V16, tmp_path / "case")
    state = read_weights(source)
    edit_weights(source, **{"model.norm.weight": state["model.norm.weight"].bfloat16()})
    convert("llava", source, tmp_path / "out")
    made = tensors(tmp_path / "out")
    assert made["model.norm.weight"].dtype == torch.bfloat16
    assert made["lm_head.weight"].dtype == torch.float32


def test_another_type(tmp_path):
    source = golden(f"llava/{V15}") / "checkpoint"
    report = convert("llava", source, tmp_path / "out", dtype="bf16", verify=True)
    assert report.difference == 0  # compared with the source rounded the same way
    made = tensors(tmp_path / "out")
    assert {t.dtype for t in made.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_checkpoint(tmp_path / "out", device="cpu").model.dtype == torch.bfloat16


def test_a_tied_head_and_unused_buffers_are_left_out_and_counted(tmp_path):
    source = stock_folder(
        stock_model("llava", text="qwen2", tie_word_embeddings=True), tmp_path / "s"
    )
    state = load_file(source / "model.safetensors")
    state["language_model.lm_head.weight"] = state[
        "language_model.model.embed_tokens.weight"
    ].clone()
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_weights(source, state)
    report = convert("llava", source, tmp_path / "out", verify=True)
    assert report.dropped == {
        "tied to the embedding": ("lm_head.weight",),
        "hold nothing that is used": (
            "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
        ),
    }
    assert "lm_head.weight" not in tensors(tmp_path / "out")


FAULTS = {
    "a missing tensor": ({"model.norm.weight": None}, "1 missing: model.norm.weight"),
    "a tensor too many": ({"model.extra": torch.ones(1)}, "1 unexpected: model.extra"),
    "a wrong shape": (
        {"model.norm.weight": torch.ones(3)},
        r"1 of a wrong shape: model.norm.weight \(the file has \(3,\), the model needs \(64,\)\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_source_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, fault):
    changes, words = FAULTS[fault]
    source = copy_case(V16, tmp_path / "case")
    state = {**read_weights(source), **changes}
    write_weights(source, {k: v for k, v in state.items() if v is not None})
    report = convert("llava", source, tmp_path / "out", dry_run=True)
    assert report.problems
    with pytest.raises(CheckpointError, match=f"cannot be converted .*{words}"):
        convert("llava", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tower_that_is_nowhere_is_named(tmp_path):
    source = copy_case(V15, tmp_path / "case")
    shutil.rmtree(tmp_path / "case" / "vision_tower")
    with pytest.raises(CheckpointError, match="tower 'vision_tower' was not found"):
        convert("llava", source, tmp_path / "out")


def test_a_tower_of_another_depth_is_refused(tmp_path):
    source = copy_case(V15, tmp_path / "case")
    edit_config(tmp_path / "case" / "vision_tower", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="holds 3 layers, but its config.json says 2"):
        convert("llava", source, tmp_path / "out")


def test_comparing_needs_memory_and_says_so_first(tmp_path, monkeypatch):
    monkeypatch.setattr("av_llava.checkpoints.compare._free_memory", lambda: 1000)
    source = golden(f"llava/{V15}") / "checkpoint"
    with pytest.raises(BudgetError, match="Leave --verify out"):
        convert("llava", source, tmp_path / "out", verify=True)
    convert("llava", source, tmp_path / "out")


def test_the_original_stays_as_it_was(tmp_path):
    source = copy_case(V15, tmp_path / "case")
    before = fingerprint(tmp_path / "case")
    convert("llava", source, tmp_path / "out", verify=True)
    assert fingerprint(tmp_path / "case") == before
