"""Checkpoints that stand on a base: projector only, LLaVA's LoRA folders, and our own adapters.

Contract: the folder gives the configuration and some weights, the base gives the rest; every
parameter comes from one of them or from a tower's folder. Tokens are added and their rows restored
before a LoRA is attached. What LLaVA splits over ``mm_projector``, ``non_lora_trainables`` and
``adapter_model`` is read in all its spellings (:mod:`parts`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from av_llava.checkpoints.base import (
    AUDIO,
    EMBEDDING,
    HEAD,
    VISION,
    check_probe,
    named_tensors,
    vocabulary_rows,
    with_rows,
)
from av_llava.checkpoints.configuration import blamed_on, generation_config, read_config
from av_llava.checkpoints.ears import fill_tower, read_tower
from av_llava.checkpoints.folder import CheckpointFolder, refuse_delta
from av_llava.checkpoints.load import (
    Loaded,
    check_report,
    fill_vision_tower,
    load_checkpoint,
    locate,
    materialise,
)
from av_llava.checkpoints.lora import attach_lora, read_lora
from av_llava.checkpoints.needed import empty_model, shapes_of
from av_llava.checkpoints.parts import (
    RECORD,
    TOKEN_ROWS,
    PartialFolder,
    Reference,
    base_of,
    is_partial,
)
from av_llava.checkpoints.public_audio import refuse_public
from av_llava.checkpoints.quantize import check_scheme, plan_weights, quantized_layers
from av_llava.checkpoints.target import check_device_map, resolve_device
from av_llava.checkpoints.tokenizers import load_tokenizer
from av_llava.checkpoints.tokens import (
    complete_tokenizer,
    embedding_of,
    grow,
    restore_rows,
    stage_one_rows,
)
from av_llava.checkpoints.towers import Tower, find_tower
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError, UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.weight_names import memory_name

logger = logging.getLogger(__name__)

_SHOWN = 6


@dataclass(frozen=True)
class Opened:
    """A partial folder and its base, checked against each other as far as headers tell."""

    folder: PartialFolder
    base_name: str
    """As it was given or named: a path or a hub id."""
    config: AVLlavaConfig
    """Of the model, with the base's rows in the vocabulary."""
    tower: Tower | None
    """Vision tower that the configuration names."""
    tokenizer: PreTrainedTokenizerBase
    rows: int
    """Rows of the matrices afterwards."""
    fresh: tuple[int, ...]
    """Ids whose rows begin as the mean."""

    @property
    def base(self) -> CheckpointFolder:
        """Folder of the base."""
        assert self.folder.base is not None
        return self.folder.base

    @property
    def holds_vision_tower(self) -> bool:
        """Whether the folder or its base holds the vision tower's weights."""
        return self.folder.has("model.vision_tower.")

    def recorded_towers(self) -> dict[str, list[str]]:
        """Places of the towers that an adapter of our own refers to, by their prefix in memory."""
        record, where = self.folder.record or {}, self.folder.path / RECORD
        found = {}
        for prefix, key in ((VISION, "vision_tower"), (AUDIO, "audio_tower")):
            places = [Reference.from_dict(r, where) for r in record.get(key, [])]
            if places:
                found[prefix] = [place.find(self.folder.path) for place in places]
        return found

    def token_rows(self, width: int) -> dict[str, Tensor]:
        """Rows of single tokens by ``input.<token>`` and ``output.<token>``."""
        table = self.folder.stage_one_rows
        rows = {}
        if table is not None:
            rows = stage_one_rows(self.tokenizer, table, self.rows, width, self.folder.path)
        return {**rows, **self.folder.token_rows}


