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
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from av_llava.checkpoints.adapter_contents import differing
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
from av_llava.checkpoints.staging import new_folder
from av_llava.checkpoints.tokens import INPUT, OUTPUT
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError, UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor

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
        saved = differing(parts, inner, processor, tensors, changed)
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
        names = differing(parts, inner, processor, tensors, None).names
    return frozenset(names | parts.trainable)


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
