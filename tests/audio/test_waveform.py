from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from av_llava.audio.waveform import check_waveform
from av_llava.errors import MediaError, UsageError


def test_good_samples_pass_unchanged() -> None:
    samples = np.array([0.0, -1.0, 3.5, 1e-9], dtype=np.float32)
    out = check_waveform(samples)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.from_numpy(samples))


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_any_float_becomes_float32(dtype: type) -> None:
    assert check_waveform(np.ones(3, dtype)).dtype == torch.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_become_silence_with_a_count(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    samples = np.array([0.5, bad, bad, -0.5], dtype=np.float32)
    with caplog.at_level(logging.WARNING):
        out = check_waveform(samples, name="a.wav")
    assert out.tolist() == [0.5, 0.0, 0.0, -0.5]
    assert "2 of 4 samples of a.wav" in caplog.text


def test_infinities_of_both_signs_do_not_cancel() -> None:
    out = check_waveform(np.array([np.inf, -np.inf, 1.0], dtype=np.float32))
    assert out.tolist() == [0.0, 0.0, 1.0]


def test_a_sum_that_overflows_is_not_taken_for_bad_samples(
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = np.full(4, 3e38, dtype=np.float32)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(check_waveform(samples), torch.from_numpy(samples))
    assert not caplog.text


def test_strict_refuses_nan() -> None:
    with pytest.raises(MediaError, match=r"1 of 2 samples of a\.wav are NaN"):
        check_waveform(np.array([np.nan, 0], dtype=np.float32), strict=True, name="a.wav")


def test_wrong_kinds_are_named() -> None:
    with pytest.raises(UsageError, match="int16"):
        check_waveform(np.zeros(4, np.int16))
    with pytest.raises(UsageError, match=r"shape \(2, 4\)"):
        check_waveform(np.zeros((2, 4), np.float32))
    with pytest.raises(MediaError, match="no samples"):
        check_waveform(np.zeros(0, np.float32))
