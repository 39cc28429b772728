"""``info`` tells the truth: what a folder holds, what loading would refuse, and what it needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden_data import golden, golden_dirs
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import LlamaConfig, LlamaForCausalLM

import av_llava
from av_llava.checkpoints import towers
from av_llava.checkpoints.adapters import save_adapter
from av_llava.checkpoints.convert import convert
from av_llava.checkpoints.load import load_checkpoint
from av_llava.checkpoints.partial import load_any
from av_llava.errors import CheckpointError
from av_llava.processor import AVLlavaProcessor

from .folders import (
    ABSENT,
    LV,
    OV,
    V15,
    V16,
    copy_case,
    edit_config,
    edit_json,
    edit_weights,
    refusal,
    write_weights,
)
from .trained import NEW, PROJECTORS, answers, base_folder, hearing, lora, new_ids

torch.set_num_threads(1)

PARTIAL = "layout_mm_projector_only"
WHOLE = [p / "checkpoint" for p in golden_dirs("llava/*") if (p / "checkpoint").is_dir()]
KINDS = {"clip": "ClipTower", "clip_s2": "ClipS2Tower", "siglip": "SiglipTower"}
FOLDERS = [p for p in WHOLE if p.parent.name != PARTIAL] + golden_dirs("hf/*")


# ---------------------------------------------------------------- every reference folder


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.parent.name + "/" + p.name)
def test_every_reference_folder_is_what_info_says(folder):
    found = av_llava.describe(folder)
    loaded = load_checkpoint(folder, device="cpu")
    model, config = loaded.model, loaded.model.config
    data = json.loads((folder / "config.json").read_text())
    text, vision = found["language_model"], found["vision_tower"]
    assert found["holds"] == "a whole model"
    assert found["layout"] == data["model_type"]
    assert found["architecture"] == data["architectures"][0]
    assert found["missing"] == found["unexpected"] == found["mismatched"] == []
    assert found["problems"] == [] and found["notes"] == []
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert text["type"] == config.text_config.model_type
    assert text["vocabulary"] == model.get_input_embeddings().weight.shape[0]
    head = model.get_output_embeddings().weight
    assert text["tied_head"] == (head is model.get_input_embeddings().weight)
    assert KINDS[vision["kind"]] == type(model.model.vision_tower).__name__
    assert vision["parameters"] == sum(p.numel() for p in model.model.vision_tower.parameters())
    inside = any("vision_tower." in key for key in tensors_of(folder))
    beside = str(folder.parent / str(data.get("mm_vision_tower")))
    assert vision["weights"] == ("inside the checkpoint" if inside else beside)
    assert found["projector"] == config.projector.kind
    linears = [m for m in model.model.mm_projector.modules() if isinstance(m, torch.nn.Linear)]
    assert found["projector"] == {1: "linear", 2: "mlp2x_gelu"}[len(linears)]
    marks = {"newline": "image_newline", "frame_end": "faster_token"}
    held = [k for k, v in marks.items() if getattr(model.model.media_tokens, v, None) is not None]
    assert sorted(found["marks"]) == sorted(held)
    processor = AVLlavaProcessor(loaded.tokenizer, config)
    assert found["tokenizer"]["size"] == len(loaded.tokenizer)
    assert found["tokenizer"]["template"] == processor.template.name
    assert found["weights"]["tensors"] == len(tensors_of(folder))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]:
        if file.name not in ("inputs.safetensors", "outputs.safetensors"):
            state |= load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    return state


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        (V15, "model.mm_projector.0.bias", ABSENT),
        (V16, "model.image_newline", torch.zeros(7)),
        (OV, "model.vision_tower.vision_tower.vision_model.extra.weight", torch.zeros(2)),
        (LV, "model.layers.1.mlp.up_proj.weight", torch.zeros(3, 5)),
        (V16, "lm_head.weight", ABSENT),
        (V15, "model.faster_token", torch.zeros(9)),
    ],
)
def test_what_does_not_fit_is_what_loading_refuses(tmp_path, case, key, value):
    folder = copy_case(case, tmp_path)
    if value is ABSENT:
        edit_config(folder, tie_word_embeddings=False)
    edit_weights(folder, **{key: value})
    found, refused = av_llava.describe(folder), refusal(folder)
    told = [*found["missing"], *found["unexpected"], *found["mismatched"]]
    assert len(told) == 1 and told[0].startswith(key) and key in refused
    (problem,) = found["problems"]
    kind = {"missing": "Missing", "unexpected": "Unexpected", "of a wrong shape": "Wrong shape"}
    said = next(v for k, v in kind.items() if k in problem)
    assert said in refused
    if said == "Wrong shape":
        assert str(tuple(value.shape)) in problem


# ---------------------------------------------------------------- what is missing, and why


def test_a_tower_that_is_nowhere_is_a_problem_and_the_rest_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(towers, "snapshot_download", unreachable)
    folder = copy_case(V15, tmp_path)
    shutil.rmtree(tmp_path / "vision_tower")
    found = av_llava.describe(folder)
    (problem,) = found["problems"]
    assert problem in refusal(folder) and "vision_tower" in problem and "Looked in" in problem
    assert found["language_model"]["type"] == "llama" and "vision_tower" not in found
    assert found["missing"] == [] and found["tokenizer"]["size"] == 304


def test_a_published_tower_is_named_without_being_fetched(tmp_path, monkeypatch):
    fetched = []

    def download(name, local_files_only=False, **options):
        fetched.append(local_files_only)
        return unreachable(name)

    monkeypatch.setattr(towers, "snapshot_download", download)
    folder = copy_case(V15, tmp_path)
    shutil.rmtree(tmp_path / "vision_tower")
    edit_config(folder, mm_vision_tower="openai/clip-vit-large-patch14-336", mm_hidden_size=1024)
    found = av_llava.describe(folder)
    assert fetched == [True]  # the hub's cache was looked into, and nothing else
    assert found["vision_tower"]["weights"] == "not here"
    assert found["vision_tower"]["image_size"] == 336
    assert "fetches them" in found["notes"][0] and not found["missing"]
    assert any("mm_projector.0.weight" in key for key in found["mismatched"])


def unreachable(*args, **options):
    raise OSError("no network")


def test_an_absent_shard_is_a_problem_and_the_rest_is_told(tmp_path):
    folder = copy_case(OV, tmp_path)
    write_weights(folder, load_file(folder / "model.safetensors"), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    found = av_llava.describe(folder)
    assert found["problems"] == [refusal(folder)]
    assert "model-00002-of-00003.safetensors" in found["problems"][0]
    assert found["language_model"]["type"] == "qwen2" and "missing" not in found


def test_a_tokenizer_that_cannot_be_read_is_a_problem(tmp_path):
    folder = copy_case(V15, tmp_path)
    (folder / "tokenizer.json").write_text("{")
    found = av_llava.describe(folder)
    assert found["problems"] == [refusal(folder)] and "tokenizer" not in found


def test_tokens_that_loading_adds_are_told(tmp_path):
    folder = copy_case(V15, tmp_path)
    edit_config(folder, mm_use_im_start_end=True, mm_use_im_patch_token=True)
    found = av_llava.describe(folder)
    tokenizer = load_checkpoint(folder, device="cpu").tokenizer
    names = ["<im_patch>", "<im_start>", "<im_end>"]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert found["tokenizer"]["tokens"] == dict(zip(names, ids, strict=True))
    assert found["notes"][0].startswith("3 token(s)")
    assert found["language_model"]["vocabulary"] == 320
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    edit_weights(folder, **{k: tensors_of(folder)[k][:304] for k in tables})
    edit_config(folder, vocab_size=304)
    found, loaded = av_llava.describe(folder), load_checkpoint(folder, device="cpu").model
    assert found["problems"] == [] and found["language_model"]["vocabulary"] == 307
    assert found["parameters"] == sum(p.numel() for p in loaded.parameters())


def test_a_model_that_only_listens(tmp_path):
    blind, processor = tiny("llama", vision_config=None)
    blind.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = av_llava.describe(tmp_path)
    assert found["missing"] == found["unexpected"] == found["problems"] == []
    assert "vision_tower" not in found and found["audio_tower"]["kind"] == "whisper"
    assert found["tokenizer"]["tokens"].keys() == {"<au_start>", "<au_end>"}
    edit_weights(tmp_path, **{"model.mm_audio_projector.0.weight": ABSENT})
    assert av_llava.describe(tmp_path)["missing"] == ["model.mm_audio_projector.0.weight"]
    assert "model.mm_audio_projector.0.weight" in refusal(tmp_path)


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="not a checkpoint of the LLaVA family"):
        av_llava.describe(tmp_path)
    case = golden(f"llava/{V15}") / "checkpoint"
    with pytest.raises(CheckpointError, match="stands on no base"):
        av_llava.describe(case, base=case)


# ---------------------------------------------------------------- parts of a model


def adapter(tmp_path):
    base = base_folder(tmp_path / "base")
    m = hearing(base)
    rows = {"embed_tokens": new_ids(m)}
    trained = lora(m, modules_to_save=PROJECTORS, trainable_token_indices=rows)
    save_adapter(trained, m.processor, tmp_path / "adapter", base=base)
    return tmp_path / "adapter"


def test_an_adapter_and_its_whole_model(tmp_path):
    folder = adapter(tmp_path)
    found = av_llava.describe(folder)
    assert found["holds"] == "an adapter of av_llava"
    assert found["base"] == str(tmp_path / "base")
    assert found["lora"] == {"modules": 6, "rank": 4}
    assert found["token_rows"] == sorted(["<au_start>", "<au_end>", *NEW])
    assert found["missing"] == found["unexpected"] == found["problems"] == []
    assert found["language_model"]["vocabulary"] == 368 and "audio_tower" in found
    state = load_file(folder / "multimodal.safetensors")
    gone = state.pop("model.mm_audio_projector.0.weight")
    state["model.mm_nothing.weight"] = gone
    save_file(state, folder / "multimodal.safetensors")
    found = av_llava.describe(folder)
    assert found["missing"] == ["model.mm_audio_projector.0.weight"]
    assert found["unexpected"] == ["model.mm_nothing.weight"] and len(found["problems"]) == 2
    shutil.rmtree(tmp_path / "base")
    found = av_llava.describe(folder)
    assert "cannot be found" in found["problems"][0] and found["lora"]["rank"] == 4


@pytest.mark.parametrize("scheme", ["4bit", "int8"])
def test_an_adapter_on_a_base_that_is_stored_quantised(tmp_path, scheme):
    base = base_folder(tmp_path / "base")
    av_llava.load(base, device="cpu", quantize=scheme).save_pretrained(tmp_path / "small")
    m = av_llava.load(tmp_path / "small", device="cpu")
    trained = lora(m)
    before = answers(trained)
    save_adapter(trained, m.processor, tmp_path / "adapter", base=tmp_path / "small")
    again = av_llava.load(tmp_path / "adapter", device="cpu").model
    assert torch.equal(answers(again), before)
    found = av_llava.describe(tmp_path / "adapter")
    assert found["base"] == str(tmp_path / "small") and found["lora"]["modules"] == 6
    assert found["missing"] == found["unexpected"] == found["problems"] == []


def test_a_tower_that_an_adapter_refers_to_and_that_is_gone_is_told(tmp_path):
    base = copy_case(V15, tmp_path)
    m = av_llava.load(base, device="cpu")
    save_adapter(lora(m, target_modules=["q_proj"]), m.processor, tmp_path / "adapter", base=base)
    tower = str(tmp_path / "vision_tower")
    found = av_llava.describe(tmp_path / "adapter")
    assert found["vision_tower"]["weights"] == tower and found["notes"] == []
    shutil.rmtree(tower)
    found = av_llava.describe(tmp_path / "adapter")
    assert found["problems"] == [] and tower in "".join(found["notes"] + found["problems"])


def test_an_adapter_on_another_base_says_which_key_and_both_shapes(tmp_path):
    folder = adapter(tmp_path)
    other = base_folder(tmp_path / "other", kind="qwen2")
    (problem,) = av_llava.describe(folder, base=other)["problems"]
    with pytest.raises(CheckpointError) as caught:
        load_any(folder, other, device="cpu")
    assert problem == str(caught.value) and str(other) in problem


def test_requests_are_planned_on_an_adapter(tmp_path):
    folder = adapter(tmp_path)
    planned = av_llava.plan(folder, None, "Who?")
    answer = av_llava.load(folder, device="cpu").ask(None, "Who?", max_new_tokens=1)
    assert planned.usage.prompt_tokens == answer.usage.prompt_tokens


def test_a_projector_needs_a_base_and_is_told_with_it():
    case = golden(f"llava/{PARTIAL}")
    found = av_llava.describe(case / "checkpoint")
    assert found["holds"] == "a projector" and found["tensors"] == 4
    assert found["base"] is None and found["problems"] == []
    assert "--base" in found["notes"][0]
    found = av_llava.describe(case / "checkpoint", base=case / "base")
    loaded = load_any(case / "checkpoint", case / "base", device="cpu")
    assert found["missing"] == found["unexpected"] == found["problems"] == found["notes"] == []
    assert found["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert found["vision_tower"]["weights"] == str(case / "vision_tower")
    planned = av_llava.plan(case / "checkpoint", None, "Who?", base=case / "base")
    assert planned.usage.prompt_tokens > 0


def test_a_lora_of_llava_and_its_base(tmp_path):
    base = copy_case(V15, tmp_path)
    folder = tmp_path / "llava-lora"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    edit = {**settings, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(edit))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{name}A.weight": torch.ones(2, 64), f"{name}B.weight": torch.ones(64, 2)}
    torch.save(pair, folder / "adapter_model.bin")
    projector = {
        f"base_model.model.{k}": v for k, v in tensors_of(base).items() if "mm_projector" in k
    }
    torch.save(projector, folder / "non_lora_trainables.bin")
    found = av_llava.describe(folder)
    assert found["holds"] == "a LoRA" and found["lora"] == {"modules": 1, "rank": 2}
    assert found["base"] == str(base) and found["tensors"] == len(projector)
    assert found["missing"] == found["unexpected"] == found["problems"] == []
    torch.save({k: v[..., :5] for k, v in pair.items()}, folder / "adapter_model.bin")
    (problem,) = av_llava.describe(folder)["problems"]
    assert "q_proj" in problem and "(2, 5)" in problem and "(64, 64)" in problem


# ---------------------------------------------------------------- deltas


@pytest.fixture
def delta(tmp_path):
    """A base, a target of it, and the delta between them."""
    target = copy_case(V15, tmp_path)
    state = {k: v for k, v in tensors_of(target).items() if "mm_projector" not in k}
    config = json.loads((target / "config.json").read_text())
    names = LlamaConfig().to_dict()
    plain = LlamaConfig(**{k: v for k, v in config.items() if k in names and k != "architectures"})
    base = LlamaForCausalLM(plain)
    generator = torch.Generator().manual_seed(0)
    shifted = {
        k: v + 1e-3 * torch.randn(v.shape, generator=generator)
        for k, v in state.items()
        if k in base.state_dict()
    }
    base.load_state_dict(shifted)
    base.save_pretrained(tmp_path / "base")
    convert("make-delta", target, tmp_path / "delta", base=str(tmp_path / "base"))
    return tmp_path


def test_a_delta_names_its_base_and_how_to_apply_it(delta):
    found = av_llava.describe(delta / "delta")
    assert found["holds"] == "a delta" and found["base"] == str(delta / "base")
    assert found["missing"] == found["unexpected"] == found["problems"] == []
    assert "apply-delta" in found["notes"][0]
    with pytest.raises(CheckpointError, match="apply-delta"):
        av_llava.load(delta / "delta", device="cpu")
    with pytest.raises(CheckpointError, match="apply-delta"):
        convert("text-only", delta / "delta", delta / "text")
    shutil.rmtree(delta / "base")
    assert str(delta / "base") in av_llava.describe(delta / "delta")["problems"][0]


def test_a_delta_that_does_not_say_so_is_recognised_by_its_norm(delta):
    (delta / "delta" / "av_llava_delta.json").unlink()  # as LLaVA's own script leaves it
    assert "may be a delta" in av_llava.describe(delta / "delta")["notes"][0]
    found = av_llava.describe(delta / "delta", base=delta / "base")
    assert found["holds"] == "a delta" and found["problems"] == []
    edit_json(delta / "base" / "config.json", hidden_size=32)
    state = load_file(delta / "base" / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"][:5].clone()
    save_file(state, delta / "base" / "model.safetensors", metadata={"format": "pt"})
    found = av_llava.describe(delta / "delta", base=delta / "base")
    assert found["mismatched"] == ["model.norm.weight (delta has (64,), the base (5,))"]
