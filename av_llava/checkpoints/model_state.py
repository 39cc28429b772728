"""A model's tensors by their plain names, without what PEFT and others put around its modules.

Contract: nothing is copied or changed. What a forward pass would use is what is found: a copy that
PEFT trains (``modules_to_save``) stands for the original, rows that it trains beside a matrix are
named with their ids, the LoRA is kept apart in PEFT's own format.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from av_llava.checkpoints.lora import OTHER_KINDS, PEFT_PREFIX
from av_llava.checkpoints.parts import is_lora_key
from av_llava.errors import UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "module.")


def unwrapped(model: Any) -> AVLlavaForConditionalGeneration:
    """The model inside what PEFT, ``torch.compile`` or data parallelism put around it."""
    while not isinstance(model, AVLlavaForConditionalGeneration):
        for name in ("module", "_orig_mod", "get_base_model"):
            inner = getattr(model, name, None)
            if inner is not None:
                model = inner() if name == "get_base_model" else inner
                break
        else:
            raise UsageError(
                f"An adapter is saved of AVLlavaForConditionalGeneration or of a PeftModel around "
                f"it, not of a {type(model).__name__}."
            )
    return model


@dataclass
class Split:
    """A model's tensors by their plain names in memory, and its LoRA."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    """Rows that PEFT trains beside a matrix: name of the matrix, ids, rows [n, D]."""
    trainable: set[str] = field(default_factory=set)
    """Plain names of whole weights that require gradients."""
    lora: dict[str, Tensor] = field(default_factory=dict)
    """By PEFT's names."""
    layers: dict[str, LoraLayer] = field(default_factory=dict)
    """LoRA layers by the plain names of their modules."""
    adapter: str = "default"
    config: LoraConfig | None = None


def split(model: Any, state_dict: Mapping[str, Tensor] | None = None) -> Split:
    """Take a model apart; tensors are not copied.

    Raises:
        UsageError: adapters of another kind or several, a merged LoRA, or incomplete parameters.
    """
    parts = Split()
    configs = dict(getattr(model, "peft_config", None) or {})
    modules = {_plain(name): module for name, module in model.named_modules()}
    parts.layers = {n: m for n, m in modules.items() if isinstance(m, LoraLayer)}
    trained_rows = {n: m for n, m in modules.items() if isinstance(m, TrainableTokensLayer)}
    tuned = [m for m in modules.values() if isinstance(m, BaseTunerLayer)]
    if tuned:
        parts.adapter, parts.config = _only_adapter(configs)
        _check_apart(tuned)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    parts.weights = _whole(state, parts.adapter)
    for name, module in trained_rows.items():
        table = name.removesuffix(".token_adapter") + ".weight"
        rows = _trained_rows(name, module, state, parts.adapter)
        parts.rows[table] = (list(module.token_indices[parts.adapter]), rows)
    if parts.layers:
        parts.lora = _lora_state(model, state, parts.adapter)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    parts.trainable = {n for k in trainable if (n := _plain_key(k, parts.adapter)) is not None}
    _check_here({**parts.weights, **parts.lora})
    return parts


def _whole(state: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """Whole weights by their plain names."""
    weights: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    for key, value in state.items():
        name = _plain_key(key, adapter)
        if name is None:
            continue
        if name in weights and weights[name].data_ptr() != value.data_ptr():
            raise UsageError(
                f"PEFT keeps two copies of {name!r} ({keys[name]!r} and {key!r}), because a short "
                f"name in modules_to_save fits two modules. Name the module with its parent, such "
                f"as 'model.vision_tower'."
            )
        weights[name], keys[name] = value, key
    return weights


def _plain(name: str) -> str:
    """A module's name without the wrappers around it."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    name = name.removeprefix(PEFT_PREFIX)
    return name.replace("._fsdp_wrapped_module", "").replace("._orig_mod", "")


def _plain_key(key: str, adapter: str) -> str | None:
    """The plain name of a whole weight; None for the rest of what PEFT keeps."""
    name = _plain(key)
    if is_lora_key(name) or ".trainable_tokens_" in name or ".original_module." in name:
        return None
    before, kept, after = name.partition(".modules_to_save.")
    if kept:
        name = f"{before}.{after.removeprefix(f'{adapter}.')}"
    return name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")


def _only_adapter(configs: Mapping[str, Any]) -> tuple[str, LoraConfig]:
    if len(configs) != 1:
        raise UsageError(
            f"The model carries {len(configs)} adapters ({', '.join(configs) or 'none'}); exactly "
            f"one can be saved. Delete the others, or merge them."
        )
    (name, config), *_ = configs.items()
    data = config.to_dict()
    special = [kind for kind in OTHER_KINDS if data.get(kind)]
    if not isinstance(config, LoraConfig) or special:
        kind = ", ".join(special) or type(config).__name__
        raise UsageError(f"Only plain LoRA adapters can be saved here, not {kind}.")
    return name, config


def _check_apart(layers: Collection[Any]) -> None:
    if any(layer.merged for layer in layers):
        raise UsageError(
            "The adapter is merged into the weights for now (merge_adapter): take it out "
            "(unmerge_adapter) before it is saved, or it would count twice."
        )


def _check_here(tensors: Mapping[str, Tensor]) -> None:
    """Raise for parameters whose values are not in this process."""
    gone = [n for n, v in tensors.items() if v.is_meta or (not v.numel() and 0 in v.shape)]
    if gone:
        raise UsageError(
            f"{len(gone)} weights are offloaded or spread over processes ({gone[0]!r}). Gather "
            f"them and hand them in as state_dict, or save a model that is in memory."
        )


def _trained_rows(
    name: str, module: TrainableTokensLayer, state: Mapping[str, Tensor], adapter: str
) -> Tensor:
    """Rows from the state that was handed in, else from the module. [n, D]

    Of matrices that are tied, PEFT may keep them with the other one.
    """
    wanted = f"{name}.trainable_tokens_delta.{adapter}"
    found = [v for k, v in state.items() if _plain(k) == wanted]
    if not found:
        found = [v for k, v in state.items() if k.endswith(f".trainable_tokens_delta.{adapter}")]
    return found[0] if found else module.trainable_tokens_delta[adapter].detach()


def _lora_state(model: Any, state: dict[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """The LoRA in PEFT's format, modules under their names in memory."""
    found = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter, save_embedding_layers=False
    )
    return {PEFT_PREFIX + _plain(k): v for k, v in found.items() if is_lora_key(k)}
