"""Where the rows of a JSON or JSONL file begin and end, found without parsing them.

Contract: one pass over the file in blocks, at the speed of numpy, with memory for a few integers a
row. What stands between the braces of a row is not looked at: a row that is not JSON is noticed
when it is read. The SHA-256 of the file comes out of the same pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from av_llava.errors import DataError

BLOCK_BYTES = 1 << 22
_NOWHERE = 1 << 62
_BOM = b"\xef\xbb\xbf"
_NEWLINE, _QUOTE, _BACKSLASH, _OPEN, _CLOSE = 1, 2, 3, 4, 5
_CLASS = np.zeros(256, np.uint8)
_CLASS[list(b'\n"\\')] = (_NEWLINE, _QUOTE, _BACKSLASH)
_CLASS[list(b"[{")] = _OPEN
_CLASS[list(b"]}")] = _CLOSE
_WHITE = np.zeros(256, bool)
_WHITE[list(b" \t\r\v\f")] = True


class Digest(Protocol):
    """A hash object of hashlib."""

    def update(self, data: bytes, /) -> None:
        """Take more bytes."""


@dataclass(frozen=True)
class RowTable:
    """The rows of one file."""

    starts: np.ndarray
    """int64 [n]: first byte of each row."""
    ends: np.ndarray
    """int64 [n]: byte after the last of each row."""
    lines: np.ndarray | None
    """int32 [n]: line in which each row begins, from 1; None where it is the row's number."""
    is_array: bool
    """Whether the file is one JSON array; otherwise it has a row a line."""
    begin: int
    """Where the first row may begin: after the byte order mark and the bracket of an array."""
    sha256: str

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, row: int) -> int:
        """Line in which a row begins, from 1."""
        return row + 1 if self.lines is None else int(self.lines[row])