def open_partial(
    path: str | Path,
    base: str | Path | None = None,
    overwrite_config: Mapping[str, Any] | None = None,
    *,
    need_tower: bool = True,
) -> Opened:
    """Open a folder with its base; no weights are read but a few of the base.

    Arguments as for :func:`load_partial`; ``need_tower`` as for :func:`read_config`.

    Raises:
        CheckpointError: no base, another base, or a configuration that does not fit it.
    """
    parts = PartialFolder(locate(path).path)
    name, under = base_of(parts, base)
    under.check_files()
    folder = PartialFolder(parts.path, base=under)
    tensors = named_tensors(under)
    if folder.record is not None:
        check_probe(folder.record.get("probe", {}), tensors, folder.path, under.path)
    described = folder if folder.holds("config.json") else PartialFolder(under.path, base=under)
    config, tower = read_config(described, overwrite_config, need_tower=need_tower)
    tokenizer_at = parts if parts.holds("tokenizer_config.json") else under
    known = vocabulary_rows(tensors)
    wanted = int(config.text_config.vocab_size)
    if folder.record is not None and known is not None and known > wanted:
        raise CheckpointError(
            f"{folder.path} was trained on another base than {under.path}: its matrix "
            f"model.embed_tokens.weight has {wanted} rows, that of the base {known}."
        )
    own = with_rows(config, known)
    _check_shapes(folder, own, tensors)
    tokenizer = load_tokenizer(tokenizer_at, with_rows(config, max(wanted, known or 0)))
    ids = complete_tokenizer(tokenizer, config)
    rows = max([wanted, known or 0, *(i + 1 for i in ids), *_matrix_rows(folder)])
    own.au_token_ids = config.au_token_ids
    fresh = () if folder.record is not None else tuple(_fresh(ids, under, own))
    return Opened(folder, name, own, tower, tokenizer, rows, fresh)


def _check_shapes(folder: PartialFolder, config: AVLlavaConfig, tensors: Mapping[str, Any]) -> None:
    """Raise if the base's tensors have other shapes than the model of the configuration.

    So a wrong base is known before its weights are read.
    """
    with blamed_on(folder, None):
        needed = shapes_of(empty_model(config))
    held = {memory_name(key) for key in folder.stored}
    wrong = [
        f"{tensors[name].name}: the base has {tensors[name].shape}, the model needs {shape}"
        for name, shape in needed.items()
        if name in tensors and name not in held and tensors[name].dtype.is_floating_point
        if tensors[name].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        assert folder.base is not None
        raise CheckpointError(
            f"{folder.path} was trained on another base than {folder.base.path}: "
            f"{'; '.join(wrong[:_SHOWN])}{more}."
        )


def _fresh(ids: Iterable[int], base: CheckpointFolder, config: AVLlavaConfig) -> list[int]:
    """Those of the tokens that the base does not know; their rows may be spare ones of its own."""
    spare = [i for i in ids if i < config.text_config.vocab_size]
    known = set(load_tokenizer(base, config).get_vocab().values()) if spare else set()
    return [i for i in ids if i not in known]


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
    merge: bool | None = None,
    float32: Collection[str] = (),
) -> Loaded:
    """Load a folder that stands on a base.

    Args:
        path: the folder with the parts.
        base: its base; None takes what the folder names.
        device, dtype, device_map, attn_implementation, overwrite_config, quantize, float32: as for
            full checkpoints.
        merge: add a LoRA to the weights (faster, and rounded as they are), or keep it apart (bit
            for bit what was trained). None keeps that of our own adapters apart, and all on
            quantised weights, and merges LLaVA's, as LLaVA does.

    Raises:
        CheckpointError: something is missing, left over, or does not fit the base.
        UsageError: options that do not go together.
    """
    check_device_map(device_map)
    check_scheme(quantize)
    target = resolve_device(device)
    opened = open_partial(path, base, overwrite_config)
    folder, config = opened.folder, opened.config
    plan = plan_weights(
        opened.base,
        quantize,
        dtype=dtype,
        own_dtype=config.dtype,
        device=target,
        device_map=device_map,
    )
    if merge and plan.scheme is not None:
        raise UsageError(
            f"A LoRA cannot be merged into weights in {plan.scheme}, which would round it away: "
            f"leave merge out, or merge it in full precision first (av-llava convert merge-lora)."
        )
    model, report = materialise(
        opened.base, config, plan, attn_implementation=attn_implementation, float32=float32
    )
    whole = folder.read_stored()
    grow(model, opened.rows, opened.fresh)
    filled = _fill_towers(model, opened) | apply_weights(model, whole, folder.path)
    restore_rows(
        model,
        opened.tokenizer,
        opened.token_rows(embedding_of(model).shape[1]),
        folder.path / TOKEN_ROWS,
    )
    mismatched = [m for m in report["mismatched_keys"] if m[0] not in filled]
    missing = set(report["missing_keys"]) - filled
    check_report(opened.base, missing, {**report, "mismatched_keys": mismatched})
    own = "generation_config.json"
    model.generation_config = generation_config(
        folder if folder.holds(own) else opened.base, config
    )
    if folder.is_adapter:
        usual = folder.record is None and plan.scheme is None
        together = usual if merge is None else merge
        model = attach_lora(model, read_lora(folder), merge=together)
        if not together:
            model.peft_config["default"].base_model_name_or_path = opened.base_name
    if plan.device_map is None:
        model.to(target)
    return Loaded(model.eval(), opened.tokenizer, folder.path, opened.tower)


