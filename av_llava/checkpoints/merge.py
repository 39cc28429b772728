"""Puts a folder with parts onto its base as one whole checkpoint: LoRA and tokens in its weights.

Contract: streaming, as all converters: one tensor is held at a time. Sums are made in float32 and
rounded once, to the type of the base's tensor. What comes out has LLaVA's names and needs neither
base nor tower. Verifying compares the logits with the LoRA attached and added, in float32, and
every written weight with PEFT's own sum.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer as PeftLayer
from safetensors.torch import save_file
from torch import Tensor

from av_llava.checkpoints.base import (
    AUDIO,
    EMBEDDING,
    HEAD,
    VISION,
    named_tensors,
    tower_tensors,
    with_rows,
)
from av_llava.checkpoints.compare import (
    check_memory,
    fixed_input,
    largest_difference,
    load_float32,
    logits_of,
)
from av_llava.checkpoints.configuration import generation_config
from av_llava.checkpoints.convert import SHARD_BYTES, ConvertOptions, Report, parse_size
from av_llava.checkpoints.destination import Weights, make_folder, small_files, target_dtype
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.load import locate
from av_llava.checkpoints.lora import LoraLayer, check_untied, layers_of, read_lora
from av_llava.checkpoints.model_state import split
from av_llava.checkpoints.needed import disk_shapes, empty_model, on_disk
from av_llava.checkpoints.partial import Opened, load_partial, open_partial
from av_llava.checkpoints.parts import TOKEN_ROWS, is_partial
from av_llava.checkpoints.quantize import stored_scheme
from av_llava.checkpoints.shards import Transfer, mean_row
from av_llava.checkpoints.source import TIED, account
from av_llava.checkpoints.staging import check_destination
from av_llava.checkpoints.stored import StoredTensor, TensorReader, stored_tensors, tensors_in
from av_llava.checkpoints.tokens import INPUT, OUTPUT, rows_by_id, rows_in_use
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor
from av_llava.weight_names import disk_name, memory_name

_TABLES = {EMBEDDING: INPUT, HEAD: OUTPUT}


def merge_adapter(
    path: str | Path,
    base: str | Path | None,
    destination: str | Path,
    verify: bool = True,
    *,
    dtype: str | None = None,
    shard_size: str | int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write the whole checkpoint that an adapter, a LoRA or a projector makes with its base.

    Args:
        path: the folder with the parts.
        base: its base; None takes what the folder names.
        destination: folder to make; must not exist.
        verify: compare the logits before it appears; needs the model in float32 in memory.
        dtype: of the weights; None keeps the base's.
        shard_size: bound of one file of weights.
        progress: called with bytes written and bytes in all.

    Returns:
        The report; ``difference`` is the largest difference of logits.

    Raises:
        CheckpointError: the parts do not fit the base, the sides differ, or the destination exists
            or cannot be written.
    """
    options = ConvertOptions(
        verify=verify,
        shard_bytes=parse_size(shard_size),
        dtype=dtype,
        progress=progress,
        extra={"base": base},
    )
    return replace(merge_lora(path, destination, options), converter="merge-lora")


def merge_lora(
    source: str | Path, destination: str | Path | None, options: ConvertOptions
) -> Report:
    """The converter; see :func:`merge_adapter`."""
    folder = locate(source)
    if not is_partial(folder):
        raise CheckpointError(
            f"{folder.path} holds no parts of a model to put onto a base: no adapter, no LoRA, no "
            f"projector of its own."
        )
    opened = open_partial(source, options.extra.get("base"))
    if stored_scheme(opened.base) is not None:
        raise CheckpointError(
            f"The base {opened.base.path} is quantised, and nothing can be added to its weights. "
            f"Give the full-precision checkpoint that it was made from as --base."
        )
    assert destination is not None
    check_destination(Path(destination), [opened.folder.path, opened.base.path])
    with small_files() as prepared, small_files() as scratch:
        plan = _Plan.of(opened, scratch)
        if options.verify:
            check_memory(sum(t.stored.n_bytes for t in plan.transfers.values()))
        _write_small(plan, opened, prepared, target_dtype(options))
        notes: list[str] = []
        report = make_folder(
            plan.report(opened),
            opened.folder.path,
            destination,
            [Weights(list(plan.transfers.values()))],
            options,
            prepared=prepared,
            compare=lambda made: _compare(source, opened, made, notes),
            tokenizer_from=[opened.folder.path, opened.base.path],
        )
    return replace(report, notes=(*report.notes, *notes))


