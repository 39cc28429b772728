"""What a caller may hand over as a medium, brought down to one local file.

Contract: `local_file` accepts a path, a `file://` or `http(s)://` address, bytes, or a binary
file object, and yields a regular file (or a folder) that stays until the block ends. Anything
else, and any other protocol, is refused. Errors are `MediaError` and name the source.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
import urllib.parse
import urllib.request
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from av_llava.errors import MediaError, UsageError
from av_llava.media.download import download
from av_llava.media.limits import Limits

_ADDRESS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_BLOCK = 1 << 20

# Texts that playlists begin with. A playlist makes a reader open other files or addresses.
_PLAYLISTS = {
    b"#extm3u": "HLS",
    b"ffconcat": "concat",
    b"[playlist]": "PLS",
    b"<asx": "ASX",
    b"<smil": "SMIL",
    b"v=0": "SDP",
    b"[reference]": "ASF reference",
}


@dataclass(frozen=True)
class LocalFile:
    """A file (or folder) on this machine, and the name to call it by in messages."""

    path: Path
    name: str
    remote: bool = False
    """Whether it came from an address."""


Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | LocalFile
"""What a caller may hand over."""


def describe(source: Source) -> str:
    """Return a short name of a source for messages."""
    if isinstance(source, LocalFile):
        return source.name
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    name = source.name if hasattr(source, "name") else type(source).__name__
    return f"<file object {name}>"


def is_remote(source: Source) -> bool:
    """Return whether the source is an HTTP(S) address, or was fetched from one."""
    if isinstance(source, LocalFile):
        return source.remote
    return address_scheme(source) in ("http", "https")


@contextlib.contextmanager
def local_file(source: Source, limits: Limits) -> Iterator[LocalFile]:
    """Yield the source as a local file; a fetched or spooled copy is removed afterwards.

    To read one address several times (picture, then sound), `fetch` it once.

    Raises:
        MediaError: missing, empty, too large, a device, another protocol, or a playlist.
    """
    name = describe(source)
    if isinstance(source, LocalFile):
        yield checked(source, limits)
    elif is_remote(source):
        with _temporary(re.split(r"[?#]", str(source))[0]) as copy:
            download(str(source), copy, limits)
            yield checked(LocalFile(copy, name), limits)
    elif isinstance(source, (str, os.PathLike)):
        yield checked(LocalFile(local_path(source), name), limits)
    else:
        with _temporary("") as copy:
            _spool(source, copy, name, limits)
            yield checked(LocalFile(copy, name), limits)


def fetch(source: Source, limits: Limits) -> LocalFile:
    """Return an address, bytes or a file object as a file that can be read several times.

    The copy is removed when the returned object is no longer used.
    """
    remote = is_remote(source)
    handle, path = tempfile.mkstemp(prefix="av-llava-")
    os.close(handle)
    file = LocalFile(Path(path), describe(source), remote)
    weakref.finalize(file, Path(path).unlink, missing_ok=True)
    if remote:
        download(str(source), file.path, limits)
    else:
        _spool(source, file.path, file.name, limits)
    return checked(file, limits)


def checked(file: LocalFile, limits: Limits) -> LocalFile:
    """Return the file if it is a folder or a regular, non-empty file that is no playlist."""
    path, name = file.path, file.name
    try:
        if path.is_dir():
            return file
        if not path.exists():
            raise MediaError(f"There is no file {name!r}. Check the path.")
        if not path.is_file():
            raise MediaError(f"{name!r} is not a regular file (a device or a pipe). Copy it first.")
        size = path.stat().st_size
        if size == 0:
            raise MediaError(f"{name!r} is empty (0 bytes). Check how it was copied.")
        limits.check("max_bytes", size, repr(name), "its size in bytes")
        with path.open("rb") as handle:
            head = handle.read(1024)
    except OSError as error:
        raise MediaError(f"{name!r} cannot be read: {error.strerror or error}.") from error
    kind = playlist_kind(head)
    if kind:
        raise MediaError(
            f"{name!r} is a playlist ({kind}), not media: it would make the reader open other "
            f"files. Pass the media file that it points to."
        )
    return file


def playlist_kind(head: bytes) -> str | None:
    """Return the kind of playlist that a file beginning with ``head`` is, or None."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, kind in _PLAYLISTS.items():
        if text.startswith(beginning):
            return kind
    return "DASH" if text.startswith(b"<") and b"<mpd" in text else None


def address_scheme(source: Source) -> str | None:
    """Return the protocol of an address (``file``, ``https``), or None for what is no address."""
    match = _ADDRESS.match(source) if isinstance(source, str) else None
    return match[1].lower() if match else None


def local_path(source: str | os.PathLike[str]) -> Path:
    """Return the absolute path that a path or a ``file://`` address names.

    Raises:
        MediaError: another protocol, or another host.
    """
    scheme = address_scheme(os.fspath(source))
    if scheme is None:
        return Path(os.path.abspath(os.path.expanduser(os.fspath(source))))
    if scheme != "file":
        raise MediaError(
            f"{source!r} uses the protocol {scheme!r}. Only http, https and file are read."
        )
    parts = urllib.parse.urlsplit(os.fspath(source))
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{source!r} names the host {parts.netloc!r}; file:// is local only.")
    return Path(urllib.request.url2pathname(parts.path))


@contextlib.contextmanager
def _temporary(like: str) -> Iterator[Path]:
    """Yield an empty temporary file with the suffix of ``like``, removed afterwards."""
    suffix = Path(like).suffix
    handle, name = tempfile.mkstemp(prefix="av-llava-", suffix=suffix if len(suffix) < 8 else "")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _spool(source: Source, path: Path, name: str, limits: Limits) -> None:
    """Copy bytes or a file object (from its beginning, where it can seek) to a file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    if isinstance(source, (str, os.PathLike, LocalFile)) or not hasattr(source, "read"):
        raise UsageError(
            f"A medium must be a path, an address, bytes or a binary file object, "
            f"not {type(source).__name__}."
        )
    if source.seekable():
        source.seek(0)
    written = 0
    with path.open("wb") as out:
        while block := source.read(_BLOCK):
            if isinstance(block, str):
                raise UsageError(f"{name} is open as text. Open it in binary mode ('rb').")
            written += len(block)
            limits.check("max_bytes", written, name, "its size in bytes")
            out.write(block)
