"""Samples by number, from files of any known format, in memory that does not grow with them.

Contract: opening a file costs one pass over its bytes and a few integers a row; a row is read and
parsed when it is asked for, by any process (threads, forks and pickled copies included). What
cannot be used raises DataError with file and line, and the row's number in an array.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from av_llava.errors import DataError, UsageError, unknown_name
from av_llava.training.byte_file import ByteFile
from av_llava.training.media_roots import MediaRoots
from av_llava.training.offsets import RowTable, scan
from av_llava.training.readers import Reading, RowContext, detect, reader_named, renamed
from av_llava.training.readers.llama_factory import read_dataset_info
from av_llava.training.samples import Sample

logger = logging.getLogger(__name__)

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson")
MIXTURE_SUFFIXES = (".yaml", ".yml")
DATASET_INFO = "dataset_info.json"


@runtime_checkable
class SampleStore(Protocol):
    """Samples by number."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The files that the samples come from, in order."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """One sample; DataError if its row cannot be used."""

    def reading(self, index: int) -> Reading:
        """One sample and the notes about its row."""

    def where(self, index: int) -> str:
        """File and line of a sample."""

    def digest(self) -> str:
        """SHA-256 of the files, of how they are read, and of the folders of their media."""


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
            row = json.loads(data)
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {_json_error(error)}") from error
        except RecursionError as error:
            raise DataError("not usable: it is nested too deeply.") from error
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