def _write_small(plan: _Plan, opened: Opened, folder: Path, dtype: torch.dtype | None) -> None:
    config = plan.config
    config.architectures = [AVLlavaForConditionalGeneration.__name__]
    config.dtype = dtype if dtype is not None else config.dtype
    config.save_pretrained(folder)
    AVLlavaProcessor(opened.tokenizer, config).save_pretrained(folder)
    own = opened.folder if opened.folder.holds("generation_config.json") else opened.base
    generation_config(own, config).save_pretrained(folder)


# ---------------------------------------------------------------- what goes where


@dataclass(frozen=True)
class _Weight(Transfer):
    """A tensor that a LoRA or new tokens may change on its way."""

    layer: LoraLayer | None = None
    is_bias: bool = False
    fresh: tuple[int, ...] = ()
    """Rows that become the mean of those in use."""
    tokens: Mapping[int, Tensor] = field(default_factory=dict)
    """Rows by id. Each [D]."""

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """What is written, from what was read."""
        rows = [tensor] if self.rows is None else self._rows(tensor)
        if self.layer is None:
            yield from rows
            return
        whole = tensor if self.rows is None else torch.cat(list(rows))
        if self.is_bias:
            yield self.layer.merged_bias(whole)
        else:
            yield from self.layer.merged(whole)

    def _rows(self, table: Tensor) -> Iterator[Tensor]:
        """The matrix with its new rows, without a copy of it. Each [n, D]"""
        assert self.rows is not None
        before = len(table)
        new = sorted({*self.fresh, *range(before, self.rows)})
        placed = dict(self.tokens)
        if new:
            used = rows_in_use(new, before)
            mean = mean_row(table[:used], used)
            placed = {**dict.fromkeys(new, mean), **placed}
        at = 0
        for i in sorted(placed):
            if at < i:
                yield table[at:i]
            yield placed[i][None].to(table)
            at = i + 1
        if at < before:
            yield table[at:]


@dataclass
class _Plan:
    """Every tensor of the whole model and where it comes from."""

    config: AVLlavaConfig
    transfers: dict[str, _Weight]
    """By names on disk."""
    expected: dict[str, tuple[int, ...]]
    dropped: dict[str, tuple[str, ...]]
    n_merged: int

    @classmethod
    def of(cls, opened: Opened, scratch: Path) -> _Plan:
        """Find all tensors; no weights are read but those of the folder with the parts."""
        config = with_rows(opened.config, opened.rows)
        model = empty_model(config)
        found = dict(named_tensors(opened.base))
        for prefix, places in _towers(opened).items():
            found |= _stored(tower_tensors(prefix, places, model), scratch)
        found |= {memory_name(key): stored for key, stored in opened.folder.stored.items()}
        expected = disk_shapes(model)
        dropped: dict[str, tuple[str, ...]] = {}
        if config.tie_word_embeddings:
            expected.pop(HEAD, None)
            if found.pop(HEAD, None) is not None:
                dropped[TIED] = (HEAD,)
        layers: dict[str, LoraLayer] = {}
        if opened.folder.is_adapter:
            lora = read_lora(opened.folder)
            check_untied(model, lora)
            layers = layers_of(lora, model)
        transfers = {
            disk_name(name): _Weight(stored, disk_name(name), **_changes(name, layers))
            for name, stored in found.items()
        }
        _place_rows(transfers, opened)
        return cls(config, transfers, expected, dropped, len(layers))

    def report(self, opened: Opened) -> Report:
        """The account of the tensors."""
        known: Any = self.transfers  # has names and shapes, as stored tensors have
        note = (
            f"A LoRA on {self.n_merged} modules is added to the weights of {opened.base.path}."
            if self.n_merged
            else f"The parts are put together with {opened.base.path}."
        )
        return replace(
            account(known, self.expected),
            source=str(opened.folder.path),
            dropped=self.dropped,
            notes=(note,),
        )


