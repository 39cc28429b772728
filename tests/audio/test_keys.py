from __future__ import annotations

import pytest
import torch
from torch import Tensor

from av_llava.audio.beats import BeatsEncoder
from av_llava.audio.keys import convert_beats_keys, convert_openai_whisper_keys
from av_llava.errors import CheckpointError

from .tiny import beats_config, tower

PAIRS = [
    ("self_attn.q_proj", "attn.query"),
    ("self_attn.k_proj", "attn.key"),
    ("self_attn.v_proj", "attn.value"),
    ("self_attn.out_proj", "attn.out"),
    ("self_attn_layer_norm", "attn_ln"),
    ("final_layer_norm", "mlp_ln"),
    ("fc1", "mlp.0"),
    ("fc2", "mlp.2"),
    ("layers.", "blocks."),
    ("embed_positions.weight", "positional_embedding"),
]


def openai_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, value in weights.items():
        if name.startswith("layer_norm."):
            name = name.replace("layer_norm.", "ln_post.")
        for ours, theirs in PAIRS:
            name = name.replace(ours, theirs)
        out[name] = value
    return out


def test_openai_whisper_fills_the_tower() -> None:
    model = tower("whisper")
    weights = model.audio_tower.state_dict()
    theirs = {f"encoder.{k}": v for k, v in openai_names(weights).items()}
    whole = {"dims": {}, "model_state_dict": {**theirs, "decoder.ln.weight": torch.ones(1)}}
    for source in (whole, whole["model_state_dict"], openai_names(weights)):
        out = convert_openai_whisper_keys(source)
        assert out.keys() == weights.keys()
        assert all(out[k] is weights[k] or torch.equal(out[k], weights[k]) for k in weights)


def test_openai_whisper_without_an_encoder_or_with_strange_keys() -> None:
    with pytest.raises(CheckpointError, match="holds no encoder"):
        convert_openai_whisper_keys({"decoder.ln.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.gate\.weight"):
        convert_openai_whisper_keys({"encoder.blocks.0.attn.gate.weight": torch.ones(1)})


def published_beats() -> dict[str, Tensor]:
    weights = BeatsEncoder(beats_config()).state_dict()
    table = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
    return {
        **weights,
        table.format(1): weights[table.format(0)].clone(),
        "predictor.weight": torch.ones(527, 24),
        "predictor.bias": torch.ones(527),
    }


def test_beats_drops_copies_and_the_classifier() -> None:
    source = published_beats()
    out = convert_beats_keys({"cfg": {}, "model": source})
    BeatsEncoder(beats_config()).load_state_dict(out)  # strict
    assert out.keys() == convert_beats_keys(source).keys()


def test_beats_with_the_newer_weight_norm() -> None:
    source = published_beats()
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        key = f"encoder.pos_conv.0.parametrizations.weight.{new}"
        source[key] = source.pop(f"encoder.pos_conv.0.{old}")
    BeatsEncoder(beats_config()).load_state_dict(convert_beats_keys(source))


def test_beats_with_different_tables_or_none() -> None:
    source = published_beats()
    source["encoder.layers.1.self_attn.relative_attention_bias.weight"] += 1
    with pytest.raises(CheckpointError, match=r"layers\.1.*differs"):
        convert_beats_keys(source)
    with pytest.raises(CheckpointError, match="no BEATs checkpoint"):
        convert_beats_keys({"encoder.layers.0.fc1.weight": torch.ones(1)})
