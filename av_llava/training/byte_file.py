"""Stretches of one file, for any thread and process.

Contract: reading moves no shared position, so threads and forked processes may read at once,
through the one descriptor; a pickled copy opens the file anew. The file that was opened stays the
one that is read, also when another one takes its name.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from av_llava.errors import DataError


class ByteFile:
    """A file that stays open.

    Raises:
        DataError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # only where there is no pread, and so no fork
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``.

        Raises:
            DataError: the file has become shorter, or cannot be read any more.
        """
        try:
            data = self._pread(start, end - start)
        except OSError as error:
            raise DataError(f"it cannot be read any more: {error.strerror or error}.") from error
        if len(data) != end - start:
            raise DataError("the file has become shorter since it was opened; open it again.")
        return data

    def _pread(self, start: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._fd, size, start)
        with self._lock:
            os.lseek(self._fd, start, os.SEEK_SET)
            return os.read(self._fd, size)

    def __reduce__(self) -> tuple[type[ByteFile], tuple[Path]]:
        return ByteFile, (self.path,)

    def __del__(self) -> None:
        if "_fd" in self.__dict__:
            os.close(self._fd)