def scan(path: Path) -> RowTable:
    """Find the rows of a file.

    Raises:
        DataError: the file cannot be read, holds no rows, or is an array that does not end.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            file.seek(0)
            _check_encoding(path, head)
            begin = len(_BOM) if head.startswith(_BOM) else 0
            is_array = head[begin:].lstrip()[:1] == b"["
            if not is_array:
                _check_one_line(path, head[begin:])
            table = _scan_array(path, file) if is_array else _scan_lines(file, begin)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(table) == 0:
        raise DataError(f"{path} holds no rows.")
    return table


def _check_encoding(path: Path, head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        raise DataError(f"{path} is not UTF-8 text; JSON and JSONL files are read as UTF-8.")


def _check_one_line(path: Path, head: bytes) -> None:
    """Refuse one object over several lines, of which none would be a row."""
    first, _, rest = head.lstrip().partition(b"\n")
    if first.rstrip()[-1:] in (b"{", b"[", b",") and rest[:1] in (b" ", b"\t"):
        raise DataError(
            f"{path} is one JSON object over several lines. Training data are one JSON array of "
            "objects, or have one object a line."
        )


def _blocks(file: BinaryIO, digest: Digest) -> Iterator[np.ndarray]:
    """The bytes of a file, block by block, which are also digested."""
    while data := file.read(BLOCK_BYTES):
        digest.update(data)
        yield np.frombuffer(data, np.uint8)


# ------------------------------------------------------------------ a row a line


def _scan_lines(file: BinaryIO, begin: int) -> RowTable:
    digest = hashlib.sha256()
    newlines: list[np.ndarray] = []
    suspects: list[int] = []  # lines that begin with white space, and may hold nothing else
    at, next_start = 0, begin
    for block in _blocks(file, digest):
        found = np.flatnonzero(block == 10)
        starts = np.concatenate([np.array([next_start - at]), found + 1])
        starts = starts[starts < len(block)]
        suspects += (starts[_WHITE[block[starts]]] + at).tolist()
        newlines.append(found + at)
        at += len(block)
        next_start = int(found[-1]) + 1 + at - len(block) if len(found) else next_start
        if next_start < at:
            next_start = _NOWHERE  # its first byte was looked at
    ends = np.concatenate([*newlines, np.array([at])]).astype(np.int64, copy=False)
    starts = np.concatenate([np.array([begin], np.int64), ends[:-1] + 1])
    keep = ends > starts
    for start in suspects:
        line = int(np.searchsorted(starts, start))
        file.seek(start)
        keep[line] = bool(file.read(int(ends[line]) - start).strip())
    rows = np.flatnonzero(keep)
    numbered = len(rows) == 0 or rows[-1] == len(rows) - 1
    lines = None if numbered else (rows + 1).astype(np.int32)
    return RowTable(starts[keep], ends[keep], lines, False, begin, digest.hexdigest())


# ------------------------------------------------------------------ one array


def _scan_array(path: Path, file: BinaryIO) -> RowTable:
    scanner = _ArrayScanner()
    digest = hashlib.sha256()
    for block in _blocks(file, digest):
        scanner.feed(block)
    starts, ends = (np.concatenate([np.empty(0, np.int64), *x]) for x in scanner.rows)
    lines = np.concatenate([np.empty(0, np.int64), *scanner.lines]).astype(np.int32)
    if scanner.end is None:
        last = f" The last row that it begins is in line {lines[-1]}." if len(lines) else ""
        raise DataError(
            f"{path} ends inside its JSON array: a bracket or a quote is missing, or the file was "
            f"cut off.{last}"
        )
    table = RowTable(starts, ends, lines, True, scanner.begin, digest.hexdigest())
    _check_tail(path, file, int(ends[-1]) if len(ends) else scanner.begin, scanner.end)
    return table


def _check_tail(path: Path, file: BinaryIO, last: int, end: int) -> None:
    """Raise if more than the closing bracket follows the last row."""
    file.seek(last)
    between = file.read(min(end - last, 200)).strip()
    file.seek(end + 1)
    after = file.read(200).strip()
    if between:
        text = between[:40].decode("utf-8", "replace")
        raise DataError(
            f"{path}: {text!r} stands where a row is expected, which is an object in braces."
        )
    if after:
        raise DataError(
            f"{path}: {after[:40]!r} follows the JSON array. A file is one array, or has one "
            "object a line."
        )


class _ArrayScanner:
    """Finds the elements of a top-level array that are objects or arrays, block by block."""

    def __init__(self) -> None:
        self.rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        self.lines: list[np.ndarray] = []
        self.begin = 0
        self.end: int | None = None
        self._at, self._line, self._depth = 0, 1, 0
        self._in_string, self._backslashes = False, 0

    def feed(self, block: np.ndarray) -> None:
        """Take the next block."""
        classes = _CLASS[block]
        where = np.flatnonzero(classes)
        kind = classes[where]
        newlines = where[kind == _NEWLINE]
        quotes = self._unescaped(where[kind == _QUOTE], where[kind == _BACKSLASH], len(block))
        brackets = where[kind >= _OPEN]
        step = np.where(kind[kind >= _OPEN] == _OPEN, 1, -1)
        inside = (np.searchsorted(quotes, brackets) + self._in_string) % 2 == 1
        brackets, step = brackets[~inside], step[~inside]
        self._brackets(brackets, step, newlines)
        self._in_string ^= bool(len(quotes) % 2)
        self._line += len(newlines)
        self._at += len(block)

    def _unescaped(self, quotes: np.ndarray, backslashes: np.ndarray, size: int) -> np.ndarray:
        """Quotes before which stands an even number of backslashes."""
        carried = self._backslashes
        self._backslashes = 0
        if len(backslashes) == 0:
            return quotes[quotes != 0] if carried % 2 else quotes
        first = np.flatnonzero(np.diff(backslashes, prepend=-2) != 1)
        length = np.diff(np.append(first, len(backslashes)))
        if backslashes[0] == 0:
            length[0] += carried
        after = backslashes[first] + np.diff(np.append(first, len(backslashes)))
        if after[-1] == size:
            self._backslashes = int(length[-1])
        escaped = after[length % 2 == 1]
        if carried % 2 and backslashes[0] != 0:
            escaped = np.append(escaped, 0)
        return quotes[~np.isin(quotes, escaped)]

    def _brackets(self, brackets: np.ndarray, step: np.ndarray, newlines: np.ndarray) -> None:
        """Follow the depth; rows begin where it comes to 2 and end where it comes back to 1."""
        if self.end is not None or len(brackets) == 0:
            return
        depth = self._depth + np.cumsum(step)
        done = np.flatnonzero(depth <= 0)
        if len(done):
            self.end = self._at + int(brackets[done[0]])
            brackets, step, depth = (x[: done[0]] for x in (brackets, step, depth))
        if self._depth == 0 and len(brackets):
            self.begin = self._at + int(brackets[0]) + 1
        starts = brackets[(depth == 2) & (step == 1)]
        ends = brackets[(depth == 1) & (step == -1)]
        self.rows[0].append(starts + self._at)
        self.rows[1].append(ends + self._at + 1)
        self.lines.append(self._line + np.searchsorted(newlines, starts))
        self._depth = int(depth[-1]) if len(depth) else self._depth
