"""Hostile files reach nothing: playlists, protocols, bombs, endless headers."""

from __future__ import annotations

import http.server
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import media_jobs
import pytest
from PIL import Image

from av_llava.errors import MediaError, UsageError
from av_llava.media import Limits, probe, read_audio, read_frames, read_image
from av_llava.media.container import CONTAINERS
from av_llava.media.limits import Deadline
from av_llava.media.source import playlist_kind
from av_llava.media.worker import run_in_worker


@pytest.fixture
def visits() -> Iterator[tuple[str, list[str]]]:
    """Return the address of a server on this machine and the list of paths asked of it."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_error(404)

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def playlists(target: str) -> dict[str, str]:
    return {
        "hls.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{target}\n#EXT-X-ENDLIST\n",
        "hls_as.mp4": f"\ufeff#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{target}\n",
        "concat.mp4": f"ffconcat version 1.0\nfile '{target}'\n",
        "dash.mp4": (
            '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
            '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1"><BaseURL>'
            f"{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"
        ),
        "radio.mp4": f"[playlist]\nFile1={target}\nNumberOfEntries=1\n",
        "session.mp4": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\na={target}\n",
    }


@pytest.mark.parametrize("name", list(playlists("")))
@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
def test_playlists_are_refused_and_reach_nothing(
    clip: Any, tmp_path: Path, visits: tuple[str, list[str]], name: str, backend: str
) -> None:
    address, seen = visits
    for target in (str(clip("secret.ts")), f"{address}/secret.ts"):
        path = tmp_path / name
        path.write_text(playlists(target)[name])
        with pytest.raises(MediaError, match="is a playlist"):
            read_frames(path, backend=backend)
        with pytest.raises(MediaError, match="is a playlist"):
            read_audio(path)
        with pytest.raises(MediaError, match="is a playlist"):
            probe(path.read_bytes())
    assert seen == []


def test_playlist_that_hides_from_the_text_check(
    clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demuxer list refuses what the reading of the first bytes may miss."""
    monkeypatch.setattr("av_llava.media.source.playlist_kind", lambda head: None)
    target = clip("secret.ts")
    for name, text in playlists(str(target)).items():
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(MediaError, match=r"not accepted|not a media file"):
            read_frames(path, backend="pyav")
    # proof that the text is a working attack: without our options FFmpeg opens the other file
    path = tmp_path / "hls.m3u8"
    path.write_text(playlists(str(target))["hls.m3u8"])
    with av.open(str(path)) as container:
        assert container.format.name == "hls"


def test_no_demuxer_that_opens_other_files_is_accepted() -> None:
    accepted = set(CONTAINERS.split(","))
    opening = {"hls", "dash", "concat", "concatf", "image2", "image2pipe", "sdp", "rtsp", "rtp",
               "lavfi", "webm_dash_manifest", "applehttp", "ffmetadata", "tty", "data", "subfile",
               "v4l2", "video4linux2", "fbdev", "alsa", "kmsgrab", "imf", "sap", "vobsub"}  # fmt: skip
    assert not accepted & opening
    # names that this FFmpeg does not know would be dead letters
    known = {name for names in av.formats_available for name in names.split(",")}
    assert {
        "mov",
        "mp4",
        "matroska",
        "webm",
        "mpegts",
        "avi",
        "gif",
        "wav",
        "mp3",
    } <= accepted & known


@pytest.mark.parametrize(
    "address",
    ["rtsp://127.0.0.1/x", "ftp://127.0.0.1/x.mp4", "concat://a|b", "data://text/plain,x"],
)
def test_other_protocols_are_refused(address: str) -> None:
    with pytest.raises(MediaError, match="Only http, https and file"):
        read_frames(address)


def test_file_addresses_are_local_only(clip: Any) -> None:
    assert probe(f"file://localhost{clip()}").kind == "video"
    with pytest.raises(MediaError, match="local only"):
        probe(f"file://elsewhere{clip()}")


def test_names_that_look_like_protocols_are_files(tmp_path: Path) -> None:
    for name in ("concat:a|b", "pipe:0", "http:x.mp4", "subfile,,start,0,end,9,,:x"):
        with pytest.raises(MediaError, match="There is no file"):
            probe(tmp_path / name)


def test_picture_bombs(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999)))
    (tmp_path / "bomb.png").write_bytes(bomb + chunk(b"IEND", b""))
    for reader in (read_image, probe):
        with pytest.raises(MediaError, match=r"bomb\.png.*(max_pixels|too large)"):
            reader(tmp_path / "bomb.png")
    Image.new("L", (300, 300)).save(tmp_path / "mild.png")
    with pytest.raises(MediaError, match="max_pixels"):
        read_image(tmp_path / "mild.png", Limits(max_pixels=10_000))


def test_larger_pictures_later_in_the_stream_are_refused(tmp_path: Path) -> None:
    from clips import make_clip

    small = make_clip(tmp_path / "s.ts", seconds=1, size=(64, 48), audio=None)
    large = make_clip(tmp_path / "l.ts", seconds=1, size=(320, 240), audio=None, video_start_s=1)
    (tmp_path / "grows.ts").write_bytes(small.read_bytes() + large.read_bytes())
    batch = read_frames(tmp_path / "grows.ts", limits=Limits(max_pixels=64 * 48))
    assert batch.frames.shape[1:] == (48, 64, 3)
    assert len(batch) <= 10
    assert any("could not be decoded" in note for note in batch.warnings)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {"bframes": 2, "rotation": 90, "cover_art": True}),
        ("hevc.mp4", {"codec": "libx265", "bframes": 2}),
        ("a.mkv", {}),
        ("a.ts", {"bframes": 2}),
        ("a.flv", {}),
        ("a.gif", {}),
        ("a.wav", {}),
        ("a.flac", {}),
    ],
)
def test_damage_gives_media_errors_and_nothing_else(
    clip: Any, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """In a worker, where a crash of FFmpeg would fail the test and not end the run."""
    data = clip(name, seconds=1.5, size=(64, 48), **options).read_bytes()
    outcomes = run_in_worker(
        media_jobs.read_damaged, data, name, str(tmp_path), 11, 12, timeout_s=300, what=name
    )
    assert sum(outcomes.values()) == 48
    assert not [words for words in outcomes if words.startswith("unnamed")]
    assert outcomes["sound read"] + outcomes["frames read"] > 0


def test_limits_are_checked_settings() -> None:
    assert Limits.from_dict({"max_pixels": 5}).max_pixels == 5
    with pytest.raises(UsageError, match="max_pixels"):
        Limits(max_pixels=0)
    with pytest.raises(UsageError, match="Did you mean 'max_pixels'"):
        Limits.from_dict({"max_pixel": 5})
    late = Deadline(Limits(max_decode_s=0.001), "film.mp4")
    time.sleep(0.01)
    with pytest.raises(MediaError, match=r"film\.mp4.*max_decode_s"):
        late.check()
    assert late.left_s > 0


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\xef\xbb\xbf  #EXTM3U", "HLS"),
        (b"<?xml?><MPD>", "DASH"),
        (b"<html>", None),
        (b"\0\0\0\x20ftypisom", None),
    ],
)
def test_playlist_kind(head: bytes, kind: str | None) -> None:
    assert playlist_kind(head) == kind
