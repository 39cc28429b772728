"""What lies in a checkpoint folder: its config, its weight files, and the keys in them.

Contract: nothing is loaded; keys come from the index or from the headers of the files. Faults of
a folder (missing shard, truncated file, broken JSON) are errors that name the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from av_llava.errors import CheckpointError

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint.

    Raises:
        CheckpointError: it is missing, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist. A checkpoint folder needs a {path.name}."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a JSON object.")
    return data


@dataclass(frozen=True)
class CheckpointFolder:
    """A local folder with a ``config.json``."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The JSON data of ``config.json``."""
        return read_json(self.path / "config.json")

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The files with weights, safetensors before ``.bin``; every one exists.

        Raises:
            CheckpointError: there are none, or the index names absent ones.
        """
        for index, single in zip(_INDEXES, _SINGLES, strict=True):
            if (self.path / index).exists():
                names = sorted(set(self._weight_map(index).values()))
                absent = [n for n in names if not (self.path / n).exists()]
                if absent:
                    raise CheckpointError(
                        f"{self.path / index} names {len(absent)} file(s) that do not exist: "
                        f"{', '.join(absent)}. The download or copy is incomplete."
                    )
                return tuple(self.path / n for n in names)
            if (self.path / single).exists():
                return (self.path / single,)
        raise CheckpointError(
            f"{self.path} holds no weights: expected one of {', '.join(_SINGLES + _INDEXES)}."
        )

    def _weight_map(self, index: str) -> dict[str, str]:
        data = read_json(self.path / index)
        if not isinstance(data.get("weight_map"), dict):
            raise CheckpointError(f"{self.path / index} has no 'weight_map'.")
        return data["weight_map"]

    @cached_property
    def keys(self) -> frozenset[str]:
        """Names of all tensors."""
        for index in _INDEXES:
            if (self.path / index).exists():
                return frozenset(self._weight_map(index))
        file = self.weight_files[0]
        if file.suffix == ".safetensors":
            return frozenset(safetensors_keys(file))
        return frozenset(load_pickle(file))

    def check_files(self) -> None:
        """Open every safetensors header, so that a damaged shard is named before loading."""
        for file in self.weight_files:
            if file.suffix == ".safetensors":
                safetensors_keys(file)

    def has(self, prefix: str) -> bool:
        """Whether a tensor's name starts with ``prefix``."""
        return any(k.startswith(prefix) for k in self.keys)


def safetensors_keys(file: Path) -> list[str]:
    """Names in a safetensors file, from its header."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}). It is damaged or cut short: fetch it again."
        ) from error


def load_pickle(file: Path) -> dict[str, Any]:
    """Load a ``.bin`` or ``.pt`` file of tensors without running code from it.

    Raises:
        CheckpointError: it is damaged, or it holds more than tensors.
    """
    import pickle

    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read as a file of tensors ({first}). It is damaged, or it holds "
            f"code, which is refused."
        ) from error
