"""What a folder with parts of a model holds: a projector, a LoRA, an adapter, a delta.

Contract: as :mod:`description`. Where the base is known and at hand, tensors are accounted for the
whole; else the reason stands under ``problems``, or under ``notes`` if the base only was not named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from av_llava.checkpoints import delta
from av_llava.checkpoints.base import HEAD, named_tensors, with_rows
from av_llava.checkpoints.convert import Report
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.lora import Lora, check_fit, read_lora
from av_llava.checkpoints.needed import disk_shapes, empty_model
from av_llava.checkpoints.partial import Opened, open_partial
from av_llava.checkpoints.parts import PartialFolder, named_base
from av_llava.checkpoints.source import TOWER_PREFIX, account
from av_llava.checkpoints.tokens import tokens_of
from av_llava.config import AVLlavaConfig
from av_llava.errors import AVLlavaError, CheckpointError
from av_llava.weight_names import disk_name


@dataclass
class Found:
    """What was found out about a folder."""

    data: dict[str, Any]
    config: AVLlavaConfig | None = None
    """Of the whole model, if it is known."""
    tower: dict[str, Any] | None = None
    """What there is to say of the vision tower besides its configuration."""
    tokenizer: PreTrainedTokenizerBase | None = None
    token_ids: list[int] = field(default_factory=list)
    """Of the tokens that the configuration speaks of."""
    account: Report | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def describe_parts(folder: PartialFolder, base: str | Path | None) -> Found:
    """A folder that stands on a base."""
    found = Found({"holds": _kind(folder), "tensors": len(folder.stored)})
    lora = read_lora(folder) if folder.is_adapter else None
    if lora is not None:
        rank = lora.settings.get("r")
        found.data["lora"] = {"modules": len(lora.modules), "rank": rank}
    rows = sorted({key.split(".", 1)[1] for key in folder.token_rows})
    if rows:
        found.data["token_rows"] = rows
    name = str(base) if base is not None else named_base(folder)
    found.data["base"] = name
    if name is None:
        found.notes.append(
            "The folder does not name the language model or checkpoint that it stands on: give it "
            "as --base (model_base)."
        )
        return found
    try:
        opened = open_partial(folder.path, base, need_tower=False)
        found.data["base"] = str(opened.base.path)
        found.config = with_rows(opened.config, opened.rows)
        found.tower, found.account = _whole(opened, found.config, lora)
    except AVLlavaError as error:
        found.problems.append(str(error))
        return found
    found.tokenizer = opened.tokenizer
    vocabulary = opened.tokenizer.get_vocab()
    found.token_ids = [vocabulary[token] for token in tokens_of(opened.config)]
    return found


def _kind(folder: PartialFolder) -> str:
    if folder.record is not None:
        return "an adapter of av_llava"
    return "a LoRA" if folder.is_adapter else "a projector"


def _whole(
    opened: Opened, config: AVLlavaConfig, lora: Lora | None
) -> tuple[dict[str, Any] | None, Report]:
    """Where the vision tower is, and how folder, base and towers fill the model.

    Raises:
        CheckpointError: a LoRA that is not of this model, or a tower that is nowhere.
    """
    model = empty_model(config)
    if lora is not None:
        check_fit(model, lora)
    expected = disk_shapes(model)
    tensors = {disk_name(name): stored for name, stored in named_tensors(opened.base).items()}
    tensors |= opened.folder.stored
    for name in (n for n in expected if n in tensors and n.endswith(_TABLES)):
        if tensors[name].shape[0] < opened.rows:  # grown while loading
            expected[name] = tensors[name].shape
    if config.tie_word_embeddings:
        expected.pop(HEAD, None)
        tensors.pop(HEAD, None)
    elsewhere = {disk_name(k): places for k, places in opened.recorded_towers().items()}
    where = "inside the folder or its base"
    if opened.tower is not None and not opened.holds_vision_tower:
        places = [str(opened.tower.folder)] if opened.tower.folder else ["not here"]
        elsewhere.setdefault(TOWER_PREFIX, places)
    where = elsewhere.get(TOWER_PREFIX, [where])[0]
    expected = {n: s for n, s in expected.items() if not n.startswith(tuple(elsewhere))}
    at = None if config.vision_config is None else {"weights": where}
    return at, account(tensors, expected)


_TABLES = ("embed_tokens.weight", "lm_head.weight")


def describe_delta(folder: CheckpointFolder, base: str | Path | None) -> Found:
    """The difference of a checkpoint from its base."""
    found = Found(
        {
            "holds": "a delta",
            "layout": folder.config.get("model_type"),
            "architecture": (folder.config.get("architectures") or [None])[0],
            "base": str(base) if base is not None else delta.named_base(folder.path),
        }
    )
    found.notes.append(
        f"A delta does not load alone: av-llava convert apply-delta {folder.path} DESTINATION "
        f"makes the checkpoint."
    )
    name = found.data["base"]
    if name is None:
        found.notes.append("It does not name its base: give the language model as --base.")
        return found
    try:
        report = delta.examine(folder.path, name)
    except CheckpointError as error:
        found.problems.append(str(error))
        return found
    found.account, found.data["tensors"] = report, report.mapped
    found.notes += report.notes
    return found
