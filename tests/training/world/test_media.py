"""Media files: real H.264 and AAC whose decoded frames and sound still hold the answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from world_senses import Clip, answer, hear, see

from av_llava.errors import MediaError
from av_llava.media import probe, read_audio, read_frames
from av_llava.settings import SamplingSettings
from av_llava.training.world.kinds import KINDS
from av_llava.training.world.parts import COLOURS, Scene, SceneSettings
from av_llava.training.world.picture import frames
from av_llava.training.world.questions import all_questions
from av_llava.training.world.scene import generator, sample_scene
from av_llava.training.world.sound import waveform
from av_llava.training.world.write import suffix, write_clip

EVERY = SamplingSettings(frames=32)


def written(scene: Scene, folder: Path) -> Path:
    return write_clip(scene, folder / f"{scene.key}{suffix(scene)}")


def scene_with(video: bool, audio: bool) -> Scene:
    scenes = (sample_scene(1, i, "media") for i in range(1000))
    return next(s for s in scenes if (s.has_video, s.has_audio) == (video, audio))


@pytest.mark.parametrize(("video", "audio"), [(True, True), (True, False), (False, True)])
def test_files_have_the_streams_of_their_scene(tmp_path: Path, video: bool, audio: bool) -> None:
    scene = scene_with(video, audio)
    info = probe(written(scene, tmp_path))
    assert (info.video is not None, info.audio is not None) == (video, audio)
    assert info.duration_s == pytest.approx(4.0, abs=0.1)
    if info.video:
        assert (info.video.codec, info.video.width, info.video.height) == ("h264", 64, 64)
        assert info.video.avg_fps == pytest.approx(8) and info.video.n_frames == 32
    if info.audio:
        assert (info.audio.codec, info.audio.rate_hz, info.audio.channels) == ("aac", 16_000, 1)
    assert [p.name for p in tmp_path.iterdir()] == [f"{scene.key}{suffix(scene)}"]


def test_silent_files_read_as_silent_and_sound_files_have_no_frames(tmp_path: Path) -> None:
    assert read_audio(written(scene_with(True, False), tmp_path)).status == "none"
    with pytest.raises(MediaError):
        read_frames(written(scene_with(False, True), tmp_path), EVERY)


def test_colours_and_places_survive(tmp_path: Path) -> None:
    """Chroma has half the resolution: inside of shapes colours stay, edges may not."""
    for index in range(20):
        scene = sample_scene(2, index, "media")
        if not scene.has_video:
            continue
        batch = read_frames(written(scene, tmp_path), EVERY)
        drawn = frames(scene)
        np.testing.assert_allclose(batch.pts_s, np.arange(32) / 8, atol=1e-6)
        error = abs(batch.frames.astype(float) - drawn)
        assert error.mean() < 3.5
        for number, picture in enumerate(batch.frames):
            for thing in scene.things_at(number / 8):
                x, y = (round(c * 64 - 0.5) for c in thing.place)
                patch = picture[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
                assert abs(patch - COLOURS[thing.colour]).max() < 30


def test_sound_survives_in_time(tmp_path: Path) -> None:
    for index in range(20):
        scene = sample_scene(2, index, "media")
        if not scene.has_audio:
            continue
        clip = read_audio(written(scene, tmp_path))
        assert clip.sample_rate_hz == 16_000 and clip.status == "ok"
        wave = waveform(scene)
        start = round(clip.start_s * 16_000)
        heard = np.r_[np.zeros(start, np.float32), clip.waveform][: len(wave)]
        assert len(heard) >= len(wave) - 1100
        levels = (np.sqrt((w[:63_000].reshape(-1, 500) ** 2).mean(1)) for w in (wave, heard))
        assert np.corrcoef(*levels)[0, 1] > 0.98


def test_the_same_scene_gives_the_same_bytes(tmp_path: Path) -> None:
    for index in range(30):
        scene = sample_scene(3, index, "media")
        files = [write_clip(scene, tmp_path / f"{i}{suffix(scene)}") for i in range(2)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_other_sizes_and_rates_are_written_as_they_are(tmp_path: Path) -> None:
    settings = SceneSettings(size=98, duration_s=5.0, fps=10)
    scene = next(
        s for i in range(99) if (s := sample_scene(0, i, "media", settings)).plot == "change"
    )
    info = probe(written(scene, tmp_path))
    assert info.video and (info.video.width, info.video.height) == (98, 98)
    assert info.video.n_frames == 50 and info.duration_s == pytest.approx(5.0, abs=0.1)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("av_llava.training.world.write._write_sound", broken)
    with pytest.raises(OSError, match="No space"):
        written(scene_with(True, True), tmp_path)
    assert not list(tmp_path.iterdir())


def measured(scene: Scene, folder: Path) -> Clip:
    """Decode a file and measure it."""
    path = written(scene, folder)
    seen, times_s, heard = [], np.zeros(0), None
    if scene.has_video:
        batch = read_frames(path, EVERY, threads=1)
        seen, times_s = [see(frame) for frame in batch.frames], batch.pts_s
    if scene.has_audio:
        clip = read_audio(path)
        heard = hear(clip.waveform, clip.sample_rate_hz)
    return Clip(seen, times_s, heard)


@pytest.mark.slow
def test_decoded_files_answer_every_kind_of_question(tmp_path: Path) -> None:
    """By measuring pixels and spectra, without knowing how the world is drawn."""
    right, asked, wrong = Counter[str](), Counter[str](), []
    for index in range(150):
        scene = sample_scene(11, index, "media")
        clip = measured(scene, tmp_path)
        for question in all_questions(scene, generator(11, index, "media", "all")):
            asked[question.kind] += 1
            said = answer(question.kind, question.question, clip)
            right[question.kind] += said == question.answer
            if said != question.answer:
                wrong.append((index, question, said))
    assert set(asked) == set(KINDS) and min(asked.values()) > 15
    assert all(right[kind] >= 0.95 * asked[kind] for kind in asked), wrong
    assert right.total() >= 0.99 * asked.total(), wrong
