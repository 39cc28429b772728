"""Mixtures: which files are trained on, how much of each, and where their media lie.

Contract: a superset of LLaVA-NeXT's YAML (``datasets: - json_path, sampling_strategy``). Unknown
keys are errors with their line. What is drawn at random is drawn by a generator of its own, seeded
by the seed and the file's name as it stands in the mixture: every rank draws the same, on every
machine, whatever else has used random numbers.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from av_llava.chat.parts import is_number
from av_llava.errors import DataError, unknown_name
from av_llava.training.media_roots import MediaRoots
from av_llava.training.recipe import parse_value
from av_llava.training.store import (
    DATASET_INFO,
    MIXTURE_SUFFIXES,
    ChainedStore,
    ChosenStore,
    FileStore,
    ReadAs,
    SampleStore,
    open_info,
)

STRATEGY = re.compile(r"(all)|(first|end|random):(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True)
class Entry:
    """One file of a mixture."""

    path: str
    """JSON, JSONL, ``dataset_info.json``, or another mixture; relative to the mixture's folder.
    ``json_path`` is another name."""
    root: str | None = None
    """Folder of the media; by default the folder of the file."""
    image_root: str | None = None
    """Folder of the pictures, where it is another one."""
    video_root: str | None = None
    """Folder of the videos, where it is another one."""
    audio_root: str | None = None
    """Folder of the sounds, where it is another one."""
    sampling_strategy: str = "all"
    """Which rows: ``all``, ``first:N``, ``end:N`` or ``random:N``; N may be a share, ``10%``, up
    to 100%."""
    repeat: float = 1.0
    """How often each row occurs in an epoch; 1.5 is once, and a second time for half of them."""
    weight: float = 1.0
    """Factor of the loss of each row."""
    format: str | None = None
    """Format of the rows; by default it is told by their keys."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Key as the format calls it → key in the file."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """LLaMA-Factory's tags of roles."""
    name: str | None = None
    """Data set of a ``dataset_info.json``; by default all of it."""
    seed: int | None = None
    """Seed of what is drawn at random; by default the mixture's."""


ENTRY_KEYS = tuple(f.name for f in fields(Entry))
_OF_FILES = ("root", "image_root", "video_root", "audio_root", "format", "columns", "tags", "name")
SHARED_KEYS = ("root", "image_root", "video_root", "audio_root", "format", "seed")
"""Keys that may stand beside ``datasets``, for all of them."""


def open_mixture(file: Path, *, seed: int = 0, inside: Sequence[Path] = ()) -> SampleStore:
    """Open a mixture.

    Args:
        file: YAML.
        seed: of random choices that name none.
        inside: mixtures that this one is part of.

    Raises:
        DataError: the file is no mixture, names unknown keys, or itself.
    """
    path = file.resolve()
    if path in inside:
        raise DataError(f"{file} is part of itself; take one of the two entries out.")
    store: list[SampleStore] = []
    for line, entry in read_mixture(file):
        where = f"{file}, line {line}"
        own_seed = seed if entry.seed is None else entry.seed
        try:
            opened = _open_entry(entry, file.parent, own_seed, [*inside, path])
            rows = chosen_rows(len(opened), entry, own_seed)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if len(rows) == 0:
            raise DataError(
                f"{where}: {entry.sampling_strategy!r} leaves none of the {len(opened)} rows of "
                f"{entry.path}."
            )
        whole = len(rows) == len(opened) and np.array_equal(rows, np.arange(len(opened)))
        if not whole or entry.weight != 1.0:
            opened = ChosenStore(opened, rows, entry.weight)
        store.append(opened)
    return store[0] if len(store) == 1 else ChainedStore(store)


def read_mixture(file: Path) -> list[tuple[int, Entry]]:
    """The entries of a mixture and the lines in which they begin.

    Raises:
        DataError: it is no mixture, or a key or value is wrong.
    """
    data, lines = _read_yaml(file)
    for key in data:
        if key not in ("datasets", *SHARED_KEYS):
            raise DataError(f"{file}: {unknown_name('key', key, ('datasets', *SHARED_KEYS))}")
    shared = {k: v for k, v in data.items() if k in SHARED_KEYS and v is not None}
    return [
        (line, _entry(f"{file}, line {line}", entry, shared))
        for line, entry in zip(lines, data["datasets"], strict=True)
    ]


def chosen_rows(n: int, entry: Entry, seed: int) -> np.ndarray:
    """Which of a file's ``n`` rows are used, in the order of the file. int64 [k]"""
    generator = np.random.default_rng(seed ^ zlib.crc32(entry.path.encode()))
    rows = _strategy_rows(n, entry.sampling_strategy, generator)
    whole, part = int(entry.repeat), entry.repeat - int(entry.repeat)
    again = math.ceil(part * len(rows) - 1e-9)
    extra = np.sort(generator.choice(rows, again, replace=False)) if again else rows[:0]
    return np.concatenate([*[rows] * whole, extra])


