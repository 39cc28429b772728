"""The rows of one JSON or JSONL file by number.

Contract: opening costs one pass over the file's bytes and a few integers a row; a row is read and
parsed when it is asked for, by any process (threads, forks and pickled copies included). What
cannot be used raises DataError with file and line, and the row's number in an array.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from av_llava.errors import DataError, UsageError
from av_llava.training.byte_file import ByteFile
from av_llava.training.media_roots import MediaRoots
from av_llava.training.offsets import RowTable, scan
from av_llava.training.readers import Reading, RowContext, detect, reader_named, renamed
from av_llava.training.readers.common import once
from av_llava.training.samples import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadAs:
    """How the rows of a file are read."""

    format: str | None = None
    """Name of a reader; None tells it by the keys of each row."""
    roots: MediaRoots = field(default_factory=MediaRoots)
    columns: Mapping[str, str] = field(default_factory=dict)
    """Key as the format calls it → key in the file."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """LLaMA-Factory's tags."""


class FileStore:
    """The rows of one JSON or JSONL file.

    Args:
        path: a JSON array, or one object a line.
        read_as: how rows are read.

    Raises:
        DataError: the file cannot be read or holds no rows.
        UsageError: an unknown format.
    """

    def __init__(self, path: str | Path, read_as: ReadAs | None = None) -> None:
        self.path = Path(path)
        self.read_as = read_as or ReadAs(roots=MediaRoots(self.path.parent))
        self._reader = None if self.read_as.format is None else reader_named(self.read_as.format)
        self._table: RowTable = scan(self.path)
        self._file = ByteFile(self.path)
        self._told: set[str] = set()

    @property
    def sources(self) -> tuple[str, ...]:
        """The file."""
        return (str(self.path),)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Sample:
        reading = self.reading(index)
        for note in reading.notes:
            self._tell(note.kind, note.text, index)
        return reading.sample

    def reading(self, index: int) -> Reading:
        """One sample and the notes about its row.

        Raises:
            DataError: the row cannot be used; the message names file and line.
        """
        index = range(len(self))[index]
        try:
            return self._read(index)
        except DataError as error:
            raise type(error)(f"{self.where(index)}: {error}") from error
        except UsageError as error:
            raise DataError(f"{self.where(index)}: {error}") from error

    def where(self, index: int) -> str:
        """``file, line 3`` or, in an array, ``file, line 3 (row 0)``."""
        index = range(len(self))[index]
        row = f" (row {index})" if self._table.is_array else ""
        return f"{self.path}, line {self._table.line(index)}{row}"

    def digest(self) -> str:
        """SHA-256 of the file and of how it is read."""
        settings = asdict(self.read_as)
        roots = settings.pop("roots").items()
        settings["roots"] = {k: v and str(v.resolve()) for k, v in roots}
        how = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(f"{self._table.sha256} {how}".encode()).hexdigest()

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands in the file.

        Raises:
            DataError: it is not a JSON object.
        """
        data = self._bytes(range(len(self))[index])
        try:
            row = json.loads(data, object_pairs_hook=once)
        except DataError:  # a key that stands twice; it is a ValueError, too
            raise
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {_json_error(error)}") from error
        except RecursionError as error:
            raise DataError("not usable: it is nested too deeply.") from error
        except ValueError as error:  # a whole number of thousands of digits
            raise DataError(f"not usable: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"a row is a JSON object, not a {type(row).__name__}.")
        return row

    def _read(self, index: int) -> Reading:
        row = renamed(self.row(index), self.read_as.columns, self._reader)
        reader = self._reader or detect(row)
        line = self._table.line(index)
        place = f"{self.path}[{index}]" if self._table.is_array else f"{self.path}:{line}"
        context = RowContext(
            place, f"{self.path.stem}-{index}", self.read_as.roots, self.read_as.tags
        )
        return reader.read(row, context)

    def _bytes(self, index: int) -> bytes:
        """The bytes of a row; in an array, what stands before it is checked to be a comma."""
        table = self._table
        start, end = int(table.starts[index]), int(table.ends[index])
        if not table.is_array:
            return self._file.read(start, end)
        before = table.begin if index == 0 else int(table.ends[index - 1])
        data = self._file.read(before, end)
        gap = data[: start - before].strip()
        if gap != (b"" if index == 0 else b","):
            found = repr(gap[:40].decode("utf-8", "replace")) if gap else "no comma"
            raise DataError(f"before this row of the array stands {found}, not just one comma.")
        return data[start - before :]

    def _tell(self, kind: str, text: str, index: int) -> None:
        """Log a note once a file."""
        if text not in self._told and len(self._told) < 100:
            self._told.add(text)
            logger.warning("%s: %s: %s (said once)", self.where(index), kind, text)


def _json_error(error: json.JSONDecodeError) -> str:
    near = error.doc[max(0, error.pos - 15) : error.pos + 15]
    place = f"column {error.colno}" if error.lineno == 1 else f"{error.lineno - 1} lines below"
    return f"{error.msg} at {place}, near {near!r}."
