"""The file that a batch appends to, and from which it is resumed.

Contract: append-only; a row is on the disk when :meth:`RowsFile.append` returns. A last line that
an interrupted write left unfinished is taken out, and nothing else is ever changed: a file that
does not hold answers of ours is refused as it is. One run at a time holds the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

from av_llava.answers import SCHEMA
from av_llava.errors import DataError, UsageError
from av_llava.files import append_whole, try_lock

_BEGINNING = json.dumps({"schema": SCHEMA})[:-1].encode()  # how each of our lines begins


class RowsFile:
    """Rows of answers, one JSON object a line.

    Args:
        path: is made if it does not exist.

    Raises:
        UsageError: it cannot be written, or another run is writing it.
        DataError: it holds something else than answers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        """The last row of each id, by the id's JSON text."""
        self.repaired: str | None = None
        """What was mended when the file was opened."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UsageError(f"--out {str(path)!r} cannot be written: {error.strerror}.") from error
        try:
            if not try_lock(self._fd):
                raise UsageError(f"--out {str(path)!r}: another run is writing it.")
            self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and wait until it is on the disk.

        Raises:
            UsageError: the disk is full, or the file can no longer be written.
        """
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            append_whole(self._fd, line)
        except OSError as error:
            raise UsageError(
                f"--out {str(self.path)!r} cannot be written any more: {error.strerror}. "
                "The rows so far are kept; the same command goes on from there."
            ) from error
        self.rows[json.dumps(row["id"])] = row

    def _read(self) -> None:
        """Read the rows that are there; mend the last line."""
        complete = 0
        with os.fdopen(os.dup(self._fd), "rb") as handle:
            handle.seek(0)
            for number, line in enumerate(handle, 1):
                if not line.endswith(b"\n"):
                    self._mend(line, complete)
                    break
                self._take(line, number)
                complete += len(line)

    def _take(self, line: bytes, number: int) -> None:
        if not line.strip():
            return
        row = _row_of(line)
        if row is None:
            raise DataError(
                f"--out {str(self.path)!r}: line {number} is not an answer of av-llava. Nothing "
                "was changed; choose another file."
            )
        self.rows[json.dumps(row["id"])] = row

    def _mend(self, tail: bytes, complete: int) -> None:
        """Finish or take out a last line without its end."""
        row = _row_of(tail)
        if row is not None:
            os.write(self._fd, b"\n")
            self.rows[json.dumps(row["id"])] = row
            self.repaired = "the last line lacked its end, which was added."
        elif tail.startswith(_BEGINNING) or _BEGINNING.startswith(tail):
            os.ftruncate(self._fd, complete)
            self.repaired = f"an unfinished last line ({len(tail)} bytes) was taken out."
        else:
            raise DataError(
                f"--out {str(self.path)!r}: its last line is not an answer of av-llava. Nothing "
                "was changed; choose another file."
            )


def _row_of(line: bytes) -> dict[str, Any] | None:
    """Return the row that a line holds, or None if it is not one of ours."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    ours = isinstance(row, dict) and row.get("schema") == SCHEMA and "id" in row
    return row if ours else None
