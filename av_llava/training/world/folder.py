"""The folder of a synthetic data set: whose it is, and that only one process writes it.

Contract: `<split>.world` holds the setting as JSON and is locked while a process writes the split.
A folder with other things, or with another setting of the split, is refused untouched.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from av_llava.errors import DataError, UsageError
from av_llava.files import replacing, try_lock
from av_llava.training.world.rows import CLIPS

_SUFFIX = ".world"


@contextlib.contextmanager
def claimed(out: Path, split: str, setting: Mapping[str, Any]) -> Iterator[None]:
    """Make the folder a data set's, or find that it is; nobody else writes the split meanwhile.

    Args:
        out: the folder; made if absent.
        split: name of the split.
        setting: what may not differ; plain JSON values.

    Raises:
        DataError: the folder holds something else, or another setting.
        UsageError: it cannot be written, or another process writes the split.
    """
    if out.is_dir() and any(out.iterdir()) and not any(out.glob(f"*{_SUFFIX}")):
        raise DataError(
            f"The folder {out} holds files that are not of a synthetic data set. Choose an empty "
            f"or new folder."
        )
    try:
        (out / CLIPS).mkdir(parents=True, exist_ok=True)
        handle = os.open(out / f"{split}{_SUFFIX}", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UsageError(f"The folder {out} cannot be written: {error.strerror}.") from error
    try:
        _lock(handle, out, split)
        _compare(handle, out, split, setting)
        yield
    finally:
        os.close(handle)  # which unlocks it


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file that appears whole."""
    try:
        with replacing(path) as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.write("\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def _lock(handle: int, out: Path, split: str) -> None:
    if not try_lock(handle):
        raise UsageError(
            f"Another process is writing the split {split!r} in {out}. Wait for it, or choose "
            f"another folder."
        )


def _compare(handle: int, out: Path, split: str, setting: Mapping[str, Any]) -> None:
    """Compare the setting with that on the disk, or write it if there is none."""
    held = os.read(handle, 2**16)
    if not held:
        os.write(handle, json.dumps(setting).encode())
        os.fsync(handle)
        return
    try:
        before = json.loads(held)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise DataError(
            f"The file {out / (split + _SUFFIX)}, which says how the split was made, is damaged. "
            f"Remove the folder, or choose another."
        )
    names = [*setting, *(k for k in before if k not in setting)]
    other = [k for k in names if before.get(k) != setting.get(k)]
    if other:
        differences = ", ".join(f"{k} was {before.get(k)}, now {setting.get(k)}" for k in other)
        raise DataError(
            f"The folder {out} holds the split {split!r} of another setting: {differences}. Use "
            f"the same setting, another split, or another folder."
        )
