"""Output that appears whole or not at all.

Contract: everything is written into a hidden sibling of the destination, made durable, and renamed
at the end. An error leaves nothing behind; a crash leaves a folder whose name says that it is
partial. What exists is never written to.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from av_llava.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SPARE_BYTES = 16 * 2**20  # tokenizers, configurations and the file system's own needs


@contextmanager
def new_folder(
    destination: Path, sources: Sequence[Path] = (), needed_bytes: int = 0
) -> Iterator[Path]:
    """Give a folder to write into, which becomes ``destination`` when the block ends well.

    Args:
        destination: must not exist, nor lie in one of the sources.
        sources: folders that are read.
        needed_bytes: size of what will be written, as far as it is known.

    Raises:
        CheckpointError: the destination exists, or cannot be written, or there is no room.
    """
    target = check_destination(destination, sources)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    with _named_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_room(target, needed_bytes)
        partial.mkdir()
        try:
            yield partial
            make_durable(partial)
            check_destination(target, sources)
            partial.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(destination: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Give the path of a file to write, which becomes ``destination`` when the block ends well.

    Raises:
        CheckpointError: as :func:`new_folder`.
    """
    target = check_destination(destination)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    with _named_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_room(target, needed_bytes)
        try:
            yield partial
            _sync(partial)
            check_destination(target)
            partial.rename(target)
            _sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def replace_file(file: Path, text: str) -> None:
    """Replace the text of a file at once: readers see the old text or the new.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial-{secrets.token_hex(4)}")
    with _named_faults(file):
        try:
            partial.write_text(text, encoding="utf-8")
            shutil.copymode(file, partial)
            _sync(partial)
            partial.replace(file)
            _sync(file.parent)
        finally:
            partial.unlink(missing_ok=True)


def check_destination(destination: Path, sources: Sequence[Path] = ()) -> Path:
    """Return the absolute path of what is to be made.

    Raises:
        CheckpointError: it exists, or lies in one of the sources.
    """
    target = Path(os.path.abspath(Path(destination).expanduser()))
    if target.exists() or target.is_symlink():
        raise CheckpointError(
            f"{target} exists, and nothing that exists is overwritten. Name another destination, "
            f"or remove it first."
        )
    for source in sources:
        if target.resolve().is_relative_to(source.resolve()):
            raise CheckpointError(
                f"The destination {target} lies in the folder {source} that is read, which must "
                f"not change. Name a destination elsewhere."
            )
    return target


def _check_room(target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed_bytes + _SPARE_BYTES > free:
        raise CheckpointError(
            f"There is no room for {target}: {size(needed_bytes + _SPARE_BYTES)} are needed and "
            f"{size(free)} are free."
        )


def size(n_bytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"


@contextmanager
def _named_faults(target: Path) -> Iterator[None]:
    """Turn what the system refuses while writing into an error of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            said = f"No space is left for {target} ({error.strerror})"
        else:
            said = f"{target} cannot be written: {error.strerror or error}"
        raise CheckpointError(f"{said}. Nothing was kept of it.") from error


def make_durable(folder: Path) -> None:
    """Have the system write all files of a folder to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
