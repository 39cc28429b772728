"""LoRA files: read under our names, attached to a model, and added to weights tensor by tensor.

Contract: a LoRA is attached by the exact names of its modules, so that it can never land on another
network, and in the type in which it is stored. Every tensor of its file is used. The arithmetic is
that of PEFT (LoRA, arXiv:2106.09685; rank-stabilised, arXiv:2312.03732; DoRA, arXiv:2402.09353).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor

from av_llava.checkpoints.folder import CheckpointFolder, read_json, sentence
from av_llava.checkpoints.parts import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    disk_key,
    is_lora_key,
    read_tensors,
)
from av_llava.errors import CheckpointError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.weight_names import memory_name

PEFT_PREFIX = "base_model.model."
_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(?P<kind>\.weight|\.bias)?$"
)
# Settings that are taken over; what else PEFT writes is about training, or refused.
_KEPT = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias")
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Kinds of LoRA that compute something else; their defaults are false, null or empty.
OTHER_KINDS = (
    "fan_in_fan_out",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_PIECE_VALUES = 2**24


@dataclass(frozen=True)
class Lora:
    """A LoRA as its folder holds it."""

    file: Path
    settings: Mapping[str, Any]
    """Of ``adapter_config.json``; patterns are over names in memory."""
    state: Mapping[str, Tensor]
    """PEFT's names without its prefix, modules by their names in memory."""

    @property
    def modules(self) -> list[str]:
        """Names in memory of the modules that it changes, in order."""
        return sorted({_split(key, self.file)["module"] for key in self.state})


def read_lora(folder: CheckpointFolder) -> Lora:
    """Read a folder's LoRA.

    Raises:
        CheckpointError: it is another kind of adapter, or its file is missing, damaged, or holds
            something else.
    """
    data = read_json(folder.path / ADAPTER_CONFIG)
    kind = data.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(
            f"{folder.path / ADAPTER_CONFIG} has peft_type {kind!r}; only LoRA adapters are read."
        )
    special = [name for name in OTHER_KINDS if data.get(name)]
    if special:
        raise CheckpointError(
            f"{folder.path / ADAPTER_CONFIG} sets {', '.join(special)}, which is not supported. "
            f"Merge the adapter with the program that trained it, and load the result."
        )
    file = next((folder.path / n for n in ADAPTER_FILES if folder.holds(n)), None)
    if file is None:
        raise CheckpointError(f"{folder.path} holds none of {', '.join(ADAPTER_FILES)}.")
    state = {_lora_key(k): v for k, v in read_tensors(file).items() if is_lora_key(k)}
    settings = {k: v for k, v in data.items() if k in _KEPT and v is not None}
    for name in _PATTERNS:
        settings[name] = {_module_name(k): v for k, v in (data.get(name) or {}).items()}
    lora = Lora(file, settings, state)
    if not lora.modules:
        raise CheckpointError(f"{file} holds no LoRA: no name in it has lora_A or lora_B.")
    return lora


def _split(key: str, file: Path) -> re.Match[str]:
    match = _KEY.match(key)
    if match is None:
        raise CheckpointError(f"{file} holds the key {key!r}, which is no part of a LoRA.")
    return match


def _module_name(name: str) -> str:
    """A module's name in memory."""
    return memory_name(disk_key(name) + ".weight").removesuffix(".weight")


def _lora_key(key: str) -> str:
    """A LoRA's key with the name in memory of its module."""
    match = _KEY.match(key.replace(".default", ""))
    if match is None:
        return disk_key(key)
    return f"{_module_name(match['module'])}.{match['part']}{match['kind'] or ''}"


# ---------------------------------------------------------------- attached


def attach_lora(model: AVLlavaForConditionalGeneration, lora: Lora, *, merge: bool) -> Any:
    """Put a LoRA onto a model, in place; with ``merge`` add it to the weights.

    Raises:
        CheckpointError: its modules or shapes are not the model's, or it cannot be merged.
    """
    check_fit(model, lora)
    if merge:
        check_untied(model, lora)
    config = LoraConfig(target_modules=lora.modules, inference_mode=True, **lora.settings)
    if merge:
        wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
        _fill(wrapped, lora, PEFT_PREFIX)
        return wrapped.merge_and_unload()
    inject_adapter_in_model(config, model)
    _take_types(model, lora)
    _fill(model, lora, "")
    # As transformers marks a model that has an adapter, so that its own methods know.
    model._hf_peft_config_loaded = True
    return model


def check_untied(model: AVLlavaForConditionalGeneration, lora: Lora) -> None:
    """Raise if merging would change a matrix that is used twice.

    Raises:
        CheckpointError: it would.
    """
    tables = ("model.language_model.embed_tokens", "lm_head")
    tied = [name for name in tables if name in lora.modules]
    if tied and model.config.tie_word_embeddings:
        raise CheckpointError(
            f"{lora.file} changes {tied[0]!r}, but embedding and head are one matrix in this "
            f"model, so merging would change both. Keep the LoRA apart (merge=False)."
        )


