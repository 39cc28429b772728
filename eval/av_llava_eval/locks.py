"""One run at a time in a folder, whatever number of processes it has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from av_llava.errors import UsageError
from av_llava.files import try_lock
from av_llava_eval.sharding import Place

LOCKS = "locks"


class RunLock:
    """Holds the folder for the processes of one run.

    Each process holds the lock of its place; processes of another number, or a second one at the
    same place, belong to another run. The system lets go of a lock when its process ends, however
    it ends.

    Args:
        folder: of the run.
        place: of this process.

    Raises:
        UsageError: another run is at work in this folder.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        self._fd = -1
        locks = folder / LOCKS
        try:
            locks.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(locks / place.name, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"{locks} cannot be written: {error.strerror}.") from error
        try:
            self._take(folder, place, locks)
        except BaseException:
            self.release()
            raise

    def _take(self, folder: Path, place: Place, locks: Path) -> None:
        if not try_lock(self._fd):
            raise UsageError(f"Another run is at work in {folder} (process {place.name}).")
        for other in sorted(locks.iterdir()):
            if other.name.endswith(f"of{place.world}"):
                continue
            fd = os.open(other, os.O_RDWR)
            try:
                if not try_lock(fd):
                    raise UsageError(f"Another run is at work in {folder} (process {other.name}).")
            finally:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
