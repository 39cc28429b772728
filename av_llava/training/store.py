"""Training data by number, whatever they are: a file, a folder, a mixture, several of these.

Contract: :func:`open_store` is the way in. Memory does not grow with the files, and what cannot be
used raises DataError with file and line when it is asked for.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from av_llava.errors import DataError, UsageError, unknown_name
from av_llava.training.combined_stores import ChainedStore, ChosenStore
from av_llava.training.file_store import FileStore, ReadAs
from av_llava.training.media_roots import MediaRoots
from av_llava.training.readers import Reading
from av_llava.training.readers.llama_factory import read_dataset_info
from av_llava.training.samples import Sample

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
        return _open_folder(file, ReadAs(format, roots, columns or {}), seed)
    if file.name == DATASET_INFO:
        return open_info(file, roots, seed=seed)
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


def _open_folder(folder: Path, read_as: ReadAs, seed: int) -> SampleStore:
    """All files of a folder, by name."""
    if (folder / DATASET_INFO).exists():
        return open_info(folder / DATASET_INFO, read_as.roots, seed=seed)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in DATA_SUFFIXES)
    if not files:
        raise DataError(f"The folder {folder} holds no {' or '.join(DATA_SUFFIXES)} file.")
    stores = [FileStore(file, read_as) for file in files]
    return stores[0] if len(stores) == 1 else ChainedStore(stores)


def open_info(
    file: Path, roots: MediaRoots, name: str | None = None, *, seed: int = 0
) -> SampleStore:
    """Open the data sets of a ``dataset_info.json``, or the one that is named.

    Args:
        file: that file.
        roots: where media are.
        name: of one data set.
        seed: for those that say ``num_samples``.
    """
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
            if entry.n_samples is not None:
                store = ChosenStore(store, _drawn(len(store), entry.n_samples, entry.name, seed))
            stores.append(store)
    return stores[0] if len(stores) == 1 else ChainedStore(stores)


def _drawn(n: int, wanted: int, name: str, seed: int) -> np.ndarray:
    """As many of n rows as are wanted; only more than there are repeat some. int64 [wanted]"""
    generator = np.random.default_rng(seed ^ zlib.crc32(name.encode()))
    once = generator.permutation(n)[:wanted]
    again = generator.choice(n, wanted - len(once)) if n else once
    return np.sort(np.concatenate([once, again]))


__all__ = [
    "ChainedStore",
    "ChosenStore",
    "FileStore",
    "ReadAs",
    "SampleStore",
    "open_store",
]
