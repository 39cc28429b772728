from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchaudio.functional
from golden_data import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from av_llava.audio import resample as module
from av_llava.audio.resample import resample
from av_llava.errors import UsageError

RATES = (8000, 11025, 22050, 32000, 44100, 48000)


def reference(waveform: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """The same filter by torchaudio, all in float64."""
    return torchaudio.functional.resample(
        waveform.double(),
        old,
        new,
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        resampling_method="sinc_interp_kaiser",
        beta=14.769656459379492,
    )


@pytest.mark.parametrize("rate", RATES)
def test_golden(rate: int) -> None:
    data = load_file(golden("audio/resample_to_16k.safetensors"))
    out = resample(data[f"in.{rate}"], rate)
    assert out.shape == data[f"kaiser.{rate}"].shape
    torch.testing.assert_close(out, data[f"kaiser.{rate}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", RATES)
def test_filters_in_blocks_are_the_same_filters(rate: int) -> None:
    waveform = torch.from_numpy(np.random.default_rng(rate).standard_normal(5000))
    divisor = math.gcd(rate, 16000)
    wanted = reference(waveform, rate, 16000)
    out = module._resample_in_blocks(waveform, rate // divisor, 16000 // divisor, wanted.shape[-1])
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [44099, 48001, 44056, 11027, 15999])
def test_odd_rates_neither_drift_nor_need_a_huge_kernel(rate: int) -> None:
    seconds, frequency = 8, 1000.0
    times = torch.arange(rate * seconds, dtype=torch.float64) / rate
    out = resample(torch.sin(2 * math.pi * frequency * times).float(), rate)
    assert out.shape == (16000 * seconds,)
    wanted = torch.sin(
        2 * math.pi * frequency * torch.arange(len(out), dtype=torch.float64) / 16000
    )
    inside = slice(1000, -1000)  # the ends ring: the sine starts and stops
    assert (out.double() - wanted)[inside].abs().max() < 1e-5


@given(rate=st.sampled_from([8000, 44099, 44100, 12345, 96000, 16000]), n=st.integers(1, 3000))
@settings(max_examples=25, deadline=None)
def test_length_is_exact(rate: int, n: int) -> None:
    out = resample(np.zeros(n, np.float32), rate)
    assert isinstance(out, np.ndarray)
    assert out.shape == (-(-n * 16000 // rate),)


def test_length_is_counted_in_integers_where_float32_cannot() -> None:
    n_out = 2**24 + 1  # which float32 rounds to 2 ** 24
    n = 3 * n_out // 2
    assert -(-n * 2 // 3) == n_out
    assert resample(torch.zeros(n), 24000).shape == (n_out,)


def test_channels_are_resampled_alike() -> None:
    waveform = torch.randn(2, 3, 700, generator=torch.Generator().manual_seed(0))
    for rate in (44100, 44099):
        out = resample(waveform, rate)
        alone = resample(waveform[1, 2], rate)
        torch.testing.assert_close(out[1, 2], alone, rtol=0, atol=1e-6)


def test_the_same_rate_is_the_same_waveform() -> None:
    waveform = torch.randn(100)
    assert resample(waveform, 16000) is waveform


@pytest.mark.parametrize("rate", [0, -8000, 44100.5])
def test_impossible_rates(rate: float) -> None:
    with pytest.raises(UsageError, match="positive whole number of hertz"):
        resample(torch.zeros(10), rate)  # type: ignore[arg-type]


def test_integers_are_refused() -> None:
    with pytest.raises(UsageError, match="floating-point"):
        resample(torch.zeros(10, dtype=torch.int16), 8000)
