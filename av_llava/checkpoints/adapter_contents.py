"""What a model has and its base has not: the weights and rows of tokens that an adapter keeps.

Contract: weights are compared with the base tensor by tensor, in the model's type; nothing is
written. A tower beside the base is referred to only if the model's is that tower to the last bit.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from av_llava.checkpoints.base import EMBEDDING, HEAD, BaseTensors
from av_llava.checkpoints.model_state import Split
from av_llava.checkpoints.quantize import quantized_layers
from av_llava.checkpoints.tokens import INPUT, OUTPUT
from av_llava.errors import CheckpointError, UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor
from av_llava.weight_names import disk_name

_TABLES = {EMBEDDING: INPUT, HEAD: OUTPUT}
_SHOWN = 6


@dataclass(frozen=True)
class Contents:
    """The weights and rows that an adapter keeps."""

    weights: dict[str, Tensor]
    """By names on disk."""
    names: frozenset[str]
    """The same, by names in memory."""
    rows: dict[str, Tensor]
    """Rows of tokens, by ``input.<token>`` and ``output.<token>``."""
    tied: bool
    """Whether embedding and head are one matrix."""


def differing(
    parts: Split,
    model: AVLlavaForConditionalGeneration,
    processor: AVLlavaProcessor,
    base: BaseTensors,
    changed: Collection[str] | None,
) -> Contents:
    """Choose the weights and rows that differ from the base."""
    weights = dict(parts.weights)
    tied = _is_tied(parts, model)
    if tied:
        weights.pop(HEAD, None)
    packed = {f"{name}.weight" for name in quantized_layers(model)}
    _check_base(parts, base, packed)
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
    return Contents({disk_name(k): v for k, v in out.items()}, frozenset(out), rows, tied)


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


def _check_base(parts: Split, base: BaseTensors, packed: Collection[str]) -> None:
    """Raise if the base holds what the model does not have, or language-model weights of other
    shapes."""
    unknown = sorted(
        name for name in base.own if name not in parts.weights and not _is_packed(name, packed)
    )
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
