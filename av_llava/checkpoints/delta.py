"""Deltas: LLaVA's first weights, published as the difference from LLaMA's, applied and made.

Contract: streaming, one tensor of each side at a time. The arithmetic is that of LLaVA's scripts:
base and delta are added (or target and base subtracted) in one type; where the vocabulary grew, the
leading block of the embedding and the head is shifted and the new rows are stored as they are; the
projector, which the base does not have, passes through. Both sides have to fit tensor by tensor,
else nothing is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from av_llava.checkpoints.base import check_probe, named_tensors, probe
from av_llava.checkpoints.convert import SHARD_BYTES, ConvertOptions, Report, parse_size
from av_llava.checkpoints.destination import Weights, make_folder, target_dtype
from av_llava.checkpoints.file_names import DELTA_RECORD
from av_llava.checkpoints.folder import CheckpointFolder, read_json
from av_llava.checkpoints.load import locate
from av_llava.checkpoints.parts import Reference
from av_llava.checkpoints.shards import Transfer
from av_llava.checkpoints.source import EMBEDDING, HEAD, MULTIMODAL, UNUSED
from av_llava.checkpoints.staging import check_destination
from av_llava.checkpoints.stored import StoredTensor, TensorReader, stored_tensors
from av_llava.config import is_llava_config, language_model_type
from av_llava.errors import CheckpointError, UsageError
from av_llava.weight_names import ignored

_GROWING = (EMBEDDING, HEAD)
_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt")
_ROUNDINGS = 2
"""Steps of the type by which going there and back may change a value."""
_FORMAT = 1
_LAST_NORM, _DELTA_NORM = "model.norm.weight", 0.05


def apply_delta(
    base: str | Path,
    delta: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    verify: bool = False,
    shard_size: str | int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write the checkpoint that a delta makes of its base.

    Args:
        base: folder or hub id of the language model.
        delta: folder or hub id of the delta.
        destination: folder to make; must not exist.
        dtype: type to add in and to write; LLaVA's script takes float16. None takes the delta's.
        verify: subtract the base again and compare with the delta.
        shard_size: bound of one file of weights.
        progress: called with bytes written and bytes in all.

    Raises:
        CheckpointError: the base is another one or patched already, or a shape does not fit.
    """
    options = _options(base, dtype, verify, shard_size, progress)
    return replace(apply(delta, destination, options), converter="apply-delta")


