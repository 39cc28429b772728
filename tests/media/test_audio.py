"""Sound on the time line: offsets, mixing, windows, damage, silence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import LAYOUTS, audio_samples, first_burst_s, make_clip, tone_rms
from golden_data import golden
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import MediaError, UsageError
from av_llava.media import AudioClip, Limits, read_audio
from av_llava.media.downmix import mix_weights
from av_llava.media.track import Track

TONE_RMS = 0.05 / np.sqrt(2)
BURST_TOLERANCE_S = 0.005


def meta() -> dict[str, dict]:
    return json.loads(golden("clips/meta.json").read_text())["clips"]


def burst_on_the_time_line(clip: AudioClip) -> float:
    return clip.start_s + first_burst_s(clip.waveform, clip.sample_rate_hz)


@pytest.mark.parametrize("name", sorted(meta()))
def test_goldens(name: str) -> None:
    truth = meta()[name]
    path = golden(f"clips/{name}")
    if "open_error" in truth:
        with pytest.raises(MediaError, match=name):
            read_audio(path)
        return
    clip = read_audio(path)
    sound = truth["audio"]
    assert clip.waveform.dtype == np.float32
    assert clip.waveform.flags.c_contiguous
    assert np.isfinite(clip.waveform).all()
    if sound is None:
        assert (clip.status, clip.channels, len(clip)) == ("none", 0, 0)
        with pytest.raises(MediaError, match="no sound track"):
            read_audio(path, strict=True)
        return
    assert (clip.sample_rate_hz, clip.channels) == (sound["rate"], sound["channels"])
    # our samples include the silence before a late track; theirs were counted after resampling
    lead_s = sound["first_pts_s"]
    assert len(clip) / clip.sample_rate_hz == pytest.approx(
        lead_s + sound["n16k"] / 16_000, abs=2e-3
    )
    if sound["pip_media_s"] is None:
        assert clip.status == "silent"
    else:
        expected = "partial" if name.startswith("trunc") else "ok"
        assert clip.status == expected
        assert bool(clip.warnings) == (expected == "partial")
        assert abs(burst_on_the_time_line(clip) - sound["pip_media_s"]) < BURST_TOLERANCE_S


@pytest.mark.parametrize(
    ("name", "gain"),
    [("av_stereo44k.mp4", 0.75), ("av_51ch48k.mp4", 0.2929), ("av_mono8k.mp4", 1.0)],
)
def test_golden_gains(name: str, gain: float) -> None:
    clip = read_audio(golden(f"clips/{name}"))
    rms = tone_rms(clip.waveform, clip.sample_rate_hz, 1.2, 1.8)
    assert rms / TONE_RMS == pytest.approx(gain, rel=0.02)


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_rates_and_channels(clip: Any, rate: int, channels: int) -> None:
    path = clip("sound.mp4", audio_rate=rate, channels=channels, seconds=3)
    sound = read_audio(path)
    assert (sound.sample_rate_hz, sound.channels, sound.status) == (rate, channels, "ok")
    assert abs(burst_on_the_time_line(sound) - 1.0) < BURST_TOLERANCE_S
    assert sound.duration_s == pytest.approx(3.0, abs=2048 / rate)
    # equal channels, weights that sum to 1: the level stays
    assert tone_rms(sound.waveform, rate, 1.2, 1.8) / TONE_RMS == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(
    "name", ["a.mp4", "a.mkv", "a.ts", "a.mov", "a.wav", "a.flac", "a.mp3", "a.m4a"]
)
def test_containers(clip: Any, name: str) -> None:
    sound = read_audio(clip(name))
    assert sound.status == "ok"
    assert sound.warnings == ()
    # a transport stream's zero is the sound's first sample, 1024 before the encoder's input
    delay_s = 1024 / 44_100 if name.endswith(".ts") else 0.0
    assert abs(burst_on_the_time_line(sound) - 1.0 - delay_s) < BURST_TOLERANCE_S


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_late_sound_begins_with_silence(clip: Any, name: str) -> None:
    sound = read_audio(clip(name, audio_start_s=1.5))
    assert abs(burst_on_the_time_line(sound) - 2.5) < BURST_TOLERANCE_S
    assert not sound.waveform[: round(1.4 * sound.sample_rate_hz)].any()
    assert sound.start_s == 0


def test_late_picture_does_not_move_the_sound(clip: Any) -> None:
    sound = read_audio(clip("late_picture.mp4", video_start_s=1.0))
    assert abs(burst_on_the_time_line(sound) - 1.0) < BURST_TOLERANCE_S


def test_both_late_share_one_zero(clip: Any) -> None:
    from av_llava.media import read_frames

    path = clip("both.mp4", video_start_s=2.0, audio_start_s=1.0)
    sound, frames = read_audio(path), read_frames(path)
    # the picture begins one second after the sound does, wherever the container puts zero
    assert frames.pts_s[0] - (burst_on_the_time_line(sound) - 1.0) == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize("name", ["w.mp4", "w.mkv", "w.ts", "w.wav", "w.flac", "w.mp3"])
def test_a_window_is_a_cut_of_the_whole(clip: Any, name: str) -> None:
    path = clip(name, seconds=6, audio_rate=48_000)
    whole = read_audio(path)
    part = read_audio(path, start_s=2.25, end_s=3.5)
    assert part.start_s == 2.25
    assert len(part) == round(1.25 * 48_000)
    begin = round(2.25 * 48_000)
    # Matroska's clock of milliseconds may shift a window by half of one
    shift = best_shift(whole.waveform[begin - 48 : begin + len(part) + 48], part.waveform)
    assert abs(shift - 48) <= (24 if name.endswith(".mkv") else 0)
    cut = whole.waveform[begin - 48 + shift :][: len(part)]
    assert np.abs(cut - part.waveform).max() < 1e-4


def best_shift(longer: np.ndarray, shorter: np.ndarray) -> int:
    """Return where in ``longer`` ``shorter`` lies."""
    steps = len(longer) - len(shorter) + 1
    errors = [np.abs(longer[i : i + len(shorter)] - shorter).max() for i in range(steps)]
    return int(np.argmin(errors))


def test_a_far_window_is_reached_by_a_seek(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import av_llava.media.audio as module

    path = clip("far.mp4", seconds=60, fps=5, size=(64, 48), audio_rate=16_000, channels=1)
    decoded = []
    mix = module.to_mono
    monkeypatch.setattr(module, "to_mono", lambda frame: decoded.append(1) or mix(frame))
    part = read_audio(path, start_s=50, end_s=52)
    assert len(decoded) * 1024 / 16_000 < 4
    monkeypatch.undo()
    whole = read_audio(path)
    np.testing.assert_allclose(part.waveform, whole.waveform[800_000:832_000], atol=1e-5)


def test_windows_around_the_sound(clip: Any) -> None:
    path = clip("late.mp4", audio_start_s=1.5, seconds=4)  # sound from 1.5 to 5.5 s
    across = read_audio(path, start_s=1.0, end_s=3.0)
    assert len(across) == 2 * 44_100
    assert abs(burst_on_the_time_line(across) - 2.5) < BURST_TOLERANCE_S
    before = read_audio(path, start_s=0.0, end_s=1.0)
    assert (before.status, len(before), before.channels) == ("none", 0, 2)
    assert "begins after the window" in before.warnings[0]
    after = read_audio(path, start_s=30.0)
    assert (after.status, len(after)) == ("none", 0)
    assert "no sound from 30.00 s on" in after.warnings[0]
    ended = read_audio(path, start_s=6.0)
    assert "ends at 5.52 s, before the window" in ended.warnings[0]
    beyond = read_audio(path, start_s=5.0, end_s=50.0)
    assert 0.4 < beyond.duration_s < 0.6
    with pytest.raises(UsageError, match="below its end"):
        read_audio(path, start_s=3, end_s=3)


def test_max_seconds_is_said(clip: Any) -> None:
    sound = read_audio(clip(), max_seconds=1.5)
    assert sound.duration_s == 1.5
    assert sound.warnings == ("only the first 1.5 s of the sound are used",)
    assert read_audio(clip(), max_seconds=30).warnings == ()
    for nonsense in ({"max_seconds": 0}, {"end_s": 0}):
        with pytest.raises(UsageError):
            read_audio(clip(), **nonsense)


def test_shorter_and_longer_than_the_picture(clip: Any) -> None:
    short = read_audio(clip("short.mp4", audio_seconds=2.0))
    assert short.duration_s == pytest.approx(2.0, abs=0.05)
    assert short.status == "ok"
    assert read_audio(clip("long.mp4", audio_seconds=7.0)).duration_s == pytest.approx(
        7.0, abs=0.05
    )


def test_silent_and_cancelling_tracks(clip: Any) -> None:
    silent = read_audio(clip("silent.mp4", audio="silent"))
    assert (silent.status, silent.warnings) == ("silent", ())
    assert silent.duration_s == pytest.approx(4.0, abs=0.05)
    anti = read_audio(clip("anti.wav", audio="antiphase"))
    assert anti.status == "silent"
    assert "cancel" in anti.warnings[0]


def test_very_short_sound(clip: Any) -> None:
    sound = read_audio(clip("tiny.wav", audio=np.full(3, 0.5), channels=1))
    assert sound.waveform.tolist() == pytest.approx([0.5] * 3, abs=1e-4)


def test_not_finite_samples_become_zero(clip: Any) -> None:
    wave = np.full(4000, 0.25, np.float32)
    wave[[5, 6, 7]] = np.nan, np.inf, -np.inf
    sound = read_audio(clip("nan.wav", audio=wave, channels=1, audio_codec="pcm_f32le"))
    assert np.isfinite(sound.waveform).all()
    assert sound.waveform[[5, 6, 7]].tolist() == [0, 0, 0]
    assert sound.waveform[8] == 0.25
    assert "3 samples were not finite" in sound.warnings[0]


@pytest.mark.parametrize(
    ("codec", "name"),
    [("pcm_u8", "u8.wav"), ("pcm_s16le", "s16.wav"), ("pcm_s24le", "s24.wav"),
     ("pcm_s32le", "s32.wav"), ("pcm_f32le", "f32.wav"), ("pcm_f64le", "f64.wav"),
     ("flac", "planar.flac")],
)  # fmt: skip
def test_sample_formats_have_one_scale(clip: Any, codec: str, name: str) -> None:
    wave = np.linspace(-0.9, 0.9, 2000, dtype=np.float32)
    stereo = np.stack([wave, wave / 3], 1)
    sound = read_audio(clip(name, audio=stereo, audio_codec=codec))
    step = 1 / 64 if codec == "pcm_u8" else 1e-4
    np.testing.assert_allclose(sound.waveform, wave * 2 / 3, atol=step)


@pytest.mark.parametrize("layout", ["mono", "stereo", "2.1", "4.0", "5.0", "5.1", "6.1", "7.1"])
def test_weights_are_itu_and_sum_to_one(layout: str) -> None:
    names = tuple(channel.name for channel in av.AudioLayout(layout).channels)
    weights = dict(zip(names, mix_weights(names, len(names))))
    assert sum(weights.values()) == pytest.approx(1, abs=1e-6)
    assert weights.get("LFE", 0) == 0
    if "FL" in weights:
        assert weights["FL"] == weights["FR"]
        if "FC" in weights and len(names) > 2:
            assert weights["FC"] / weights["FL"] == pytest.approx(np.sqrt(2))
        for side in ("SL", "BL"):
            if side in weights:
                assert weights[side] / weights["FL"] == pytest.approx(np.sqrt(0.5))


def test_published_weights_of_5_1() -> None:
    weights = mix_weights(("FL", "FR", "FC", "LFE", "BL", "BR"), 6)
    np.testing.assert_allclose(weights, [0.2071, 0.2071, 0.2929, 0, 0.1464, 0.1464], atol=5e-5)
    np.testing.assert_array_equal(weights, mix_weights(("?",) * 6, 6))  # unnamed: WAVE order
    np.testing.assert_allclose(mix_weights(("?",) * 3, 3), [1 / 3] * 3)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "libopus")])
def test_eight_channels(clip: Any, name: str, codec: str) -> None:
    """Eight planes are where reading decoded sound naively crashes the process."""
    path = clip(name, channels=8, audio_rate=48_000, audio_codec=codec)
    sound = read_audio(path)
    assert (sound.channels, sound.status, sound.warnings) == (8, "ok", ())
    assert abs(burst_on_the_time_line(sound) - 1.0) < BURST_TOLERANCE_S
    assert tone_rms(sound.waveform, 48_000, 1.2, 1.8) / TONE_RMS == pytest.approx(1.0, rel=0.05)


def test_each_channel_of_5_1_by_its_weight(clip: Any) -> None:
    names = [channel.name for channel in av.AudioLayout(LAYOUTS[6]).channels]
    weights = mix_weights(tuple(names), 6)
    for k in range(6):
        gains = [float(i == k) for i in range(6)]
        sound = read_audio(clip(f"ch{k}.wav", channels=6, gains=gains, seconds=2))
        rms = tone_rms(sound.waveform, sound.sample_rate_hz, 1.2, 1.8) / TONE_RMS
        assert rms == pytest.approx(weights[k], abs=2e-3)


def test_damaged_sound_keeps_its_place(clip: Any, tmp_path: Path) -> None:
    path = clip("long.m4a", seconds=10)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4
    size = len(data) - at
    begin, end = at + int(size * 0.30), at + int(size * 0.45)
    data[begin:end] = random.Random(5).randbytes(end - begin)
    (tmp_path / "bad.m4a").write_bytes(data)
    sound = read_audio(tmp_path / "bad.m4a")
    whole = read_audio(path)
    assert sound.status == "partial"
    assert any("could not be decoded" in note for note in sound.warnings)
    rate = sound.sample_rate_hz
    np.testing.assert_allclose(sound.waveform[: rate * 2], whole.waveform[: rate * 2], atol=1e-6)
    # what follows the damage is where it was
    late = slice(rate * 7, rate * 9)
    np.testing.assert_allclose(sound.waveform[late], whole.waveform[late], atol=1e-3)


def test_nothing_decodable_is_an_error(clip: Any, tmp_path: Path) -> None:
    data = bytearray(clip("long.m4a", seconds=10).read_bytes())
    at = data.index(b"mdat") + 4
    data[at:] = bytes(len(data) - at)
    (tmp_path / "noise.m4a").write_bytes(data)
    with pytest.raises(MediaError, match=r"noise\.m4a.*cannot be decoded"):
        read_audio(tmp_path / "noise.m4a")


def test_gap_in_the_sound_is_silent(tmp_path: Path) -> None:
    """Sound for one second, nothing for two, sound again (as a paused recording has)."""
    path = tmp_path / "gap.mkv"
    tone = audio_samples("tone", 1.0, 8000, 1) + 0.2
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        for start_s in (0, 3):
            for at in range(0, 8000, 800):
                part = (tone[at : at + 800, 0] * 32767).astype(np.int16)[None]
                frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
                frame.sample_rate, frame.pts = 8000, start_s * 8000 + at
                out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    sound = read_audio(path)
    assert len(sound) == pytest.approx(4 * 8000, abs=16)
    assert not sound.waveform[8100:23900].any()
    assert sound.waveform[24100:31900].min() > 0.1
    assert sound.warnings == ("1 gaps in the sound (2.00 s) are silent",)
    window = read_audio(path, start_s=0.5, end_s=2.0)
    assert window.duration_s == 1.5
    assert not window.waveform[4100:].any()
    assert len(read_audio(path, start_s=1.5, end_s=2.5)) in (0, 8000)


def test_pictures_and_folders_have_no_sound(clip: Any, tmp_path: Path) -> None:
    for source in (tmp_path, clip("a.gif")):
        sound = read_audio(source)
        assert (sound.status, sound.channels) == ("none", 0)
        with pytest.raises(MediaError, match="no sound track"):
            read_audio(source, strict=True)


def test_default_track_is_read(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("pcm_s16le", rate=8000, layout="mono") for _ in range(2)]
        streams[0].disposition = av.stream.Disposition.comment
        streams[1].disposition = av.stream.Disposition.default
        for level, stream in zip((0.1, 0.4), streams):
            part = np.full((1, 8000), int(level * 32768), np.int16)
            frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 8000, 0
            out.mux(stream.encode(frame) + stream.encode(None))
    assert read_audio(path).waveform[100] == pytest.approx(0.4, abs=1e-3)


def test_sources_and_isolation(clip: Any) -> None:
    path = clip()
    here = read_audio(path)
    for other in (read_audio(path.read_bytes()), read_audio(path, isolate=True)):
        np.testing.assert_array_equal(here.waveform, other.waveform)
        assert other.status == "ok"
    text = repr(here)
    assert "f32[177152], 44100 Hz" in text
    assert "status='ok'" in text


def test_limits(clip: Any) -> None:
    with pytest.raises(MediaError, match="max_duration_s"):
        read_audio(clip(), limits=Limits(max_duration_s=1))
    with pytest.raises(MediaError, match="max_decode_s"):
        read_audio(clip(), limits=Limits(max_decode_s=0.001))


@given(
    begin=st.integers(0, 50),
    length=st.integers(1, 100),
    blocks=st.lists(st.tuples(st.integers(-6, 40), st.integers(1, 30)), min_size=1, max_size=12),
)
def test_track_against_a_plain_model(
    begin: int, length: int, blocks: list[tuple[int, int]]
) -> None:
    """Blocks with gaps and overlaps, placed in a window, equal a sample-by-sample model."""
    rate = 100  # steps up to 3 samples are the clock's rounding
    track = Track(begin / rate, (begin + length) / rate, np.inf)
    model: dict[int, float] = {}
    at, value, wanted = 0, 1.0, 0
    for step, count in blocks:
        start = max(0, at + step)
        samples = np.full(count, value, np.float32)
        track.add(start / rate, samples, value, rate)
        if wanted == 0 and not model:
            wanted = start
        placed = wanted if abs(start - wanted) <= 3 else max(start, wanted)
        skipped = wanted - start if start < wanted - 3 else 0
        for k in range(skipped, count):
            model[placed + k - skipped] = value
        wanted = placed + max(0, count - skipped)
        at, value = start + count, value + 1
    got = track.finished()
    inside = [k for k in model if begin <= k < begin + length]
    last = max(inside) + 1 if inside else begin
    expected = [model.get(k, 0.0) for k in range(begin, last)]
    np.testing.assert_array_equal(got[: len(expected)], expected)
    assert not got[len(expected) :].any()
    assert len(got) <= length


def test_clock_that_is_reset_is_followed() -> None:
    track = Track(0.0, 1e6, np.inf)
    one = np.ones(100, np.float32)
    for at_s in (0.0, 1.0, 95_000.0, 95_001.0, 2.0, 3.0):  # a jump of a day ahead, and back
        track.add(at_s, one, 1.0, 100)
    assert track.finished().tolist() == [1.0] * 600
    assert track.notes() == ["the sound's clock jumps 2 times; the jumps are left out"]


def test_long_sound_grows_in_place(clip: Any) -> None:
    path = make_clip(
        clip().parent / "long.wav", seconds=200, audio_rate=8000, channels=1, audio="tone"
    )
    sound = read_audio(path)
    assert len(sound) == 200 * 8000
    assert sound.waveform[-4000:].any()
