"""The language model alone: the same bits, the same answers, no trace of the rest."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from golden_data import golden
from tiny import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from av_llava.chat import normalize_messages
from av_llava.checkpoints import shards
from av_llava.checkpoints.convert import convert
from av_llava.checkpoints.load import load_checkpoint
from av_llava.errors import CheckpointError
from av_llava.processor import AVLlavaProcessor

from .converting import fingerprint, tensors
from .folders import (
    ABSENT,
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


def load_text(folder):
    """As users do, strictly."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize(
    "case", [V15, V16, OV, LV, "layout_sharded_bin", "mistral_anyres_unpad_landscape"]
)
def test_it_answers_text_as_the_whole_model_does(tmp_path, case):
    source = golden(f"llava/{case}") / "checkpoint"
    report = convert("text-only", source, tmp_path / "text", verify=True)
    assert report.difference == 0
    whole = load_checkpoint(source, device="cpu", dtype="float32").model
    text = load_text(tmp_path / "text")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(text(ids).logits, whole(ids).logits)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(text.generate(ids, **options), whole.generate(ids, **options))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_and_both_kinds_of_heads(tmp_path, kind, tied):
    more = {"head_dim": 16} if kind == "gemma2" else {}
    model, processor = tiny(kind, text={"tie_word_embeddings": tied, **more})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    report = convert("text-only", tmp_path / "source", tmp_path / "text", verify=True)
    text = load_text(tmp_path / "text")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(text(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-6)
    assert (text.lm_head.weight is text.model.embed_tokens.weight) == tied
    made = tensors(tmp_path / "text")
    assert ("lm_head.weight" in made) == (not tied)
    assert made["model.embed_tokens.weight"].shape[0] == text.config.vocab_size
    assert report.mapped == len(made)
    left = {n for names in report.dropped.values() for n in names}
    assert left | made.keys() == set(tensors(tmp_path / "source"))


def test_the_folder_is_plain(tmp_path, caplog):
    source = golden(f"llava/{V16}") / "checkpoint"
    convert("text-only", source, tmp_path / "text")
    data = json.loads((tmp_path / "text" / "config.json").read_text())
    assert data["model_type"] == "llama" and data["architectures"] == ["LlamaForCausalLM"]
    assert data["dtype"] == "float32" and data["tie_word_embeddings"] is False
    strange = [
        k for k in data if k.startswith(("mm_", "image_", "tune_", "max_length", "do_sample"))
    ]
    assert strange == []
    generation = GenerationConfig.from_pretrained(tmp_path / "text")
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 0)
    assert generation.max_length is None or generation.max_length != 20
    with caplog.at_level(logging.WARNING):
        AutoTokenizer.from_pretrained(tmp_path / "text")
        load_text(tmp_path / "text")
    assert caplog.text == ""


def test_the_tokenizer_has_the_prompt_format(tmp_path):
    source = golden(f"llava/{V15}") / "checkpoint"
    report = convert("text-only", source, tmp_path / "text")
    assert "prompt format vicuna_v1" in report.notes[0]
    loaded = load_checkpoint(source, device="cpu")
    turns = [{"role": "user", "content": "What is a llama?"}]
    processor = AVLlavaProcessor(loaded.tokenizer, loaded.model.config)
    wanted = processor.template.render(normalize_messages(turns), True).text
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    assert ids["input_ids"] == loaded.tokenizer(wanted).input_ids


def test_no_tower_needs_to_be_at_hand(tmp_path):
    source = copy_case(V15, tmp_path / "case")
    shutil.rmtree(tmp_path / "case" / "vision_tower")
    assert convert("text-only", source, tmp_path / "text", verify=True).difference == 0


def test_the_head_of_a_tied_checkpoint_is_left_out(tmp_path):
    source = copy_case(OV, tmp_path / "case")
    edit_weights(source, **{"lm_head.weight": ABSENT})
    edit_config(source, tie_word_embeddings=True)
    report = convert("text-only", source, tmp_path / "text", verify=True)
    assert report.difference == 0 and load_text(tmp_path / "text").config.tie_word_embeddings


def test_from_a_folder_of_transformers(tmp_path):
    stock = stock_model("llava_onevision", text="qwen2")
    folder = stock_folder(stock, tmp_path / "stock")
    convert("text-only", folder, tmp_path / "text", verify=True)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(load_text(tmp_path / "text")(ids).logits, stock(ids).logits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.norm.weight": None}, "1 missing: model.norm.weight"),
        ({"model.layers.9.mlp.up_proj.weight": torch.ones(2)}, "1 unexpected: model.layers.9"),
        ({"lm_head.weight": torch.ones(3, 64)}, r"1 of a wrong shape: lm_head.weight"),
    ],
)
def test_an_incomplete_language_model_is_refused(tmp_path, changes, words):
    source = copy_case(V16, tmp_path / "case")
    state = {**read_weights(source), **changes}
    write_weights(source, {k: v for k, v in state.items() if v is not None})
    with pytest.raises(CheckpointError, match=words):
        convert("text-only", source, tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_a_plain_language_model_has_nothing_to_leave_out(tmp_path):
    source = golden("llava/layout_mm_projector_only") / "base"
    with pytest.raises(CheckpointError, match="not a checkpoint of the LLaVA family"):
        convert("text-only", source, tmp_path / "text")


def test_a_difference_is_found(tmp_path, monkeypatch):
    source = golden(f"llava/{V15}") / "checkpoint"
    pieces = shards.Transfer.pieces

    def wrong(self, tensor):
        return [t * 1.1 if self.name == "lm_head.weight" else t for t in pieces(self, tensor)]

    monkeypatch.setattr(shards.Transfer, "pieces", wrong)
    with pytest.raises(CheckpointError, match="differs from"):
        convert("text-only", source, tmp_path / "text", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_the_original_stays_as_it_was(tmp_path):
    source = copy_case(V16, tmp_path / "case")
    before = fingerprint(tmp_path / "case")
    convert("text-only", source, tmp_path / "text", verify=True)
    assert fingerprint(tmp_path / "case") == before
