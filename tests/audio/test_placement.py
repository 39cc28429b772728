from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.audio.placement import AudioPlan, plan_audio
from av_llava.errors import BudgetError, MediaError, UsageError
from av_llava.geometry import AudioGeometry, beats_geometry, mel_frames, whisper_geometry
from av_llava.settings import AudioSettings

WHISPER = whisper_geometry(1500)
TINY = whisper_geometry(50)
SECOND = 16000

geometries = st.sampled_from(
    [WHISPER, TINY, beats_geometry(480000), beats_geometry(480000, freq_pool="mean")]
)


@st.composite
def all_settings(draw: st.DrawFn) -> AudioSettings:
    mode = draw(st.sampled_from(["none", "average", "stack"]))
    return AudioSettings(
        projector="linear",
        pool_mode=mode,
        pool_stride=draw(st.integers(1, 30)),
        chunk_newline=draw(st.booleans()),
        token_mode=draw(st.sampled_from(["tokens", "param"])),
        use_start_end=draw(st.booleans()),
        max_tokens=draw(st.integers(40, 4000)),
        max_seconds=draw(st.floats(0.1, 900)),
        long_audio=draw(st.sampled_from(["keep", "uniform"])),
        min_samples=draw(st.integers(1, 20000)),
    )


def test_known_counts() -> None:
    for seconds, tokens in [(30, 150), (60, 300), (600, 3000), (3, 15), (31, 155), (0.01, 1)]:
        plan = plan_audio(int(seconds * SECOND), AudioSettings(), WHISPER)
        assert plan.n_tokens == len(plan) == tokens
        assert plan.stride == 10 and plan.seconds_per_token == pytest.approx(0.2)
    for stride, tokens in [(2, 750), (4, 375), (25, 60)]:
        plan = plan_audio(30 * SECOND, AudioSettings(pool_stride=stride), WHISPER)
        assert plan.n_tokens == tokens


def test_ten_samples_more_than_a_chunk() -> None:
    plan = plan_audio(30 * SECOND + 10, AudioSettings(), WHISPER)
    assert plan.chunks == ((0, 480000),) and plan.notes == ()
    plan = plan_audio(30 * SECOND + 1600, AudioSettings(), WHISPER)
    assert plan.chunks == ((0, 480000), (480000, 481600))
    assert plan.chunk_lengths == (3000, 10) and plan.frames == (1500, 5) and plan.n_tokens == 151


