"""Tensors that lie in files, read one at a time: safetensors and pickles.

Contract: never more than one tensor is held (of a ``.bin`` shard, the pages that were touched,
until the next shard is opened), so that memory does not grow with the checkpoint. Safetensors'
format: eight bytes with the length of a JSON header, the header, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from av_llava.checkpoints.folder import (
    CheckpointFolder,
    load_bin,
    safetensors_keys,
    unreadable,
)
from av_llava.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Safetensors' names of types."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file and has not been read."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None = None
    """Where its data begin, in bytes from the start of the file; None in a pickle."""

    @property
    def n_bytes(self) -> int:
        """Size of its data."""
        return size_in_bytes(self.dtype, self.shape)


def size_in_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Size of a tensor's data."""
    return math.prod(shape) * dtype.itemsize


def stored_tensors(folder: CheckpointFolder) -> list[StoredTensor]:
    """The tensors of a checkpoint folder, shard by shard, in the order of their data.

    Raises:
        CheckpointError: a file is damaged, two files hold one name, or the index names a tensor
            that its file does not hold.
    """
    found = tensors_in(folder.weight_files)
    absent = sorted(folder.keys - {t.name for t in found})
    if absent:
        raise CheckpointError(
            f"{folder.path}: the index of the shards names {len(absent)} tensor(s) that no file "
            f"holds: {', '.join(absent[:6])}. The download or copy is incomplete."
        )
    return found


def tensors_in(files: Iterable[Path]) -> list[StoredTensor]:
    """The tensors of some files, safetensors or pickles; names are unique among them."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _in_file(file):
            if tensor.name in found:
                raise CheckpointError(
                    f"{tensor.name!r} is both in {found[tensor.name].file} and in {file}."
                )
            found[tensor.name] = tensor
    return list(found.values())


def _in_file(file: Path) -> list[StoredTensor]:
    if file.suffix != ".safetensors":
        return [
            StoredTensor(name, file, value.dtype, tuple(value.shape))
            for name, value in load_bin(file).items()
        ]
    safetensors_keys(file)  # raises for a file whose header and length do not fit
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: {name!r} has the type {entry['dtype']}, unknown here.")
        start = 8 + length + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        tensors.append(StoredTensor(name, file, DTYPES[entry["dtype"]], shape, start))
    return sorted(tensors, key=lambda t: t.offset or 0)


class TensorReader:
    """Reads stored tensors; use as a context. The file of the last one stays open."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._handle: IO[bytes] | None = None
        self._pickle: dict[str, Tensor] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the open file."""
        if self._handle is not None:
            self._handle.close()
        self._file, self._handle, self._pickle = None, None, {}

    def read(self, stored: StoredTensor) -> Tensor:
        """Return the tensor, on the CPU in its own type.

        Raises:
            CheckpointError: the file became shorter since its header was read.
        """
        if stored.file != self._file:
            self._open(stored)
        if stored.offset is None:
            return self._pickle[stored.name]
        assert self._handle is not None
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        view = memoryview(as_bytes(tensor))
        try:
            self._handle.seek(stored.offset)
            n_read = self._handle.readinto(view)  # type: ignore[attr-defined]
        except OSError as error:
            raise unreadable(stored.file, error) from error
        if n_read != stored.n_bytes:
            raise CheckpointError(f"{stored.file} ends within the data of {stored.name!r}.")
        return tensor

    def _open(self, stored: StoredTensor) -> None:
        self.close()
        if stored.offset is None:
            self._pickle = load_bin(stored.file)
        else:
            try:
                self._handle = stored.file.open("rb")
            except OSError as error:
                raise unreadable(stored.file, error) from error
        self._file = stored.file


def as_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor as an array of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
