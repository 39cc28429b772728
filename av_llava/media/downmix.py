"""Mixing the channels of decoded sound to one, in float.

Contract: stereo is the mean; more channels get the weights of ITU-R BS.775 (centre 1/sqrt 2,
surround 1/2 relative to a front channel in each of two outputs, which are then averaged),
normalised to sum 1, the low-frequency channel left out. The sum of weights being 1, nothing
clips, and levels do not depend on the sample format, as FFmpeg's own mixing does.
"""

from __future__ import annotations

import functools
import math

import av
import numpy as np

_FRONT, _CENTRE, _SURROUND = 1.0, math.sqrt(2), math.sqrt(0.5)

# Weight of each channel in the sum of the two ITU outputs, by FFmpeg's channel names.
CHANNEL_WEIGHTS = {
    "FL": _FRONT,
    "FR": _FRONT,
    "FC": _CENTRE,
    "LFE": 0.0,
    "LFE2": 0.0,
    "BL": _SURROUND,
    "BR": _SURROUND,
    "SL": _SURROUND,
    "SR": _SURROUND,
    "BC": _FRONT,
    "FLC": _FRONT,
    "FRC": _FRONT,
    "DL": _FRONT,
    "DR": _FRONT,
}
_OTHER = _SURROUND  # height and side channels of large layouts

# What unnamed channels mean when there are so many of them (WAVE order).
_UNNAMED = {
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}
_STEREO = np.full(2, 0.5, np.float32)
_KNOWN_NAMES = frozenset(
    [*CHANNEL_WEIGHTS, "WL", "WR", "TC", "TFL", "TFC", "TFR", "TBL", "TBC", "TBR", "TSL", "TSR"]
)


def to_mono(frame: av.AudioFrame) -> tuple[np.ndarray, float]:
    """Mix one decoded frame.

    Returns:
        float32 [S] and the largest absolute sample of any channel before mixing.
    """
    channels = float_channels(frame)
    peak = float(np.abs(channels).max()) if channels.size else 0.0
    if len(channels) == 1:
        return channels[0], peak
    return _weights_of(frame.layout) @ channels, peak


def _weights_of(layout: av.AudioLayout) -> np.ndarray:
    count = layout.nb_channels
    if count == 2:
        return _STEREO
    return mix_weights(tuple(channel.name for channel in layout.channels), count)


def float_channels(frame: av.AudioFrame) -> np.ndarray:
    """Return a decoded frame as float32 [channels, S], full scale being 1."""
    samples = frame.to_ndarray()
    count = frame.layout.nb_channels
    if not frame.format.is_planar:
        samples = samples.reshape(-1, count).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        full_scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
        return np.ascontiguousarray(samples, np.float32) / np.float32(full_scale)
    return np.ascontiguousarray(samples, np.float32)


@functools.lru_cache(maxsize=64)
def mix_weights(names: tuple[str, ...], count: int) -> np.ndarray:
    """Return the weight of each channel, float32 [channels], summing to 1.

    Args:
        names: FFmpeg's channel names; other names mean that the file does not say.
        count: number of channels.
    """
    if count <= 2:
        return np.full(count, 1 / count, np.float32)
    if len(names) != count or not _KNOWN_NAMES.issuperset(names):
        names = _UNNAMED.get(count, ("FL",) * count)
    weights = np.array([CHANNEL_WEIGHTS.get(name, _OTHER) for name in names])
    if not weights.any():
        weights[:] = 1
    return (weights / weights.sum()).astype(np.float32)