def _towers(opened: Opened) -> dict[str, list[str]]:
    """Places of towers that lie neither in the folder nor in the base."""
    found = opened.recorded_towers()
    if opened.tower is not None and not opened.holds_vision_tower:
        if opened.tower.folder is None:
            raise CheckpointError(
                f"The weights of the tower {opened.tower.name!r} are not at hand."
            )
        found[VISION] = [str(opened.tower.folder)]
    return found


def _stored(tensors: Mapping[str, Any], scratch: Path) -> dict[str, StoredTensor]:
    """Tensors in files that can be read one at a time; others are written into one first."""
    loose = {k: v.contiguous() for k, v in tensors.items() if isinstance(v, Tensor)}
    found = {k: v for k, v in tensors.items() if k not in loose}
    if loose:
        file = scratch / f"{AUDIO}safetensors"
        save_file(loose, file)
        found |= {t.name: t for t in tensors_in([file])}
    return found


def _changes(name: str, layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """What a LoRA changes about a tensor."""
    module, _, kind = name.rpartition(".")
    layer = layers.get(module)
    if layer is None or (kind == "bias" and not layer.has_bias):
        return {}
    return {"layer": layer, "is_bias": kind == "bias"}


def _place_rows(transfers: dict[str, _Weight], opened: Opened) -> None:
    """Tell the embedding and the head of new tokens."""
    table = transfers.get(disk_name(EMBEDDING))
    if table is None:
        return
    width = table.stored.shape[1]
    rows = rows_by_id(
        opened.tokenizer,
        opened.token_rows(width),
        opened.rows,
        width,
        opened.folder.path / TOKEN_ROWS,
    )
    for name, kind in _TABLES.items():
        found = transfers.get(disk_name(name))
        if found is not None:
            transfers[found.name] = replace(
                found, rows=opened.rows, fresh=opened.fresh, tokens=rows[kind]
            )


# ---------------------------------------------------------------- verifying


def _compare(source: str | Path, opened: Opened, made: Path, notes: list[str]) -> float:
    """Logits with the LoRA attached against added; then every written weight against the sum."""
    attached = load_partial(
        source, opened.base_name, device="cpu", dtype=torch.float32, merge=False
    ).model.float()  # the LoRA, too, which has a type of its own
    inputs = _with_tokens(fixed_input(attached), opened)
    expected = logits_of(attached, inputs)
    for module in attached.modules():
        if isinstance(module, PeftLayer):
            module.merge()
    difference = largest_difference(expected, logits_of(attached, inputs))
    _check_weights(split_merged(attached), made)
    del attached
    gc.collect()
    rounded = largest_difference(expected, logits_of(load_float32(made), inputs))
    notes.append(
        f"Attached and added, the logits differ by at most {difference:.3g} in float32; with the "
        f"weights rounded as they are written, by {rounded:.3g}."
    )
    return difference


def _with_tokens(inputs: dict[str, Any], opened: Opened) -> dict[str, Any]:
    """The input with the tokens at its end whose rows the folder holds."""
    names = {key.split(".", 1)[1] for key in opened.folder.token_rows}
    vocabulary = opened.tokenizer.get_vocab()
    ids = torch.tensor([[vocabulary[token] for token in sorted(names)]], dtype=torch.long)
    return {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], dim=1)}


def split_merged(model: AVLlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Weights of a model whose LoRA is merged in place, by their names on disk."""
    for module in model.modules():
        if isinstance(module, PeftLayer):
            module.merged_adapters.clear()  # so that it counts as taken out
    return on_disk(model.config, split(model).weights)


def _check_weights(expected: Mapping[str, Tensor], made: Path) -> None:
    """Raise unless every written weight is the sum, rounded to its type."""
    stored = {t.name: t for t in stored_tensors(CheckpointFolder(made))}
    with TensorReader() as reader:
        for name in sorted(stored, key=lambda n: (str(stored[n].file), stored[n].offset or 0)):
            found, wanted = reader.read(stored[name]), expected[name]
            if not found.is_floating_point():
                continue
            kind = torch.finfo(found.dtype)
            slack = (kind.eps / 2 + 1e-6) * wanted.abs() + 1e-6 * wanted.abs().max() + kind.tiny
            worst = (found.float() - wanted).abs() - slack
            if not bool((worst <= 0).all()):
                raise CheckpointError(
                    f"{made / stored[name].file.name}: {name!r} is not the weight of the base with "
                    f"the LoRA added. Nothing was kept."
                )