def _matrix_rows(folder: PartialFolder) -> list[int]:
    """Rows of the embedding and head that a folder holds completely."""
    tables = (t for key, t in folder.stored.items() if memory_name(key) in (EMBEDDING, HEAD))
    return [table.shape[0] for table in tables]


def _fill_towers(model: AVLlavaForConditionalGeneration, opened: Opened) -> set[str]:
    """Read towers that lie neither in the base nor in the folder; return what was filled."""
    filled: set[str] = set()
    if opened.tower is not None and not opened.holds_vision_tower:
        filled |= fill_vision_tower(model, opened.tower)
    for prefix, places in opened.recorded_towers().items():
        if prefix == VISION:
            tower = find_tower(places[0], opened.folder.path, weights=True)
            filled |= fill_vision_tower(model, tower)
        else:
            ears = read_tower(places[0] if len(places) == 1 else (places[0], places[1]))
            fill_tower(model.model.audio_tower, ears.state or {}, ears.name)
            filled |= {AUDIO + name for name in ears.state or {}}
    return filled


def load_any(
    path: str | Path,
    base: str | Path | None = None,
    *,
    merge: bool | None = None,
    **options: Any,
) -> Loaded:
    """Load a checkpoint of any kind: whole, or standing on a base.

    Raises:
        CheckpointError: it cannot be loaded completely, or a whole one was given a base.
    """
    folder = locate(path)
    if is_partial(folder):
        return load_partial(path, base, merge=merge, **options)
    refuse_delta(folder)
    if base is not None:
        raise CheckpointError(
            f"{folder.path} holds a whole model, so it stands on no base: leave out {str(base)!r}."
        )
    refuse_public(folder)
    return load_checkpoint(path, **options)


@torch.no_grad()
def apply_weights(
    model: AVLlavaForConditionalGeneration, state: Mapping[str, Tensor], where: Path
) -> set[str]:
    """Copy tensors under names on disk into the model; return the names in memory.

    Raises:
        CheckpointError: a name that the model does not have, or another shape.
    """
    own = model.state_dict()
    quantized = {f"{name}.weight" for name in quantized_layers(model)}
    filled = set()
    for key, value in state.items():
        name = memory_name(key)
        if name in quantized:
            raise CheckpointError(
                f"{where} holds {key} in full, which cannot be put into a quantised layer. Load it "
                f"without quantize, on a base in full precision."
            )
        if name not in own:
            raise CheckpointError(
                f"{where} holds {key}, which the model does not have. Is its config.json the one "
                f"that it was trained with?"
            )
        if own[name].shape != value.shape:
            raise CheckpointError(
                f"{where} holds {key} of shape {tuple(value.shape)}, but the model on this base "
                f"has {tuple(own[name].shape)}. It was trained on another base."
            )
        own[name].copy_(value)
        filled.add(name)
    return filled
