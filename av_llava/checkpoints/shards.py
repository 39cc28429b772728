"""Tensors from files into safetensors shards, one at a time.

Contract: memory does not grow with the checkpoint (:mod:`stored`). What an output file will hold is
laid out before the first byte is written; each tensor then goes straight to its place. Values never
change unless another type is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from av_llava.checkpoints.stored import (
    DTYPES,
    StoredTensor,
    TensorReader,
    as_bytes,
    size_in_bytes,
)
from av_llava.errors import CheckpointError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_PIECE_BYTES = 64 * 2**20

Progress = Callable[[int, int], None]
"""Called with the bytes that are written and those of the whole."""


# ---------------------------------------------------------------- what becomes of a tensor


@dataclass(frozen=True)
class Transfer:
    """One tensor on its way from a file into another."""

    stored: StoredTensor
    name: str
    """What it is called there."""
    rows: int | None = None
    """Rows to end up with: fewer cut off the last ones, more add rows; None keeps them."""
    n_used: int | None = None
    """Added rows are the mean of so many first rows; None means of all."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What it is written with."""
        shape = self.stored.shape
        return shape if self.rows is None else (self.rows, *shape[1:])

    @property
    def reshaped(self) -> bool:
        """Whether rows are added or cut off."""
        return self.shape != self.stored.shape

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """What is written, from what was read."""
        if self.rows is None:
            yield tensor
            return
        n = len(tensor)
        yield tensor[: self.rows]
        if self.rows > n:
            mean = mean_row(tensor, n if self.n_used is None else self.n_used)
            yield mean.expand(self.rows - n, *tensor.shape[1:])


def mean_row(table: Tensor, n_used: int) -> Tensor:
    """The mean of the first ``n_used`` rows, summed in float64 a few rows at a time. [D]"""
    total = torch.zeros(table.shape[1:], dtype=torch.float64)
    for rows in table[:n_used].split(1024):
        total += rows.sum(0, dtype=torch.float64)
    return (total / n_used).to(table.dtype)


def copy_tensors(
    transfers: Sequence[Transfer],
    folder: Path,
    max_shard_bytes: int,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    stem: str = "model",
) -> list[Path]:
    """Write tensors into safetensors shards, in the order given.

    Args:
        transfers: what to copy.
        folder: where the files go.
        max_shard_bytes: a new file is begun before this size is exceeded; a larger tensor has a
            file of its own.
        dtype: type to convert floating-point tensors to; None keeps each one's own.
        progress: told after each tensor.
        stem: first part of the files' names.

    Returns:
        The files: one, or several and their index.
    """
    slots = [slot_of(transfer, dtype) for transfer in transfers]
    total, done = sum(s.n_bytes for s in slots), 0
    writer = ShardWriter(folder, slots, max_shard_bytes, stem)
    with TensorReader() as reader, writer:
        for transfer, slot in zip(transfers, slots, strict=True):
            tensor = reader.read(transfer.stored)
            writer.write(slot.name, transfer.pieces(tensor))
            del tensor
            done += slot.n_bytes
            if progress is not None:
                progress(done, total)
    return writer.files


def slot_of(transfer: Transfer, dtype: torch.dtype | None) -> Slot:
    """The place that a transfer needs."""
    own = transfer.stored.dtype
    target = dtype if dtype is not None and own.is_floating_point else own
    return Slot(transfer.name, target, transfer.shape)


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Slot:
    """Place of one tensor in an output file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0
    """From the start of the file, in bytes."""

    @property
    def n_bytes(self) -> int:
        """Size of its data."""
        return size_in_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One output file, laid out: its header and where each tensor goes."""

    file: Path
    header: bytes
    slots: tuple[Slot, ...]

    @classmethod
    def lay_out(cls, file: Path, slots: Sequence[Slot]) -> Shard:
        """Place tensors; types with more bytes come first, so that each lies aligned."""
        ordered = sorted(slots, key=lambda s: -s.dtype.itemsize)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        starts, at = [], 0
        for slot in ordered:
            if slot.dtype not in _NAMES:
                raise CheckpointError(
                    f"{slot.name!r} has the type {slot.dtype}, which safetensors files cannot hold."
                )
            entries[slot.name] = {
                "dtype": _NAMES[slot.dtype],
                "shape": list(slot.shape),
                "data_offsets": [at, at + slot.n_bytes],
            }
            starts.append(at)
            at += slot.n_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        placed = [replace(s, offset=len(header) + b) for s, b in zip(ordered, starts, strict=True)]
        return cls(file, header, tuple(placed))