def has_lora(model: Any) -> bool:
    """Whether a model carries a LoRA that is not merged."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def _fill(model: Any, lora: Lora, prefix: str) -> None:
    named = {prefix + k: v for k, v in lora.state.items()}
    try:
        result = set_peft_model_state_dict(model, named)
    except RuntimeError as error:  # torch's, for shapes that differ
        raise CheckpointError(
            f"{lora.file} does not fit its {ADAPTER_CONFIG}: {sentence(str(error))}"
        ) from error
    missing = [k for k in result.missing_keys if ".lora_" in k]
    if result.unexpected_keys or missing:
        raise CheckpointError(
            f"{lora.file} does not fit its {ADAPTER_CONFIG}. Missing: {sorted(missing)[:6]}. Of no "
            f"use: {sorted(result.unexpected_keys)[:6]}."
        )


def _take_types(model: torch.nn.Module, lora: Lora) -> None:
    """Bring the LoRA's empty tensors into the types of its file; PEFT makes them the weights'."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            key = name.replace(".default", "")
            stored = lora.state.get(key, lora.state.get(key.removesuffix(".weight")))
            if stored is not None:
                parameter.data = parameter.data.to(stored.dtype)


def check_fit(model: torch.nn.Module, lora: Lora) -> None:
    """Raise unless a LoRA's modules and shapes are those of a model, which may be without values.

    Raises:
        CheckpointError: they are not.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    linear = {
        n: (m.in_features, m.out_features)
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    for key, value in lora.state.items():
        match = _split(key, lora.file)
        module, part = match["module"], match["part"]
        weight = shapes.get(f"{module}.weight")
        if weight is None:
            raise CheckpointError(
                f"{lora.file} changes {module!r}, which the model does not have. It was made for "
                f"another base."
            )
        wanted = weight if module not in linear else linear[module][::-1]
        side = {"lora_A": 1, "lora_B": 0, "lora_embedding_A": 0, "lora_embedding_B": 1}.get(part)
        own = {"lora_A": 1, "lora_B": 0, "lora_embedding_A": 1, "lora_embedding_B": 0}.get(part)
        if side is None or own is None or match["kind"] == ".bias" or value.ndim != 2:
            continue
        if value.shape[own] != wanted[side]:
            raise CheckpointError(
                f"{lora.file}: {key} has shape {tuple(value.shape)}, but the weight of its layer "
                f"in this base has shape {tuple(wanted)}. It was made for another base."
            )


# ---------------------------------------------------------------- added tensor by tensor


@dataclass
class LoraLayer:
    """What a LoRA changes in one module."""

    name: str
    parts: dict[str, Tensor] = field(default_factory=dict)
    """By PEFT's name and kind: ``lora_A.weight``."""
    scaling: float = 1.0

    def merged(self, weight: Tensor) -> Iterator[Tensor]:
        """The weight with the LoRA in it, a few rows at a time, in float32.

        Args:
            weight: of the base. [out, in], or [rows, D] of an embedding
        """
        left, right = self._factors()
        step = max(1, _PIECE_VALUES // max(1, weight[0].numel()))
        for at in range(0, len(weight), step):
            rows = slice(at, at + step)
            piece = weight[rows].float() + (left[rows] @ right) * self.scaling
            if "lora_magnitude_vector" in self.parts:
                size = self.parts["lora_magnitude_vector"].float()[rows]
                piece *= (size / torch.linalg.norm(piece, dim=1))[:, None]
            yield piece

    def merged_bias(self, bias: Tensor) -> Tensor:
        """The module's bias with that of ``lora_B`` in it, in float32. [out]"""
        return bias.float() + self.parts["lora_B.bias"].float() * self.scaling

    @property
    def has_bias(self) -> bool:
        """Whether the LoRA changes the bias, too."""
        return "lora_B.bias" in self.parts

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Left [out, r] and right [r, in] factor of what is added."""
        if "lora_A.weight" in self.parts:
            return self.parts["lora_B.weight"].float(), self.parts["lora_A.weight"].float()
        return (
            self.parts["lora_embedding_A"].float().T.contiguous(),
            self.parts["lora_embedding_B"].float().T.contiguous(),
        )


def layers_of(lora: Lora, model: torch.nn.Module) -> dict[str, LoraLayer]:
    """A LoRA's layers by the names in memory of their modules, checked against the model.

    Args:
        lora: of a folder.
        model: for names and shapes; may be on the meta device.

    Raises:
        CheckpointError: a module that the model lacks, another shape, or a kind of module that
            cannot be merged tensor by tensor.
    """
    check_fit(model, lora)
    layers = {name: LoraLayer(name) for name in lora.modules}
    for key, value in lora.state.items():
        match = _split(key, lora.file)
        part = match["part"] + (match["kind"] or "")
        part = part.removesuffix(".weight") if "magnitude" in part else part
        layers[match["module"]].parts[part] = value
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        if not isinstance(modules[name], (torch.nn.Linear, torch.nn.Embedding)):
            raise CheckpointError(
                f"{lora.file} changes {name!r}, a {type(modules[name]).__name__}; only linear "
                f"layers and embeddings are merged."
            )
        _check_complete(layer, lora.file)
        layer.scaling = _scaling(layer, lora.settings)
    return layers


def _check_complete(layer: LoraLayer, file: Path) -> None:
    pairs = ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"})
    if not any(pair <= layer.parts.keys() for pair in pairs):
        raise CheckpointError(
            f"{file} holds only {sorted(layer.parts)} for {layer.name!r}: a LoRA needs both of its "
            f"factors."
        )


def _scaling(layer: LoraLayer, settings: Mapping[str, Any]) -> float:
    """Alpha over rank, or over its square root."""
    down = layer.parts.get("lora_A.weight", layer.parts.get("lora_embedding_A"))
    assert down is not None
    rank = down.shape[0]
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in settings["alpha_pattern"].items():
        if re.match(rf"(.*\.)?({pattern})$", layer.name):
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))
