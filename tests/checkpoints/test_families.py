"""Published families that the reference cases do not hold, as tiny folders in their own layout.

MobileVLM's two projectors, BakLLaVA (Mistral as 1.5), LLaVA 1.6 34B (Yi): names, files and config
fields as their authors publish them. The language model's side is compared with transformers' own
class, MobileVLM's projectors with the modules that it is written with.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionModel, LlamaForCausalLM, MistralForCausalLM

import av_llava
from av_llava.checkpoints.convert import convert
from av_llava.processor import AVLlavaProcessor

from .converting import assert_same_tensors, fingerprint, tensors
from .folders import (
    V15,
    V16,
    copy_case,
    edit_config,
    edit_json,
    load,
    read_weights,
    same_weights,
    write_sentencepiece,
    write_weights,
)

torch.set_num_threads(1)

IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 40, -200, 41, 42], [1, 43, -200, 44, 45]])


@torch.no_grad()
def door(model):
    """Embeddings and logits of two prompts with a picture each, through LLaVA's door."""
    *_, embeds, _ = model.prepare_inputs_labels_for_multimodal(IDS, None, None, None, None, IMAGES)
    return embeds, model(inputs_embeds=embeds).logits


@torch.no_grad()
def stock_logits(kind, model, embeds):
    """What transformers' own class makes of the embeddings, with the folder's weights."""
    stock = kind(model.config.text_config).eval()
    state = {
        k.replace("model.language_model.", "model."): v
        for k, v in model.state_dict().items()
        if k.startswith(("model.language_model.", "lm_head."))
    }
    stock.load_state_dict(state)
    return stock(inputs_embeds=embeds).logits


# ---------------------------------------------------------------- MobileVLM