class ShardWriter:
    """Writes tensors into laid-out shards; use as a context.

    Args:
        folder: where the files go.
        slots: all tensors to come, in the order in which they will be written.
        max_shard_bytes: bound of the data in one file.
        stem: first part of the files' names.
    """

    def __init__(
        self, folder: Path, slots: Sequence[Slot], max_shard_bytes: int, stem: str = "model"
    ) -> None:
        self.shards = _cut(folder, slots, max_shard_bytes, stem)
        self.files = [shard.file for shard in self.shards]
        if len(self.shards) > 1:
            self.files.append(folder / f"{stem}.safetensors.index.json")
        self._where = {slot.name: (shard, slot) for shard in self.shards for slot in shard.slots}
        self._left = {shard.file: len(shard.slots) for shard in self.shards}
        self._open: dict[Path, IO[bytes]] = {}

    def __enter__(self) -> ShardWriter:
        for shard in self.shards:
            if not shard.slots:  # a checkpoint without tensors is still a file
                self._close(self._handle(shard), shard)
        return self

    def __exit__(self, kind: Any, *unused: Any) -> None:
        for handle in self._open.values():
            handle.close()
        if kind is None:
            missing = [file.name for file, n in self._left.items() if n]
            assert not missing, f"unfinished shards: {missing}"
            if len(self.shards) > 1:
                self._write_index()

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write one tensor, given as consecutive groups of its rows."""
        shard, slot = self._where.pop(name)
        handle = self._handle(shard)
        handle.seek(slot.offset)
        n_written = 0
        for piece in pieces:
            for part in _small(piece):
                n_written += handle.write(as_bytes(part.to(slot.dtype).contiguous()))
        assert n_written == slot.n_bytes, f"{name}: {n_written} bytes for {slot}"
        self._left[shard.file] -= 1
        if not self._left[shard.file]:
            self._close(handle, shard)

    def _handle(self, shard: Shard) -> IO[bytes]:
        if shard.file not in self._open:
            handle = shard.file.open("xb")
            handle.write(shard.header)
            self._open[shard.file] = handle
        return self._open[shard.file]

    def _close(self, handle: IO[bytes], shard: Shard) -> None:
        handle.flush()
        os.fsync(handle.fileno())
        handle.close()
        del self._open[shard.file]

    def _write_index(self) -> None:
        slots = [slot for shard in self.shards for slot in shard.slots]
        weight_map = {s.name: shard.file.name for shard in self.shards for s in shard.slots}
        metadata = {
            "total_parameters": sum(s.n_bytes // s.dtype.itemsize for s in slots),
            "total_size": sum(s.n_bytes for s in slots),
        }
        data = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        self.files[-1].write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _cut(folder: Path, slots: Sequence[Slot], max_shard_bytes: int, stem: str) -> list[Shard]:
    """Give each tensor its file, in order."""
    groups: list[list[Slot]] = [[]]
    room = max_shard_bytes
    for slot in slots:
        if groups[-1] and slot.n_bytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(slot)
        room -= slot.n_bytes
    n = len(groups)
    names = [f"{stem}-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    if n == 1:
        names = [f"{stem}.safetensors"]
    return [Shard.lay_out(folder / f, group) for f, group in zip(names, groups, strict=True)]


def _small(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in groups of rows, so that a conversion copies little at once."""
    if not tensor.ndim or not len(tensor):
        yield tensor
        return
    rows = max(1, _PIECE_BYTES // max(1, tensor[0].numel() * tensor.itemsize))
    yield from tensor.split(rows)
