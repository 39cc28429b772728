"""Ten minutes of sound to log-mel: ours against transformers' ``WhisperFeatureExtractor``.

Both take the waveform in chunks of 30 seconds and give equal numbers, bit for bit. One thread.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from av_llava.audio.features import LogMel
from av_llava.geometry import SAMPLE_RATE_HZ
from bench.measure import Row, check, race, rows_of, single_threaded

TITLE = "Log-mel"
RATIO = "× transformers"
OURS, TORCH = "av_llava", "transformers (PyTorch)"
BOUND = 1.0
CHUNK = 30 * SAMPLE_RATE_HZ


def make_sound(seconds: int) -> np.ndarray:
    """Noise and tones that change. float32 [S] at 16 kHz"""
    rng = np.random.default_rng(0)
    time_s = np.arange(seconds * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    tone = np.sin(2 * np.pi * (200 + 50 * np.sin(time_s)) * time_s) * (1 + np.sin(time_s / 3))
    return (0.2 * tone + 0.02 * rng.normal(size=len(time_s))).astype(np.float32)


@single_threaded
def run(quick: bool) -> list[Row]:
    """All rows."""
    rows = []
    seconds = 60 if quick else 600
    sound = make_sound(seconds)
    chunks = np.split(sound, range(CHUNK, len(sound), CHUNK))
    for n_mels in (80, 128):
        extractor = WhisperFeatureExtractor(feature_size=n_mels)
        contestants = {
            TORCH: partial(_transformers, extractor, chunks),
            OURS: partial(_ours, LogMel(n_mels), sound),
        }
        check(torch.equal(*(run() for run in contestants.values())), f"log-mel, {n_mels} bins")
        timings = race(contestants, rounds=2 if quick else 15, seconds=5)
        rows += rows_of(f"{seconds} s, {n_mels} bins", timings, TORCH, bounds={OURS: BOUND})
    return rows


def _ours(mel: LogMel, sound: np.ndarray) -> Tensor:
    return mel(sound).features


def _transformers(extractor: WhisperFeatureExtractor, chunks: list[np.ndarray]) -> Tensor:
    features: Tensor = extractor(chunks, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")[
        "input_features"
    ]
    return features
