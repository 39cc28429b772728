"""Ears of published audio-visual checkpoints: key maps on tiny models with the published names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import text_config, tiny
from torch import nn
from transformers import AutoModelForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import av_llava
from av_llava.audio.beats import BeatsEncoder
from av_llava.audio.configs import BeatsConfig
from av_llava.checkpoints.public_audio import (
    add_public_audio,
    load_public_audio,
    read_public_audio,
)
from av_llava.demo_model import tiny_tokenizer
from av_llava.errors import CheckpointError, UsageError
from av_llava.inference import AVLlava
from av_llava.processor import AVLlavaProcessor

from .folders import edit_config, read_weights

torch.set_num_threads(1)
RNG = np.random.default_rng(3)
SOUND = (RNG.normal(size=32_000) * 0.1).astype(np.float32)  # one chunk of the tiny Whisper
FRAMES = RNG.integers(0, 255, (4, 40, 60, 3), dtype=np.uint8)
WHISPER = WhisperConfig(
    d_model=64,
    encoder_layers=2,
    encoder_attention_heads=1,
    encoder_ffn_dim=96,
    num_mel_bins=80,
    max_source_positions=100,
)
BEATS = BeatsConfig(
    embed_dim=24,
    encoder_layers=2,
    encoder_embed_dim=32,
    encoder_ffn_embed_dim=64,
    encoder_attention_heads=4,
    conv_pos=16,
    conv_pos_groups=4,
)
STRIDE, HIDDEN = 10, 40


def openai_names(encoder: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names of Whisper's encoder, the other way round."""
    pairs = (
        ("self_attn_layer_norm", "attn_ln"),
        ("final_layer_norm", "mlp_ln"),
        ("fc1", "mlp.0"),
        ("fc2", "mlp.2"),
        ("self_attn.q_proj", "attn.query"),
        ("self_attn.k_proj", "attn.key"),
        ("self_attn.v_proj", "attn.value"),
        ("self_attn.out_proj", "attn.out"),
        ("layers.", "blocks."),
        ("embed_positions.weight", "positional_embedding"),
    )
    out = {}
    for key, value in encoder.items():
        key = f"ln_post{key.removeprefix('layer_norm')}" if key.startswith("layer_norm") else key
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        out[key] = value
    return out


def published_beats(encoder: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The position table in every layer, and the head that nothing uses."""
    table = "self_attn.relative_attention_bias.weight"
    first = encoder[f"encoder.layers.0.{table}"]
    again = {f"encoder.layers.{i}.{table}": first.clone() for i in range(1, 2)}
    return {**encoder, **again, "predictor.weight": torch.zeros(5, 32)}


class Parts:
    """Random modules and the language model, before anyone gave them published names."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.whisper = WhisperEncoder(WHISPER).eval()
        self.beats = BeatsEncoder(BEATS).eval()
        for name, p in self.beats.named_parameters():  # its gates and tables begin as constants
            if p.ndim > 1 and "weight_" not in name:
                p.data.normal_(std=0.1)
        self.config = text_config("qwen2", tie_word_embeddings=False)
        self.lm = AutoModelForCausalLM.from_config(self.config).eval()
        width = self.config.hidden_size
        self.first = nn.Linear(STRIDE * 96, HIDDEN)
        self.second = nn.Linear(HIDDEN, width)
        self.marks = {n: torch.randn(width) for n in ("newline", "begin", "end")}
        self.mlp = nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, width))

    def ola(self) -> dict[str, torch.Tensor]:
        ears = {f"whisper_model.{k}": v for k, v in openai_names(self.whisper.state_dict()).items()}
        beats = published_beats(self.beats.state_dict())
        ears |= {f"beats_model.{k}": v for k, v in beats.items()}
        state = {f"model.speech_encoder.{k}": v for k, v in ears.items()}
        for name, layer in (("linear1", self.first), ("linear2", self.second)):
            state |= {
                f"model.speech_projector.{name}.{k}": v for k, v in layer.state_dict().items()
            }
        state |= {f"model.speech_projector.speech_{k}": v for k, v in self.marks.items()}
        return state

    def videollama2(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        beats = published_beats(self.beats.state_dict())
        tower = {f"model.audio_tower.{k}": v for k, v in beats.items()}
        return tower, {f"model.mm_projector_a.{k}": v for k, v in self.mlp.state_dict().items()}

    def write(self, place: Path, state: dict[str, torch.Tensor], **config) -> Path:
        place.mkdir(parents=True)
        eyes = {
            "model.vision_tower.vision_tower.blocks.0.weight": torch.zeros(2),
            "model.vision_resampler.pos_emb": torch.zeros(2),
            "model.mm_projector.readout.0.weight": torch.zeros(2, 2),
        }
        whole = {**self.lm.state_dict(), **eyes, **state}
        whole = {k: v.clone().contiguous() for k, v in whole.items()}
        save_file(whole, place / "model.safetensors", metadata={"format": "pt"})
        data = {**self.config.to_dict(), "mm_vision_tower": "eyes", **config}
        (place / "config.json").write_text(json.dumps(data))
        tiny_tokenizer().save_pretrained(place)
        return place


OLA = {
    "architectures": ["OlaQwenForCausalLM"],
    "model_type": "ola_qwen",
    "speech_encoder": "/somewhere/large-v3.pt",
    "music_encoder": "/somewhere/BEATs.pt",
    "speech_encoder_ds_rate": STRIDE,
    "speech_encoder_hidden_size": 96,
    "mm_projector_type": "ola_mlp",
}
VIDEOLLAMA2 = {
    "architectures": ["Videollama2Qwen2ForCausalLM"],
    "model_type": "videollama2_qwen2",
    "mm_audio_tower": "audio_tower.bin",
    "mm_projector_type": "stc_connector_v35",
    "mm_projector_a_type": "mlp2x_gelu",
    "mm_hidden_size_a": 32,
    "num_frames": 16,
}


@pytest.fixture
def parts():
    return Parts()


@pytest.fixture
def ola(parts, tmp_path):
    return parts.write(tmp_path / "ola", parts.ola(), **OLA)


@pytest.fixture
def videollama2(parts, tmp_path):
    tower, projector = parts.videollama2()
    return parts.write(tmp_path / "av", {**tower, **projector}, **VIDEOLLAMA2)


def heard(model, seconds=2.0):
    """Audio features of the sound and the tower's input for it."""
    wave = torch.from_numpy(SOUND[: int(16_000 * seconds)])
    inputs = model.model.audio_tower.features([wave])
    plan = model.model.planner.audio(len(wave))
    with torch.no_grad():
        found = model.get_audio_features(inputs.features, [plan]).pooler_output[0]
    return found, inputs.features


@torch.no_grad()
def olas_ears(parts, features):
    """Ola's dual encoder and projector, written down once more."""
    mel, fbank = features[:, :80], features[:, 80:]
    first = parts.whisper(mel).last_hidden_state
    second = parts.beats(fbank[:, :, :198])
    second = nn.functional.pad(second, (0, 0, 0, first.shape[1] - second.shape[1]))
    frames = torch.cat([first, second], dim=-1)
    groups = frames.reshape(1, -1, STRIDE * frames.shape[-1])
    tokens = parts.second(torch.relu(parts.first(groups)))[0]
    begin, newline, end = (parts.marks[k][None] for k in ("begin", "newline", "end"))
    return torch.cat([begin, tokens, newline, end])


def test_olas_ears_hear_what_ola_hears(parts, ola):
    loaded = load_public_audio(ola, device="cpu")
    found, features = heard(loaded.model)
    wanted = olas_ears(parts, features)
    assert found.shape == wanted.shape == (13, 64)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, parts.lm(input_ids=ids).logits)
    assert loaded.model.model.vision_tower is None


