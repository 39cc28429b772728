from __future__ import annotations

import json

import pytest
import torch
from golden_data import golden
from safetensors.torch import load_file
from torch import Tensor

from av_llava.audio.beats import BeatsEncoder
from av_llava.audio.configs import BeatsConfig
from av_llava.errors import UsageError

from .tiny import beats_config


def published() -> dict[str, Tensor]:
    return load_file(golden("audio/beats_tiny.safetensors"))


def encoder(data: dict[str, Tensor], implementation: str) -> BeatsEncoder:
    config = BeatsConfig(**json.loads(golden("audio/beats_tiny_meta.json").read_text())["cfg"])
    config._attn_implementation = implementation
    model = BeatsEncoder(config).eval()
    model.load_state_dict({k[2:]: v for k, v in data.items() if k.startswith("w.")})
    return model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_golden(implementation: str) -> None:
    data = published()
    model = encoder(data, implementation)
    assert model.config._attn_implementation == implementation
    out = model(data["fbank_norm"].transpose(1, 2))
    torch.testing.assert_close(out, data["out"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_masked_golden(implementation: str) -> None:
    data = published()
    valid = data["mask_out"] == 0
    assert not valid.all()
    out = encoder(data, implementation)(data["fbank_norm"].transpose(1, 2), valid)
    torch.testing.assert_close(out[valid], data["out_masked"][valid], rtol=0, atol=2e-6)


@torch.no_grad()
def test_position_bias_golden() -> None:
    data = published()
    bias = encoder(data, "sdpa").encoder.layers[0].self_attn.position_bias(6)
    assert torch.equal(bias, data["rel_bias_6x6_layer0"])


def slow_bucket(distance: int, n_buckets: int, max_distance: int) -> int:
    """T5's bidirectional bucket of one distance, step by step."""
    import math

    half = n_buckets // 2
    offset = half if distance > 0 else 0
    away, exact = abs(distance), half // 2
    if away < exact:
        return offset + away
    ratio = math.log(away / exact) / math.log(max_distance / exact)
    return offset + min(half - 1, exact + int(ratio * (half - exact)))


def test_position_bias_of_long_distances() -> None:
    config = beats_config(num_buckets=320, max_distance=800)
    attention = BeatsEncoder(config).encoder.layers[0].self_attn
    length = 1000
    bias = attention.position_bias(length)
    for query, key in [(0, 0), (0, 79), (0, 80), (0, 81), (0, 999), (999, 0), (500, 420), (3, 800)]:
        bucket = slow_bucket(key - query, 320, 800)
        wanted = attention.relative_attention_bias.weight[bucket]
        assert torch.equal(bias[:, query, key], wanted), (query, key)


@torch.no_grad()
def test_a_masked_chunk_is_a_shorter_chunk() -> None:
    model = encoder(published(), "sdpa")
    features = published()["fbank_norm"].transpose(1, 2)
    valid = torch.arange(48)[None] < torch.tensor([24, 48])[:, None]
    out = model(features, valid)
    torch.testing.assert_close(out[:1, :24], model(features[:1, :, :48]), rtol=0, atol=2e-6)
    torch.testing.assert_close(out[1:], model(features[1:]), rtol=0, atol=2e-6)


def test_published_size() -> None:
    with torch.device("meta"):
        model = BeatsEncoder(BeatsConfig())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["patch_embedding.weight"] == (512, 1, 16, 16)
    assert shapes["encoder.pos_conv.0.weight_g"] == (1, 1, 128)
    assert shapes["encoder.pos_conv.0.weight_v"] == (768, 48, 128)
    assert shapes["encoder.layers.0.self_attn.relative_attention_bias.weight"] == (320, 12)
    assert shapes["encoder.layers.11.self_attn.grep_linear.weight"] == (8, 64)
    assert sum(p.numel() for p in model.parameters()) == 90_311_792


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = BeatsEncoder(beats_config()).train()
    features = torch.randn(2, 128, 98)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(features).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(g.any() for g in grads[0])
    for plain, checkpointed in zip(*grads):
        torch.testing.assert_close(checkpointed, plain)


def test_save_and_load_again(tmp_path) -> None:
    torch.manual_seed(0)
    model = BeatsEncoder(beats_config()).eval()
    model.save_pretrained(tmp_path)
    again = BeatsEncoder.from_pretrained(tmp_path).eval()
    features = torch.randn(1, 128, 98)
    assert torch.equal(again(features), model(features))


def test_networks_that_were_never_published_are_refused() -> None:
    with pytest.raises(UsageError, match="layer_norm_first"):
        BeatsConfig(layer_norm_first=True)
