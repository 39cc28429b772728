"""Scenes: pure functions of their numbers, with room for everything that is asked."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import UsageError
from av_llava.training.world.parts import (
    COLOURS,
    SHAPES,
    WORLD_VERSION,
    Scene,
    SceneSettings,
)
from av_llava.training.world.picture import frame_times, frames
from av_llava.training.world.plots import NEED_SOUND, ORDER_SOUND_S
from av_llava.training.world.scene import generator, sample_scene
from av_llava.training.world.sound import waveform

SCENES = [sample_scene(7, i, "train") for i in range(600)]
PLOT = {n: [s for s in SCENES if s.plot == n] for n in {s.plot for s in SCENES}}


def content(scene: Scene) -> str:
    """What is to be seen and heard, without the scene's number."""
    return repr((scene.things, scene.sounds, scene.background, scene.noise_seed))


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.text(min_size=1, max_size=8))
def test_a_scene_is_a_function_of_its_numbers(seed: int, index: int, split: str) -> None:
    assert sample_scene(seed, index, split) == sample_scene(seed, index, split)


def test_scenes_stay_the_same_from_version_to_version() -> None:
    text = "".join(
        repr((s.plot, s.topic, s.things, s.sounds, s.background, s.noise_seed))
        for s in (sample_scene(0, i, "test") for i in range(64))
    )
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert (WORLD_VERSION, digest) == (1, "07d3cebdc1367cab"), (
        "other scenes need another WORLD_VERSION"
    )


def test_splits_seeds_and_indices_share_no_scene() -> None:
    names = [
        (seed, index, split)
        for seed in (0, 1, 2)
        for split in ("train", "test", "val", "trai", "ntest")
        for index in range(60)
    ]
    contents = {content(sample_scene(*name)) for name in names}
    assert len(contents) == len(names)
    assert len({sample_scene(*name).key for name in names}) == len(names)


def test_purposes_have_their_own_random_numbers() -> None:
    draws = {generator(0, 0, "train", p).random() for p in ("scene", "questions", "s", "x")}
    assert len(draws) == 4


