"""A scene's sound: tones, chirps, noises, bells and beeps over a faint hiss.

Contract: numpy only, a pure function of the scene. The kinds differ in what a spectrogram shows:
a flat line, a slanted line, a broad band, a fading stack of lines, a row of dots.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from av_llava.errors import UsageError
from av_llava.training.world.parts import Scene, Sound

RATE_HZ = 16_000
_HISS, _EDGE_S, _CHIRP_RATIO, _BEEP_SHARE = 0.002, 0.012, 4.0, 0.45
_BELL_PARTIALS = ((1.0, 1.0), (2.76, 0.6), (5.4, 0.35))
"""(ratio to the pitch, loudness): the first modes of a struck bar."""


def waveform(scene: Scene, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Return the whole clip's sound, float32 [samples], mono, within -1..1.

    Raises:
        UsageError: the scene is silent.
    """
    if not scene.has_audio:
        raise UsageError(f"Scene {scene.key} is silent; it has no waveform.")
    rng = np.random.default_rng(scene.noise_seed)
    samples = round(scene.duration_s * rate_hz)
    out = _HISS * rng.standard_normal(samples, np.float32)
    for sound in scene.sounds:
        start = round(sound.onset_s * rate_hz)
        time_s = np.arange(round(sound.duration_s * rate_hz)) / rate_hz
        part = SYNTHESIZERS[sound.kind](sound, time_s, rng) * _fade(time_s, sound.duration_s)
        part = part[: samples - start]
        out[start : start + len(part)] += sound.level * part
    return np.clip(out, -1, 1).astype(np.float32)


def _fade(time_s: np.ndarray, length_s: float) -> np.ndarray:
    """A factor that rises and falls within a few milliseconds, so that nothing clicks."""
    return np.clip(np.minimum(time_s, length_s - time_s) / _EDGE_S, 0, 1)


def _tone(sound: Sound, time_s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sin(2 * np.pi * sound.pitch_hz * time_s)


def _chirp(sound: Sound, time_s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two octaves, evenly in time."""
    rate = np.log(_CHIRP_RATIO) / sound.duration_s
    low = sound.pitch_hz
    if not sound.rising:
        rate, low = -rate, low * _CHIRP_RATIO
    return np.sin(2 * np.pi * low * np.expm1(rate * time_s) / rate)


def _noise(sound: Sound, time_s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    white = rng.uniform(-1, 1, len(time_s))
    # A short average takes the highest band away; how much depends on the pitch.
    share = sound.pitch_hz / 4000
    return share * white + (1 - share) * np.convolve(white, np.full(3, 1 / 3), "same")


def _bell(sound: Sound, time_s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    decay = np.exp(-4 * time_s / sound.duration_s)
    partials = sum(
        loud * np.sin(2 * np.pi * ratio * sound.pitch_hz * time_s) for ratio, loud in _BELL_PARTIALS
    )
    return decay * partials / sum(loud for _, loud in _BELL_PARTIALS)


def _beeps(sound: Sound, time_s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    since_s = time_s % sound.period_s
    length_s = _BEEP_SHARE * sound.period_s
    gate = np.clip(np.minimum(since_s, length_s - since_s) / _EDGE_S, 0, 1)
    return gate * np.sin(2 * np.pi * sound.pitch_hz * time_s)


SYNTHESIZERS: dict[str, Callable[[Sound, np.ndarray, np.random.Generator], np.ndarray]] = {
    "tone": _tone,
    "chirp": _chirp,
    "noise": _noise,
    "bell": _bell,
    "beeps": _beeps,
}
