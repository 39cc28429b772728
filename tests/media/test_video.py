"""The right frames with the right times, from every kind of file; damage is reported."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import make_clip, read_counter, read_counters
from golden_data import golden
from media_jobs import half
from PIL import Image

from av_llava.errors import MediaError, UsageError
from av_llava.media import Limits, read_frames, read_frames_at, scan_frames
from av_llava.media.pyav_reader import plan_runs
from av_llava.media.table import FrameTable
from av_llava.settings import SamplingSettings

ALL = SamplingSettings(frames=None)

# name -> options of make_clip. Every container and structure that must be read exactly.
EXACT: dict[str, dict[str, Any]] = {
    "plain.mp4": {},
    "long_groups.mp4": {"gop": 50},
    "bframes.mp4": {"bframes": 3, "gop": 12},
    "open_groups.mp4": {"bframes": 3, "gop": 12, "open_gop": True},
    "bframes.mkv": {"bframes": 2, "gop": 12},
    "bframes.ts": {"bframes": 3, "gop": 12, "open_gop": True},
    "bframes.flv": {"bframes": 2, "gop": 12},
    "camera.mov": {"bframes": 2, "gop": 12, "faststart": False},
    "refresh.ts": {"encoder_params": "intra-refresh=1", "gop": 20},
    "pyramid.mp4": {"encoder_params": "b-pyramid=normal:ref=6", "bframes": 8, "gop": 20},
    "fields.mp4": {"encoder_params": "interlaced=1", "bframes": 2, "gop": 20},
    "hevc.mp4": {"codec": "libx265", "bframes": 3, "gop": 12, "open_gop": True},
    "hevc.ts": {"codec": "libx265", "bframes": 3, "gop": 12},
    "vp8.mkv": {"codec": "libvpx", "gop": 12},
    "vp9.webm": {"codec": "libvpx-vp9", "gop": 12, "audio_rate": 48_000},
    "mpeg2.mpg": {"codec": "mpeg2video", "gop": 12, "fps": 25.0, "audio_codec": "mp2"},
    "mpeg4.mp4": {"codec": "mpeg4", "gop": 12},
    "bframes.avi": {"bframes": 2, "gop": 12},
    "raw.h264": {"bframes": 2, "gop": 12, "audio": None},
    "animation.gif": {},
    "cut.mp4": {"preroll_s": 1.3, "bframes": 2, "gop": 50},
    "late.mp4": {"video_start_s": 1.0},
    "cover.mp4": {"cover_art": True},
    "odd.mp4": {"size": (161, 121)},
    "film_rate.mp4": {"fps": 23.976, "gop": 12},
    "variable.mp4": {"frame_times": [0, 0.1, 0.2, 0.3, 1.0, 2.0, 2.04, 3.5]},
    "one.mp4": {"seconds": 0.1},
    "short.mp4": {"seconds": 0.3},
}
# Files on which decord gives wrong frames, or none: it must refuse them, never guess.
DECORD_REFUSES = {
    "open_groups.mp4", "refresh.ts", "bframes.ts", "hevc.mp4", "hevc.ts", "mpeg2.mpg", "bframes.avi",
    "raw.h264", "animation.gif", "cut.mp4",
}  # fmt: skip


def first_number(options: dict[str, Any]) -> int:
    """Return the counter of the first shown frame."""
    return round(options.get("preroll_s", 0) * options.get("fps", 10))


@pytest.mark.parametrize("name", EXACT)
def test_every_frame_in_order(clip: Any, name: str) -> None:
    path = clip(name, **EXACT[name])
    batch = read_frames(path, ALL)
    count = len(batch)
    first = first_number(EXACT[name])
    assert read_counters(batch.frames) == list(range(first, first + count))
    assert batch.n_source_frames == count == len(scan_frames(path))
    assert batch.warnings == ()
    assert (np.diff(batch.pts_s) > 0).all()
    assert batch.frames.dtype == np.uint8
    assert batch.backend == "pyav"
    assert batch.duration_s > batch.pts_s[-1]


@pytest.mark.parametrize("name", EXACT)
def test_any_few_frames_are_those_asked_for(clip: Any, name: str) -> None:
    path = clip(name, **EXACT[name])
    table = scan_frames(path)
    every = read_frames(path, ALL).frames
    first = first_number(EXACT[name])
    rng = random.Random(7)
    for k in (1, 2, 5, 12):
        numbers = sorted(rng.sample(range(len(table)), min(k, len(table))))
        batch = read_frames_at(path, table.pts_s[numbers])
        assert read_counters(batch.frames) == [first + n for n in numbers]
        np.testing.assert_array_equal(batch.pts_s, table.pts_s[numbers])
        np.testing.assert_array_equal(batch.frames, every[numbers])  # bit for bit


@pytest.mark.parametrize("name", EXACT)
def test_decord_gives_the_same_frames_or_refuses(clip: Any, name: str) -> None:
    path = clip(name, **EXACT[name])
    table = scan_frames(path)
    wanted = sorted(random.Random(3).sample(range(len(table)), min(9, len(table))))
    if name in DECORD_REFUSES:
        with pytest.raises(MediaError, match="decord"):
            read_frames_at(path, table.pts_s[wanted], backend="decord")
        return
    theirs = read_frames_at(path, table.pts_s[wanted], backend="decord")
    ours = read_frames_at(path, table.pts_s[wanted], backend="pyav")
    assert theirs.backend == "decord"
    assert read_counters(theirs.frames) == read_counters(ours.frames)
    np.testing.assert_array_equal(theirs.pts_s, ours.pts_s)
    # both convert by the frame's own colour space; decord's older scaler rounds differently
    assert np.abs(theirs.frames.astype(int) - ours.frames).mean() < 1.0


@pytest.mark.parametrize("turn", [90, 180, 270, -90])
def test_rotation_is_applied_by_every_backend(clip: Any, turn: int) -> None:
    path = clip("turned.mp4", rotation=turn, seconds=1)
    ours = read_frames(path, ALL)
    expected = (160, 120) if turn % 180 == 0 else (120, 160)
    assert ours.frames.shape[2:0:-1] == expected == ours.source_size
    upright = np.rot90(ours.frames, -turn // 90 % 4, axes=(1, 2))
    assert read_counters(upright) == list(range(10))
    assert ours.frames.flags.c_contiguous
    theirs = read_frames(path, ALL, backend="decord")
    assert read_counters(np.rot90(theirs.frames, -turn // 90 % 4, axes=(1, 2))) == list(range(10))


def test_resize_gets_upright_writable_frames(clip: Any) -> None:
    seen = []

    def resize(picture: np.ndarray) -> np.ndarray:
        seen.append((picture.shape, picture.dtype, picture.flags.c_contiguous))
        picture[0, 0] = 0  # in place is allowed
        return picture[::2, ::2]

    batch = read_frames(clip("turned.mp4", rotation=90, seconds=1), ALL, resize=resize)
    assert batch.frames.shape == (10, 80, 60, 3)
    assert set(seen) == {((160, 120, 3), np.dtype(np.uint8), True)}
    assert batch.source_size == (120, 160)


def test_times_share_the_clock_of_the_sound(clip: Any) -> None:
    late = read_frames(clip("late.mp4", video_start_s=1.0), ALL)
    assert late.pts_s[0] == pytest.approx(1.0)
    assert late.span_s == pytest.approx((1.0, 5.0))
    assert late.duration_s == pytest.approx(5.0)
    # a transport stream starts its clock at 1.4 s: zero is its earliest stream
    stream = read_frames(clip("plain.ts"), ALL)
    assert 0 <= stream.pts_s[0] < 0.05
    # sound first: the picture of a file whose sound is late starts at zero
    assert read_frames(clip("late_sound.mp4", audio_start_s=1.5), ALL).pts_s[0] == 0


def test_edit_list_hides_what_was_cut(clip: Any) -> None:
    batch = read_frames(clip("cut.mp4", preroll_s=1.3, bframes=2, gop=50), SamplingSettings(4))
    assert batch.pts_s[0] == 0
    assert read_counter(batch.frames[0]) == 13
    assert batch.n_source_frames == 40


def test_variable_rate_golden() -> None:
    path = golden("clips/av_vfr.mp4")
    table = scan_frames(path)
    assert len(table) == 37
    assert table.pts_s[-1] == pytest.approx(5.6)
    assert table.end_s == pytest.approx(6.0)  # not 37 / average rate = 5.1
    batch = read_frames(path, SamplingSettings(8))
    assert np.abs(batch.pts_s - np.linspace(0, 5.6, 8)).max() <= 0.4
    assert (batch.pts_s > 3).sum() >= 3


def test_goldens_have_the_frames_they_promise() -> None:
    clips = json.loads(golden("clips/meta.json").read_text())["clips"]
    checked = 0
    for name, truth in clips.items():
        if "video" not in truth or name.startswith("trunc"):
            continue
        batch = read_frames(golden(f"clips/{name}"), ALL)
        assert len(batch) == truth["video"]["frames"], name
        assert batch.pts_s[0] == pytest.approx(truth["video"]["start_s"], abs=0.005)
        assert batch.warnings == ()
        checked += 1
    assert checked >= 7


def test_window_and_its_edges(clip: Any) -> None:
    path = clip("bframes.mp4", bframes=3, gop=12)
    batch = read_frames(path, ALL, start_s=1.0, end_s=2.0)
    assert read_counters(batch.frames) == list(range(10, 20))
    assert batch.span_s == (1.0, 2.0)
    assert batch.n_source_frames == 10
    between = read_frames(path, SamplingSettings(4), start_s=1.05, end_s=1.08)
    assert read_counters(between.frames) == [10]
    assert read_frames(path, ALL, start_s=3.0, end_s=99.0).span_s == pytest.approx((3.0, 4.0))
    with pytest.raises(UsageError, match="after the last frame"):
        read_frames(path, start_s=50.0)
    with pytest.raises(UsageError, match="below its end"):
        read_frames(path, start_s=2.0, end_s=1.0)
    with pytest.raises(MediaError, match=r"picture begins at 1\.00 s"):
        read_frames(clip("late.mp4", video_start_s=1.0), end_s=0.5)


def test_read_frames_at_keeps_the_order_asked_for(clip: Any) -> None:
    batch = read_frames_at(clip(), [3.0, 0.5, 0.5, 99.0, -1.0])
    assert read_counters(batch.frames) == [30, 5, 5, 39, 0]
    np.testing.assert_allclose(batch.pts_s, [3.0, 0.5, 0.5, 3.9, 0.0])
    with pytest.raises(UsageError, match="at least one time"):
        read_frames_at(clip(), [])


def test_repeated_frames(clip: Any) -> None:
    settings = SamplingSettings(frames=6, repeat_frames=True)
    batch = read_frames(clip("short.mp4", seconds=0.3), settings)
    assert read_counters(batch.frames) == [0, 0, 0, 1, 1, 2]


def test_sources_of_every_kind(clip: Any, tmp_path: Path) -> None:
    path = clip()
    few = SamplingSettings(3)
    expected = read_frames(path, few)
    data = path.read_bytes()
    with path.open("rb") as handle:
        handle.seek(100)  # a file object is read from its beginning
        sources = [str(path), path.as_uri(), data, bytearray(data), handle]
        for source in sources:
            batch = read_frames(source, few)
            np.testing.assert_array_equal(batch.frames, expected.frames)
    awkward = tmp_path / "concat:a|b %d #1?.mp4"  # no protocol, no pattern, no address
    awkward.write_bytes(data)
    np.testing.assert_array_equal(read_frames(awkward, few).frames, expected.frames)
    with pytest.raises(UsageError, match="bytes or a binary file object"):
        read_frames(12)  # type: ignore[arg-type]
    with open(__file__) as text, pytest.raises(UsageError, match="binary mode"):
        read_frames(text)  # type: ignore[arg-type]


def test_folder_of_frames_in_natural_order(tmp_path: Path) -> None:
    from clips import counter_frame

    for i in range(12):
        Image.fromarray(counter_frame(i, (64, 48))).save(tmp_path / f"frame_{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    batch = read_frames(tmp_path, SamplingSettings(frames=None, source_fps=2))
    assert read_counters(batch.frames) == list(range(12))
    assert batch.pts_s[3] == 1.5
    assert batch.duration_s == 6.0
    assert batch.warnings == ()
    assert batch.backend == "pillow"
    window = read_frames(tmp_path, SamplingSettings(source_fps=2), start_s=1, end_s=2)
    assert read_counters(window.frames) == [2, 3]
    assert "1 fps assumed" in read_frames(tmp_path, SamplingSettings(2)).warnings[0]
    assert len(scan_frames(tmp_path, source_fps=2)) == 12


def test_folder_with_a_broken_frame(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "1.jpg").write_bytes(b"\xff\xd8\xff and nothing more")
    with pytest.raises(MediaError, match=r"1\.jpg"):
        read_frames(tmp_path, ALL)


def test_animated_webp_and_png(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (32, 24), (i * 40, 0, 0)) for i in range(5)]
    for name in ("a.webp", "a.png"):
        path = tmp_path / name
        pictures[0].save(
            path, save_all=True, append_images=pictures[1:], duration=200, lossless=True
        )
        batch = read_frames(path, SamplingSettings(3))
        np.testing.assert_allclose(batch.pts_s, [0, 0.4, 0.8], atol=0.01)
        assert np.abs(batch.frames[:, 0, 0, 0].astype(int) - [0, 80, 160]).max() <= 3
    pictures[0].save(tmp_path / "still.png")
    with pytest.raises(MediaError, match="still image"):
        read_frames(tmp_path / "still.png")


def test_truncated_file_keeps_what_is_there() -> None:
    path = golden("clips/trunc_faststart_half.mp4")
    batch = read_frames(path, ALL)
    whole = read_frames(golden("clips/av_audio_short2s.mp4"), ALL)
    assert 25 <= len(batch) <= 32
    assert any("header states 6.00 s" in note for note in batch.warnings)
    np.testing.assert_allclose(np.diff(batch.pts_s), 0.1, atol=1e-6)
    # same picture source as the whole clips: what came is undamaged
    assert np.abs(batch.frames[:25].astype(int) - whole.frames[:25]).mean() < 2


def corrupted(path: Path, target: Path, start: float, stop: float) -> Path:
    """Copy a file with part of its media data overwritten by noise."""
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4 if b"mdat" in data else 0
    size = len(data) - at
    begin, end = at + int(size * start), at + int(size * stop)
    data[begin:end] = random.Random(1).randbytes(end - begin)
    target.write_bytes(data)
    return target


def test_corrupted_payload_keeps_the_rest(clip: Any, tmp_path: Path) -> None:
    # faststart: the header lies before the noise
    path = corrupted(clip("long.mp4", seconds=10, audio=None), tmp_path / "bad.mp4", 0.4, 0.6)
    batch = read_frames(path, ALL)
    assert batch.warnings
    assert 20 <= len(batch) <= 100
    numbers = np.round(batch.pts_s * 10).astype(int)
    intact = numbers < 35
    assert intact.sum() == 35
    assert read_counters(batch.frames[intact]) == list(range(35))
    tail = numbers >= 75
    assert read_counters(batch.frames[tail]) == numbers[tail].tolist()


def test_nothing_decodable_is_an_error(clip: Any, tmp_path: Path) -> None:
    path = corrupted(clip("long.mp4", seconds=10, audio=None), tmp_path / "noise.mp4", 0, 1)
    with pytest.raises(MediaError, match=r"noise\.mp4.*could be decoded.*decord was tried"):
        read_frames(path, SamplingSettings(4))


def test_over_reported_frame_count(clip: Any, tmp_path: Path) -> None:
    """The frame count comes from the packets, whatever the header of an AVI claims."""
    path = clip("count.avi", codec="mpeg4", audio=None)
    data = bytearray(path.read_bytes())
    at = data.index(b"avih") + 8 + 16
    assert int.from_bytes(data[at : at + 4], "little") in (40, 41)
    data[at : at + 4] = (4000).to_bytes(4, "little")
    stream = data.index(b"strh") + 8 + 32
    data[stream : stream + 4] = (4000).to_bytes(4, "little")
    (tmp_path / "claims.avi").write_bytes(data)
    batch = read_frames(tmp_path / "claims.avi", ALL)
    assert len(batch) == 40
    assert read_counters(batch.frames) == list(range(40))


def test_size_change_needs_a_resize(tmp_path: Path) -> None:
    """Two transport streams glued together: the picture grows half way."""
    small = make_clip(tmp_path / "s.ts", seconds=1, size=(64, 48), audio=None)
    large = make_clip(tmp_path / "l.ts", seconds=1, size=(128, 96), audio=None, video_start_s=1.0)
    glued = tmp_path / "glued.ts"
    glued.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(MediaError, match="changes from"):
        read_frames(glued, ALL)

    def square(picture: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).resize((64, 48)))

    batch = read_frames(glued, ALL, resize=square)
    assert batch.frames.shape[1:] == (48, 64, 3)
    assert len(batch) == 20


def test_bad_resize_functions(clip: Any) -> None:
    with pytest.raises(UsageError, match="must return uint8"):
        read_frames(clip(), SamplingSettings(2), resize=lambda a: a.astype(np.float32))
    sizes = itertools.count(4)
    with pytest.raises(MediaError, match="one output size"):
        read_frames(clip(), SamplingSettings(2), resize=lambda a: a[: next(sizes)])


def test_backends_are_a_registry(clip: Any) -> None:
    with pytest.raises(UsageError, match="Did you mean 'decord'"):
        read_frames(clip(), backend="decrod")


def test_isolated_reading_gives_the_same(clip: Any) -> None:
    path = clip()
    here = read_frames(path, SamplingSettings(5), resize=half)
    there = read_frames(path, SamplingSettings(5), resize=half, isolate=True)
    np.testing.assert_array_equal(here.frames, there.frames)
    np.testing.assert_array_equal(here.pts_s, there.pts_s)
    # the function runs in this process, so it may be anything
    nested = read_frames(path, SamplingSettings(5), resize=lambda a: a[::2, ::2], isolate=True)
    np.testing.assert_array_equal(here.frames, nested.frames)
    with pytest.raises(UsageError, match="after the last frame"):
        read_frames(path, start_s=90, isolate=True)


def test_no_video_stream(clip: Any) -> None:
    with pytest.raises(MediaError, match="no video stream"):
        read_frames(clip("sound.m4a"))
    with pytest.raises(MediaError, match="no video stream"):
        read_frames(clip("covered.mp4", video=False, cover_art=True))


def test_window_of_a_long_film_is_reached_by_a_seek(clip: Any) -> None:
    path = clip("long_film.mp4", seconds=120, size=(64, 48), bframes=2, gop=25, audio=None)
    table = scan_frames(path, start_s=90, end_s=95)
    assert len(table) < 300
    assert not table.whole
    batch = read_frames(path, SamplingSettings(6), start_s=90, end_s=95)
    assert read_counters(batch.frames) == [900, 909, 919, 929, 939, 949]
    assert batch.duration_s == pytest.approx(120)
    # the whole table says the same
    assert read_counters(read_frames_at(path, batch.pts_s).frames) == read_counters(batch.frames)


def test_sparse_frames_of_a_long_film_skip_by_seeking(
    clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import av_llava.media.pyav_reader as reader

    path = clip("long_film.mp4", seconds=120, size=(64, 48), bframes=2, gop=25, audio=None)
    jumps = []
    jump = reader._Packets._jump
    monkeypatch.setattr(reader, "_SEEK_PACKETS", 100)
    monkeypatch.setattr(
        reader._Packets, "_jump", lambda self, first: jumps.append(first) or jump(self, first)
    )
    batch = read_frames(path, SamplingSettings(5))
    assert read_counters(batch.frames) == [0, 299, 599, 899, 1199]
    assert len(jumps) == 4
    # a seek that lands elsewhere is noticed, and the frames are read without seeking
    monkeypatch.setattr(reader._Packets, "_jump", lambda self, first: False)
    batch = read_frames(path, SamplingSettings(5))
    assert read_counters(batch.frames) == [0, 299, 599, 899, 1199]


def test_unwanted_pictures_are_not_decoded(clip: Any) -> None:
    """The plan covers only groups of pictures that hold a wanted frame."""
    table = scan_frames(clip("bframes.mp4", bframes=3, gop=12))
    runs = plan_runs(table, [1, 30])
    assert [run.frames for run in runs] == [(1,), (30,)]
    assert runs[0].first == 0
    assert runs[1].first == 24
    assert sum(run.stop - run.first for run in runs) < 20


def test_leading_pictures_start_one_keyframe_earlier(clip: Any) -> None:
    table = scan_frames(clip("open_groups.mp4", bframes=3, gop=12, open_gop=True))
    assert table.has_leading_pictures
    leading = [
        i
        for i, position in enumerate(table.positions)
        for key in [table.key_positions[table.key_positions <= position].max()]
        if table.ticks[i] < table.packet_ticks[key]
    ]
    assert leading
    for index in leading:
        (run,) = plan_runs(table, [index])
        own = table.key_positions[table.key_positions <= table.positions[index]].max()
        assert run.first < own


def test_table_of_separate_pictures() -> None:
    table = FrameTable.of_times(np.array([0.0, 0.5, 1.0]))
    assert len(table) == 2
    assert table.end_s == 1.0
    assert "2 frames" in repr(table)


def test_batch_says_what_it_is(clip: Any) -> None:
    batch = read_frames(clip(), SamplingSettings(4))
    text = repr(batch)
    assert "u8[4, 120, 160, 3]" in text
    assert "pts_s=[0.00, 1.30, 2.60, … 3.90]" in text
    assert len(text) < 250
    assert batch.avg_fps == 10


def test_colours_follow_the_streams_own_matrix(tmp_path: Path) -> None:
    """BT.709 and BT.601 are told apart by the tag, and full range from limited."""

    def film(space: int, full: bool) -> Path:
        path = tmp_path / f"{space}{full}.mp4"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("libx264", rate=10, options={"crf": "1"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.codec_context.colorspace = space
            stream.codec_context.color_range = 2 if full else 1
            frame = av.VideoFrame(64, 48, "yuv420p")
            for plane, value in zip(frame.planes, (120, 90, 180)):
                plane.update(bytes([value]) * plane.buffer_size)
            out.mux(stream.encode(frame) + stream.encode(None))
        return path

    for space, kr, kb in ((1, 0.2126, 0.0722), (6, 0.299, 0.114)):
        for full in (False, True):
            y = 120 / 255 if full else (120 - 16) / 219
            u, v = ((c - 128) / (255 if full else 224) for c in (90, 180))
            red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
            green = (y - kr * red - kb * blue) / (1 - kr - kb)
            got = read_frames(film(space, full), ALL).frames[0].mean((0, 1))
            np.testing.assert_allclose(got, [255 * c for c in (red, green, blue)], atol=2.5)


def test_limits_of_pixels_memory_and_length(clip: Any) -> None:
    path = clip()
    with pytest.raises(MediaError, match="max_pixels"):
        read_frames(path, limits=Limits(max_pixels=1000))
    with pytest.raises(MediaError, match="max_batch_bytes"):
        read_frames(path, limits=Limits(max_batch_bytes=100_000))
    with pytest.raises(MediaError, match="max_duration_s"):
        read_frames(path, limits=Limits(max_duration_s=2))
    with pytest.raises(MediaError, match="max_frames"):
        read_frames(path, limits=Limits(max_frames=20))
    with pytest.raises(MediaError, match="max_decode_s"):
        read_frames(path, limits=Limits(max_decode_s=0.001))
    with pytest.raises(MediaError, match="max_bytes"):
        read_frames(path, limits=Limits(max_bytes=1000))
