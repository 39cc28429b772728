"""Reading the annotation files of benchmarks as they lie on disk: JSON, JSONL, CSV, parquet.

Contract: nothing is downloaded. A file that is missing or unreadable raises DataError with its
path; what is wrong inside a row is the task's to say.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from av_llava.errors import DataError, MissingExtraError

VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".flv", ".ts")
AUDIO_ENDINGS = (".wav", ".mp3", ".m4a", ".flac", ".ogg", ".opus", ".aac")


def find_file(root: Path, *patterns: str) -> Path:
    """Return the first file that matches a pattern; earlier patterns win.

    Args:
        root: folder of the benchmark.
        patterns: glob patterns relative to it, such as ``videomme/test-*.parquet``.

    Raises:
        DataError: the folder is not there, or nothing matches.
    """
    if not root.is_dir():
        raise DataError(
            f"There is no folder {str(root)!r}. Give the benchmark's folder with --data."
        )
    for pattern in patterns:
        found = sorted(p for p in root.glob(pattern) if p.is_file())
        if found:
            return found[0]
    raise DataError(f"{root} holds no annotation file: looked for {', '.join(patterns)}.")


def find_medium(
    root: Path,
    folders: Sequence[str],
    name: str,
    endings: Sequence[str] = VIDEO_ENDINGS,
) -> Path:
    """Return the medium that a row names, looked for in several folders.

    Args:
        root: folder of the benchmark.
        folders: relative to it, the likeliest first; ``""`` is the root itself.
        name: as the row has it, with or without its ending.
        endings: tried where ``name`` does not exist as it is.

    Returns:
        The file (or folder of pictures) that exists; where none does, the likeliest place, so that
        the failure names it.
    """
    for folder in folders or ("",):
        exact = root / folder / name
        if exact.exists():
            return exact
        if not exact.parent.is_dir():
            continue
        for ending in endings:
            other = exact.with_name(exact.name + ending)
            if other.exists():
                return other
    first = root / (folders[0] if folders else "") / name
    return first if Path(name).suffix in endings else first.with_name(first.name + endings[0])


def read_rows(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """Read all rows of a file whose format its ending tells.

    A field that is null, or an empty cell of a table, is missing from its row.

    Args:
        path: ``.json`` (a list, or an object of which ``key`` is one), ``.jsonl``, ``.csv``,
            ``.tsv`` or ``.parquet`` (all columns but pictures and sounds).
        key: of the list in a JSON object.

    Raises:
        DataError: the file cannot be read, or its rows are no objects.
        MissingExtraError: parquet without pyarrow.
    """
    readers = {
        ".json": _json,
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(readers)
        raise DataError(f"{path}: annotations are read from {known}, not {path.suffix!r}.")
    try:
        rows = reader(path, key)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}[{number}]: a row is an object, not a {type(row).__name__}.")
    return [{k: v for k, v in row.items() if v is not None} for row in rows]


def _json(path: Path, key: str | None) -> list[Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}).") from error
    if key is not None and isinstance(data, dict):
        if key not in data:
            raise DataError(f"{path} has no {key!r}; it has {', '.join(map(repr, data))}.")
        data = data[key]
    if not isinstance(data, list):
        raise DataError(f"{path} holds a {type(data).__name__} where a list of rows was expected.")
    return data


def _jsonl(path: Path, key: str | None) -> list[Any]:
    return list(_lines(path))


def _lines(path: Path) -> Iterator[Any]:
    # Not splitlines(): it also splits at characters that JSON allows inside a string.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}).") from error


def _csv(path: Path, key: str | None) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = csv.DictReader(handle, delimiter=delimiter)
        return [{k: v or None for k, v in row.items()} for row in rows]


def _parquet(path: Path, key: str | None) -> list[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "eval", f"Reading {path}") from error
    try:
        file = parquet.ParquetFile(path)
        # Pictures and sounds inside a table would be read into memory as a whole.
        plain = [f.name for f in file.schema_arrow if not _is_medium(f.type)]
        rows: list[Any] = file.read(columns=plain).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a parquet file that can be read: {error}.") from error
    return rows


def _is_medium(kind: Any) -> bool:
    """Whether a column holds bytes, as the Image and Audio features of datasets do."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(_is_medium(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_medium(kind.value_type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))