class ChainedStore:
    """Several stores, one after the other."""

    def __init__(self, stores: Sequence[SampleStore]) -> None:
        self.stores = list(stores)
        self._ends = np.cumsum([len(s) for s in self.stores]).tolist()

    @property
    def sources(self) -> tuple[str, ...]:
        """The files of all of them, each once."""
        return tuple(dict.fromkeys(name for store in self.stores for name in store.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        store, inner = self._at(index)
        return store[inner]

    def reading(self, index: int) -> Reading:
        """One sample and the notes about its row."""
        store, inner = self._at(index)
        return store.reading(inner)

    def where(self, index: int) -> str:
        """File and line of a sample."""
        store, inner = self._at(index)
        return store.where(inner)

    def digest(self) -> str:
        """SHA-256 of the digests of all of them."""
        return _joined([store.digest() for store in self.stores])

    def _at(self, index: int) -> tuple[SampleStore, int]:
        index = range(len(self))[index]
        which = bisect.bisect_right(self._ends, index)
        return self.stores[which], index - (self._ends[which - 1] if which else 0)


class ChosenStore:
    """Some samples of a store, in an order, also more than once.

    Args:
        store: the samples.
        rows: int64 [n]: numbers of the chosen ones.
        weight: factor of the weight of each.
    """

    def __init__(self, store: SampleStore, rows: np.ndarray, weight: float = 1.0) -> None:
        self.store, self.rows, self.weight = store, np.asarray(rows, np.int64), weight

    @property
    def sources(self) -> tuple[str, ...]:
        """The files of the store."""
        return self.store.sources

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self._weighted(self.store[int(self.rows[index])])

    def reading(self, index: int) -> Reading:
        """One sample and the notes about its row."""
        reading = self.store.reading(int(self.rows[index]))
        return replace(reading, sample=self._weighted(reading.sample))

    def where(self, index: int) -> str:
        """File and line of a sample."""
        return self.store.where(int(self.rows[index]))

    def digest(self) -> str:
        """SHA-256 of the store's digest, of the choice, and of the weight."""
        chosen = hashlib.sha256(self.rows.tobytes()).hexdigest()
        return _joined([self.store.digest(), chosen, repr(self.weight)])

    def _weighted(self, sample: Sample) -> Sample:
        if self.weight == 1.0:
            return sample
        return replace(sample, weight=sample.weight * self.weight)


def open_store(
    path: str | Path | Sequence[str | Path],
    *,
    format: str | None = None,
    media_root: str | Path | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> SampleStore:
    """Open training data.

    Args:
        path: a JSON or JSONL file, a mixture (YAML), LLaMA-Factory's ``dataset_info.json``, a
            folder of such files, or a list of these.
        format: one of ``READERS``; None tells it by the keys of each row.
        media_root: folder that relative names are relative to; by default that of each file.
        seed: of a mixture's random choices that name no seed of their own.
        columns: key as the format calls it → key in the file.

    Raises:
        DataError: a file that cannot be read, or holds no rows.
        UsageError: an unknown format or kind of file.
    """
    if not isinstance(path, (str, Path)):
        if not path:
            raise UsageError("No training data was named.")
        given: dict[str, Any] = {"format": format, "media_root": media_root, "columns": columns}
        stores = [open_store(p, seed=seed, **given) for p in path]
        return stores[0] if len(stores) == 1 else ChainedStore(stores)
    file = Path(path).expanduser()
    if not file.exists():
        raise DataError(f"The training data {file} do not exist.")
    if file.suffix.lower() in MIXTURE_SUFFIXES:
        if format is not None or media_root is not None or columns is not None:
            raise UsageError(
                f"{file} is a mixture, which says format, root and columns of each of its files "
                "itself; leave out the option."
            )
        from av_llava.training.mixture import open_mixture

        return open_mixture(file, seed=seed)
    roots = MediaRoots(_root(file, media_root))
    if file.is_dir():
        return _open_folder(file, ReadAs(format, roots, columns or {}))
    if file.name == DATASET_INFO:
        return open_info(file, roots)
    if file.suffix.lower() not in DATA_SUFFIXES:
        known = ", ".join((*DATA_SUFFIXES, *MIXTURE_SUFFIXES))
        raise UsageError(f"{file} is no kind of file that training data are read from: {known}.")
    return FileStore(file, ReadAs(format, roots, columns or {}))


def _root(file: Path, media_root: str | Path | None) -> Path:
    if media_root is None:
        return file if file.is_dir() else file.parent
    root = Path(media_root).expanduser()
    if not root.is_dir():
        raise DataError(f"The folder of media {root} does not exist.")
    return root


def _open_folder(folder: Path, read_as: ReadAs) -> SampleStore:
    """All files of a folder, by name."""
    if (folder / DATASET_INFO).exists():
        return open_info(folder / DATASET_INFO, read_as.roots)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in DATA_SUFFIXES)
    if not files:
        raise DataError(f"The folder {folder} holds no {' or '.join(DATA_SUFFIXES)} file.")
    stores = [FileStore(file, read_as) for file in files]
    return stores[0] if len(stores) == 1 else ChainedStore(stores)


def open_info(file: Path, roots: MediaRoots, name: str | None = None) -> SampleStore:
    """Open the data sets of a ``dataset_info.json``, or the one that is named."""
    entries = read_dataset_info(file)
    names = [entry.name for entry in entries]
    if not entries:
        raise DataError(f"{file} names no data sets.")
    if name is not None and name not in names:
        raise DataError(str(unknown_name("data set", name, names)))
    stores: list[SampleStore] = []
    for entry in entries:
        if name in (None, entry.name):
            read_as = ReadAs(entry.format, roots, entry.columns, entry.tags)
            store: SampleStore = FileStore(entry.path, read_as)
            if entry.first is not None:
                store = ChosenStore(store, np.arange(min(entry.first, len(store))))
            stores.append(store)
    return stores[0] if len(stores) == 1 else ChainedStore(stores)


def _json_error(error: json.JSONDecodeError) -> str:
    near = error.doc[max(0, error.pos - 15) : error.pos + 15]
    place = f"column {error.colno}" if error.lineno == 1 else f"{error.lineno - 1} lines below"
    return f"{error.msg} at {place}, near {near!r}."


def _joined(digests: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


__all__ = [
    "ChainedStore",
    "ChosenStore",
    "FileStore",
    "ReadAs",
    "SampleStore",
    "open_store",
]
