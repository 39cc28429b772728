"""Writes GGUF files, tensor by tensor.

Contract: a file is planned completely (names, shapes, types, metadata) before anything is read;
then tensors are read, converted and written one at a time, so that memory is bounded by the largest
one. Follows the GGUF format, through llama.cpp's own package ``gguf``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_llava.errors import CheckpointError, MissingExtraError

BLOCK = 32
"""Numbers that share one scale in q8_0; a row is whole blocks."""

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
"""Type of the weights to the number under ``general.file_type``."""

_F16_MAX = 65504.0
_BLOCK_ITEMS = 2**23  # numbers that are converted at once


@dataclass(frozen=True)
class Planned:
    """One tensor of a file."""

    name: str
    """In the file."""
    source: str | Tensor
    """Name in the checkpoint, or the values themselves."""
    shape: tuple[int, ...]
    """In the file, rows first as torch has it (GGUF itself counts from the other end)."""
    kind: str
    """f32, f16 or q8_0."""
    change: Callable[[Tensor], Tensor] | None = None
    """From what is stored to what is written."""

    @property
    def n_bytes(self) -> int:
        """Size in the file, without alignment."""
        n = math.prod(self.shape)
        return {"f32": 4 * n, "f16": 2 * n, "q8_0": n // BLOCK * (BLOCK + 2)}[self.kind]


@dataclass(frozen=True)
class PlannedFile:
    """A file: its architecture, metadata and tensors."""

    architecture: str
    metadata: Mapping[str, Any]
    """Key to bool, int (unsigned 32 bit), float, string, or a list of one of these."""
    tensors: tuple[Planned, ...]
    left_out: tuple[str, ...] = field(default=())
    """Sentences on what llama.cpp cannot express."""

    @property
    def n_bytes(self) -> int:
        """Size of the tensors."""
        return sum(t.n_bytes for t in self.tensors)

    @property
    def kinds(self) -> dict[str, int]:
        """Number of tensors by type."""
        names = [t.kind for t in self.tensors]
        return {kind: names.count(kind) for kind in FILE_TYPES if kind in names}


def kind_for(shape: Iterable[int], wanted: str) -> str:
    """The type in which a tensor is stored.

    Vectors stay float32, as llama.cpp's operations want them; rows that are no whole blocks
    cannot be q8_0 and become float16.
    """
    sizes = tuple(shape)
    if len(sizes) < 2:
        return "f32"
    return "f16" if wanted == "q8_0" and (len(sizes) > 2 or sizes[-1] % BLOCK) else wanted


def import_gguf() -> Any:
    """The ``gguf`` package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise MissingExtraError("gguf", "gguf", "Writing files for llama.cpp") from error
    return gguf


def _blocks(planned: Planned, read: Callable[[str], Tensor]) -> Iterator[np.ndarray]:
    """The values of a planned tensor in float32, a few rows at a time. [rows, width]

    Raises:
        CheckpointError: values that the type cannot hold, or that are no numbers.
    """
    tensor = read(planned.source) if isinstance(planned.source, str) else planned.source
    if planned.change is not None:
        tensor = planned.change(tensor)
    assert tuple(tensor.shape) == planned.shape, (planned.name, tensor.shape, planned.shape)
    rows = tensor.detach().reshape(-1, planned.shape[-1])
    for block in rows.split(max(1, _BLOCK_ITEMS // planned.shape[-1])):
        values = block.to(torch.float32).contiguous().numpy()
        largest = float(max(values.max(), -values.min()))
        if not math.isfinite(largest):
            raise CheckpointError(
                f"The tensor {planned.name} holds infinite values or NaN: the checkpoint is "
                f"damaged."
            )
        if planned.kind != "f32" and largest > _F16_MAX:
            raise CheckpointError(
                f"The tensor {planned.name} holds {largest:.6g}, which {planned.kind} cannot "
                f"express (at most {_F16_MAX:.0f}): export with the type f32."
            )
        yield values


def _encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Rows as they stand in the file; those of q8_0 as bytes."""
    if kind == "q8_0":
        gguf = import_gguf()
        encoded: np.ndarray = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        return encoded
    return values.astype(np.float16) if kind == "f16" else values


def _decode(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows of a file in float32."""
    gguf = import_gguf()
    values: np.ndarray = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind.upper()])
    return values


def _whole(planned: Planned, read: Callable[[str], Tensor]) -> np.ndarray:
    """All rows of a tensor as they stand in the file."""
    item = {"f32": np.float32, "f16": np.float16, "q8_0": np.uint8}[planned.kind]
    n_rows = math.prod(planned.shape[:-1])
    out = np.empty(planned.n_bytes, np.uint8).view(item).reshape(n_rows, -1)
    done = 0
    for values in _blocks(planned, read):
        out[done : done + len(values)] = _encode(values, planned.kind)
        done += len(values)
    return out


def write_file(
    path: Path,
    plan: PlannedFile,
    read: Callable[[str], Tensor],
    told: Callable[[int], None] | None = None,
) -> None:
    """Write a planned file.

    Args:
        path: of the file; an existing one is replaced.
        plan: what is in it.
        read: from a name in the checkpoint to the stored tensor.
        told: called with the size of each tensor that is written.

    Raises:
        CheckpointError: values that the planned type cannot express.
        MissingExtraError: the ``gguf`` package is not installed.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, plan.architecture)
    for key, value in plan.metadata.items():
        _add(writer, key, value)
    for tensor in plan.tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
        # Only for raw bytes would the shape be one of bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, np.float32, tensor.n_bytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan.tensors:
            writer.write_tensor_data(_whole(tensor, read))
            if told is not None:
                told(tensor.n_bytes)
        writer.flush()
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def verify_file(path: Path, plan: PlannedFile, read: Callable[[str], Tensor]) -> float:
    """Read a file back and compare every tensor with what it was made from.

    Returns:
        The largest difference of a number in the file from the stored one: what its type costs.

    Raises:
        CheckpointError: a tensor is absent, or not what its type makes of the stored one.
    """
    gguf = import_gguf()
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    if found.keys() != {t.name for t in plan.tensors}:
        raise CheckpointError(f"{path} does not hold the planned tensors.")
    return max((_verify(path, t, found[t.name], read) for t in plan.tensors), default=0.0)


def _verify(path: Path, planned: Planned, stored: Any, read: Callable[[str], Tensor]) -> float:
    """The largest difference of one tensor."""
    same = stored.tensor_type.name.lower() == planned.kind
    same = same and tuple(int(n) for n in reversed(stored.shape)) == planned.shape
    rows = stored.data.reshape(math.prod(planned.shape[:-1]), -1) if same else stored.data
    largest, done = 0.0, 0
    for values in _blocks(planned, read):
        block = rows[done : done + len(values)]
        if not (same and np.array_equal(block, _encode(values, planned.kind))):
            raise CheckpointError(f"{path}: the tensor {planned.name} is not what was written.")
        difference = np.abs(_decode(np.ascontiguousarray(block), planned.kind) - values)
        largest = max(largest, float(difference.max()))
        done += len(values)
    return largest
