from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from golden_data import golden
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, WhisperConfig, WhisperModel

from av_llava.audio.placement import plan_audio
from av_llava.audio.towers import (
    AUDIO_TOWERS,
    AudioTower,
    WhisperTower,
    audio_geometry,
    build_audio_tower,
    build_feature_extractor,
)
from av_llava.errors import UsageError
from av_llava.settings import AudioSettings

from .tiny import KINDS, beats_config, config, noise, tower, whisper_config


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_whisper_golden(n_mels: int, implementation: str) -> None:
    name = f"audio/whisper_encoder_tiny_{n_mels}"
    data = load_file(golden(f"{name}.safetensors"))
    whisper = WhisperConfig(**json.loads(golden(f"{name}.config.json").read_text()))
    whisper._attn_implementation = implementation
    model = build_audio_tower(whisper, AudioSettings()).eval()
    model.load_state_dict({f"audio_tower.{k[2:]}": v for k, v in data.items() if k[:2] == "w."})
    lengths = torch.tensor([100, 100])
    out, out_lengths = model(data["input_features"], lengths)
    torch.testing.assert_close(out, data["last_hidden_state"], rtol=0, atol=1e-5)
    assert out_lengths.tolist() == [50, 50]
    masked = WhisperTower(whisper, AudioSettings(mask_padding=True)).eval()
    masked.load_state_dict(model.state_dict())
    assert masked.audio_tower.config._attn_implementation == implementation
    torch.testing.assert_close(masked(data["input_features"], lengths)[0], out, rtol=0, atol=1e-5)


def test_whisper_takes_the_encoder_of_a_whole_model() -> None:
    whisper = whisper_config(decoder_layers=1, decoder_attention_heads=2, vocab_size=32)
    whisper.pad_token_id = whisper.decoder_start_token_id = 0
    weights = WhisperModel(whisper).encoder.state_dict()
    model = build_audio_tower(whisper, AudioSettings())
    assert set(model.state_dict()) == {f"audio_tower.{name}" for name in weights}


