"""Our own adapter folders: everything that a model has and its base has not.

Contract: the folder alone loads the model again, to the same logits. It holds
``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT's format, the LoRA only),
``multimodal.safetensors`` (every other weight that differs from the base, under LLaVA's names),
``token_rows.safetensors`` (rows of tokens by their strings), ``config.json``,
``generation_config.json``, the tokenizer, and ``av_llava_adapter.json``, which names the base and
towers beside it. Files without content are left out. The same model gives the same bytes; the
folder appears whole or not at all.

What differs is found by comparing with the base, tensor by tensor. That reads the whole base, so
whoever saves again and again (a trainer) calls :func:`changed_names` once and hands the names in.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from av_llava.checkpoints.base import (
    AUDIO,
    EMBEDDING,
    HEAD,
    VISION,
    BaseTensors,
    probe,
)
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.load import locate
from av_llava.checkpoints.model_state import Split, split, unwrapped
from av_llava.checkpoints.parts import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    MULTIMODAL,
    RECORD,
    RECORD_FORMAT,
    TOKEN_ROWS,
    PartialFolder,
    Reference,
    is_partial,
)
from av_llava.checkpoints.quantize import quantized_layers
from av_llava.checkpoints.staging import new_folder
from av_llava.checkpoints.tokens import INPUT, OUTPUT
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError, UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor
from av_llava.weight_names import disk_name

logger = logging.getLogger(__name__)

_TABLES = {EMBEDDING: INPUT, HEAD: OUTPUT}
_SHOWN = 6


def save_adapter(
    model: Any,
    processor: AVLlavaProcessor,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    changed: Collection[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write what a model has and its base has not, as a new folder.

    Args:
        model: with or without a LoRA; a ``PeftModel`` or the model itself.
        processor: of the model.
        folder: to make; must not exist.
        base: path or hub id of the checkpoint or language model that it stands on; None takes the
            one that the model was loaded from.
        changed: names of weights to save without comparing (:func:`changed_names`); all others are
            taken to be the base's. None compares with the base.
        state_dict: of ``model``, where its parameters are spread over processes.

    Returns:
        The folder.

    Raises:
        UsageError: an adapter of another kind, a merged one, or parameters that are not all here.
        CheckpointError: the base is not the model's, or the folder exists or cannot be written.

    Example:
        >>> names = changed_names(peft_model, processor, base="vicuna-7b")
        >>> save_adapter(peft_model, processor, "run/step-100", base="vicuna-7b", changed=names)
    """
    inner = unwrapped(model)
    name, under = _base(inner, base)
    with new_folder(Path(folder), [under.path]) as partial:
        write_adapter(model, processor, partial, base=name, changed=changed, state_dict=state_dict)
    return Path(folder)


