"""Output appears whole or not at all: errors, crashes, full disks, what exists already."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest

from av_llava.checkpoints import staging
from av_llava.checkpoints.staging import check_destination, new_file, new_folder, replace_file, size
from av_llava.demo_model import tiny_random
from av_llava.errors import CheckpointError

from .converting import fingerprint, leftovers


def never() -> None:
    raise AssertionError("the block was entered")


def fail(error: BaseException) -> None:
    raise error


def make(target, act=never, **options):
    """Write a file into a folder to be, and do something before it appears."""
    with new_folder(target, **options) as folder:
        (folder / "a").write_text("ours")
        act()


def make_file(target, act=never):
    with new_file(target) as file:
        file.write_text("ours")
        act()


def test_a_folder_appears_at_the_end_with_ordinary_permissions(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_folder(target) as folder:
        (folder / "a").write_text("x")
        assert not target.exists() and folder.parent == target.parent
    assert (target / "a").read_text() == "x" and leftovers(target.parent) == []
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_whatever_ends_the_block_leaves_nothing(tmp_path, error):
    for maker in (make, make_file):
        with pytest.raises(type(error)):
            maker(tmp_path / "out", lambda: fail(error))
        assert list(tmp_path.iterdir()) == []


def test_a_file_appears_at_the_end(tmp_path):
    with new_file(tmp_path / "sub" / "out.gguf") as file:
        file.write_text("x")
        assert not (tmp_path / "sub" / "out.gguf").exists()
    assert fingerprint(tmp_path).keys() == {"sub/out.gguf"}
    with pytest.raises(CheckpointError, match="out.gguf exists"):
        make_file(tmp_path / "sub" / "out.gguf")


@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "dead link"])
def test_what_exists_is_not_overwritten(tmp_path, what):
    target = tmp_path / "out"
    if what == "file":
        target.write_text("mine")
    elif what == "dead link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        if what == "folder":
            (target / "mine").write_text("mine")
    before = fingerprint(tmp_path)
    with pytest.raises(CheckpointError, match="exists, and nothing that exists is overwritten"):
        make(target)
    assert fingerprint(tmp_path) == before and leftovers(tmp_path) == []


def test_a_destination_that_appears_meanwhile_wins(tmp_path):
    def overtake():
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("theirs")

    with pytest.raises(CheckpointError, match="exists"):
        make(tmp_path / "out", overtake)
    assert (tmp_path / "out" / "a").read_text() == "theirs" and leftovers(tmp_path) == []


@pytest.mark.parametrize("inner", ["out", "a/b/out", "../source/out"])
def test_the_source_is_no_place_for_the_destination(tmp_path, inner):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(CheckpointError, match="lies in the folder"):
        check_destination(source / inner, [source])
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(CheckpointError, match="lies in the folder"):
        check_destination(link / "out", [source])
    assert check_destination(tmp_path / "source2", [source]) == tmp_path / "source2"


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(
        CheckpointError, match=r"There is no room for .*out: .* are needed and 1 GB"
    ):
        make(tmp_path / "out", needed_bytes=10**9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_said(tmp_path, number):
    with pytest.raises(CheckpointError, match="No space is left for .*out"):
        make(tmp_path / "out", lambda: fail(OSError(number, os.strerror(number))))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file/out cannot be written"):
        make(tmp_path / "file" / "out")


def test_replacing_keeps_permissions_and_the_old_text_on_failure(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text("old")
    file.chmod(0o640)
    replace_file(file, "new")
    assert file.read_text() == "new" and stat.S_IMODE(file.stat().st_mode) == 0o640

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(staging, "_sync", fails)
    with pytest.raises(CheckpointError, match="No space is left"):
        replace_file(file, "newer")
    assert file.read_text() == "new" and leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (2_500_000, "2.5 MB"), (13e12, "13 TB")],
)
def test_sizes_for_people(n_bytes, text):
    assert size(n_bytes) == text


# ---------------------------------------------------------------- whole conversions

KILLED = """
import os, signal, sys
from av_llava.checkpoints.convert import convert
def progress(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert("llava", sys.argv[1], sys.argv[2], progress=progress)
"""
CROWDED = """
import resource, sys
from av_llava.checkpoints.convert import convert
from av_llava.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    convert("llava", sys.argv[1], sys.argv[2])
except CheckpointError as error:
    print(error)
"""


def test_a_killed_conversion_leaves_no_folder_that_looks_whole(tmp_path):
    source = tiny_random(tmp_path / "source")
    before = fingerprint(source)
    done = subprocess.run([sys.executable, "-c", KILLED, source, tmp_path / "out"])
    assert done.returncode == -9
    assert not (tmp_path / "out").exists() and fingerprint(source) == before
    (partial,) = leftovers(tmp_path)
    assert partial.startswith(".out.partial-")
    assert not (tmp_path / partial / "config.json").exists()


def test_a_real_write_error_leaves_nothing(tmp_path):
    source = tiny_random(tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", CROWDED, source, tmp_path / "out"], capture_output=True, text=True
    )
    assert "No space is left for" in done.stdout, json.dumps([done.stdout, done.stderr])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
