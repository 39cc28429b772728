"""Projector and tower as files of their own, and back into a checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from golden_data import golden
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import AutoModel

from av_llava.checkpoints import shards, stored
from av_llava.checkpoints.convert import convert
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.load import load_checkpoint
from av_llava.errors import CheckpointError, UsageError

from .converting import assert_same_tensors, fingerprint, tensors
from .folders import LV, OV, V15, V16, copy_case, edit_config, read_weights, write_weights
from .stock_llava import stock_folder, stock_model

torch.set_num_threads(1)

TOWER = "model.vision_tower.vision_tower."


@pytest.mark.parametrize("case", [V15, V16, OV, LV, "layout_sharded_bin"])
def test_parts_are_the_same_bits_under_llavas_names(tmp_path, case):
    source = golden(f"llava/{case}") / "checkpoint"
    state = {}
    with stored.TensorReader() as reader:
        for tensor in stored.stored_tensors(CheckpointFolder(source)):
            state[tensor.name] = reader.read(tensor).clone()
    report = convert("surgery", source, tmp_path / "parts", verify=True)
    assert report.difference == 0
    projector = load_file(tmp_path / "parts" / "mm_projector.safetensors")
    marks = ("model.image_newline", "model.faster_token")
    wanted = {k: v for k, v in state.items() if k.startswith("model.mm_projector.") or k in marks}
    assert_same_tensors(wanted, projector)
    tower = {k.removeprefix(TOWER): v for k, v in state.items() if k.startswith(TOWER)}
    assert (tmp_path / "parts" / "vision_tower").is_dir() == bool(tower)
    if tower:
        assert_same_tensors(tower, tensors(tmp_path / "parts" / "vision_tower"))
    else:
        assert "holds no vision tower; its config.json names 'vision_tower'" in report.notes[0]


def test_the_tower_loads_with_transformers_and_gives_the_same_features(tmp_path):
    source = golden(f"llava/{V16}") / "checkpoint"
    convert("surgery", source, tmp_path / "parts", parts="tower")
    assert not (tmp_path / "parts" / "mm_projector.safetensors").exists()
    tower, report = AutoModel.from_pretrained(
        tmp_path / "parts" / "vision_tower", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    own = load_checkpoint(source, device="cpu").model.model.vision_tower
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        states = tower.eval()(pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[-2][:, 1:], own(pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [V16, OV])
def test_a_checkpoint_may_name_the_tower_that_was_taken_out(tmp_path, case):
    # SigLIP towers lack their last layer in LLaVA's files; LLaVA names them as if complete.
    source = copy_case(case, tmp_path / "case")
    before = load_checkpoint(source, device="cpu").model
    convert("surgery", source, tmp_path / "parts")
    write_weights(
        source, {k: v for k, v in read_weights(source).items() if "vision_tower" not in k}
    )
    shutil.move(tmp_path / "parts" / "vision_tower", source / "my_tower")
    edit_config(source, mm_vision_tower="my_tower")
    after = load_checkpoint(source, device="cpu").model
    side = before.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        assert torch.equal(before.model.encode_images(pixels), after.model.encode_images(pixels))
    assert before.config.vision.image_mean == after.config.vision.image_mean


@pytest.mark.parametrize("case", [V15, V16, OV, LV])
def test_putting_back_what_was_taken_out_changes_nothing(tmp_path, case):
    source = golden(f"llava/{case}") / "checkpoint"
    convert("surgery", source, tmp_path / "parts")
    report = convert("surgery", source, tmp_path / "back", put_back=tmp_path / "parts", verify=True)
    assert report.difference == 0
    assert_same_tensors(tensors(source), tensors(tmp_path / "back"))
    names = fingerprint(source).keys() - {"config.json"}
    assert {
        n: h for n, h in fingerprint(tmp_path / "back").items() if n in names and "model" not in n
    } == {n: h for n, h in fingerprint(source).items() if n in names and "model" not in n}
    one, two = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back"))
    assert one == two
    loaded = load_checkpoint(tmp_path / "back", device="cpu").model
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(
            loaded(ids).logits, load_checkpoint(source, device="cpu").model(ids).logits
        )


def test_a_tuned_projector_takes_the_place_of_the_old_one(tmp_path):
    source = golden(f"llava/{V16}") / "checkpoint"
    convert("surgery", source, tmp_path / "parts", parts="projector")
    file = tmp_path / "parts" / "mm_projector.safetensors"
    tuned = {k: v + 1 for k, v in load_file(file).items()}
    save_file(tuned, file)
    report = convert("surgery", source, tmp_path / "new", put_back=file)
    made, old = tensors(tmp_path / "new"), tensors(source)
    assert_same_tensors({**old, **tuned}, made)
    assert set(report.dropped["are replaced"]) == set(tuned)


SPELLINGS = {
    "LLaVA's mm_projector.bin": ("mm_projector.bin", lambda k: k),
    "trainables beside LoRA": ("non_lora_trainables.bin", lambda k: "base_model.model." + k),
    "llama.cpp's script": ("llava.projector", lambda k: k),
    "bare": ("projector.safetensors", lambda k: k.removeprefix("model.")),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_projectors_of_other_tools_are_put_back(tmp_path, spelling):
    # llama.cpp's script takes the tensors out of the original file.
    source = copy_case(V16, tmp_path / "case")
    name, rename = SPELLINGS[spelling]
    state = read_weights(source)
    part = {k: v for k, v in state.items() if "mm_projector" in k or "newline" in k}
    write_weights(source, {k: v for k, v in state.items() if k not in part})
    (tmp_path / "parts").mkdir()
    renamed = {rename(k): v for k, v in part.items()}
    if name.endswith("safetensors"):
        save_file(renamed, tmp_path / "parts" / name)
    else:
        torch.save(renamed, tmp_path / "parts" / name)
    report = convert("surgery", source, tmp_path / "back", put_back=tmp_path / "parts", verify=True)
    assert report.difference == 0
    assert_same_tensors(state, tensors(tmp_path / "back"))


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: k.replace("model.vision_tower.vision_tower.", ""),
        lambda k: k.replace("model.vision_tower.vision_tower.vision_model.", ""),
        lambda k: k.replace("model.vision_tower.vision_tower.", "vision_tower."),
        lambda k: k,
    ],
)
def test_towers_in_any_spelling_are_put_back(tmp_path, rename):
    source = copy_case(V16, tmp_path / "case")
    state = read_weights(source)
    part = {k: v for k, v in state.items() if "vision_tower" in k}
    write_weights(source, {k: v for k, v in state.items() if k not in part})
    torch.save({rename(k): v for k, v in part.items()}, tmp_path / "llava.clip")
    convert("surgery", source, tmp_path / "back", put_back=tmp_path / "llava.clip", verify=True)
    assert_same_tensors(state, tensors(tmp_path / "back"))


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_folders_of_transformers_keep_their_names(tmp_path, kind):
    folder = stock_folder(stock_model(kind), tmp_path / "stock")
    convert("surgery", folder, tmp_path / "parts", verify=True)
    names = set(load_file(tmp_path / "parts" / "mm_projector.safetensors"))
    assert names == {
        "model.image_newline",
        *(f"model.mm_projector.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")),
    }
    convert("surgery", folder, tmp_path / "back", put_back=tmp_path / "parts", verify=True)
    assert_same_tensors(tensors(folder), tensors(tmp_path / "back"))


def test_our_own_folders(tmp_path):
    model, processor = tiny()
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    convert("surgery", tmp_path / "source", tmp_path / "parts", verify=True)
    parts = tmp_path / "parts"
    convert("surgery", tmp_path / "source", tmp_path / "back", put_back=parts, verify=True)
    assert_same_tensors(tensors(tmp_path / "source"), tensors(tmp_path / "back"))


def test_a_tower_beside_the_checkpoint_comes_along(tmp_path):
    source = copy_case(V15, tmp_path / "case")
    convert("surgery", source, tmp_path / "parts")
    convert("surgery", source, tmp_path / "elsewhere" / "back", put_back=tmp_path / "parts")
    shutil.rmtree(tmp_path / "case")
    load_checkpoint(tmp_path / "elsewhere" / "back", device="cpu")


def test_the_original_stays_as_it_was(tmp_path):
    source = copy_case(V16, tmp_path / "case")
    before = fingerprint(tmp_path / "case")
    convert("surgery", source, tmp_path / "parts", verify=True)
    parts = fingerprint(tmp_path / "parts")
    convert("surgery", source, tmp_path / "back", put_back=tmp_path / "parts", verify=True)
    assert fingerprint(tmp_path / "case") == before and fingerprint(tmp_path / "parts") == parts


# ---------------------------------------------------------------- wrong input


def test_what_is_not_there_cannot_be_taken_out(tmp_path):
    source = golden(f"llava/{V15}") / "checkpoint"
    with pytest.raises(CheckpointError, match="no vision tower.*There is nothing to take out"):
        convert("surgery", source, tmp_path / "parts", parts="tower")
    with pytest.raises(UsageError, match="Unknown part 'projetcor'.*Did you mean 'projector'"):
        convert("surgery", source, tmp_path / "parts", parts="projetcor")
    case = copy_case(V16, tmp_path / "case")
    write_weights(case, {k: v for k, v in read_weights(case).items() if "mm_projector" not in k})
    with pytest.raises(CheckpointError, match="holds no projector"):
        convert("surgery", case, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


PARTS = {
    "another shape": (
        {"model.mm_projector.0.weight": torch.ones(64, 7)},
        r"1 of a wrong shape: model.mm_projector.0.weight \(the part has \(64, 7\), "
        r"the checkpoint \(64, 32\)\)",
    ),
    "half a projector": (
        {"model.mm_projector.0.weight": torch.ones(64, 32)},
        "3 missing: model.mm_projector.0.bias",
    ),
    "another projector": (
        {"model.mm_projector.4.weight": torch.ones(64, 64)},
        "1 unexpected: model.mm_projector.4.weight",
    ),
    "something else": (
        {"model.layers.0.mlp.up_proj.weight": torch.ones(2)},
        "belongs to neither projector nor vision tower",
    ),
    "twice": (
        {"model.mm_projector.0.bias": torch.ones(64), "mm_projector.0.bias": torch.ones(64)},
        "is there twice",
    ),
}


@pytest.mark.parametrize("fault", PARTS)
def test_parts_that_do_not_fit_are_refused(tmp_path, fault):
    state, words = PARTS[fault]
    save_file(state, tmp_path / "part.safetensors")
    source = golden(f"llava/{V16}") / "checkpoint"
    with pytest.raises(CheckpointError, match=words):
        convert("surgery", source, tmp_path / "out", put_back=tmp_path / "part.safetensors")
    assert not (tmp_path / "out").exists()


def test_parts_that_are_nowhere_are_named(tmp_path):
    source = golden(f"llava/{V16}") / "checkpoint"
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        convert("surgery", source, tmp_path / "out", put_back=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty holds no parts"):
        convert("surgery", source, tmp_path / "out", put_back=tmp_path / "empty")


def test_a_difference_is_found(tmp_path, monkeypatch):
    source = golden(f"llava/{V16}") / "checkpoint"
    pieces = shards.Transfer.pieces
    monkeypatch.setattr(shards.Transfer, "pieces", lambda self, t: [p + 1 for p in pieces(self, t)])
    with pytest.raises(CheckpointError, match="differs from .* by 1,"):
        convert("surgery", source, tmp_path / "parts", verify=True)
    assert list(tmp_path.iterdir()) == []