def write_adapter(
    model: Any,
    processor: AVLlavaProcessor,
    folder: Path,
    *,
    base: str | Path | None = None,
    changed: Collection[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """As :func:`save_adapter`, into a folder that exists, for callers with a staging of their own.

    The base is referred to from ``folder``: what it is renamed to must have the same parent.
    """
    inner = unwrapped(model)
    name, under = _base(inner, base)
    parts = split(model, state_dict)
    with BaseTensors(under, inner) as tensors:
        saved = _saved(parts, inner, processor, tensors, changed)
        record: dict[str, Any] = {
            "format": RECORD_FORMAT,
            "base": Reference.to(name, folder).to_dict(),
            "probe": probe(tensors.stored),
        }
        for prefix, key in ((VISION, "vision_tower"), (AUDIO, "audio_tower")):
            if prefix in tensors.towers:
                places = tensors.towers[prefix]
                record[key] = [Reference.to(place, folder).to_dict() for place in places]
    files = {MULTIMODAL: saved.weights, TOKEN_ROWS: saved.rows, ADAPTER_FILES[0]: parts.lora}
    record["files"] = [file for file, tensors in files.items() if tensors]
    _write_json(record, folder / RECORD)
    for file in record["files"]:
        _write_tensors(files[file], folder / file)
    if parts.lora:
        _write_json(_peft_config(parts, name), folder / ADAPTER_CONFIG)
    config = _own_config(inner, saved.tied)
    config.save_pretrained(folder)
    AVLlavaProcessor(processor.tokenizer, config, processor.chat_template).save_pretrained(folder)
    if inner.generation_config is not None:
        inner.generation_config.save_pretrained(folder)


def _own_config(model: AVLlavaForConditionalGeneration, tied: bool) -> AVLlavaConfig:
    """A copy of the configuration as the model is."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    if hasattr(config, "quantization_config"):  # of the base, which says so itself
        del config.quantization_config
    for part in (config.text_config, config.vision_config, config.audio_config):
        if part is not None:
            part.dtype = model.dtype
    if config.tie_word_embeddings and not tied:
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    return config


def changed_names(
    model: Any,
    processor: AVLlavaProcessor,
    *,
    base: str | Path | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> frozenset[str]:
    """Names in memory of the weights that training changes or has changed.

    They are those that differ from the base now, and those that require gradients. Call it when it
    is settled what trains.
    """
    inner = unwrapped(model)
    parts = split(model, state_dict)
    with BaseTensors(_base(inner, base)[1], inner) as tensors:
        differing = set(_saved(parts, inner, processor, tensors, None).names)
    return frozenset(differing | parts.trainable)


def _base(
    model: AVLlavaForConditionalGeneration, base: str | Path | None
) -> tuple[str, CheckpointFolder]:
    """The base to save against: an adapter of our own without a LoRA stands for its base."""
    name = str(base) if base is not None else _loaded_on(model)
    if not name:
        raise UsageError(
            "Name the base that the adapter stands on: the checkpoint or language model from "
            "which training started."
        )
    folder = locate(name)
    if not is_partial(folder):
        return name, folder
    parts = PartialFolder(folder.path)
    if parts.is_adapter or parts.record is None:
        raise CheckpointError(
            f"The base {folder.path} holds only parts of a model itself. Put it on its own base "
            f"first: av-llava convert merge-lora {folder.path} DESTINATION."
        )
    found = Reference.from_dict(parts.record.get("base"), parts.path / RECORD).find(parts.path)
    return _base(model, found)


def _loaded_on(model: AVLlavaForConditionalGeneration) -> str | None:
    """Where the model was loaded from; an adapter knows its base."""
    for config in (getattr(model, "peft_config", None) or {}).values():
        if config.base_model_name_or_path:
            return str(config.base_model_name_or_path)
    return model.name_or_path or None


def _peft_config(parts: Split, base: str) -> dict[str, Any]:
    """The LoRA's settings as its layers have them, so that nothing depends on how they were given.

    PEFT's own loader takes them, too: modules and patterns are exact names.
    """
    assert parts.config is not None
    rank, alpha = parts.config.r, parts.config.lora_alpha
    ranks, alphas = {}, {}
    for name, layer in sorted(parts.layers.items()):
        own_rank = layer.r[parts.adapter]
        own_alpha = _alpha(layer, parts.adapter, own_rank, parts.config.use_rslora)
        if own_rank != rank:
            ranks[name] = own_rank
        if own_alpha != alpha:
            alphas[name] = own_alpha
    return {
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": parts.config.lora_dropout,
        "lora_bias": parts.config.lora_bias,
        "use_rslora": parts.config.use_rslora,
        "use_dora": parts.config.use_dora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(parts.layers),
    }


def _alpha(layer: LoraLayer, adapter: str, rank: int, root: bool) -> float:
    """The alpha that gives the layer's scaling, which may have been changed since."""
    scaling, alpha = layer.scaling[adapter], layer.lora_alpha[adapter]
    over = math.sqrt(rank) if root else rank
    return alpha if alpha / over == scaling else scaling * over


# ---------------------------------------------------------------- what is saved


@dataclass(frozen=True)
class _Saved:
    weights: dict[str, Tensor]
    """By names on disk."""
    names: frozenset[str]
    """The same, by names in memory."""
    rows: dict[str, Tensor]
    """Rows of tokens, by ``input.<token>`` and ``output.<token>``."""
    tied: bool
    """Whether embedding and head are one matrix."""


def _saved(
    parts: Split,
    model: AVLlavaForConditionalGeneration,
    processor: AVLlavaProcessor,
    base: BaseTensors,
    changed: Collection[str] | None,
) -> _Saved:
    """Choose the weights and rows that differ from the base."""
    weights = dict(parts.weights)
    tied = _is_tied(parts, model)
    if tied:
        weights.pop(HEAD, None)
    _check_base(parts, base)
    packed = {f"{name}.weight" for name in quantized_layers(model)}
    weights = {k: v for k, v in weights.items() if not _is_packed(k, packed)}
    tables = {k: weights.pop(k) for k in _TABLES if k in weights}
    for prefix in list(base.towers):
        _settle_tower(prefix, weights, base, changed)
    out = {k: v for k, v in weights.items() if _differs(k, v, base, changed)}
    rows: dict[str, Tensor] = {}
    for name, table in tables.items():
        found = _Table(name, table, parts, processor, base)
        if found.differs(changed):
            out[name] = found.effective()
        rows |= found.rows()
    return _Saved({disk_name(k): v for k, v in out.items()}, frozenset(out), rows, tied)


def _is_packed(name: str, packed: Collection[str]) -> bool:
    """Whether a tensor is of a quantised layer, which cannot have been trained."""
    module, _, last = name.rpartition(".")
    if last in ("weight", "SCB", "weight_format") or last.startswith("_weight_"):
        return f"{module}.weight" in packed
    return any(name.startswith(f"{weight}.") for weight in packed)


def _is_tied(parts: Split, model: AVLlavaForConditionalGeneration) -> bool:
    """Whether embedding and head are one matrix, as the configuration says.

    PEFT copies a matrix that it trains as a whole, and so unties it.
    """
    if not model.config.tie_word_embeddings:
        return False
    table, head = parts.weights.get(EMBEDDING), parts.weights.get(HEAD)
    if table is None or head is None:
        return True
    same = table.data_ptr() == head.data_ptr() or torch.equal(table, head)
    trained = [parts.rows.get(name) for name in (EMBEDDING, HEAD)]
    if trained[0] is None or trained[1] is None:
        return same and trained[0] is trained[1]
    return same and trained[0][0] == trained[1][0] and torch.equal(trained[0][1], trained[1][1])


def _check_base(parts: Split, base: BaseTensors) -> None:
    """Raise if the base holds what the model does not have, or language-model weights of other
    shapes."""
    unknown = sorted(name for name in base.own if name not in parts.weights)
    experts = [name for name in unknown if ".experts." in name]
    if experts:
        raise CheckpointError(
            f"Adapters of mixtures of experts are not supported: {base.folder.path} holds each "
            f"expert apart ({experts[0]}), the model holds those of a layer as one tensor. Save "
            f"the whole model with save_pretrained."
        )
    wrong = [
        f"{base.stored[name].name} (the base has {base.shape(name)}, the model "
        f"{tuple(value.shape)})"
        for name, value in parts.weights.items()
        if name in base.own
        and name not in _TABLES
        and name.startswith("model.language_model.")
        and value.is_floating_point()
        and base.stored[name].dtype.is_floating_point
        and base.shape(name) != tuple(value.shape)
    ]
    if unknown or wrong:
        said = [f"the model lacks {', '.join(unknown[:_SHOWN])}"] if unknown else []
        said += [f"shapes differ: {'; '.join(wrong[:_SHOWN])}"] if wrong else []
        raise CheckpointError(
            f"{base.folder.path} is not the base of this model: {'; '.join(said)}."
        )


def _settle_tower(
    prefix: str, weights: dict[str, Tensor], base: BaseTensors, changed: Collection[str] | None
) -> None:
    """Keep to a tower beside the base only if the model's is that tower to the last bit."""
    names = [k for k in weights if k.startswith(prefix)]
    if any(_differs(k, weights[k], base, changed) for k in names):
        base.drop_tower(prefix)


def _differs(name: str, value: Tensor, base: BaseTensors, changed: Collection[str] | None) -> bool:
    """Whether a weight has to be saved."""
    if name not in base or base.shape(name) != tuple(value.shape):
        return True
    if changed is not None:
        return name in changed
    return not torch.equal(base.read(name).to(value.dtype), value.detach().cpu())


class _Table:
    """The embedding or the head: rows that are saved by token, or the whole matrix."""

    def __init__(
        self,
        name: str,
        table: Tensor,
        parts: Split,
        processor: AVLlavaProcessor,
        base: BaseTensors,
    ) -> None:
        self.name, self.table, self.base = name, table, base
        self.tokenizer = processor.tokenizer
        self.trained_ids, self.trained = parts.rows.get(name, ([], table[:0]))
        added = self.tokenizer.get_added_vocab().values()
        self.ids = sorted({*(i for i in added if i < len(table)), *self.trained_ids})
        self.n_base = base.shape(name)[0] if name in base else 0
        if name in base and (self.n_base > len(table) or base.shape(name)[1:] != table.shape[1:]):
            raise CheckpointError(
                f"{base.folder.path} is not the base of this model: {base.stored[name].name} has "
                f"shape {base.shape(name)} there, and {tuple(table.shape)} in the model."
            )

    def effective(self) -> Tensor:
        """The matrix with the rows that PEFT trains beside it. [V, D]"""
        if not self.trained_ids:
            return self.table
        out = self.table.detach().clone()
        out[self.trained_ids] = self.trained.to(out)
        return out

    def differs(self, changed: Collection[str] | None) -> bool:
        """Whether rows other than the tokens' have to be saved."""
        if self.name not in self.base:
            return True
        if set(range(self.n_base, len(self.table))) - set(self.ids):
            return True
        if changed is not None:
            return self.name in changed
        mine = self.table.detach()[: self.n_base].cpu()
        theirs = self.base.read(self.name).to(mine.dtype)
        unequal = (mine != theirs).any(1)
        unequal[[i for i in self.ids if i < self.n_base]] = False
        return bool(unequal.any())

    def rows(self) -> dict[str, Tensor]:
        """Rows of tokens that are new, trained, or not the base's."""
        held = [i for i in self.ids if i < self.n_base]
        same: set[int] = set()
        values = self._values(self.ids)
        if held:
            theirs = self.base.rows(self.name, held).to(self.table.dtype)
            mine = torch.stack([values[i] for i in held]).cpu()
            same = {i for i, equal in zip(held, (mine == theirs).all(1), strict=True) if equal}
        return {_TABLES[self.name] + self._token(i): values[i] for i in self.ids if i not in same}

    def _values(self, ids: list[int]) -> dict[int, Tensor]:
        rows = {i: self.table.detach()[i] for i in ids}
        trained = dict(zip(self.trained_ids, self.trained.to(self.table.dtype), strict=True))
        return {**rows, **trained}

    def _token(self, i: int) -> str:
        token: Any = self.tokenizer.convert_ids_to_tokens(i)
        if token is None:
            raise UsageError(
                f"The row {i} of {self.name} is trained, but the tokenizer has no token of this id."
            )
        return str(token)


# ---------------------------------------------------------------- files


def _write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    whole = {name: value.detach().contiguous() for name, value in sorted(tensors.items())}
    seen: set[int] = set()
    for name, value in whole.items():  # safetensors refuses tensors that share memory
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            whole[name] = value.clone()
        seen.add(storage.data_ptr())
    save_file(whole, file, metadata={"format": "pt"})
    shutil.copymode(file.with_name(RECORD), file)  # safetensors lets nobody else read it


def _write_json(data: Mapping[str, Any], file: Path) -> None:
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
