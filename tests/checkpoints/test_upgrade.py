"""Old configurations of the family, brought up to date without a question."""

from __future__ import annotations

import json

import pytest
import torch
from golden_data import golden

from av_llava.checkpoints.convert import convert
from av_llava.checkpoints.load import load_checkpoint
from av_llava.checkpoints.upgrade import upgraded
from av_llava.errors import CheckpointError, UsageError

from .converting import assert_same_tensors, fingerprint, tensors
from .folders import ABSENT, OV, V15, V16, copy_case, edit_config, read_weights, write_weights
from .stock_llava import stock_folder, stock_model

torch.set_num_threads(1)


def first_llava(to):
    """A folder as the first LLaVA wrote it: a LLaMA by name, with the projector in it."""
    source = copy_case(V15, to)
    edit_config(
        source,
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        mm_projector_type=ABSENT,
        mm_vision_select_feature=ABSENT,
        image_aspect_ratio=ABSENT,
        pad_token_id=-1,
        use_mm_proj=True,
    )
    state = read_weights(source)
    state["model.mm_projector.weight"] = state.pop("model.mm_projector.0.weight")
    state["model.mm_projector.bias"] = state.pop("model.mm_projector.0.bias")
    del state["model.mm_projector.2.weight"], state["model.mm_projector.2.bias"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write_weights(source, state, "bin", shards=2)
    return source


def logits(folder):
    model = load_checkpoint(folder, device="cpu", dtype="float32").model
    pixels = torch.randn((1, 3, 56, 56), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(torch.tensor([[5, -200, 7]]), images=pixels).logits


def test_the_first_llava_becomes_one_that_its_later_code_reads(tmp_path):
    source = first_llava(tmp_path / "case")
    before = fingerprint(tmp_path / "case")
    report = convert("consolidate", source, tmp_path / "new", verify=True)
    assert report.difference == 0 and report.converter == "consolidate"
    assert fingerprint(tmp_path / "case") == before
    data = json.loads((tmp_path / "new" / "config.json").read_text())
    assert data["model_type"] == "llava_llama"
    assert data["architectures"] == ["LlavaLlamaForCausalLM"]
    assert data["mm_projector_type"] == "linear" and data["mm_vision_select_feature"] == "patch"
    assert data["pad_token_id"] is None
    old = json.loads((source / "config.json").read_text())
    assert all(
        data[k] == v
        for k, v in old.items()
        if k not in ("model_type", "architectures", "pad_token_id")
    )
    assert 'model_type: "llama" becomes "llava_llama"' in report.notes
    assert 'mm_projector_type: absent becomes "linear"' in report.notes
    assert report.dropped["hold nothing that is used"] == (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )
    made = tensors(tmp_path / "new")
    assert "model.mm_projector.weight" in made and len(made) == report.mapped
    assert torch.equal(logits(source), logits(tmp_path / "new"))


def test_shards_become_one_kind_and_the_tower_beside_comes_along(tmp_path):
    source = copy_case(V15, tmp_path / "case")
    state = read_weights(source)
    write_weights(source, state, "bin", shards=3)
    (source / "README.md").write_text("mine")
    (source / "extra").mkdir()
    (source / "extra" / "file").write_text("x")
    convert("upgrade", source, tmp_path / "far" / "new", shard_size="200kB")
    made = tmp_path / "far" / "new"
    assert_same_tensors(state, tensors(made))
    assert (
        not list(made.glob("pytorch_model*")) and (made / "model.safetensors.index.json").exists()
    )
    assert (made / "README.md").read_text() == "mine" and (made / "extra" / "file").is_file()
    assert torch.equal(logits(source), logits(made))
    assert (made / "vision_tower" / "config.json").is_file()


@pytest.mark.parametrize(
    ("case", "kind", "architecture"),
    [
        (V16, "llava_llama", "LlavaLlamaForCausalLM"),
        (OV, "llava_qwen", "LlavaQwenForCausalLM"),
        ("mistral_anyres_unpad_landscape", "llava_mistral", "LlavaMistralForCausalLM"),
    ],
)
def test_families_get_their_names(case, kind, architecture):
    data = json.loads((golden(f"llava/{case}") / "checkpoint" / "config.json").read_text())
    new, _ = upgraded(data)
    assert (new["model_type"], new["architectures"]) == (kind, [architecture])
    assert upgraded(new) == (new, ())


def test_the_old_name_of_the_tower_is_read():
    new, changes = upgraded(
        {"model_type": "llama", "vision_tower": "clip", "mm_projector_type": "linear"}
    )
    assert new["mm_vision_tower"] == "clip" and any("mm_vision_tower" in c for c in changes)


# ---------------------------------------------------------------- in place


def test_in_place_changes_config_only_and_keeps_the_old_one(tmp_path):
    source = first_llava(tmp_path / "case")
    before, old = fingerprint(source), (source / "config.json").read_bytes()
    report = convert("upgrade", source, in_place=True)
    assert report.files == ("config.json", "config.json.bak")
    assert (source / "config.json.bak").read_bytes() == old
    after = fingerprint(source)
    assert {k: v for k, v in after.items() if "config.json" not in k} == {
        k: v for k, v in before.items() if "config.json" not in k
    }
    assert json.loads((source / "config.json").read_text())["model_type"] == "llava_llama"
    again = convert("upgrade", source, in_place=True)
    assert again.files == () and again.notes == ("The config.json is up to date.",)
    assert fingerprint(source) == after
    edit_config(source, model_type="llama")
    assert convert("upgrade", source, in_place=True).files == ("config.json", "config.json.bak2")
    assert (source / "config.json.bak").read_bytes() == old


def test_a_dry_run_changes_nothing(tmp_path):
    source = first_llava(tmp_path / "case")
    before = fingerprint(tmp_path)
    in_place = convert("upgrade", source, in_place=True, dry_run=True)
    elsewhere = convert("upgrade", source, tmp_path / "new", dry_run=True)
    assert in_place.notes == elsewhere.notes and len(in_place.notes) > 2
    assert fingerprint(tmp_path) == before


# ---------------------------------------------------------------- wrong input


def test_exactly_one_place_must_be_given(tmp_path):
    source = copy_case(V16, tmp_path / "case")
    for destination, in_place in ((None, False), (tmp_path / "new", True)):
        with pytest.raises(UsageError, match="either a destination or --in-place"):
            convert("upgrade", source, destination, in_place=in_place)


def test_in_place_has_no_weights_to_convert_and_no_hub_to_change(tmp_path):
    source = first_llava(tmp_path / "case")
    for options in ({"verify": True}, {"dtype": "bfloat16"}):
        with pytest.raises(UsageError, match="In place only config.json changes"):
            convert("upgrade", source, in_place=True, **options)
    with pytest.raises(UsageError, match="'owner/name' is no folder here"):
        convert("upgrade", "owner/name", in_place=True)


def test_folders_of_other_layouts_are_refused(tmp_path):
    folder = stock_folder(stock_model("llava"), tmp_path / "stock")
    with pytest.raises(CheckpointError, match="not in LLaVA's layout"):
        convert("upgrade", folder, in_place=True)
    with pytest.raises(CheckpointError, match="not in LLaVA's layout"):
        convert("upgrade", golden("llava/layout_mm_projector_only") / "base", tmp_path / "new")
    assert not (tmp_path / "new").exists()
