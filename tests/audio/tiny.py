"""Small towers of each kind: chunks of one second, random weights."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedConfig, WhisperConfig

from av_llava.audio.configs import BeatsConfig, DualAudioConfig
from av_llava.audio.towers import AudioTower, build_audio_tower
from av_llava.settings import AudioSettings

KINDS = ("whisper", "beats", "dual")


def whisper_config(**changes: object) -> WhisperConfig:
    fields = {
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "num_mel_bins": 80,
        "max_source_positions": 50,
    }
    return WhisperConfig(**{**fields, **changes})


def beats_config(**changes: object) -> BeatsConfig:
    fields = {
        "embed_dim": 12,
        "encoder_layers": 2,
        "encoder_embed_dim": 24,
        "encoder_ffn_embed_dim": 32,
        "encoder_attention_heads": 2,
        "conv_pos": 8,
        "conv_pos_groups": 4,
        "num_buckets": 16,
        "max_distance": 32,
        "chunk_seconds": 1.0,
    }
    return BeatsConfig(**{**fields, **changes})


def config(kind: str) -> PreTrainedConfig:
    if kind == "whisper":
        return whisper_config()
    if kind == "beats":
        return beats_config()
    return DualAudioConfig(whisper_config(), beats_config())


def tower(kind: str, seed: int = 0, **settings: object) -> AudioTower:
    torch.manual_seed(seed)
    return build_audio_tower(config(kind), AudioSettings(kind=kind, **settings)).eval()


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n_samples) * 0.1).astype(np.float32)
