"""Checkpoints that stand on a base: projector only, LLaVA's LoRA folders, and our own adapters.

Contract: the folder gives the configuration and some weights, the base gives the rest; every
parameter comes from one of them or from a tower's folder. A LoRA is attached by the exact names of
its modules, so that it can never land on another network. What LLaVA splits over ``mm_projector``,
``non_lora_trainables`` and ``adapter_model`` is read in all its spellings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from av_llava.checkpoints.folder import CheckpointFolder, load_pickle, read_json
from av_llava.checkpoints.load import (
    Loaded,
    check_report,
    fill_vision_tower,
    generation_config,
    load_checkpoint,
    locate,
    materialise,
    read_config,
)
from av_llava.checkpoints.quantize import check_scheme, plan_weights, quantized_layers
from av_llava.checkpoints.target import check_device_map, resolve_device
from av_llava.checkpoints.tokenizers import load_tokenizer
from av_llava.checkpoints.tokens import ensure_tokens
from av_llava.errors import CheckpointError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.weight_names import ignored, memory_name

ADAPTER_CONFIG = "adapter_config.json"
# Files with weights that are neither the base's nor a LoRA's, in the order in which they win.
EXTRA_FILES = (
    "mm_projector.safetensors",
    "mm_projector.bin",
    "non_lora_trainables.safetensors",
    "non_lora_trainables.bin",
    "multimodal.safetensors",
)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PEFT_PREFIX = "base_model.model."
_OWN_PARTS = (
    "mm_projector.",
    "image_newline",
    "faster_token",
    "vision_tower.",
    "audio_tower.",
    "mm_audio_projector.",
)
_LORA_KEY = re.compile(r"^(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB])(\.weight)?$")


@dataclass(frozen=True)
class PartialFolder(CheckpointFolder):
    """A folder with its base: the keys are those of both."""

    base: CheckpointFolder | None = None

    @cached_property
    def extra(self) -> dict[str, Tensor]:
        """Weights of the folder itself, under names on disk."""
        state: dict[str, Tensor] = {}
        for name in EXTRA_FILES:
            if self.holds(name):
                state |= {disk_key(k): v for k, v in _read(self.path / name).items()}
        return {k: v for k, v in state.items() if not ignored(k)}

    @cached_property
    def keys(self) -> frozenset[str]:  # type: ignore[override]
        """Names on disk of all tensors of the folder and its base."""
        base = frozenset() if self.base is None else self.base.keys
        return base | frozenset(self.extra)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a LoRA."""
        return self.holds(ADAPTER_CONFIG)


def is_partial(folder: CheckpointFolder) -> bool:
    """Whether a folder needs a base: it holds parts, but no whole model."""
    has_part = any(folder.holds(name) for name in (*EXTRA_FILES, ADAPTER_CONFIG))
    whole = any(
        folder.holds(name)
        for name in (
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        )
    )
    return has_part and not whole


def disk_key(key: str) -> str:
    """A key without what PEFT and LLaVA's training scripts put before it.

    ``base_model.model.model.mm_projector.0.weight``, ``model.model.mm_projector.0.weight`` and
    ``mm_projector.0.weight`` are one.
    """
    key = key.removeprefix("base_model.model.").removeprefix("base_model.")
    key = key.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
    while key.startswith("model.model."):
        key = key.removeprefix("model.")
    return f"model.{key}" if key.startswith(_OWN_PARTS) else key


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    state = load_file(file) if file.suffix == ".safetensors" else load_pickle(file)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{file} holds more than tensors by name.")
    return dict(state)


def base_of(folder: CheckpointFolder, base: str | Path | None) -> CheckpointFolder:
    """The base that was given, or the one that the adapter names.

    Raises:
        CheckpointError: none is known.
    """
    if base is None and folder.holds(ADAPTER_CONFIG):
        base = read_json(folder.path / ADAPTER_CONFIG).get("base_model_name_or_path") or None
    if base is None and folder.holds("config.json"):
        base = folder.config.get("av_llava_base")
    if base is None:
        raise CheckpointError(
            f"{folder.path} holds only parts of a model (an adapter or a projector) and names no "
            f"base. Give the language model or checkpoint that it was trained on as model_base "
            f"(--base)."
        )
    beside = folder.path / str(base)
    return locate(beside if beside.is_dir() else base)


def load_partial(
    path: str | Path,
    base: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    overwrite_config: Mapping[str, Any] | None = None,
    quantize: str | None = None,
    merge: bool = True,
) -> Loaded:
    """Load a folder that stands on a base.

    Args:
        path: the folder with the parts.
        base: its base; None takes what the folder names.
        device, dtype, device_map, attn_implementation, overwrite_config, quantize: as for full
            checkpoints.
        merge: add a LoRA to the weights; False keeps it apart (``model`` is then a PEFT model).
            Weights that are quantised cannot take it up: it then stays beside them, inside the
            model.

    Raises:
        CheckpointError: something is missing, left over, or does not fit the base.
    """
    check_device_map(device_map)
    check_scheme(quantize)
    target = resolve_device(device)
    parts = locate(path)
    under = base_of(parts, base)
    under.check_files()
    folder = PartialFolder(parts.path, base=under)
    described = folder if folder.holds("config.json") else under
    source = PartialFolder(described.path, base=under) if described is not under else under
    config, tower = read_config(source, overwrite_config)
    plan = plan_weights(
        under, quantize, dtype=dtype, own_dtype=config.dtype, device=target, device_map=device_map
    )
    model, report = materialise(under, config, plan, attn_implementation=attn_implementation)
    missing, extra = set(report["missing_keys"]), dict(folder.extra)
    if tower is not None and not source.has("model.vision_tower."):
        missing -= fill_vision_tower(model, tower)
    filled = apply_weights(model, extra, parts.path)
    mismatched = [m for m in report["mismatched_keys"] if m[0] not in filled]
    check_report(under, missing - filled, {**report, "mismatched_keys": mismatched})
    tokenizer = load_tokenizer(_tokenizer_folder(parts, under), config)
    ensure_tokens(model, tokenizer)
    model.generation_config = generation_config(under, config)
    if folder.is_adapter:
        lora = attach_lora(model, folder, merge=merge and plan.scheme is None)
        model = lora.get_base_model() if merge and plan.scheme is not None else lora
    if plan.device_map is None:
        model.to(target)
    return Loaded(model.eval(), tokenizer, parts.path, tower)


