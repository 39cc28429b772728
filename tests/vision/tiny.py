"""Small towers for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, SiglipVisionConfig

from av_llava.settings import VisionSettings
from av_llava.vision import (
    VisionTower,
    as_llava_stores_it,
    build_vision_tower,
    tower_weights,
    vision_config_from,
)

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def tiny_clip(
    layers: int = 4, config: dict[str, Any] | None = None, **settings: Any
) -> VisionTower:
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SHAPE, num_hidden_layers=layers, **(config or {}))
    return build_vision_tower(config, VisionSettings(**settings)).eval()


def tiny_siglip(layers: int = 4, **settings: Any) -> VisionTower:
    torch.manual_seed(0)
    config = SiglipVisionConfig(**SHAPE, num_hidden_layers=layers)
    return build_vision_tower(config, VisionSettings(kind="siglip", **settings)).eval()


def tower_from(folder: Path, llava: bool = False, **settings: Any) -> VisionTower:
    """Build and load a stand-alone tower's folder; ``llava`` keeps what LLaVA keeps of it."""
    config = vision_config_from(json.loads((folder / "config.json").read_text()))
    chosen = VisionSettings(**settings)
    if llava:
        config, chosen = as_llava_stores_it(config, chosen)
    tower = build_vision_tower(config, chosen)
    kept, _ = tower_weights(load_file(folder / "model.safetensors"), tower)
    tower.vision_tower.load_state_dict(kept)
    return tower.eval()
