from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from golden_data import golden
from safetensors.torch import load_file
from transformers import WhisperFeatureExtractor

from av_llava.audio.features import DualFeatures, KaldiFbank, LogMel, mel_filters
from av_llava.audio.placement import plan_audio
from av_llava.geometry import fbank_frames, whisper_geometry
from av_llava.settings import AudioSettings

from .tiny import noise

SIGNALS = (
    "noise_1s",
    "chirp_1s",
    "pips_odd",
    "silence_half",
    "lsb_noise",
    "clipped",
    "short_399",
    "dc_step",
)


def signal(name: str) -> torch.Tensor:
    return load_file(golden("audio/whisper_fe_80.safetensors"))[f"wav.{name}"].float() / 32768


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("name", SIGNALS)
def test_log_mel_golden(n_mels: int, name: str) -> None:
    wanted = load_file(golden(f"audio/whisper_fe_{n_mels}.safetensors"))[f"padded30s_head.{name}"]
    case = json.loads(golden("audio/whisper_fe_meta.json").read_text())["cases"][name]
    mel, lengths, chunks = LogMel(n_mels)(signal(name))
    assert mel.shape == (1, n_mels, 3000) and mel.dtype == torch.float32
    assert lengths.tolist() == [case["valid_frames"]] and chunks == (1,)
    torch.testing.assert_close(mel[0, :, : wanted.shape[1]], wanted, rtol=0, atol=1e-6)
    tail = mel[0, :, wanted.shape[1] :]
    torch.testing.assert_close(tail, torch.full_like(tail, case[f"tail_value_{n_mels}"]))
    assert mel.double().sum().item() == pytest.approx(case[f"sum_{n_mels}"], rel=1e-7)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("name", SIGNALS)
def test_log_mel_equals_transformers(n_mels: int, name: str) -> None:
    waveform = signal(name).numpy()
    theirs = WhisperFeatureExtractor(feature_size=n_mels)(
        waveform, sampling_rate=16000, return_tensors="pt", return_attention_mask=True
    )
    mel, lengths, _ = LogMel(n_mels)(waveform)
    assert torch.equal(mel, theirs["input_features"])
    assert lengths.tolist() == theirs["attention_mask"].sum(1).tolist()


def test_chunks_equal_transformers_one_by_one() -> None:
    first, second = noise(16000 * 61), noise(16000 * 3, seed=1)
    extractor = WhisperFeatureExtractor(feature_size=80)
    pieces = [first[:480000], first[480000:960000], first[960000:], second]
    theirs = [extractor(p, sampling_rate=16000, return_tensors="pt") for p in pieces]
    mel, lengths, chunks = LogMel(80)([first, torch.from_numpy(second)])
    assert torch.equal(mel, torch.cat([t["input_features"] for t in theirs]))
    assert lengths.tolist() == [3000, 3000, 100, 300] and chunks == (3, 1)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_filterbank_is_that_of_transformers(n_mels: int) -> None:
    theirs = WhisperFeatureExtractor(feature_size=n_mels).mel_filters
    np.testing.assert_array_equal(mel_filters(n_mels), theirs)


def test_a_chunk_of_a_small_tower_is_padded_in_the_waveform() -> None:
    clip = noise(16000 + 4000)
    mel, lengths, _ = LogMel(80, n_frames=100)(clip)
    padded = np.concatenate([clip[16000:], np.zeros(12000, np.float32)])
    theirs = WhisperFeatureExtractor(feature_size=80, chunk_length=1)(
        padded, sampling_rate=16000, return_tensors="pt"
    )
    assert mel.shape == (2, 80, 100) and lengths.tolist() == [100, 25]
    assert torch.equal(mel[1:], theirs["input_features"])


def test_a_short_rest_is_left_out_and_a_short_clip_is_not() -> None:
    extractor = LogMel(80, n_frames=100, min_samples=1600)
    assert extractor(noise(16000 + 1599)).chunks_per_clip == (1,)
    assert extractor(noise(16000 + 1600)).chunks_per_clip == (2,)
    assert extractor(noise(1)).lengths.tolist() == [10]


def test_planned_stretches_are_used() -> None:
    settings = AudioSettings(max_seconds=2.0, long_audio="uniform")
    clip = noise(16000 * 5)
    plan = plan_audio(len(clip), settings, whisper_geometry(50))
    mel, lengths, _ = LogMel(80, n_frames=100)([clip], [plan.chunks])
    assert plan.chunks == ((0, 16000), (64000, 80000))
    assert lengths.tolist() == list(plan.chunk_lengths)
    assert torch.equal(mel[1:], LogMel(80, n_frames=100)(clip[64000:]).features)


def test_no_clips_give_no_chunks() -> None:
    mel, lengths, chunks = LogMel(80)([])
    assert mel.shape == (0, 80, 3000) and lengths.shape == (0,) and chunks == ()


@pytest.mark.parametrize("extractor", [LogMel(80, 100), KaldiFbank(16000)])
def test_autocast_and_bfloat16_do_not_touch_features(extractor: LogMel | KaldiFbank) -> None:
    clip = torch.from_numpy(noise(16000))
    wanted = extractor(clip).features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(clip).features, wanted)
    assert wanted.dtype == torch.float32
    exact = clip.bfloat16()
    assert torch.equal(extractor(exact).features, extractor(exact.float()).features)


@pytest.mark.parametrize("extractor", [LogMel(80, 100), KaldiFbank(16000)])
def test_silence_is_finite(extractor: LogMel | KaldiFbank) -> None:
    assert extractor(np.zeros(16000, np.float32)).features.isfinite().all()
    assert extractor(np.full(16000, np.nan, np.float32)).features.isfinite().all()


def test_fbank_golden() -> None:
    data = load_file(golden("audio/kaldi_fbank_128.safetensors"))
    names = [key[6:] for key in data if key.startswith("fbank.")]
    assert names
    for name in names:
        waveform = data[f"wav.{name}"].float() / 32768
        out, lengths, _ = KaldiFbank(len(waveform))(waveform)
        wanted = (data[f"fbank.{name}"] - 15.41663) / (2 * 6.55582)
        torch.testing.assert_close(out[0].T, wanted, rtol=0, atol=1e-6)
        assert lengths.tolist() == [len(wanted)]


def test_fbank_of_a_clip_shorter_than_a_window() -> None:
    waveform = load_file(golden("audio/kaldi_fbank_128.safetensors"))["wav.short_399"] / 32768
    out, lengths, _ = KaldiFbank(16000)(waveform)
    assert out.shape == (1, 128, 98) and lengths.tolist() == [1]
    silence = KaldiFbank(16000)(np.zeros(16000, np.float32)).features
    assert torch.equal(out[:, :, 3:], silence[:, :, 3:])
    assert not torch.equal(out, silence)


@pytest.mark.parametrize("n", [1, 399, 400, 559, 560, 2800, 15999, 16000])
def test_fbank_lengths_are_the_filled_windows(n: int) -> None:
    _, lengths, _ = KaldiFbank(16000)(noise(n))
    assert lengths.tolist() == [max(fbank_frames(n), 1)]


def test_dual_features_hold_both() -> None:
    clip = noise(20000)
    mel, fbank = LogMel(80, 100), KaldiFbank(16000)
    out, lengths, chunks = DualFeatures(mel, fbank)(clip)
    assert out.shape == (2, 208, 100) and chunks == (2,)
    assert torch.equal(out[:, :80], mel(clip).features)
    assert torch.equal(out[:, 80:, :98], fbank(clip).features)
    assert not out[:, 80:, 98:].any()
    assert torch.equal(lengths, mel(clip).lengths)