def load_any(path: str | Path, base: str | Path | None = None, **options: Any) -> Loaded:
    """Load a checkpoint of any kind: whole, or standing on a base.

    Raises:
        CheckpointError: it cannot be loaded completely, or a whole one was given a base.
    """
    folder = locate(path)
    if is_partial(folder):
        return load_partial(path, base, **options)
    if base is not None:
        raise CheckpointError(
            f"{folder.path} holds a whole model, so it stands on no base: leave out {str(base)!r}."
        )
    return load_checkpoint(path, **options)


def _tokenizer_folder(parts: CheckpointFolder, base: CheckpointFolder) -> CheckpointFolder:
    return parts if parts.holds("tokenizer_config.json") else base


@torch.no_grad()
def apply_weights(
    model: AVLlavaForConditionalGeneration, state: Mapping[str, Tensor], where: Path
) -> set[str]:
    """Copy tensors under names on disk into the model; return the names in memory.

    Raises:
        CheckpointError: a name that the model does not have, or another shape.
    """
    own = model.state_dict()
    quantized = {f"{layer}.weight" for layer in quantized_layers(model)}
    filled = set()
    for key, value in state.items():
        name = memory_name(key)
        if name not in own:
            raise CheckpointError(
                f"{where} holds {key}, which the model does not have. Is its config.json the one "
                f"that it was trained with?"
            )
        if name in quantized:
            raise CheckpointError(
                f"{where} holds {key} as a whole, which a base in 4 or 8 bits cannot take. Load it "
                f"without quantize."
            )
        if own[name].shape != value.shape:
            raise CheckpointError(
                f"{where} holds {key} of shape {tuple(value.shape)}, but the model on this base "
                f"has {tuple(own[name].shape)}. It was trained on another base."
            )
        own[name].copy_(value)
        filled.add(name)
    return filled


def attach_lora(
    model: AVLlavaForConditionalGeneration, folder: CheckpointFolder, *, merge: bool
) -> Any:
    """Attach the LoRA of a folder by exact module names, and merge it if asked to.

    Raises:
        CheckpointError: it is not LoRA, or its modules or shapes are not the model's.
    """
    data = read_json(folder.path / ADAPTER_CONFIG)
    if data.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(
            f"{folder.path / ADAPTER_CONFIG} has peft_type {data['peft_type']!r}; only LoRA "
            f"adapters are read."
        )
    file = next((folder.path / n for n in _ADAPTER_FILES if folder.holds(n)), None)
    if file is None:
        raise CheckpointError(f"{folder.path} holds none of {', '.join(_ADAPTER_FILES)}.")
    state = {_lora_key(k): v for k, v in _read(file).items() if not _is_extra(k)}
    modules = _lora_modules(model, state, file)
    kept = {k: v for k, v in data.items() if k in _KEPT and v is not None}
    config = LoraConfig(target_modules=modules, inference_mode=True, **_patterns(kept))
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    result = set_peft_model_state_dict(wrapped, {_PEFT_PREFIX + k: v for k, v in state.items()})
    if result.unexpected_keys:
        raise CheckpointError(f"{file} holds keys of no use: {sorted(result.unexpected_keys)[:6]}.")
    return wrapped.merge_and_unload() if merge else wrapped


_KEPT = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
)


def _patterns(fields: dict[str, Any]) -> dict[str, Any]:
    """Rank and alpha patterns name modules as on disk; bring them into memory's names."""
    for name in ("rank_pattern", "alpha_pattern"):
        if name in fields:
            fields[name] = {_module_name(k): v for k, v in fields[name].items()}
    return fields


def _is_extra(key: str) -> bool:
    """Whether an adapter file's key is a whole weight, not a part of a LoRA."""
    return "lora_" not in key


def _module_name(name: str) -> str:
    """A module's name in memory."""
    return memory_name(disk_key(name) + ".weight").removesuffix(".weight")


def _lora_key(key: str) -> str:
    """A LoRA's key with the name in memory of its module."""
    match = _LORA_KEY.match(key.replace(".default", ""))
    if match is None:
        return disk_key(key)
    return f"{_module_name(match['module'])}.{match['part']}{match[3] or ''}"


def _lora_modules(model: Any, state: Mapping[str, Tensor], file: Path) -> list[str]:
    """Full names of the modules that a LoRA changes, checked against the model."""
    own = dict(model.named_modules())
    names = []
    for key, value in state.items():
        match = _LORA_KEY.match(key)
        if match is None:
            raise CheckpointError(f"{file} holds the key {key!r}, which is no part of a LoRA.")
        module = own.get(match["module"])
        if module is None or not hasattr(module, "weight"):
            raise CheckpointError(
                f"{file} changes {match['module']!r}, which the model does not have. It was made "
                f"for another base."
            )
        # Packed weights have another shape than their layer.
        width = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[1]
        if match["part"] == "lora_A" and value.shape[1] != width:
            raise CheckpointError(
                f"{file}: {key} has shape {tuple(value.shape)}, but its layer in this base takes "
                f"{width} channels. It was made for another base."
            )
        names.append(match["module"])
    return sorted(set(names))
