"""Files that crashes, full disks and other processes cannot spoil.

Contract: the standard library only. What the system refuses comes as OSError; what that means to a
user, and what to do, is for the caller to say.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take a file for this process until it is closed, or its process ends, however it ends.

    Args:
        fd: of the open file.
        shared: others may hold it so, too.

    Returns:
        False if another process holds it. True also where there are no locks: on Windows, and on
        some network mounts.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def append_whole(fd: int, data: bytes, *, durable: bool = True) -> None:
    """Write at the end of a file: all of it, or nothing.

    Args:
        fd: of the file, which stands at its end or was opened for appending.
        data: to write.
        durable: wait until it is on the disk.

    Raises:
        OSError: it could not be written; the file is as it was.
    """
    before = os.fstat(fd).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(fd, data[written:])
        if durable:
            os.fsync(fd)
    except OSError:
        os.ftruncate(fd, before)
        raise


@contextmanager
def replacing(path: Path, errors: str = "strict") -> Iterator[IO[str]]:
    """A text file that takes its place when it is whole; what was there stays until then.

    Args:
        path: to be written, in a folder that exists.
        errors: what to do with characters that UTF-8 cannot hold, as ``open`` has it.

    Raises:
        OSError: it could not be written.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("x", encoding="utf-8", errors=errors) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        draft.replace(path)
    finally:
        with suppress(OSError):  # it took its place, or was never made
            draft.unlink()
