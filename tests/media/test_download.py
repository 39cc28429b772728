"""Fetching over HTTP from a server on this machine."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_jobs import half

from av_llava.errors import MediaError
from av_llava.media import Limits, local_file, probe, read_audio, read_frames, read_image
from av_llava.settings import SamplingSettings


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file and a set of misbehaviours."""

    film: bytes

    def do_GET(self) -> None:
        answer = getattr(self, "answer" + self.path.split("?")[0].replace("/", "_"))
        answer()

    def answer_film(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.film)))
        self.end_headers()
        self.wfile.write(self.film)

    def answer_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(10_000):
            self.wfile.write(bytes(100_000))

    def answer_slow(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def answer_half(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.film)))
        self.end_headers()
        self.wfile.write(self.film[: len(self.film) // 2])

    def answer_moved(self) -> None:
        self.redirect("/film")

    def answer_trick(self) -> None:
        self.redirect("file:///etc/passwd")

    def answer_old(self) -> None:
        self.redirect("ftp://127.0.0.1/film.mp4")

    def answer_circle(self) -> None:
        self.redirect("/circle")

    def answer_playlist(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"#EXTM3U\n/etc/passwd\n")

    def redirect(self, where: str) -> None:
        self.send_response(302)
        self.send_header("Location", where)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what is tested here."""


@pytest.fixture
def web(clip: Any) -> Iterator[str]:
    Handler.film = clip().read_bytes()
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_frames_and_sound_from_an_address(web: str, clip: Any) -> None:
    settings = SamplingSettings(4)
    here = read_frames(clip(), settings)
    for address in (f"{web}/film", f"{web}/moved"):
        there = read_frames(address, settings)
        np.testing.assert_array_equal(there.frames, here.frames)
        assert there.source == address
    small = read_frames(f"{web}/film?token=1", settings, resize=half)
    assert small.frames.shape[1:] == (60, 80, 3)
    sound = read_audio(f"{web}/film")
    np.testing.assert_array_equal(sound.waveform, read_audio(clip()).waveform)
    assert probe(f"{web}/film").kind == "video"


def test_one_copy_for_several_reads_is_removed_afterwards(web: str) -> None:
    with local_file(f"{web}/film", Limits()) as file:
        assert file.name == f"{web}/film"
        assert probe(file.path).kind == "video"
        assert read_audio(file.path).status == "ok"
    assert not file.path.exists()


@pytest.mark.parametrize(
    ("path", "limits", "words"),
    [
        ("endless", {"max_download_bytes": 1_000_000}, "max_download_bytes"),
        ("film", {"max_download_bytes": 1_000}, "the server declares"),
        ("slow", {"max_download_s": 1.0}, "took longer than 1 s"),
        ("half", {}, "stopped after|cannot be fetched"),
        ("trick", {}, "not allowed"),
        ("old", {}, "neither http nor https"),
        ("circle", {}, "the server answers 302"),
        ("playlist", {}, "is a playlist"),
    ],
)
def test_misbehaving_servers(
    web: str, path: str, limits: dict[str, float], words: str, tmp_path: Path
) -> None:
    start = time.monotonic()
    with pytest.raises(MediaError, match=words) as caught:
        probe(f"{web}/{path}", Limits(**limits))  # type: ignore[arg-type]
    assert f"{web}/{path}" in str(caught.value)
    assert time.monotonic() - start < 15


def test_no_such_server_or_page(web: str) -> None:
    with pytest.raises(MediaError, match="cannot be fetched"):
        read_image("http://127.0.0.1:9/x.png")
    Handler.answer_gone = lambda self: self.send_error(410)  # type: ignore[attr-defined]
    with pytest.raises(MediaError, match="the server answers 410"):
        read_image(f"{web}/gone")
    with pytest.raises(MediaError, match="cannot be fetched"):
        probe("http://[not an address/x")