@given(n=st.integers(1, 20_000_000), settings=all_settings(), geometry=geometries)
def test_plans_are_consistent(n: int, settings: AudioSettings, geometry: AudioGeometry) -> None:
    try:
        plan = plan_audio(n, settings, geometry)
    except BudgetError:
        limit = min(max(n, settings.min_samples), int(settings.max_seconds * SECOND))
        marks = 2 * (settings.use_start_end and settings.token_mode == "param")
        n_chunks = -(-max(limit, settings.min_samples) // geometry.chunk_samples)
        assert n_chunks * (1 + settings.chunk_newline) + marks > settings.max_tokens
        return
    assert plan.n_tokens <= settings.max_tokens
    assert plan.n_samples == max(n, settings.min_samples)
    assert all(plan.chunk_tokens) and all(f >= 1 for f in plan.frames)
    assert all(f <= geometry.frames_per_chunk for f in plan.frames)
    previous = 0
    for first, stop in plan.chunks:
        assert previous <= first < stop <= first + geometry.chunk_samples
        previous = stop
    assert previous <= plan.n_samples
    assert plan.used_s <= max(settings.max_seconds, settings.min_samples / SECOND) + 1e-9
    step = plan.base_stride if settings.pool_mode == "stack" else 1
    assert (plan.stride - plan.base_stride) % step == 0
    if plan.stride > plan.base_stride:  # the smallest that fits
        finer = plan.replace(stride=plan.stride - step)
        assert finer.n_tokens > settings.max_tokens
    assert bool(plan.notes) == (
        plan.stride > plan.base_stride or plan.duration_s - plan.used_s >= 0.1
    )


@given(n=st.integers(1, 2_000_000), settings=all_settings(), start=st.floats(-10, 1e4))
def test_centres_are_in_order_and_inside(n: int, settings: AudioSettings, start: float) -> None:
    try:
        plan = plan_audio(n, settings, TINY, start_s=start)
    except BudgetError:
        return
    centres = plan.centres_s
    assert len(centres) == plan.n_tokens
    assert list(centres) == sorted(centres)
    assert centres[0] > start and centres[-1] < start + plan.duration_s + 0.02 + 1e-6


def test_centres_are_the_middles_of_the_tokens() -> None:
    plan = plan_audio(SECOND + 4800, AudioSettings(), TINY, start_s=2.0)  # 50 and 15 frames
    wanted = [2.1, 2.3, 2.5, 2.7, 2.9, 3.1, 3.25]
    assert plan.centres_s == pytest.approx(wanted)
    marked = plan.replace(chunk_newline=True, bounds=True)
    wanted = [2.1, *wanted[:5], 2.9, *wanted[5:], 3.25, 3.25]
    assert marked.centres_s == pytest.approx(wanted)


def test_too_long_keeps_the_first_part_and_says_so() -> None:
    plan = plan_audio(700 * SECOND, AudioSettings(), WHISPER)
    assert plan.chunks[0] == (0, 480000) and plan.chunks[-1] == (570 * SECOND, 600 * SECOND)
    assert len(plan.notes) == 1
    assert "Of 700.0 s of sound, 600.0 s are used" in plan.notes[0]


def test_too_long_and_uniform_covers_the_clip_with_true_times() -> None:
    settings = AudioSettings(max_seconds=90, long_audio="uniform")
    plan = plan_audio(1000 * SECOND, settings, WHISPER, start_s=5.0)
    starts = [first // SECOND for first, _ in plan.chunks]
    assert starts == [0, 485, 970]
    assert plan.centres_s[150] == pytest.approx(5 + 485 + 0.1)
    one = plan_audio(100 * SECOND, settings.replace(max_seconds=20), WHISPER)
    assert one.chunks == ((40 * SECOND, 60 * SECOND),)


def test_the_cap_is_said() -> None:
    plan = plan_audio(600 * SECOND, AudioSettings(max_tokens=1000), WHISPER)
    assert plan.stride == 30 and plan.n_tokens == 1000
    assert "0.60 s instead of 0.20 s" in plan.notes[0]
    fine = AudioSettings(projector="linear", pool_mode="average", max_tokens=1200)
    assert plan_audio(600 * SECOND, fine, WHISPER).stride == 25


def test_the_cap_counts_marks() -> None:
    settings = AudioSettings(chunk_newline=True, token_mode="param", max_tokens=305)
    plan = plan_audio(60 * SECOND, settings, WHISPER)
    assert plan.stride == 10 and plan.n_tokens == 304
    assert plan_audio(60 * SECOND, settings.replace(max_tokens=303), WHISPER).stride == 20


def test_a_cap_that_cannot_hold() -> None:
    with pytest.raises(BudgetError, match="at least 600 audio tokens, but max_tokens is 100"):
        plan_audio(600 * SECOND, AudioSettings(max_tokens=100), TINY)


@pytest.mark.parametrize("n", [0, -5])
def test_no_samples(n: int) -> None:
    with pytest.raises(MediaError, match="no samples"):
        plan_audio(n, AudioSettings(), WHISPER)


@given(n=st.integers(1, 2_000_000), settings=all_settings())
def test_survives_json_and_is_hashable(n: int, settings: AudioSettings) -> None:
    assert AudioSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    plan = plan_audio(n, settings.replace(max_tokens=4000), WHISPER, start_s=1.5)
    again = AudioPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and hash(again) == hash(plan)
    assert again.n_tokens == plan.n_tokens


@given(n=st.integers(1, 480_000))
def test_frames_are_the_published_formulas(n: int) -> None:
    assert WHISPER.input_frames(n) == mel_frames(n) == -(-n // 160)
    assert WHISPER.frames(WHISPER.input_frames(n)) == (mel_frames(n) - 1) // 2 + 1
    beats = beats_geometry(480_000)
    windows = max(1, 1 + (n - 400) // 160)
    assert beats.input_frames(n) == windows
    assert beats.frames(windows) == max(1, windows // 16) * 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool_mode", "max"),
        ("placement", "before"),
        ("token_mode", "vector"),
        ("long_audio", "cut"),
        ("freq_pool", "max"),
        ("pool_stride", 0),
        ("max_tokens", 0),
        ("min_samples", 0),
        ("max_seconds", 0.0),
        ("max_seconds", float("nan")),
        ("group_seconds", 0.0),
    ],
)
def test_wrong_settings(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=str(value) if isinstance(value, str) else name):
        AudioSettings(**{name: value})


def test_planning_costs_no_torch() -> None:
    code = "import sys, av_llava.audio.placement; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
