"""What trains and what is frozen, part by part; applied once, last, and counted.

Contract: after :func:`apply_trainable` exactly the declared parameters require gradients; they are
float32, whatever the rest is stored in; frozen parts stay in evaluation mode when the model is put
into training mode. Nothing may change ``requires_grad`` afterwards. A LoRA and the rows of the
audio tokens are put into the model in place, so that the model stays what it is.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from av_llava.checkpoints.lora import has_lora
from av_llava.checkpoints.model_state import unwrapped
from av_llava.checkpoints.quantize import quantized_layers
from av_llava.errors import UsageError, unknown_name
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.training.carried_lora import check_carried
from av_llava.training.precision import shrink_embedding
from av_llava.training.settings import ENCODERS, PARTS, LoraSettings, TrainableSettings
from av_llava.training.token_rows import make_lean

logger = logging.getLogger(__name__)

_WRAPPERS = re.compile(r"(?:^module\.|_fsdp_wrapped_module\.|_orig_mod\.|^base_model\.model\.)")
_ROWS = ".trainable_tokens_"
_NO_LORA = "dummy-target-modules"  # PEFT's word for an adapter that only has token rows
ADAPTER = "default"


@dataclass(frozen=True)
class PartRow:
    """One part of the model."""

    name: str
    mode: str
    """freeze, full, lora, last:N, or absent."""
    n_trained: int
    n_total: int
    lr: float | None = None
    weight_decay: float = 0.0


@dataclass(frozen=True)
class PartsTable:
    """What trains of a model, and how."""

    rows: tuple[PartRow, ...]

    @property
    def n_trained(self) -> int:
        """Parameters that train."""
        return sum(row.n_trained for row in self.rows)

    @property
    def n_total(self) -> int:
        """All parameters."""
        return sum(row.n_total for row in self.rows)

    def of(self, name: str) -> PartRow:
        """The row of a part."""
        return next(row for row in self.rows if row.name == name)

    def lines(self) -> list[str]:
        """The table for people."""
        head = f"{'part':<20}{'mode':<10}{'trained':>16}{'of':>16}{'lr':>10}{'decay':>8}"
        out = [head, "-" * len(head)]
        for row in self.rows:
            if row.mode == "absent":
                continue
            lr = f"{row.lr:.1e}" if row.lr is not None else ""
            decay = f"{row.weight_decay:g}" if row.n_trained else ""
            out.append(
                f"{row.name:<20}{row.mode:<10}{row.n_trained:>16,}{row.n_total:>16,}"
                f"{lr:>10}{decay:>8}"
            )
        share = self.n_trained / max(self.n_total, 1)
        total = f"{self.n_trained:>16,}{self.n_total:>16,}{share:>10.2%}"
        return [*out, f"{'together':<30}{total}"]


def plain_name(name: str) -> str:
    """A parameter's name without what PEFT, ``torch.compile`` and others put around modules."""
    return _WRAPPERS.sub("", name)


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name in memory with or without wrappers."""
    name = plain_name(name)
    if _ROWS in name:
        return "audio_token_rows"
    match = re.match(r"model\.(\w+)\.", name)
    if match is not None and match[1] in PARTS:
        return match[1]
    if name.startswith("lm_head."):
        return "language_model"
    raise AssertionError(f"the parameter {name!r} belongs to no part")


def apply_trainable(
    model: Any,
    trainable: TrainableSettings,
    lora: LoraSettings | None = None,
    *,
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> PartsTable:
    """Make exactly the declared parts trainable, in place.

    Args:
        model: as it was loaded; a LoRA that it carries is trained further where the language
            model trains as ``lora``.
        trainable: what trains.
        lora: the adapter that ``language_model: lora`` gets.
        learning_rate: of parts that name none (``training.learning_rate``).
        weight_decay: likewise.

    Raises:
        UsageError: the model lacks an encoder that should train, or what trains is quantised.
    """
    inner = unwrapped(model)
    modules = _modules(inner)
    for name in ENCODERS:
        if getattr(trainable, name).is_trained and modules.get(name) is None:
            raise UsageError(f"trainable.{name} trains, but the model has no {name}.")
    inner.requires_grad_(False)
    _attach(inner, trainable, lora or LoraSettings())
    for name, parameter in _declared(inner, trainable, modules):
        _train(name, parameter)
    shrink_embedding(inner)
    for name in PARTS:
        if not getattr(trainable, name).is_trained and modules.get(name) is not None:
            _keep_still(modules[name], recomputes=name not in ENCODERS)
    table = _table(inner, trainable, learning_rate, weight_decay)
    _check(inner, table, trainable)
    return table


def _modules(model: AVLlavaForConditionalGeneration) -> dict[str, Any]:
    """Each part's module; the head and the token rows have none of their own here."""
    own = model.model
    names = [n for n in PARTS if n != "audio_token_rows"]
    return {n: getattr(own, n) for n in names if getattr(own, n, None) is not None}


