"""``info`` on adapters, LoRA folders and projectors: what they hold, stand on and lack."""

from __future__ import annotations

import shutil

from golden_data import golden
from safetensors.torch import load_file, save_file

import av_llava
from av_llava.checkpoints.adapters import save_adapter

from .trained import NEW, PROJECTORS, base_folder, hearing, lora, new_ids


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
    assert found["layout"] == "adapter of av_llava"
    assert found["base"] == str(tmp_path / "base")
    assert found["lora"] == {"modules": 6, "rank": 4}
    assert found["tokens"] == sorted(["<au_start>", "<au_end>", *NEW])
    assert found["missing"] == [] and found["unexpected"] == []
    assert found["language_model"]["vocabulary"] == 368 and "audio_tower" in found
    state = load_file(folder / "multimodal.safetensors")
    gone = state.pop("model.mm_audio_projector.0.weight")
    state["model.mm_nothing.weight"] = gone
    save_file(state, folder / "multimodal.safetensors")
    found = av_llava.describe(folder)
    assert found["missing"] == ["model.mm_audio_projector.0.weight"]
    assert found["unexpected"] == ["model.mm_nothing.weight"]
    shutil.rmtree(tmp_path / "base")
    assert "cannot be found" in av_llava.describe(folder)["error"]


def test_requests_are_planned_on_an_adapter(tmp_path):
    folder = adapter(tmp_path)
    planned = av_llava.plan(folder, None, "Who?")
    answer = av_llava.load(folder, device="cpu").ask(None, "Who?", max_new_tokens=1)
    assert planned.usage.prompt_tokens == answer.usage.prompt_tokens


def test_a_projector_says_that_its_base_is_not_named():
    found = av_llava.describe(golden("llava/layout_mm_projector_only") / "checkpoint")
    assert found["layout"] == "projector" and found["tensors"] == 4
    assert "names no base" in found["error"]
