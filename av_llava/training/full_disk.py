"""A full disk while something large is written: libraries say it each in their own way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from av_llava.errors import CheckpointError

_FULL_DISK = ("No space left", "PytorchStreamWriter failed", "File too large", "quota")


@contextmanager
def full_disk_named(target: Path) -> Iterator[None]:
    """Turn what libraries raise when a disk is full into an error that says what to do."""
    try:
        yield
    except (RuntimeError, OSError, SafetensorError) as error:
        full = isinstance(error, OSError) or any(sign in str(error) for sign in _FULL_DISK)
        if not full:
            raise
        raise CheckpointError(
            f"{target} could not be written: {error}. The checkpoints before it are whole. Make "
            f"room, then go on with --resume."
        ) from error
