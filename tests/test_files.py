"""Files that crashes, full disks and other processes cannot spoil."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from av_llava.files import append_whole, replacing, try_lock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")

HOLD = """
import sys
from av_llava.files import try_lock
file = open(sys.argv[1], "a")
print(try_lock(file.fileno(), shared=sys.argv[2] == "shared"), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("theirs", "ours", "free"),
    [("alone", False, False), ("alone", True, False), ("shared", True, True)],
)
def test_a_lock_holds_between_processes_until_its_holder_dies(
    tmp_path: Path, theirs: str, ours: bool, free: bool
) -> None:
    path = tmp_path / "taken"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), theirs],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdin is not None
    try:
        assert other.stdout.readline().strip() == "True"
        with path.open("a") as file:
            assert try_lock(file.fileno(), shared=ours) is free
        other.kill()
        other.wait()
        with path.open("a") as file:
            assert try_lock(file.fileno(), shared=ours)
    finally:
        other.kill()
        other.communicate()


def test_lines_are_appended_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "lines", os.write
    path.write_bytes(b"first\n")
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        append_whole(fd, b"second\n")
        assert path.read_bytes() == b"first\nsecond\n"  # the system may take it in pieces
        pieces = iter([b"thi"])

        def full(fd: int, data: bytes) -> int:
            for piece in pieces:
                return write(fd, piece)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            append_whole(fd, b"third\n")
    finally:
        os.close(fd)
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("old")
    with replacing(path) as handle:
        handle.write("new, é")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "new, é"
    with pytest.raises(TypeError), replacing(path) as handle:
        handle.writelines(["half", 3])  # type: ignore[list-item]
    assert path.read_text(encoding="utf-8") == "new, é"
    assert [p.name for p in tmp_path.iterdir()] == ["notes.json"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "x") as handle:
        handle.write("x")