def make_delta(
    base: str | Path,
    target: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    verify: bool = False,
    shard_size: str | int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write the difference of a checkpoint from its base; arguments as :func:`apply_delta`."""
    options = _options(base, dtype, verify, shard_size, progress)
    return replace(make(target, destination, options), converter="make-delta")


def _options(
    base: str | Path,
    dtype: str | None,
    verify: bool,
    shard_size: str | int,
    progress: Callable[[int, int], None] | None,
) -> ConvertOptions:
    return ConvertOptions(
        verify=verify,
        shard_bytes=parse_size(shard_size),
        dtype=dtype,
        progress=progress,
        extra={"base": base},
    )


def apply(source: str | Path, destination: str | Path | None, options: ConvertOptions) -> Report:
    """The converter ``apply-delta``: the source is the delta."""
    return _convert(source, destination, options, sign=1)


def make(source: str | Path, destination: str | Path | None, options: ConvertOptions) -> Report:
    """The converter ``make-delta``: the source is the target."""
    return _convert(source, destination, options, sign=-1)


def _convert(
    source: str | Path, destination: str | Path | None, options: ConvertOptions, sign: int
) -> Report:
    side = _opened(source)
    given = options.extra.get("base") or named_base(side.path, sign)
    if given is None:
        raise UsageError("A delta needs its base: the language model below it (--base).")
    base = _base_below(given, side, sign)
    assert destination is not None
    check_destination(Path(destination), [side.path, base.path])

    def finish(folder: Path) -> None:
        _copy_rest(side.path, folder)
        if sign < 0:
            named = Reference.to(given, folder).to_dict()
            below = probe(named_tensors(CheckpointFolder(base.path)))
            data = {"format": _FORMAT, "base": named, "probe": below}
            text = json.dumps(data, indent=2, sort_keys=True)
            (folder / DELTA_RECORD).write_text(text + "\n", encoding="utf-8")

    dtype = target_dtype(options)
    with TensorReader() as reader:
        transfers = [
            _Shifted(
                stored, name, base=base.tensors.get(name), sign=sign, kind=dtype, reader=reader
            )
            for name, stored in side.tensors.items()
        ]
        return make_folder(
            _report(side, base, sign),
            side.path,
            destination,
            [Weights(transfers)],
            options,
            finish=finish,
            compare=lambda made: _go_back(side, base, made, sign),
        )


def examine(folder: str | Path, base: str | Path) -> Report:
    """How a delta and its base fit, by names and shapes; nothing is written.

    Raises:
        CheckpointError: the base is another one, patched already, or cannot be read.
    """
    side = _opened(folder)
    return _report(side, _base_below(base, side, 1), 1)


def looks_like_delta(folder: CheckpointFolder) -> bool:
    """Whether the last norm scales by almost nothing, as only that of a difference does.

    LLaVA's own deltas say nothing of themselves. Nothing is told of language models whose norms
    store what they add to one.
    """
    if not is_llava_config(folder.config) or "gemma" in language_model_type(folder.config):
        return False
    stored = {t.name: t for t in stored_tensors(folder)}.get(_LAST_NORM)
    if stored is None:
        return False
    with TensorReader() as reader:
        return float(reader.read(stored).float().abs().mean()) < _DELTA_NORM


def named_base(folder: Path, sign: int = 1) -> str | None:
    """The base that a delta names; None for a target, and for deltas of LLaVA's script."""
    record = _record_of(folder) if sign > 0 else None
    if record is None:
        return None
    return Reference.from_dict(record.get("base"), folder / DELTA_RECORD).find(folder)


def _base_below(given: str | Path, side: _Side, sign: int) -> _Side:
    """Open the base of a delta or a target, and check that it can be one."""
    base = _with_head(_opened(given), side)
    _check_unpatched(base)
    if not any(MULTIMODAL.match(name) for name in side.tensors):
        what = "no delta" if sign > 0 else "no target"
        raise CheckpointError(
            f"{side.path} holds no projector (model.mm_projector.*): it is {what} of a LLaVA "
            f"model. Are it and the base swapped?"
        )
    record = _record_of(side.path) if sign > 0 else None
    if record is not None:
        below = named_tensors(CheckpointFolder(base.path))
        check_probe(record.get("probe", {}), below, side.path, base.path)
    return base


@dataclass(frozen=True)
class _Side:
    path: Path
    tensors: Mapping[str, StoredTensor]
    unused: tuple[str, ...]


def _opened(path: str | Path) -> _Side:
    folder = locate(path)
    folder.check_files()
    found = {t.name: t for t in stored_tensors(folder)}
    unused = tuple(sorted(name for name in found if ignored(name)))
    return _Side(folder.path, {n: t for n, t in found.items() if n not in unused}, unused)


def _with_head(base: _Side, side: _Side) -> _Side:
    """The base with its embedding as head, if it ties them and the other side does not."""
    tied = CheckpointFolder(base.path).config.get("tie_word_embeddings")
    if not tied or HEAD in base.tensors or HEAD not in side.tensors:
        return base
    return replace(base, tensors={**base.tensors, HEAD: base.tensors[EMBEDDING]})


def _record_of(folder: Path) -> dict[str, Any] | None:
    """What a delta says about its base; None for those of LLaVA's script."""
    if not (folder / DELTA_RECORD).is_file():
        return None
    data = read_json(folder / DELTA_RECORD)
    if data.get("format") != _FORMAT:
        raise CheckpointError(
            f"{folder / DELTA_RECORD} has format {data.get('format')!r}; this release reads "
            f"{_FORMAT}."
        )
    return data


def _check_unpatched(base: _Side) -> None:
    patched = sorted(name for name in base.tensors if MULTIMODAL.match(name))
    if patched:
        raise CheckpointError(
            f"The base {base.path} is patched already: it holds {patched[0]!r}, which only a LLaVA "
            f"model has. Give the plain language model, or use {base.path} as it is."
        )


def _report(side: _Side, base: _Side, sign: int) -> Report:
    """What fits; a tensor that only one side has, or that fits by no rule, is a problem."""
    mismatched = []
    for name, stored in side.tensors.items():
        below = base.tensors.get(name)
        if below is not None and not _fits(name, stored.shape, below.shape):
            mismatched.append(
                f"{name} ({side.path.name} has {stored.shape}, the base {below.shape})"
            )
    known = {n for n in side.tensors if n in base.tensors or MULTIMODAL.match(n)}
    passed = tuple(sorted(n for n in side.tensors if n not in base.tensors and n in known))
    grown = [
        f"{n}: the leading {base.tensors[n].shape} of {side.tensors[n].shape}"
        for n in _GROWING
        if n in known and n in base.tensors and base.tensors[n].shape != side.tensors[n].shape
    ]
    notes = [f"{len(passed)} tensors that the base does not have are taken over as they are."]
    notes += [f"The vocabulary grew; shifted is {', '.join(grown)}."] if grown else []
    return Report(
        converter="apply-delta" if sign > 0 else "make-delta",
        source=str(side.path),
        destination=None,
        mapped=len(known),
        missing=tuple(sorted(f"{n} (of the base)" for n in base.tensors if n not in side.tensors)),
        unexpected=tuple(sorted(f"{n} (not in the base)" for n in side.tensors if n not in known)),
        mismatched=tuple(mismatched),
        dropped={UNUSED: side.unused} if side.unused else {},
        notes=tuple(notes),
    )


def _fits(name: str, shape: tuple[int, ...], below: tuple[int, ...]) -> bool:
    """Whether a base's tensor can be shifted: equal shapes, or a vocabulary that grew."""
    if shape == below:
        return True
    return name in _GROWING and shape[1:] == below[1:] and shape[0] >= below[0]


@dataclass(frozen=True)
class _Shifted(Transfer):
    """A tensor with the base's added or subtracted."""

    base: StoredTensor | None = None
    sign: int = 1
    kind: torch.dtype | None = None
    """Type to compute in; None takes the tensor's own."""
    reader: TensorReader | None = None

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """What is written, from what was read."""
        if self.base is None or self.reader is None:
            yield tensor
        else:
            yield shifted(tensor, self.reader.read(self.base), self.sign, self.kind)


def shifted(tensor: Tensor, base: Tensor, sign: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor plus (or minus) the base's, on the leading rows that both have.

    Args:
        tensor: of the delta, or of the target. [V, ...]
        base: of the base. [v, ...], v <= V
        sign: 1 to apply a delta, -1 to make one.
        dtype: both sides are brought into it first, as LLaVA's scripts do with float16; None
            takes that of ``tensor``.
    """
    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    out = tensor.to(kind, copy=True)
    if not out.ndim:
        return out + sign * base.to(kind)
    block = out[: len(base)]
    if sign > 0:
        block += base.to(kind)
    else:
        block -= base.to(kind)
    return out


def _go_back(side: _Side, base: _Side, made: Path, sign: int) -> float:
    """Undo the conversion and compare with the source.

    Returns:
        The largest difference beyond what rounding twice explains; 0 if there is none.
    """
    found = _opened(made)
    worst = 0.0
    with TensorReader() as made_reader, TensorReader() as side_reader, TensorReader() as reader:
        for name, stored in found.tensors.items():
            here = made_reader.read(stored)
            wanted = side_reader.read(side.tensors[name]).to(here.dtype)
            if not here.is_floating_point():
                worst = max(worst, float(not torch.equal(here, wanted)))
                continue
            below = base.tensors.get(name)
            slack = torch.zeros_like(wanted, dtype=torch.float32)
            if below is not None:
                back = shifted(here, reader.read(below), -sign, here.dtype)
                size = torch.maximum(here.float().abs(), back.float().abs())
                slack = _ROUNDINGS * torch.finfo(here.dtype).eps * size
                here = back
            over = (here.float() - wanted.float()).abs() - slack
            worst = max(worst, float(over.max()) if over.numel() else 0.0)
    return max(worst, 0.0)


def _copy_rest(source: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and what else lies in the folder, but no weights."""
    weights = {file for pattern in _NOT_COPIED for file in source.glob(pattern)}
    weights.add(source / DELTA_RECORD)
    files = [p for p in sorted(source.iterdir()) if p.is_file() and p not in weights]
    for file in sorted(files, key=lambda p: p.name == "config.json"):
        shutil.copyfile(file, folder / file.name)
