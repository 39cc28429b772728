"""The file in which an index keeps what was measured.

Contract: one line of JSON for each chunk of rows, appended when the chunk is done, after a first
line that says what the lengths depend on. A kill at any moment leaves a file that is good up to its
last whole line. A chunk is taken from the file only if the media it was made from are unchanged.
One process at a time writes the file; any number may read one that is whole. A file that is no
index is never touched.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from av_llava.errors import DataError, UsageError
from av_llava.files import append_whole, try_lock
from av_llava.media import is_remote

logger = logging.getLogger(__name__)

SCHEMA = "av-llava-index/1"
CHUNK_ROWS = 32
"""Rows that are measured, written and, when a medium changes, measured again together."""

Stamp = list[int] | None
_THREADS = 8  # waiting for a network disk, mostly
_LINES_AT_ONCE = 256
_LONGEST_HEAD = 1 << 14
_BEGINNING = json.dumps({"schema": SCHEMA})[:-1].encode()


@dataclass
class Measured:
    """The lengths of one chunk of rows."""

    chunk: int
    rows: np.ndarray
    """int32 [3, n]: of each row the tokens, those that are learned, the code of its modality."""
    errors: dict[int, str]
    """Row of the store → why it could not be measured."""
    media: dict[str, Stamp]
    """Medium → its stamp when it was measured."""

    def to_line(self) -> bytes:
        """One line of the file."""
        data = [self.chunk, self.rows.tolist(), self.errors, self.media]
        return (json.dumps(data, separators=(",", ":")) + "\n").encode()

    @classmethod
    def from_line(cls, line: bytes) -> Measured:
        """Read a line; ValueError if it is none of ours."""
        if not line.endswith(b"\n"):
            raise ValueError("an unfinished line")
        data = json.loads(line)
        if not isinstance(data, list) or len(data) != 4:
            raise ValueError("not a chunk")
        chunk, rows, errors, media = data
        # An array, since a list of numbers takes ten times the room.
        return cls(chunk, np.array(rows, np.int32), {int(k): v for k, v in errors.items()}, media)


def stamp(path: str) -> Stamp:
    """Size and time of change of a file or folder; None if there is none.

    What lies behind an address cannot be seen to change: its stamp is always the same.
    """
    if is_remote(path):
        return [0, 0]
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # no such file, or a name that no file can have
        return None
    return [found.st_size, found.st_mtime_ns]


def beside(data: str) -> Path:
    """Where ``av-llava data index`` keeps the lengths of a data file or folder."""
    return Path(f"{data.rstrip('/')}.index").expanduser()


def _head(key: dict[str, str], n_rows: int) -> dict[str, Any]:
    """What the first line of a file says."""
    return {"schema": SCHEMA, "rows": n_rows, **key}


def is_for(path: Path, key: dict[str, str], n_rows: int) -> bool:
    """Whether an existing file holds lengths of these data and options, and nobody writes it."""
    if not os.access(path, os.R_OK | os.W_OK):
        return False
    with path.open("rb") as handle:
        if not try_lock(handle.fileno(), shared=True):
            return False
        first = handle.readline(_LONGEST_HEAD)
    try:
        return bool(json.loads(first) == _head(key, n_rows))
    except ValueError:
        return False


class IndexFile:
    """What was measured of one store.

    Args:
        path: is made if it does not exist; one for other data or options is begun anew.
        key: what the lengths depend on.
        n_rows: of the store.
        writes: whether more will be written even if nothing is missing.

    Raises:
        UsageError: it cannot be written, is no index, or another process is writing it.
    """

    def __init__(
        self, path: Path, key: dict[str, str], n_rows: int, *, writes: bool = False
    ) -> None:
        self.path = path
        self._good: dict[int, Measured] = {}
        self._head = _head(key, n_rows)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"The index {path} cannot be written: {error.strerror}.") from error
        try:
            self._lock(shared=True)
            self._read()
            if writes or len(self._good) < -(-n_rows // CHUNK_ROWS):
                self._lock(shared=False)
                self._begin(self._read())  # again: another one may have written meanwhile
        except BaseException:
            os.close(self._fd)
            raise

    def take(self, chunk: int) -> Measured | None:
        """What was measured of a chunk, if it still holds."""
        return self._good.pop(chunk, None)

    def append(self, measured: Measured) -> None:
        """Write a chunk.

        Raises:
            DataError: the disk is full.
        """
        self._write(measured.to_line())

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._fd)

    def _lock(self, shared: bool) -> None:
        """Lock the file for reading, or for writing."""
        if not try_lock(self._fd, shared=shared):
            raise UsageError(f"The index {self.path} is being written by another run.")

    def _read(self) -> int:
        """Read what there is; returns after how many bytes it is no longer good."""
        self._good.clear()
        with os.fdopen(os.dup(self._fd), "rb") as handle:
            handle.seek(0)
            first = handle.readline(_LONGEST_HEAD)
            good = len(first) if first and self._matches(first) else 0
            with ThreadPoolExecutor(_THREADS) as pool:
                while good and (lines := list(itertools.islice(handle, _LINES_AT_ONCE))):
                    whole = self._keep(lines, pool)
                    good += sum(len(line) for line in lines[:whole])
                    if whole < len(lines):
                        break
        return good

    def _begin(self, good: int) -> None:
        """Get ready to write: take out what an interrupted run left unfinished."""
        damaged = os.fstat(self._fd).st_size - good
        if good and damaged:
            logger.warning("%s: %d bytes after a damaged line were cut off", self.path, damaged)
        os.ftruncate(self._fd, good)
        os.lseek(self._fd, 0, os.SEEK_END)
        if good == 0:
            self._write(self._first_line())

    def _first_line(self) -> bytes:
        return (json.dumps(self._head) + "\n").encode()

    def _matches(self, first: bytes) -> bool:
        """Whether the first line says that lengths of these data and options follow."""
        if not first.endswith(b"\n") and _BEGINNING.startswith(first[: len(_BEGINNING)]):
            return False  # a run that was killed at once
        try:
            head: Any = json.loads(first)
        except ValueError:
            head = None
        if not isinstance(head, dict) or not str(head.get("schema")).startswith("av-llava-index/"):
            raise UsageError(
                f"{self.path} is no index of av_llava. Nothing was changed; choose another file."
            )
        other = [k for k in self._head if head.get(k) != self._head[k]]
        if other:
            logger.info("%s is made anew: it is for another %s", self.path, " and ".join(other))
        return not other

    def _keep(self, lines: list[bytes], pool: ThreadPoolExecutor) -> int:
        """Keep chunks whose media are unchanged; returns how many lines are whole."""
        found = []
        for line in lines:
            try:
                found.append(Measured.from_line(line))
            except ValueError:
                break
        for measured, same in zip(found, pool.map(_unchanged, found), strict=True):
            measured.media = {}
            self._good.pop(measured.chunk, None)
            if same:
                self._good[measured.chunk] = measured
        return len(found)

    def _write(self, line: bytes) -> None:
        try:
            append_whole(self._fd, line, durable=False)
        except OSError as error:
            raise DataError(
                f"The index {self.path} cannot be written any more: {error.strerror}. What was "
                "measured so far is kept; the same command goes on from there."
            ) from error


def _unchanged(measured: Measured) -> bool:
    return all(stamp(path) == known for path, known in measured.media.items())