def test_videollama2s_ears(parts, videollama2):
    loaded = load_public_audio(videollama2, device="cpu")
    found, features = heard(loaded.model, 1.0)
    with torch.no_grad():
        wanted = parts.mlp(parts.beats(features))[0]
    assert wanted.shape == (1496, 64) and found.shape == (48, 64)  # the rest is padding
    torch.testing.assert_close(found, wanted[:48], atol=1e-5, rtol=1e-5)
    assert loaded.model.config.au_token_ids is None


def test_part_files_beside_the_shards_fill_what_the_shards_lack(parts, videollama2, tmp_path):
    wanted, _ = heard(load_public_audio(videollama2, device="cpu").model)
    tower, projector = parts.videollama2()
    torch.save(tower, videollama2 / "audio_tower.bin")
    torch.save(
        {f"base_model.model.{k}": v for k, v in projector.items()},
        videollama2 / "mm_projector_a.bin",
    )
    state = read_weights(videollama2)
    for key in [*tower, *projector]:
        state.pop(key, None)
    save_file(state, videollama2 / "model.safetensors", metadata={"format": "pt"})
    found, _ = heard(load_public_audio(videollama2, device="cpu").model)
    assert torch.equal(found, wanted)
    (videollama2 / "model.safetensors").unlink()  # a base for audio: only the part files
    half = read_public_audio(videollama2)
    assert half.width == 64 and len(half.projector) == 4


def test_olas_towers_may_lie_in_their_authors_files(parts, tmp_path):
    state = {k: v for k, v in parts.ola().items() if "speech_encoder" not in k}
    folder = parts.write(tmp_path / "ola", state, **OLA)
    with pytest.raises(CheckpointError, match=r"whisper weights.*large-v3\.pt.*whisper="):
        read_public_audio(folder)
    dims = {
        "n_mels": 80,
        "n_audio_ctx": 100,
        "n_audio_state": 64,
        "n_audio_head": 1,
        "n_audio_layer": 2,
    }
    encoder = {f"encoder.{k}": v for k, v in openai_names(parts.whisper.state_dict()).items()}
    torch.save({"dims": dims, "model_state_dict": encoder}, tmp_path / "large-v3.pt")
    beats = {"cfg": BEATS.to_diff_dict(), "model": published_beats(parts.beats.state_dict())}
    beats["cfg"].pop("transformers_version", None)
    torch.save(beats, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=r"beats weights.*BEATs\.pt"):
        read_public_audio(folder)
    with pytest.raises(CheckpointError, match="holds a whisper tower; beats is needed"):
        read_public_audio(folder, beats=tmp_path / "large-v3.pt")
    loaded = load_public_audio(folder, beats=tmp_path / "mine.pt", device="cpu")
    found, features = heard(loaded.model)
    torch.testing.assert_close(found, olas_ears(parts, features), atol=1e-5, rtol=1e-5)


