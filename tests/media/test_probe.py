"""What a medium is, and a clear reason for everything that is none."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from golden_data import golden
from PIL import Image

from av_llava.errors import MediaError
from av_llava.media import Limits, probe


def test_video_with_sound(clip: Any) -> None:
    path = clip("turned.mp4", rotation=90, size=(160, 120), video_start_s=0.5, audio_rate=48_000)
    info = probe(path)
    assert (info.kind, info.container, info.path) == ("video", "mov", str(path))
    assert info.size_bytes == path.stat().st_size
    assert info.duration_s == pytest.approx(4.5, abs=0.05)
    video, audio = info.video, info.audio
    assert video is not None and audio is not None
    assert (video.codec, video.width, video.height, video.rotation) == ("h264", 120, 160, 90)
    assert (video.avg_fps, video.n_frames) == (10.0, 40)
    assert video.start_s == pytest.approx(0.5)
    assert (audio.codec, audio.rate_hz, audio.channels) == ("aac", 48_000, 2)
    assert audio.layout == "stereo"
    assert audio.start_s == pytest.approx(0, abs=1e-3)


def test_golden_late_sound() -> None:
    audio = probe(golden("clips/av_audio_late1500ms.mp4")).audio
    assert audio is not None
    assert audio.start_s == pytest.approx(1.478, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("a.mkv", {}, "video"),
        ("a.ts", {}, "video"),
        ("a.gif", {}, "video"),
        ("a.m4a", {}, "audio"),
        ("a.wav", {}, "audio"),
        ("a.mp3", {}, "audio"),
        ("covered.mp4", {"video": False, "cover_art": True}, "audio"),
        ("covered_film.mp4", {"cover_art": True}, "video"),
    ],
)
def test_kinds(clip: Any, name: str, options: dict[str, Any], kind: str) -> None:
    info = probe(clip(name, **options))
    assert info.kind == kind
    if kind == "video":
        assert info.video is not None
        assert (info.video.width, info.video.height) == (160, 120)
    else:
        assert info.video is None
        assert info.audio is not None


def test_pictures_and_folders(tmp_path: Path) -> None:
    picture = Image.new("RGB", (30, 20))
    picture.save(tmp_path / "b.jpg")
    picture.save(tmp_path / "a.png")
    info = probe(tmp_path / "a.png")
    assert (info.kind, info.container) == ("image", "png")
    assert info.video is not None
    assert (info.video.width, info.video.height) == (30, 20)
    folder = probe(tmp_path)
    assert (folder.kind, folder.container) == ("frames", "folder")
    assert folder.video is not None
    assert folder.video.n_frames == 2
    picture.save(tmp_path / "c.webp", save_all=True, append_images=[Image.new("RGB", (30, 20), 9)])
    assert probe(tmp_path / "c.webp").kind == "video"


def test_each_unusable_source_has_its_own_words(tmp_path: Path, clip: Any) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "words.mp4").write_text("These are words, not a film. " * 20)
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.mp4").write_bytes(clip("tail.mp4", faststart=False).read_bytes()[:9000])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    expected = {
        "missing.mp4": "There is no file",
        "empty.mp4": "is empty",
        "words.mp4": "is not a media file",
        "folder": "folder without frame images",
        "cut.mp4": "no index",
        "broken.png": "is not an image that can be read",
    }
    for name, words in expected.items():
        with pytest.raises(MediaError, match=words) as caught:
            probe(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty.mp4", "is empty"),
        ("not_media.mp4", "is not a media file"),
        ("trunc_no_moov.mp4", "no index"),
    ],
)
def test_golden_unusable_files(name: str, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        probe(golden(f"clips/{name}"))


def test_devices_and_limits(clip: Any) -> None:
    with pytest.raises(MediaError, match="not a regular file"):
        probe("/dev/null")
    with pytest.raises(MediaError, match="max_bytes"):
        probe(clip(), limits=Limits(max_bytes=10))
    with pytest.raises(MediaError, match="max_duration_s"):
        probe(clip(), limits=Limits(max_duration_s=1))


def test_truncated_file_can_be_probed() -> None:
    info = probe(golden("clips/trunc_faststart_half.mp4"))
    assert info.kind == "video"
    assert info.duration_s == pytest.approx(6.0)


def test_fast_and_without_torch(clip: Any) -> None:
    code = (
        "import sys, time; t = time.perf_counter()\n"
        "from av_llava.media import probe; import av_llava.sampling\n"
        f"info = probe({str(clip())!r})\n"
        "heavy = {'torch', 'transformers', 'decord', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert info.kind == 'video'\n"
    )
    start = time.perf_counter()
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    assert time.perf_counter() - start < 10  # a fraction of a second on an idle machine
