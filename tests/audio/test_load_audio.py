from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from clips import first_burst_s, make_clip
from golden_data import golden

from av_llava.audio.resample import load_audio, resample
from av_llava.errors import MediaError
from av_llava.media import read_audio


@pytest.mark.parametrize("rate", [8000, 16000, 44099, 48000])
def test_a_file_of_any_rate_comes_at_16_khz(tmp_path: Path, rate: int) -> None:
    path = make_clip(tmp_path / "a.wav", video=False, audio_rate=rate, seconds=3)
    clip, native = load_audio(path), read_audio(path)
    assert native.sample_rate_hz == rate and clip.sample_rate_hz == 16000
    assert clip.waveform.dtype == np.float32 and clip.waveform.shape == (48000,)
    assert clip.duration_s == 3.0
    np.testing.assert_array_equal(clip.waveform, resample(native.waveform, rate))
    assert first_burst_s(clip.waveform, 16000) == pytest.approx(1.0, abs=0.002)


def test_a_window_of_a_video(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "v.mp4", seconds=4)
    clip = load_audio(path, 1.5, 3.5)
    assert clip.start_s == 1.5 and clip.duration_s == pytest.approx(2.0, abs=1e-3)
    assert clip.start_s + first_burst_s(clip.waveform, 16000) == pytest.approx(2.0, abs=0.005)
    first = load_audio(path, max_seconds=1.0)
    assert first.duration_s == pytest.approx(1.0, abs=1e-3) and first.warnings


def test_no_sound(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "v.mp4", audio=None, seconds=1)
    clip = load_audio(path)
    assert clip.status == "none" and clip.waveform.shape == (0,)
    assert (clip.sample_rate_hz, clip.duration_s) == (16000, 0.0)
    with pytest.raises(MediaError, match="no sound track"):
        load_audio(path, strict=True)


def test_golden_clips_have_their_bursts_in_time() -> None:
    clips = json.loads(golden("clips/meta.json").read_text())["clips"]
    checked = 0
    for name, facts in clips.items():
        pip = (facts.get("audio") or {}).get("pip_media_s")
        if pip is None or facts["audio"]["decode_error"]:
            continue
        clip = load_audio(golden(f"clips/{name}"))
        assert clip.start_s + first_burst_s(clip.waveform, 16000, 0.1) == pytest.approx(
            pip, abs=0.005
        ), name
        checked += 1
    assert checked >= 6