@pytest.mark.parametrize("name", [(-1, 0, "train"), (0, -1, "train"), (0, 0, "")])
def test_impossible_numbers_are_refused(name: tuple[int, int, str]) -> None:
    with pytest.raises(UsageError, match="seed and an index of 0 or more"):
        sample_scene(*name)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": 63}, "63 pixels, but must be even"),
        ({"size": 1024}, "within 32..512"),
        ({"duration_s": 2.0}, "duration_s is 2, but must be within 4..30 s"),
        ({"fps": 1}, "fps is 1"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        SceneSettings(**wrong)  # type: ignore[arg-type]


def test_scenes_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SCENES[0].seed = 1  # type: ignore[misc]


def test_what_happens_does_not_depend_on_the_size() -> None:
    large = [sample_scene(7, i, "train", SceneSettings(size=128, fps=16)) for i in range(50)]
    assert [content(s) for s in large] == [content(s) for s in SCENES[:50]]


def test_media_are_mixed_as_promised() -> None:
    silent = sum(not s.has_audio for s in SCENES) / len(SCENES)
    unseen = sum(not s.has_video for s in SCENES) / len(SCENES)
    assert 0.06 < silent < 0.14 and 0.06 < unseen < 0.14
    assert all(s.has_audio or s.has_video for s in SCENES)
    assert all(s.has_audio for s in SCENES if s.plot in NEED_SOUND)
    assert all(bool(s.topic) == s.has_audio for s in SCENES)
    assert {s.suffix for s in SCENES if not s.has_video} == {".m4a"}


def test_things_differ_in_shape_and_colour() -> None:
    for scene in SCENES:
        for names, known in (
            ([t.shape for t in scene.things], SHAPES),
            ([t.colour for t in scene.things], COLOURS),
            ([t.turn.colour for t in scene.things if t.turn], COLOURS),
        ):
            assert len(set(names)) == len(names) and set(names) <= set(known)
        turned = {t.turn.colour for t in scene.things if t.turn}
        assert not turned & {t.colour for t in scene.things}


def test_things_stay_in_the_picture_and_apart() -> None:
    for scene in SCENES:
        for time_s in frame_times(scene):
            seen = scene.things_at(time_s)
            for i, one in enumerate(seen):
                assert all(one.size / 2 <= c <= 1 - one.size / 2 for c in one.place)
                for other in seen[:i]:
                    gaps = np.abs(np.subtract(one.place, other.place))
                    assert gaps.max() > (one.size + other.size) / 2


def test_moving_things_cross_about_half_of_the_picture_or_more() -> None:
    moving = [(s, t.motion) for s in SCENES for t in s.things if t.motion]
    assert len(moving) > 150
    for scene, motion in moving:
        way = np.subtract(motion.end, motion.start)
        assert abs(way).max() >= 0.45 and abs(way).min() == 0
        assert 0 < motion.start_s < motion.end_s < scene.duration_s
        names = {(1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up"}
        assert names[tuple(np.sign(way).astype(int))] == motion.direction


def test_events_whose_order_is_asked_lie_apart() -> None:
    for scene in PLOT["sequence"]:
        times = [t.turn.time_s if t.turn else t.appears_s for t in scene.things]
        assert abs(times[0] - times[1]) >= 0.8 and min(times) >= 0.5
        assert max(times) <= scene.duration_s - 0.6


def test_the_sound_and_the_change_never_overlap() -> None:
    for scene in PLOT["change"]:
        (turn,) = (t.turn for t in scene.things if t.turn)
        (sound,) = scene.sounds
        assert 0.45 < abs(sound.onset_s - turn.time_s) < 0.65
        assert sound.end_s < turn.time_s or sound.onset_s > turn.time_s + 0.4
        assert sound.duration_s <= ORDER_SOUND_S


def test_the_sound_lies_within_one_motion() -> None:
    for scene in PLOT["turns"]:
        (sound,) = scene.sounds
        motions = [t.motion for t in scene.things]
        inside = [m.start_s < sound.onset_s and sound.end_s < m.end_s for m in motions if m]
        outside = [sound.end_s < m.start_s or m.end_s < sound.onset_s for m in motions if m]
        assert sorted(inside) == [False, True] and sorted(outside) == [False, True]


def test_sounds_end_before_the_clip_does() -> None:
    for scene in SCENES:
        for sound in scene.sounds:
            assert 0.05 < sound.onset_s < sound.end_s < scene.duration_s
            assert 1 <= sound.beeps <= 4 if sound.kind == "beeps" else sound.beeps == 0


def test_frames_at_given_times_are_those_of_the_clip() -> None:
    scene = PLOT["turns"][0]
    whole = frames(scene)
    assert whole.shape == (32, 64, 64, 3) and whole.dtype == np.uint8
    np.testing.assert_array_equal(frames(scene, [0.5, 2.25, 2.25]), whole[[4, 18, 18]])


def test_things_are_drawn_where_they_are() -> None:
    for scene in (s for s in SCENES[:80] if s.has_video):
        picture = frames(scene, [3.9])[0].astype(float)
        for thing in scene.things_at(3.9):
            x, y = (round(c * scene.size - 0.5) for c in thing.place)
            assert abs(picture[y, x] - COLOURS[thing.colour]).max() <= 1


def test_a_larger_picture_shows_the_same() -> None:
    scene = PLOT["crowd"][0]
    large = replace(scene, settings=SceneSettings(size=128))
    small = frames(scene, [1.0])[0].astype(float)
    halved = frames(large, [1.0])[0].reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert abs(small - halved).mean() < 3


def test_waveforms_hold_their_sound_and_little_else() -> None:
    for scene in (s for s in SCENES[:80] if s.has_audio):
        wave = waveform(scene)
        assert wave.shape == (64_000,) and wave.dtype == np.float32 and abs(wave).max() <= 1
        (sound,) = scene.sounds
        inside = np.zeros(len(wave), bool)
        inside[round(sound.onset_s * 16_000) : round(sound.end_s * 16_000) + 1] = True
        assert abs(wave[~inside]).max() < 0.02 < 0.2 < abs(wave[inside]).max()


def test_waveforms_follow_the_rate() -> None:
    scene = next(s for s in SCENES if s.has_audio and s.sounds[0].kind == "tone")
    for rate_hz in (16_000, 48_000):
        wave = waveform(scene, rate_hz)
        spectrum = abs(np.fft.rfft(wave))
        assert abs(spectrum.argmax() / scene.duration_s - scene.sounds[0].pitch_hz) < 3


def test_a_missing_sense_is_an_error() -> None:
    silent = next(s for s in SCENES if not s.has_audio)
    unseen = next(s for s in SCENES if not s.has_video)
    with pytest.raises(UsageError, match=f"Scene {silent.key} is silent"):
        waveform(silent)
    with pytest.raises(UsageError, match=f"Scene {unseen.key} is sound only"):
        frames(unseen)


def test_scenes_are_plain_data() -> None:
    for scene in SCENES[:100]:
        for value in flat(asdict(scene)):
            assert value is None or type(value) in (int, float, str, bool), value


def flat(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in flat(v)]
    return (
        [leaf for v in value for leaf in flat(v)] if isinstance(value, (list, tuple)) else [value]
    )


def test_sampling_and_drawing_need_neither_torch_nor_av() -> None:
    program = """
import sys
from av_llava.training.world import frames, questions, sample_scene, waveform
scene = sample_scene(0, 0, "train")
assert not {"torch", "av", "transformers"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
