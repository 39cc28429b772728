"""What lies in a checkpoint folder: its config, its weight files, and the keys in them.

Contract: nothing is loaded; keys come from the index or from the headers of the files. Faults of
a folder (missing shard, truncated file, broken JSON, no permission) are errors that name the file.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from av_llava.checkpoints.file_names import DELTA_RECORD
from av_llava.errors import CheckpointError

# The order in which transformers looks: what is checked here must be what it loads.
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Files of what is not a full checkpoint, and what to say about them.
_PARTS = {
    "adapter_config.json": "It is an adapter (LoRA): load the checkpoint that it was merged into.",
    "mm_projector.bin": "It is only a projector: load the full checkpoint that it belongs to.",
}

# What reading a damaged pickle can end in.
_PICKLE_FAULTS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    struct.error,
)


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
    except OSError as error:
        raise unreadable(path, error) from error
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

    def holds(self, name: str) -> bool:
        """Whether there is a file of this name.

        Raises:
            CheckpointError: the folder may not be looked into.
        """
        try:
            return (self.path / name).is_file()
        except OSError as error:
            raise unreadable(self.path, error) from error

    @cached_property
    def _index(self) -> str | None:
        """Name of the index of shards; None for a single file.

        Raises:
            CheckpointError: there are neither.
        """
        for single, index in zip(_SINGLES, _INDEXES, strict=True):
            if self.holds(single):
                return None
            if self.holds(index):
                return index
        hint = "".join(f" {text}" for name, text in _PARTS.items() if self.holds(name))
        raise CheckpointError(
            f"{self.path} holds no weights: expected one of {', '.join(_SINGLES + _INDEXES)}.{hint}"
        )

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The files with weights, safetensors before ``.bin``; every one exists.

        Raises:
            CheckpointError: there are none, or the index names absent ones.
        """
        index = self._index
        if index is None:
            return (self.path / next(name for name in _SINGLES if self.holds(name)),)
        names = sorted(set(self._weight_map(index).values()))
        absent = [name for name in names if not self.holds(name)]
        if absent:
            raise CheckpointError(
                f"{self.path / index} names {len(absent)} file(s) that do not exist: "
                f"{', '.join(absent)}. The download or copy is incomplete."
            )
        return tuple(self.path / name for name in names)

    def _weight_map(self, index: str) -> dict[str, str]:
        found = read_json(self.path / index).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise CheckpointError(f"{self.path / index} has no 'weight_map'.")
        for key, name in found.items():
            if not isinstance(name, str):
                raise CheckpointError(
                    f"{self.path / index} gives no file name for {key!r}: {name!r}."
                )
        return found

    @cached_property
    def keys(self) -> frozenset[str]:
        """Names of all tensors."""
        if self._index is not None:
            return frozenset(self._weight_map(self._index))
        return frozenset(_keys(self.weight_files[0]))

    def check_files(self) -> None:
        """Open every file's header, so that a damaged shard is named before anything is loaded."""
        for file in self.weight_files:
            _keys(file)

    def has(self, prefix: str) -> bool:
        """Whether a tensor's name starts with ``prefix``."""
        return any(k.startswith(prefix) for k in self.keys)


def refuse_delta(folder: CheckpointFolder) -> None:
    """Raise for a folder that says that it holds a delta: its weights alone mean nothing.

    Raises:
        CheckpointError: it does.
    """
    if folder.holds(DELTA_RECORD):
        raise CheckpointError(
            f"{folder.path} holds a delta ({DELTA_RECORD}), the difference of a checkpoint from "
            f"its base. Make the checkpoint first: av-llava convert apply-delta {folder.path} "
            f"DESTINATION."
        )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Make the error for a path that the system refuses to open."""
    return CheckpointError(f"{path} cannot be opened: {error.strerror or error}.")


def sentence(text: str) -> str:
    """The text of a library's error in one line that ends with a full stop."""
    return f"{' '.join(text.split()).rstrip('.')}."


def _keys(file: Path) -> list[str]:
    """Names in a file of tensors; their data are not read."""
    return safetensors_keys(file) if file.suffix == ".safetensors" else list(load_bin(file))


def safetensors_keys(file: Path) -> list[str]:
    """Names in a safetensors file, from its header."""
    try:
        file.open("rb").close()  # safetensors calls every refusal "no such file"
    except OSError as error:
        raise unreadable(file, error) from error
    try:
        with safe_open(str(file), framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}). It is damaged or cut short: fetch it again."
        ) from error


def load_bin(file: Path) -> dict[str, Any]:
    """Tensors by name from a ``.bin`` file; see :func:`load_pickle`.

    Raises:
        CheckpointError: it is damaged, or it holds anything else.
    """
    import torch

    data = load_pickle(file)
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{file} holds an object of type {type(data).__name__}, not tensors by name."
        )
    for key, value in data.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{file} holds an object of type {type(value).__name__} under {key!r}, where a "
                f"tensor should be."
            )
    return data


def load_pickle(file: Path) -> Any:
    """Load tensors and plain data from a ``.bin`` or ``.pt`` file without running code from it.

    The data are mapped, not read, unless the file is of the format before PyTorch 1.6.

    Raises:
        CheckpointError: it is damaged, or it holds objects of other kinds.
    """
    import torch

    try:
        mapped = zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise unreadable(file, error) from error
    except _PICKLE_FAULTS as error:
        raise CheckpointError(f"{file} cannot be read as tensors: {_fault(error)}") from error


def _fault(error: Exception) -> str:
    """What is wrong with a pickled file, in a sentence."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code is not None:
        return f"it holds more than tensors ({code[1]}), and nothing of that kind is run."
    return "it is damaged, cut short, or not a file of torch.save. Fetch it again."