def test_ears_for_a_model_that_sees(parts, ola, tmp_path):
    model, processor = tiny("qwen2", audio=False)
    m = AVLlava(model, processor)
    before = m.ask(FRAMES, "What?", max_new_tokens=6).text
    add_public_audio(model, processor, ola)
    assert m.ask(FRAMES, "What?", max_new_tokens=6).text == before
    found, features = heard(model)
    torch.testing.assert_close(found, olas_ears(parts, features), atol=1e-5, rtol=1e-5)
    answer = m.ask(FRAMES, "What?", audio=SOUND, max_new_tokens=6)
    assert answer.usage.audio_tokens == 13
    m.save_pretrained(tmp_path / "saved")
    again = av_llava.load(tmp_path / "saved", device="cpu")
    assert again.ask(FRAMES, "What?", audio=SOUND, max_new_tokens=6).text == answer.text
    with pytest.raises(UsageError, match="already"):
        add_public_audio(model, processor, ola)


def test_a_model_that_only_listens_answers_and_is_saved(ola, tmp_path):
    loaded = load_public_audio(ola, device="cpu")
    m = AVLlava(loaded.model, AVLlavaProcessor(loaded.tokenizer, loaded.model.config))
    answer = m.ask(SOUND, "What do you hear?", max_new_tokens=6)
    assert answer.usage.audio_tokens == 13
    m.save_pretrained(tmp_path / "saved")
    shutil.rmtree(ola)
    again = av_llava.load(tmp_path / "saved", device="cpu")
    assert again.ask(SOUND, "What do you hear?", max_new_tokens=6).text == answer.text
    with pytest.raises(UsageError, match="no vision tower"):
        again.ask(FRAMES, "What?", max_new_tokens=1)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("name", "part"), [("ola", "Oryx ViT"), ("videollama2", "STC")])
def test_loading_the_whole_names_the_part_that_is_not_supported(request, name, part):
    folder = request.getfixturevalue(name)
    with pytest.raises(CheckpointError, match=f"{part}.*load_public_audio"):
        av_llava.load(folder, device="cpu")


def test_other_folders_are_no_audio_half(parts, tmp_path):
    folder = parts.write(tmp_path / "plain", {}, **OLA)
    with pytest.raises(CheckpointError, match="no audio half of Ola or VideoLLaMA2-AV"):
        read_public_audio(folder)
    model, processor = tiny("llama", audio=False, text={"hidden_size": 32})
    half = parts.write(tmp_path / "ola", parts.ola(), **OLA)
    with pytest.raises(CheckpointError, match="width 64; this one has 32"):
        add_public_audio(model, processor, half)
    assert model.config.audio_config is None and model.model.audio_tower is None


FAULTS = {
    "stride": ("ola", {}, {"speech_encoder_ds_rate": 7}, r"\(40, 960\).*7 frames"),
    "gone": ("ola", {"model.speech_projector.linear2.bias": None}, {}, "Missing: .*2.bias"),
    "no layer": ("ola", {"model.speech_projector.linear1.weight": None}, {}, "not complete"),
    "unknown": ("ola", {"model.speech_projector.gate": torch.zeros(2)}, {}, "gate, which is not"),
    "shape": (
        "ola",
        {"model.speech_encoder.whisper_model.blocks.1.mlp.0.weight": torch.zeros(95, 64)},
        {},
        r"\(95, 64\).*\(96, 64\)",
    ),
    "unknown in the tower": (
        "ola",
        {"model.speech_encoder.whisper_model.blocks.1.gate": torch.zeros(2)},
        {},
        "Unknown key",
    ),
    "tower gone": (
        "videollama2",
        {"model.audio_tower.post_extract_proj.weight": None},
        {},
        "post_extract_proj",
    ),
    "projector": ("videollama2", {}, {"mm_projector_a_type": "qformer"}, "'qformer'"),
    "language model": ("videollama2", {"model.norm.weight": None}, {}, "model.language_model.norm"),
    "left over": ("videollama2", {"model.gate.weight": torch.zeros(2)}, {}, "model.gate.weight"),
    "architecture": ("ola", {}, {"architectures": ["OlaRwkvForCausalLM"]}, "OlaRwkv"),
    "width": ("ola", {}, {"hidden_size": 32, "num_key_value_heads": 2}, "width 32.*64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_halves_are_named(request, fault):
    name, weights, config, words = FAULTS[fault]
    folder = request.getfixturevalue(name)
    state = {**read_weights(folder), **weights}
    save_file(
        {k: v for k, v in state.items() if v is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    edit_config(folder, **config)
    with pytest.raises(CheckpointError, match=words):
        load_public_audio(folder, device="cpu")
