"""What a mini-benchmark is, and how its files are written.

Contract: a :class:`Mini` holds annotation rows as the benchmark's own files have them, a function
that writes these files, and the names of its media. Rows are plain data, so that tests can damage
them before they are written. Media are real: films with and without sound, sounds, pictures.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from clips import make_clip
from PIL import Image

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Mini:
    """A benchmark of a few questions."""

    task: str
    rows: Rows
    write: Callable[[Path, Rows], None]
    """Writes the annotation files below a folder."""
    media: tuple[str, ...]
    """Relative paths; a name that ends in ``/`` is a folder of pictures."""
    n: int
    """Samples that are loaded from the split."""
    split: str | None = None
    layout: str = ""
    """Which of several layouts on disk, for the tests' names."""
    bad_answer: dict[str, Any] = field(default_factory=dict)
    """Fields of a row that make its answer none of the options; empty where there are none."""
    drop: str = "question"
    """A field that no row can do without."""
    ids: tuple[str, ...] = ()
    """The fields that make a row's id; empty where ids are numbers of rows."""

    @property
    def name(self) -> str:
        """For the tests' names."""
        return f"{self.task}-{self.layout}" if self.layout else self.task

    def build(self, root: Path, media: Media, change: Callable[[Rows], None] | None = None) -> Path:
        """Write the benchmark; ``change`` damages a copy of the rows before."""
        rows = copy.deepcopy(self.rows)
        if change is not None:
            change(rows)
        root.mkdir(parents=True, exist_ok=True)
        self.write(root, rows)
        for name in self.media:
            media.put(root / name)
        return root


class Media:
    """A few real media files, made once and copied under the names that benchmarks use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        size = {"seconds": 1.6, "fps": 5.0, "size": (64, 48), "gop": 4}
        make_clip(folder / "film.mp4", **size, channels=1, audio_rate=16_000)
        make_clip(folder / "silent.mp4", **size, audio=None)
        make_clip(folder / "film.avi", **size, channels=1, audio_rate=16_000, audio_codec="mp3")
        make_clip(folder / "film.mkv", **size, channels=1, audio_rate=16_000)
        make_clip(folder / "sound.wav", seconds=1.6, video=False, channels=1, audio_rate=16_000)
        pixels = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "picture.jpg")

    def put(self, path: Path) -> None:
        """Put a medium of the kind that its name tells."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if str(path).endswith("frames"):
            path.mkdir()
            for number in range(6):
                shutil.copy(self.folder / "picture.jpg", path / f"{number + 1:05d}.jpg")
            return
        kind = {".wav": "sound", ".jpg": "picture"}.get(path.suffix, "film")
        source = self.folder / f"{'silent' if 'silent' in path.stem else kind}{path.suffix}"
        if not path.exists():
            os.link(source, path)


# ------------------------------------------------------------------ writers


def to_json(name: str) -> Callable[[Path, Rows], None]:
    """One JSON list."""

    def write(root: Path, rows: Rows) -> None:
        _file(root, name).write_text(json.dumps(rows), encoding="utf-8")

    return write


def to_jsonl(name: str) -> Callable[[Path, Rows], None]:
    """One object per line."""

    def write(root: Path, rows: Rows) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        _file(root, name).write_text(text, encoding="utf-8")

    return write


def to_csv(name: str) -> Callable[[Path, Rows], None]:
    """A header, then rows."""

    def write(root: Path, rows: Rows) -> None:
        names = list(dict.fromkeys(key for row in rows for key in row))
        with _file(root, name).open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, names)
            writer.writeheader()
            writer.writerows(rows)

    return write


def to_parquet(name: str) -> Callable[[Path, Rows], None]:
    """A table; a field that only some rows have becomes null in the others."""

    def write(root: Path, rows: Rows) -> None:
        import pyarrow
        from pyarrow import parquet

        names = list(dict.fromkeys(key for row in rows for key in row))
        whole = [{n: row.get(n) for n in names} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(whole), _file(root, name))

    return write


def to_files_by(field_name: str, pattern: str) -> Callable[[Path, Rows], None]:
    """One JSON list per value of a field, which the rows on disk do not have."""

    def write(root: Path, rows: Rows) -> None:
        files: dict[str, Rows] = {}
        for row in rows:
            value = row[field_name]
            files.setdefault(value, []).append({k: v for k, v in row.items() if k != field_name})
        for value, some in files.items():
            _file(root, pattern.format(value)).write_text(json.dumps(some), encoding="utf-8")

    return write


def to_tree(name: str, *levels: str, inner: str | None = None) -> Callable[[Path, Rows], None]:
    """Objects in objects, by the values of some fields, around lists of rows."""

    def write(root: Path, rows: Rows) -> None:
        tree: dict[str, Any] = {}
        for row in rows:
            at: Any = tree
            for depth, level in enumerate(levels):
                last = depth == len(levels) - 1
                empty: Any = ({inner: []} if inner else []) if last else {}
                at = at.setdefault(row[level], empty)
            (at[inner] if inner else at).append({k: v for k, v in row.items() if k not in levels})
        _file(root, name).write_text(json.dumps(tree), encoding="utf-8")

    return write


def to_pair(root: Path, rows: Rows) -> None:
    """test_q.json and test_a.json."""
    answers = ("answer", "type")
    asked = [{k: v for k, v in row.items() if k not in answers} for row in rows]
    said = [{k: v for k, v in row.items() if k in (*answers, "question_id")} for row in rows]
    (root / "test_q.json").write_text(json.dumps(asked), encoding="utf-8")
    (root / "test_a.json").write_text(json.dumps(said), encoding="utf-8")


def _file(root: Path, name: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