def _train(name: str, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point():
        raise UsageError(
            f"{name} is quantised and cannot train itself. Train a LoRA on it "
            f"(trainable.language_model=lora), or leave model.quantize out."
        )
    if parameter.dtype is not torch.float32:
        parameter.data = parameter.data.float()  # master weights: bfloat16 would lose small steps
    parameter.requires_grad_(True)


def _declared(
    model: AVLlavaForConditionalGeneration, trainable: TrainableSettings, modules: dict[str, Any]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are to train."""
    idle = _idle(modules)
    last = trainable.language_model.last_layers
    chosen = _last_layers(model, last) if last is not None else frozenset()
    mode = trainable.language_model.train
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part != "language_model":
            if getattr(trainable, part).is_trained and id(parameter) not in idle:
                yield name, parameter
        elif ".lora_" in name:
            if mode == "lora":
                yield name, parameter
        elif mode == "full" or id(parameter) in chosen:
            yield name, parameter


def _idle(modules: dict[str, Any]) -> frozenset[int]:
    """Parameters that no output depends on, which could never get a gradient."""
    found: set[int] = set()
    for name in ENCODERS:
        parameters = getattr(modules.get(name), "idle_parameters", None)
        if parameters is not None:
            found |= {id(parameter) for _, parameter in parameters()}
    return frozenset(found)


def _last_layers(model: AVLlavaForConditionalGeneration, n: int) -> frozenset[int]:
    """The last layers of the language model, and the norm after them."""
    layers = decoder_layers(model)
    if n > len(layers):
        raise UsageError(
            f"trainable.language_model=last:{n} asks for more layers than the language model has "
            f"({len(layers)})."
        )
    found = {id(p) for layer in layers[-n:] for p in layer.parameters()}
    body = model.model.language_model
    inside = {id(p) for layer in layers for p in layer.parameters()}
    table = {id(p) for p in body.get_input_embeddings().parameters()}
    rest = [p for p in body.parameters() if id(p) not in inside | table]
    return frozenset(found | {id(p) for p in rest if p.ndim == 1})


def decoder_layers(model: AVLlavaForConditionalGeneration) -> Sequence[nn.Module]:
    """The language model's layers, whatever its family calls them."""
    count = model.config.text_config.num_hidden_layers
    for module in model.model.language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UsageError("The layers of this language model cannot be found: last:N cannot be used.")


# ---------------------------------------------------------------- what is attached


def _attach(
    model: AVLlavaForConditionalGeneration, trainable: TrainableSettings, lora: LoraSettings
) -> None:
    """Put a LoRA and the rows of the audio tokens into the model, as far as they are declared."""
    mode = trainable.language_model.train
    carries = has_lora(model)
    if carries and mode != "lora":
        raise UsageError(
            "The model carries a LoRA that trainable.language_model would leave untrained: set it "
            "to lora, or model.merge=true to add it to the weights first."
        )
    if carries:
        check_carried(model, lora)
    ids = _row_ids(model, trainable)
    wants_lora = mode == "lora" and not carries
    if carries and ids:
        raise UsageError(
            "The rows of the audio tokens cannot train beside a LoRA that was loaded: set "
            "trainable.audio_token_rows=freeze, or model.merge=true for a new LoRA."
        )
    if not wants_lora and not ids:
        return
    name = "model.language_model." + _embedding_name(model)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha is not None else 2 * lora.rank,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=lora_targets(model, lora) if wants_lora else _NO_LORA,
        trainable_token_indices={name: ids} if ids else None,
        base_model_name_or_path=model.name_or_path or None,
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    make_lean(model)
    model._hf_peft_config_loaded = True  # as transformers marks a model that has an adapter


def _row_ids(
    model: AVLlavaForConditionalGeneration, trainable: TrainableSettings
) -> list[int] | None:
    """Ids of the start and end token, if their rows are to train apart from the embedding."""
    ids = model.config.au_token_ids
    if ids is None or not trainable.audio_token_rows.is_trained:
        return None
    return None if trainable.language_model.train == "full" else [int(i) for i in ids]


def _embedding_name(model: AVLlavaForConditionalGeneration) -> str:
    body = model.model.language_model
    table = body.get_input_embeddings()
    return next(name for name, module in body.named_modules() if module is table)


def lora_targets(model: AVLlavaForConditionalGeneration, lora: LoraSettings) -> list[str]:
    """Full names of the linear layers that get a LoRA; only the language model's.

    Raises:
        UsageError: a target that no layer has.
    """
    inside = [
        f"model.language_model.{name}"
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if lora.targets is None:
        return inside
    ends = {name.rpartition(".")[2] for name in inside}
    for target in lora.targets:
        if target not in ends:
            raise unknown_name("LoRA target", target, ends)
    return [name for name in inside if name.rpartition(".")[2] in lora.targets]


# ---------------------------------------------------------------- modes


def _keep_still(module: nn.Module, recomputes: bool) -> None:
    """Keep a frozen module in evaluation mode, whatever its parents are put into.

    Args:
        module: the frozen one.
        recomputes: whether gradients go through it, so that its layers may be checkpointed. Towers
            stand before all that trains.
    """
    module.train = functools.partial(_still, module, recomputes)  # type: ignore[method-assign]
    module.train(False)


def _still(module: nn.Module, recomputes: bool, mode: bool = True) -> nn.Module:
    """Take the place of ``module.train``.

    Layers that compute their activations twice only do so in training mode; what they hold stays
    in evaluation mode, so that nothing random happens. Dropout that a layer applies itself would
    (Whisper's), which is why towers have no such layers.
    """
    nn.Module.train(module, False)
    if mode and recomputes:
        for layer in module.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                layer.training = True
    return module


# ---------------------------------------------------------------- counts


def _table(
    model: AVLlavaForConditionalGeneration,
    trainable: TrainableSettings,
    learning_rate: float | None,
    weight_decay: float,
) -> PartsTable:
    total = dict.fromkeys(PARTS, 0)
    trained = dict.fromkeys(PARTS, 0)
    packed = {
        id(layer.weight): layer.in_features * layer.out_features
        for layer in quantized_layers(model).values()
    }
    for name, parameter in model.named_parameters():
        part = part_of(name)
        total[part] += packed.get(id(parameter), parameter.numel())
        trained[part] += parameter.numel() if parameter.requires_grad else 0
    rows = []
    for name in PARTS:
        part = getattr(trainable, name)
        mode = part.train if total[name] else "absent"
        lr = trainable.learning_rate(name, learning_rate) if trained[name] else None
        decay = weight_decay if part.weight_decay is None else part.weight_decay
        rows.append(PartRow(name, mode, trained[name], total[name], lr, decay))
    return PartsTable(tuple(rows))


def _check(
    model: AVLlavaForConditionalGeneration, table: PartsTable, trainable: TrainableSettings
) -> None:
    """Count what must be trained in another way than it was chosen, and compare."""
    modules = _modules(model)
    for row in table.rows:
        if row.mode == "freeze":
            wanted = 0
        elif row.name == "language_model":
            wanted = _language_model_count(model, trainable)
        elif row.mode == "full" and row.name in modules:
            module, idle = modules[row.name], _idle({row.name: modules[row.name]})
            wanted = sum(p.numel() for p in module.parameters() if id(p) not in idle)
        else:
            continue
        if row.n_trained != wanted:
            raise AssertionError(
                f"{row.name} ({row.mode}): {row.n_trained:,} parameters would train, but "
                f"{wanted:,} should"
            )


def _language_model_count(
    model: AVLlavaForConditionalGeneration, trainable: TrainableSettings
) -> int:
    mode, last = trainable.language_model.train, trainable.language_model.last_layers
    body = model.model.language_model
    if mode == "lora":
        layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        return sum(p.numel() for m in layers for p in m.parameters() if p.requires_grad)
    if last is not None:
        own = {id(p) for p in body.parameters()}
        sizes = {id(p): p.numel() for p in body.parameters()}
        return sum(sizes[i] for i in _last_layers(model, last) if i in own)
    parameters = {id(p): p for p in [*body.parameters(), *model.lm_head.parameters()]}
    return sum(p.numel() for p in parameters.values())
