"""What a folder with parts of a model holds, from headers: for ``av-llava info``.

Contract: no weights are loaded. Where the base is known and at hand, what is missing is told for
the whole; else the reason stands under ``error``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from av_llava.checkpoints.base import HEAD, VISION, named_tensors, with_rows
from av_llava.checkpoints.lora import read_lora
from av_llava.checkpoints.partial import Opened, open_partial
from av_llava.checkpoints.parts import PartialFolder
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.weight_names import disk_name, memory_name


def describe_parts(folder: PartialFolder) -> tuple[dict[str, Any], AVLlavaConfig | None]:
    """What the folder holds, and the configuration on its base, if that is at hand."""
    found: dict[str, Any] = {"layout": _layout(folder), "tensors": len(folder.stored)}
    if folder.is_adapter:
        lora = read_lora(folder)
        found["lora"] = {"modules": len(lora.modules), "rank": lora.settings.get("r")}
    tokens = {key.split(".", 1)[1] for key in folder.token_rows}
    if tokens:
        found["tokens"] = sorted(tokens)
    try:
        opened = open_partial(folder.path)
    except CheckpointError as error:
        return {**found, "error": str(error)}, None
    config = with_rows(opened.config, opened.rows)
    return {**found, "base": str(opened.base.path), **_keys(opened, config)}, config


def _layout(folder: PartialFolder) -> str:
    if folder.record is not None:
        return "adapter of av_llava"
    return "LoRA" if folder.is_adapter else "projector"


def _keys(opened: Opened, config: AVLlavaConfig) -> dict[str, Any]:
    """Names that neither the folder, its base nor a tower has; and those of no use."""
    with torch.device("meta"):
        model = AVLlavaForConditionalGeneration(copy.deepcopy(config))
    wanted = set(model.state_dict())
    held = set(named_tensors(opened.base)) | {memory_name(key) for key in opened.folder.stored}
    if config.tie_word_embeddings:
        wanted.discard(HEAD)
        held.discard(HEAD)
    elsewhere = tuple(opened.recorded_towers())
    elsewhere += (VISION,) if opened.tower is not None and not opened.holds_vision_tower else ()
    missing = {name for name in wanted - held if not name.startswith(elsewhere)}
    return {
        "missing": sorted(map(disk_name, missing)),
        "unexpected": sorted(map(disk_name, held - wanted)),
    }
