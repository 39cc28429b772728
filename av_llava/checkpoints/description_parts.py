"""What a folder with parts of a model holds: a projector, a LoRA, an adapter, a delta.

Contract: as :mod:`description`. Where the base is known and at hand, tensors are accounted for the
whole; else the reason stands under ``problems``, or under ``notes`` if the base only was not named.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from av_llava.checkpoints import delta
from av_llava.checkpoints.base import HEAD, named_tensors, with_rows
from av_llava.checkpoints.configuration import memory_keys
from av_llava.checkpoints.convert import Report
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.lora import Lora, check_fit, read_lora
from av_llava.checkpoints.needed import disk_shapes, empty_model
from av_llava.checkpoints.partial import Opened, open_partial
from av_llava.checkpoints.parts import PartialFolder, named_base
from av_llava.checkpoints.quantize import stored_scheme
from av_llava.checkpoints.source import TOWER_PREFIX, account
from av_llava.checkpoints.tokens import tokens_of
from av_llava.checkpoints.towers import cached
from av_llava.config import AVLlavaConfig
from av_llava.errors import AVLlavaError, CheckpointError
from av_llava.weight_names import disk_name

_TABLES = ("embed_tokens.weight", "lm_head.weight")


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
        _whole(found, opened, lora)
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


def _whole(found: Found, opened: Opened, lora: Lora | None) -> None:
    """Account for folder, base and towers together, and say where the vision tower is.

    Raises:
        CheckpointError: a LoRA that is not of this model.
    """
    assert found.config is not None
    model = empty_model(found.config)
    if lora is not None:
        check_fit(model, lora)
    elsewhere = _towers(found, opened)
    if stored_scheme(opened.base) is not None:
        names = set(map(disk_name, memory_keys(opened.base))) | set(opened.folder.stored)
        report = account_of_names(names, found.config)
    else:
        expected = disk_shapes(model)
        tensors = {disk_name(name): stored for name, stored in named_tensors(opened.base).items()}
        tensors |= opened.folder.stored
        for name in (n for n in expected if n in tensors and n.endswith(_TABLES)):
            if tensors[name].shape[0] < opened.rows:  # grown while loading
                expected[name] = tensors[name].shape
        if found.config.tie_word_embeddings:
            expected.pop(HEAD, None)
            tensors.pop(HEAD, None)
        report = account(tensors, expected)
    kept = tuple(name for name in report.missing if not name.startswith(elsewhere))
    found.account = replace(report, missing=kept)


def _towers(found: Found, opened: Opened) -> tuple[str, ...]:
    """Say where towers lie that neither the folder nor its base holds; prefixes of their names."""
    places = {disk_name(k): where for k, where in opened.recorded_towers().items()}
    tower = opened.tower
    if tower is not None and not opened.holds_vision_tower:
        folder = tower.folder or cached(tower.name)
        places.setdefault(TOWER_PREFIX, [tower.name if folder is None else str(folder)])
    for place in (place for several in places.values() for place in several):
        if not Path(place).expanduser().exists():
            found.notes.append(f"The tower {place!r} is not at hand; loading asks the hub for it.")
    inside = "inside the folder or its base"
    found.tower = {"weights": places.get(TOWER_PREFIX, [inside])[0]}
    return tuple(places)


def account_of_names(stored: set[str], config: AVLlavaConfig) -> Report:
    """Compare names alone, for quantised weights, whose shapes are not those of the model."""
    wanted = set(disk_shapes(empty_model(config)))
    if config.tie_word_embeddings:
        stored, wanted = stored - {HEAD}, wanted - {HEAD}
    return Report(
        converter="",
        source="",
        destination=None,
        missing=tuple(sorted(wanted - stored)),
        unexpected=tuple(sorted(stored - wanted)),
    )


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