@torch.no_grad()
def test_whisper_mask_hides_the_padding() -> None:
    """Against a slow oracle: each clip alone, its padding cut off before attention."""
    model = tower("whisper", mask_padding=True)
    encoder = model.audio_tower
    clips = [noise(5000), noise(16000), noise(320, seed=1)]
    features, lengths, _ = model.features(clips)
    out, out_lengths = model(features, lengths)
    assert out_lengths.tolist() == [16, 50, 5]
    for i, n in enumerate(out_lengths.tolist()):
        x = torch.nn.functional.gelu(encoder.conv1(features[i : i + 1]))
        x = torch.nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)
        x = (x + encoder.embed_positions.weight)[:, :n]
        for layer in encoder.layers:
            x = layer(x, None)
        wanted = encoder.layer_norm(x)
        torch.testing.assert_close(out[i : i + 1, :n], wanted, rtol=0, atol=1e-5)
    free = build_audio_tower(config("whisper"), AudioSettings()).eval()
    free.load_state_dict(model.state_dict())
    assert (free(features, lengths)[0][0, :16] - out[0, :16]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask_padding", [False, True])
@torch.no_grad()
def test_batch_is_single(kind: str, mask_padding: bool) -> None:
    model = tower(kind, mask_padding=mask_padding)
    clips = [noise(n, seed=n) for n in (16000, 9000, 700, 40000)]
    features, lengths, chunks = model.features(clips)
    assert chunks == (1, 1, 1, 3)
    together, valid = model(features, lengths)
    row = 0
    for clip, n in zip(clips, chunks):
        single, lengths_alone, _ = model.features([clip])
        alone, valid_alone = model(single, lengths_alone)
        torch.testing.assert_close(together[row : row + n], alone, rtol=0, atol=2e-6)
        assert valid[row : row + n].tolist() == valid_alone.tolist()
        row += n


@pytest.mark.parametrize(
    ("kind", "freq_pool"),
    [("whisper", "flatten"), ("beats", "flatten"), ("beats", "mean"), ("dual", "flatten")],
)
@torch.no_grad()
def test_geometry_is_what_the_tower_does(kind: str, freq_pool: str) -> None:
    model = tower(kind, freq_pool=freq_pool)
    settings = AudioSettings(kind=kind, freq_pool=freq_pool)
    assert audio_geometry(config(kind), settings) == model.geometry
    for n in (1, 1600, 2799, 2800, 2801, 5359, 5360, 12345, 16000, 17600, 31999):
        plan = plan_audio(n, settings, model.geometry)
        features, lengths, chunks = model.features([noise(n)], [plan])
        frames, valid = model(features, lengths)
        assert chunks == (len(plan.chunks),)
        assert lengths.tolist() == list(plan.chunk_lengths)
        assert valid.tolist() == list(plan.frames)
        assert frames.shape == (len(plan.chunks), model.frames_per_chunk, model.hidden_size)
        assert valid.max() <= model.frames_per_chunk


def test_published_geometries() -> None:
    whisper = audio_geometry(WhisperConfig(), AudioSettings())
    assert (whisper.chunk_seconds, whisper.frames_per_chunk, whisper.frame_rate_hz) == (
        30,
        1500,
        50,
    )
    beats = audio_geometry(beats_config(chunk_seconds=30.0), AudioSettings(kind="beats"))
    assert (beats.chunk_seconds, beats.frames_per_chunk, beats.frame_rate_hz) == (30, 1496, 50)
    mean = audio_geometry(
        beats_config(chunk_seconds=30.0), AudioSettings(kind="beats", freq_pool="mean")
    )
    assert (mean.frames_per_chunk, mean.frame_rate_hz) == (187, 6.25)


@torch.no_grad()
def test_bands_are_averaged_in_time_major_order() -> None:
    flat, mean = tower("beats"), tower("beats", freq_pool="mean")
    features, lengths, _ = flat.features([noise(16000)])
    wanted = torch.stack(
        [flat(features, lengths)[0][:, 8 * t : 8 * t + 8].mean(1) for t in range(6)], 1
    )
    torch.testing.assert_close(mean(features, lengths)[0], wanted)


@pytest.mark.parametrize("mask_padding", [False, True])
@torch.no_grad()
def test_dual_is_both_side_by_side(mask_padding: bool) -> None:
    dual = tower("dual", mask_padding=mask_padding)
    clips = [noise(16000), noise(4321)]
    features, lengths, _ = dual.features(clips)
    frames, valid = dual(features, lengths)
    assert dual.hidden_size == 16 + 24 and frames.shape == (2, 50, 40)
    heard, heard_valid = dual.whisper(*dual.whisper.features(clips)[:2])
    assert torch.equal(frames[..., :16], heard) and torch.equal(valid, heard_valid)
    sensed = dual.beats(*dual.beats.features(clips)[:2])[0]
    torch.testing.assert_close(frames[:, :48, 16:], sensed, rtol=0, atol=1e-6)
    assert not frames[:, 48:, 16:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_made_without_weights_and_filled_later(kind: str) -> None:
    ready = tower(kind)
    with torch.device("meta"):
        empty = build_audio_tower(config(kind), AudioSettings(kind=kind))
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(ready.state_dict(), assign=True)
    features, lengths, _ = empty.features([noise(9000)])
    assert not features.is_meta
    with torch.no_grad():
        assert torch.equal(empty.eval()(features, lengths)[0], ready(features, lengths)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask_padding", [False, True])
@torch.no_grad()
def test_bfloat16(kind: str, mask_padding: bool) -> None:
    model = tower(kind, mask_padding=mask_padding)
    features, lengths, _ = model.features([noise(16000), noise(5000)])
    wanted, valid = model(features, lengths)
    model.to(torch.bfloat16)
    again, _, _ = model.features([noise(16000), noise(5000)])
    assert torch.equal(again, features)  # features stay float32
    out, _ = model(features, lengths)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    for o, w, n in zip(out.float(), wanted, valid.tolist()):
        assert (o - w)[:n].abs().mean() < 0.02 * w[:n].abs().mean() + 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_tower_builds_no_graph_and_a_tuned_one_does(kind: str) -> None:
    model = tower(kind)
    features, lengths, _ = model.features([noise(16000)])
    assert model(features, lengths)[0].requires_grad
    model.requires_grad_(False)
    assert not model(features, lengths)[0].requires_grad


def test_whisper_trains_with_a_mask() -> None:
    model = tower("whisper", mask_padding=True).train()
    features, lengths, _ = model.features([noise(8000)])
    out, valid = model(features, lengths)
    out[0, : int(valid[0])].square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_silence_and_nan_are_encoded() -> None:
    for kind in KINDS:
        model = tower(kind)
        for clip in (np.zeros(16000, np.float32), np.full(1, np.nan, np.float32)):
            features, lengths, _ = model.features([clip])
            assert model(features, lengths)[0].isfinite().all()


def test_wrong_names_and_configs() -> None:
    with pytest.raises(UsageError, match=r"Unknown audio tower 'wisper'\. Did you mean 'whisper'"):
        build_audio_tower(config("whisper"), AudioSettings(kind="wisper"))
    with pytest.raises(UsageError, match=r"needs a WhisperConfig.*BeatsConfig.*'beats'"):
        build_audio_tower(config("beats"), AudioSettings())
    with pytest.raises(UsageError, match="CLIPVisionConfig"):
        audio_geometry(CLIPVisionConfig(), AudioSettings())
    with pytest.raises(UsageError, match="freq_pool 'flatten'"):
        build_audio_tower(config("dual"), AudioSettings(kind="dual", freq_pool="mean"))


def test_wrong_features_are_named() -> None:
    model = tower("whisper")
    features, lengths, _ = model.features([noise(16000)])
    with pytest.raises(UsageError, match=r"\[chunks, 80, 100\].*\[1, 80, 99\]"):
        model(features[..., :99], lengths)
    with pytest.raises(UsageError, match="2 lengths"):
        model(features, torch.tensor([100, 100]))


def test_a_clip_of_another_length_than_planned() -> None:
    model = tower("whisper")
    plan = plan_audio(16000, AudioSettings(), model.geometry)
    with pytest.raises(UsageError, match="Clip 0 has 15000 samples, but 16000 were planned"):
        model.features([noise(15000)], [plan])


def test_mask_needs_a_known_attention() -> None:
    model = tower("whisper", mask_padding=True)
    features, lengths, _ = model.features([noise(16000)])
    model.audio_tower.config._attn_implementation = "flex_attention"
    with pytest.raises(UsageError, match="flex_attention"):
        model(features, lengths)


def test_a_tower_from_elsewhere() -> None:
    class Loudness(AudioTower):
        """One channel: the mean of each pair of mel frames."""

        config_class = WhisperConfig
        hidden_size = 1

        def __init__(self, whisper, settings):
            super().__init__(whisper, settings)
            self.gain = torch.nn.Parameter(torch.ones(1))

        geometry_of = WhisperTower.geometry_of
        features_of = WhisperTower.features_of

        def encode(self, features, lengths):
            return features.mean(1).unflatten(1, (-1, 2)).mean(2)[..., None] * self.gain

    AUDIO_TOWERS["loudness"] = Loudness
    try:
        settings = AudioSettings(kind="loudness")
        model = build_audio_tower(config("whisper"), settings)
        plan = plan_audio(9000, settings, audio_geometry(config("whisper"), settings))
        extractor = build_feature_extractor(config("whisper"), settings)
        frames, valid = model(*extractor(noise(9000))[:2])
        assert frames.shape == (1, 50, 1) and valid.tolist() == list(plan.frames)
    finally:
        del AUDIO_TOWERS["loudness"]
