"""Bring sound to 16 kHz, from a file or from any rate; exact in time at every rate.

The filter is resampy's "kaiser_best", a windowed sinc whose parameters torchaudio documents: no
audible loss below 7 kHz and aliases under -110 dB at 44.1 kHz, where torchaudio's default leaves
-8 dB.

Common rates go through ``torchaudio.functional.resample``. It stores one filter per output phase,
each as long as a whole period: a rate such as 44099 Hz, coprime to 16000, would need 2.8 GB.
There the same filters are made block by block and kept only as long as they are not zero; nothing
is approximated and time does not drift. The two ways differ by up to 2e-5 of full scale, which is
torchaudio's rounding of its filters in float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import numpy as np
import torch
import torchaudio.functional
from torch import Tensor
from torch.nn import functional as F

from av_llava.errors import UsageError
from av_llava.geometry import SAMPLE_RATE_HZ
from av_llava.media import DEFAULT_LIMITS, AudioClip, Limits, Source, read_audio

ZERO_CROSSINGS = 64
ROLLOFF = 0.9475937167399596
KAISER_BETA = 14.769656459379492

_MAX_KERNEL = 1_000_000  # elements of torchaudio's kernel; above it, filters are made in blocks
_BLOCK = 16  # output phases per block: wide enough for a matrix product, narrow enough to be dense
_MARGIN = 64  # extra output samples, see _resample_direct

_Samples = TypeVar("_Samples", Tensor, np.ndarray)


def resample(waveform: _Samples, rate_hz: int, target: int = SAMPLE_RATE_HZ) -> _Samples:
    """Resample along the last axis.

    Args:
        waveform: float samples [..., S], an array or a tensor.
        rate_hz: samples per second of ``waveform``, a whole number.
        target: samples per second wanted.

    Returns:
        The same kind, [..., ceil(S * target / rate_hz)].

    Raises:
        UsageError: a rate that is not a positive whole number, or samples that are not floats.
    """
    for name, value in (("sample rate", rate_hz), ("target rate", target)):
        if value != int(value) or value < 1:
            raise UsageError(f"A {name} is a positive whole number of hertz, not {value!r}.")
    if isinstance(waveform, np.ndarray):
        return resample(torch.from_numpy(waveform), rate_hz, target).numpy()
    if not waveform.is_floating_point():
        raise UsageError(f"Resampling needs floating-point samples, not {waveform.dtype}.")
    divisor = math.gcd(int(rate_hz), int(target))
    old, new = int(rate_hz) // divisor, int(target) // divisor
    if old == new:
        return waveform
    n_out = -(-waveform.shape[-1] * new // old)
    if new * (old + 2 * _half_width(old, new)) <= _MAX_KERNEL:
        return _resample_direct(waveform, old, new, n_out)
    return _resample_in_blocks(waveform, old, new, n_out)


def load_audio(
    source: Source,
    start_s: float | None = None,
    end_s: float | None = None,
    max_seconds: float | None = None,
    strict: bool = False,
    *,
    limits: Limits = DEFAULT_LIMITS,
    isolate: bool | None = None,
) -> AudioClip:
    """Read the sound of a file as mono samples at 16 kHz.

    See :func:`av_llava.media.read_audio`, which decodes and mixes, for the arguments, the status
    and the errors. Without sound the waveform is empty and the status ``none``.
    """
    clip = read_audio(
        source,
        start_s=start_s,
        end_s=end_s,
        max_seconds=max_seconds,
        strict=strict,
        limits=limits,
        isolate=isolate,
    )
    waveform = clip.waveform
    if len(waveform):
        waveform = resample(waveform, clip.sample_rate_hz)
    return dataclasses.replace(
        clip,
        waveform=waveform,
        sample_rate_hz=SAMPLE_RATE_HZ,
        duration_s=len(waveform) / SAMPLE_RATE_HZ,
    )


def _half_width(old: int, new: int) -> int:
    """Input samples that a filter reaches to either side."""
    return math.ceil(ZERO_CROSSINGS * old / (min(old, new) * ROLLOFF))


def _resample_direct(waveform: Tensor, old: int, new: int, n_out: int) -> Tensor:
    """Resample by torchaudio, with the length counted in integers.

    torchaudio computes the output length in float32 and is off by some samples beyond 2**24; it
    gets a little silence more than there is, which its own padding would be, and the end is cut.
    """
    more = math.ceil(_MARGIN * old / new)
    padded = F.pad(waveform, (0, more))
    out = torchaudio.functional.resample(
        padded,
        old,
        new,
        lowpass_filter_width=ZERO_CROSSINGS,
        rolloff=ROLLOFF,
        resampling_method="sinc_interp_kaiser",
        beta=KAISER_BETA,
    )
    return out[..., :n_out].contiguous()


def _resample_in_blocks(waveform: Tensor, old: int, new: int, n_out: int) -> Tensor:
    """Resample with filters made for 16 output phases at a time.

    Output ``m * new + r`` is at input time ``m * old + r * old / new``: all periods ``m`` share the
    filter of phase ``r``, so a block of phases is one product of strided input rows and filters.
    """
    shape = waveform.shape[:-1]
    rows = waveform.reshape(-1, waveform.shape[-1])
    width = _half_width(old, new)
    periods = -(-n_out // new)
    reach = 2 * width + old * _BLOCK // new + 2
    right = max(0, periods * old + reach - rows.shape[-1])
    padded = F.pad(rows, (width, right))  # [B, P]; padded[:, i] is input sample i - width
    out = rows.new_empty(rows.shape[0], periods, new)
    for first in range(0, min(new, n_out), _BLOCK):
        phases = range(first, min(first + _BLOCK, new))
        offset = first * old // new
        taps = 2 * width + phases[-1] * old // new - offset + 2
        filters = _filters(phases, offset - width, taps, old, new).to(rows)  # [taps, phases]
        windows = padded.as_strided(
            (rows.shape[0], periods, taps), (padded.stride(0), old, 1), offset
        )
        out[:, :, first : first + len(phases)] = windows @ filters
    return out.reshape(rows.shape[0], -1)[:, :n_out].reshape(*shape, n_out)


def _filters(phases: range, first_tap: int, taps: int, old: int, new: int) -> Tensor:
    """Filters in float64: column p holds the weights of the inputs from ``first_tap`` on."""
    cutoff = min(old, new) * ROLLOFF / old  # of the input's Nyquist frequency
    times = torch.tensor([(p * old) / new for p in phases], dtype=torch.float64)
    taps_at = torch.arange(first_tap, first_tap + taps, dtype=torch.float64)
    t = (taps_at[:, None] - times) * cutoff
    inside = t.abs() <= ZERO_CROSSINGS
    t = t.clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)
    beta = torch.tensor(KAISER_BETA, dtype=torch.float64)
    window = torch.i0(beta * torch.sqrt(1 - (t / ZERO_CROSSINGS) ** 2)) / torch.i0(beta)
    return torch.sinc(t) * window * cutoff * inside