class Ldp(nn.Module):
    """The lightweight downsample projector of MobileVLM, of torchvision's blocks."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        mobilenet = pytest.importorskip("torchvision.models.mobilenetv3")
        ops = pytest.importorskip("torchvision.ops.misc")

        def excite(channels, squeezed, **_):
            return ops.SqueezeExcitation(channels, squeezed, scale_activation=nn.Hardsigmoid)

        def block(stride):
            sizes = (outside, 3, outside, outside, True, "HS", stride, 1, 1)
            config = mobilenet.InvertedResidualConfig(*sizes)
            return mobilenet.InvertedResidual(config, ChannelNorm, excite)

        self.mlp = nn.Sequential(
            nn.Identity(), nn.Linear(inside, outside), nn.GELU(), nn.Linear(outside, outside)
        )
        self.mb_block = nn.Sequential(nn.Identity(), block(1), block(2))

    def forward(self, x):
        x = self.mlp(x).transpose(1, 2).unflatten(2, (4, 4))
        return self.mb_block(x).flatten(2).transpose(1, 2)


class ChannelNorm(nn.LayerNorm):
    """Over channels that come second; takes the place of a batch norm, which has no bias before."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class LdpV2(nn.Module):
    """Version 2: average pooling to 12 by 12, and positions by a depthwise convolution."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        layers = (nn.Linear(inside, outside), nn.GELU(), nn.Linear(outside, outside))
        self.mlp = nn.ModuleDict({"mlp": nn.Sequential(*layers)})
        convolution = nn.Conv2d(outside, outside, 3, 1, 1, groups=outside)
        self.peg = nn.ModuleDict({"peg": nn.Sequential(convolution)})

    def forward(self, x):
        x = self.mlp["mlp"](x).transpose(1, 2).unflatten(2, (4, 4))
        x = nn.functional.adaptive_avg_pool2d(x, 12)
        return (self.peg["peg"](x) + x).flatten(2).transpose(1, 2)


KINDS = {"ldpnet": (Ldp, "model.", 4), "ldpnetv2": (LdpV2, "", 144)}


def mobilevlm(tmp_path, kind, inside):
    """A folder as published: one pickle, names of its own, the tower in it (V2) or beside (V1)."""
    folder = copy_case(V15, tmp_path)
    make, prefix, _ = KINDS[kind]
    torch.manual_seed(0)
    projector = make(32, 64).eval()
    state = {k: v for k, v in read_weights(folder).items() if "mm_projector" not in k}
    own = {f"model.mm_projector.{prefix}{k}": v for k, v in projector.state_dict().items()}
    tower = load_file(tmp_path / "vision_tower" / "model.safetensors")
    if inside:
        own |= {f"model.vision_tower.vision_tower.{k}": v for k, v in tower.items()}
    write_weights(folder, state | own, "bin")
    edit_config(
        folder,
        architectures=["MobileLlamaForCausalLM"],
        model_type="mobilevlm",
        mm_projector_type=kind,
        vision_tower_type="clip",
        max_sequence_length=2048,
    )
    return folder, projector


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_mobilevlm(tmp_path, kind, inside):
    folder, projector = mobilevlm(tmp_path, kind, inside)
    loaded = load(folder)
    embeds, logits = door(loaded.model)
    with torch.no_grad():
        tower = CLIPVisionModel.from_pretrained(tmp_path / "vision_tower").eval()
        states = tower(IMAGES, output_hidden_states=True).hidden_states
        wanted = projector(states[-2][:, 1:])
    n = KINDS[kind][2]
    assert wanted.shape == (2, n, 64)
    torch.testing.assert_close(embeds[:, 2 : 2 + n], wanted, atol=1e-5, rtol=1e-5)
    stock = stock_logits(LlamaForCausalLM, loaded.model, embeds)
    torch.testing.assert_close(logits, stock, atol=1e-4, rtol=1e-4)
    assert AVLlavaProcessor(loaded.tokenizer, loaded.model.config).template.name == "vicuna_v1"
    found = av_llava.describe(folder)
    assert found["projector"] == kind and found["problems"] == found["notes"] == []
    assert found["layout"] == "mobilevlm" and found["language_model"]["type"] == "llama"
    assert ("inside" in found["vision_tower"]["weights"]) == inside


@pytest.mark.parametrize("kind", KINDS)
def test_mobilevlm_leaves_again_and_comes_back(tmp_path, kind):
    folder, _ = mobilevlm(tmp_path, kind, inside=False)
    before = load(folder).model
    convert("llava", folder, tmp_path / "out", verify=True)
    after = load(tmp_path / "out").model
    assert same_weights(before, after)
    # Convolutions round by where their weights lie in memory.
    torch.testing.assert_close(door(before), door(after), atol=1e-5, rtol=1e-5)
    convert("surgery", folder, tmp_path / "parts")
    parts = load_file(tmp_path / "parts" / "mm_projector.safetensors")
    stored = torch.load(folder / "pytorch_model.bin")
    assert_same_tensors(parts, {k: v for k, v in stored.items() if "mm_projector" in k})


# ---------------------------------------------------------------- other language models


def test_bakllava_is_mistral_in_the_layout_of_1_5(tmp_path):
    folder = copy_case(V15, tmp_path)
    write_weights(folder, read_weights(folder), "bin", shards=2)
    edit_config(
        folder,
        architectures=["LlavaMistralForCausalLM"],
        model_type="llava_mistral",
        sliding_window=4096,
    )
    loaded = load(folder)
    assert loaded.model.config.text_config.model_type == "mistral"
    assert loaded.model.config.image.aspect_ratio == "pad"
    embeds, logits = door(loaded.model)
    stock = stock_logits(MistralForCausalLM, loaded.model, embeds)
    torch.testing.assert_close(logits, stock, atol=1e-4, rtol=1e-4)
    processor = AVLlavaProcessor(loaded.tokenizer, loaded.model.config)
    assert processor.template.name == "mistral_instruct"


def test_yi_is_a_llama_that_speaks_chatml(tmp_path):
    folder = copy_case(V16, tmp_path)
    plain = load(folder).model
    settings = edit_json(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    edit_config(folder, eos_token_id=7, model_type="llava")
    asked = av_llava.load(folder, device="cpu", dtype="float32")
    assert settings["eos_token"] == asked.processor.tokenizer.eos_token == "<|im_end|>"
    assert asked.processor.template.name == "chatml_direct"
    assert asked.stops(av_llava.inference.Options.of({})) == ["<|im_end|>"]
    assert torch.equal(asked.model(IDS.clamp(min=0)).logits, plain(IDS.clamp(min=0)).logits)


def test_yis_own_tokenizer_file(tmp_path):
    folder = copy_case(V16, tmp_path)
    marks = ("<|im_start|>", "<|im_end|>")
    own = write_sentencepiece(folder, marks, add_bos_token=False, eos_token="<|im_end|>")
    edit_config(folder, vocab_size=320, eos_token_id=own.piece_to_id("<|im_end|>"))
    asked = av_llava.load(folder, device="cpu", dtype="float32")
    assert asked.processor.template.name == "chatml_direct"
    text = "<|im_start|>user\nWhat is in this image?<|im_end|>"
    ids = asked.processor.tokenizer(text).input_ids
    assert ids[0] == own.piece_to_id("<|im_start|>") and ids[-1] == own.piece_to_id("<|im_end|>")
    assert asked.ask(None, "What?", max_new_tokens=3).usage.completion_tokens <= 3


# ---------------------------------------------------------------- SentencePiece's own file


@pytest.mark.parametrize("name", ["llava", "hf", "text-only"])
def test_sentencepieces_file_is_carried_over(tmp_path, name):
    folder = copy_case(V16, tmp_path)
    own = write_sentencepiece(folder)
    before = fingerprint(folder)
    convert(name, folder, tmp_path / "out", verify=True)
    assert fingerprint(folder) == before
    made = tmp_path / "out" / "tokenizer.model"
    assert made.read_bytes() == (folder / "tokenizer.model").read_bytes()
    again = av_llava.checkpoints.tokenizers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("What is in this image?").input_ids == [1, *own.encode("What is in this image?")]


@pytest.mark.parametrize("name", ["llava", "hf", "text-only", "upgrade", "surgery"])
def test_whatever_it_holds_it_is_carried_over_bit_for_bit(tmp_path, name):
    folder = copy_case(V16, tmp_path)
    (folder / "tokenizer.model").write_bytes(b"SentencePiece's own")
    convert("surgery", folder, tmp_path / "parts")
    put_back = {"put_back": tmp_path / "parts"} if name == "surgery" else {}
    report = convert(name, folder, tmp_path / "out", **put_back)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"SentencePiece's own"
    assert "tokenizer.model" in report.files
    assert not (tmp_path / "parts" / "tokenizer.model").exists()
    convert(name, copy_case(V15, tmp_path / "without"), tmp_path / "none")
    assert not (tmp_path / "none" / "tokenizer.model").exists()
    assert tensors(tmp_path / "none")