def _strategy_rows(n: int, strategy: str, generator: np.random.Generator) -> np.ndarray:
    match = STRATEGY.fullmatch(strategy)
    assert match is not None  # checked when the mixture was read
    if match[1]:
        return np.arange(n)
    wanted = math.ceil(n * float(match[3]) / 100 - 1e-9) if match[4] else int(match[3])
    wanted = min(wanted, n)
    if match[2] == "random":
        return np.sort(generator.choice(n, wanted, replace=False))
    return np.arange(n)[:wanted] if match[2] == "first" else np.arange(n - wanted, n)


def _open_entry(entry: Entry, folder: Path, seed: int, inside: Sequence[Path]) -> SampleStore:
    file = folder / Path(entry.path).expanduser()
    if not file.exists():
        raise DataError(f"The file {file} does not exist.")
    if file.suffix.lower() in MIXTURE_SUFFIXES:
        of_files = [n for n in _OF_FILES if getattr(entry, n)]
        if of_files:
            raise DataError(
                f"{entry.path} is a mixture: it says {' and '.join(of_files)} of its files itself."
            )
        return open_mixture(file, seed=seed, inside=inside)
    named = {
        name: folder / Path(value).expanduser()
        for name in ("root", "image_root", "video_root", "audio_root")
        if (value := getattr(entry, name)) is not None
    }
    for name, place in named.items():
        if not place.is_dir():
            raise DataError(f"The folder {place} ({name}) does not exist.")
    roots = MediaRoots(**{"root": file.parent, **named})
    if file.name == DATASET_INFO:
        return open_info(file, roots, entry.name, seed=seed)
    return FileStore(file, ReadAs(entry.format, roots, entry.columns, entry.tags))


# ------------------------------------------------------------------ YAML


def _read_yaml(file: Path) -> tuple[dict[str, Any], list[int]]:
    """The data of a mixture, and the line of each of its data sets."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            _check_twice(file, node)
        data = parse_value(text)  # as recipes are read: 1e3 is a number, on is a word
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise DataError(f"{file} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict) or not isinstance(data.get("datasets"), list):
        raise DataError(
            f"{file} is no mixture: it needs 'datasets' with a list of files (path, and what else "
            "is to be said of them)."
        )
    if not data["datasets"]:
        raise DataError(f"{file} lists no files under 'datasets'.")
    assert isinstance(node, yaml.MappingNode)  # data is a dict
    listed = next(v for k, v in node.value if k.value == "datasets")
    return data, [item.start_mark.line + 1 for item in listed.value]


def _check_twice(file: Path, node: Any) -> None:
    """Refuse a key that stands twice in one mapping, of which YAML would take the last."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise DataError(f"{file}, line {line}: the key {key.value!r} stands here twice.")
            seen.add(key.value)
            _check_twice(file, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_twice(file, value)


def _entry(where: str, data: Any, shared: Mapping[str, Any]) -> Entry:
    """Check one entry."""
    if not isinstance(data, dict):
        raise DataError(f"{where}: an entry has keys (path: …), this is {data!r}.")
    data = dict(data)
    for key in data:
        if key not in (*ENTRY_KEYS, "json_path"):
            raise DataError(f"{where}: {unknown_name('key', key, (*ENTRY_KEYS, 'json_path'))}")
    if ("path" in data) == ("json_path" in data):
        raise DataError(f"{where}: an entry needs 'path' (or 'json_path'), once.")
    data["path"] = data.pop("json_path", None) or data.get("path")
    entry = Entry(**{**shared, **{k: v for k, v in data.items() if v is not None}})
    for name in ("path", "root", "image_root", "video_root", "audio_root", "format", "name"):
        value = getattr(entry, name)
        if value is not None and not (isinstance(value, str) and value):
            raise DataError(f"{where}: {name!r} must be a text, not {value!r}.")
    if not isinstance(entry.sampling_strategy, str) or not _is_strategy(entry.sampling_strategy):
        raise DataError(
            f"{where}: sampling_strategy must be all, first:N, end:N or random:N, where N is a "
            f"whole number or a share such as 10%, at most 100%, not {entry.sampling_strategy!r}."
        )
    for name in ("columns", "tags"):
        _check_names(where, name, getattr(entry, name))
    _check_numbers(where, entry)
    return entry


def _is_strategy(text: str) -> bool:
    match = STRATEGY.fullmatch(text)
    if match is None:
        return False
    if match[4]:
        return float(match[3]) <= 100
    return match[1] is not None or "." not in match[3]


def _check_names(where: str, name: str, value: Any) -> None:
    good = isinstance(value, dict) and all(isinstance(x, str) for p in value.items() for x in p)
    if not good:
        raise DataError(f"{where}: {name!r} must map names to names, not {value!r}.")


def _check_numbers(where: str, entry: Entry) -> None:
    for name, value in (("repeat", entry.repeat), ("weight", entry.weight)):
        if not is_number(value) or value <= 0:
            raise DataError(f"{where}: {name!r} must be a number above 0, not {value!r}.")
    seed = entry.seed
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise DataError(f"{where}: 'seed' must be a whole number from 0, not {seed!r}.")
