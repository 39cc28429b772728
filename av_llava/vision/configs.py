"""Configurations of towers: published ones by name, those in a tower's folder, LLaVA's SigLIP.

Contract: no network. A checkpoint that holds its tower's weights but only names the tower loads
with what is written here. Values are those of the published ``config.json`` and
``preprocessor_config.json``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from av_llava.errors import CheckpointError, unknown_name
from av_llava.settings import CLIP_MEAN, CLIP_STD, VisionSettings

logger = logging.getLogger(__name__)

_BICUBIC = 3
_CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {
    "clip_vision_model": CLIPVisionConfig,
    "siglip_vision_model": SiglipVisionConfig,
}
# A tower's folder may hold the whole text-image model; its vision part has its own model_type.
_WHOLE_MODELS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_KINDS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}

_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_HUGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}


def _clip(shape: dict[str, int], heads: int, patch: int, side: int, **more: Any) -> dict[str, Any]:
    return {
        "vision_config": {
            "model_type": "clip_vision_model",
            **shape,
            "num_attention_heads": heads,
            "patch_size": patch,
            "image_size": side,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            **more,
        },
        "preprocessor_config": {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": side},
            "resample": _BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "do_convert_rgb": True,
        },
    }


def _siglip(shape: dict[str, int], heads: int, patch: int, side: int) -> dict[str, Any]:
    return {
        "vision_config": {
            "model_type": "siglip_vision_model",
            **shape,
            "num_attention_heads": heads,
            "patch_size": patch,
            "image_size": side,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "preprocessor_config": {
            "image_processor_type": "SiglipImageProcessor",
            "do_resize": True,
            "size": {"height": side, "width": side},
            "resample": _BICUBIC,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    }


PUBLISHED_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-base-patch32": _clip(_BASE, 12, 32, 224, projection_dim=512),
    "openai/clip-vit-base-patch16": _clip(_BASE, 12, 16, 224, projection_dim=512),
    "openai/clip-vit-large-patch14": _clip(_LARGE, 16, 14, 224, projection_dim=768),
    "openai/clip-vit-large-patch14-336": _clip(_LARGE, 16, 14, 336, projection_dim=768),
    "Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12": _clip(
        _LARGE, 16, 14, 336, projection_dim=768
    ),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _clip(
        _HUGE, 16, 14, 224, projection_dim=1024, hidden_act="gelu"
    ),
    "google/siglip-so400m-patch14-224": _siglip(_SO400M, 16, 14, 224),
    "google/siglip-so400m-patch14-384": _siglip(_SO400M, 16, 14, 384),
    "google/siglip-base-patch16-224": _siglip(_BASE, 12, 16, 224),
    "google/siglip-base-patch16-256": _siglip(_BASE, 12, 16, 256),
    "google/siglip-base-patch16-384": _siglip(_BASE, 12, 16, 384),
    "google/siglip-base-patch16-512": _siglip(_BASE, 12, 16, 512),
    "google/siglip-large-patch16-256": _siglip(_LARGE, 16, 16, 256),
    "google/siglip-large-patch16-384": _siglip(_LARGE, 16, 16, 384),
}
"""Hub name to ``{"vision_config": ..., "preprocessor_config": ...}``, as JSON data."""


def find_published(name: str) -> dict[str, Any] | None:
    """Return the published tower that a hub name or a path ends in, or None.

    A path of another machine, such as ``/data/models/clip-vit-large-patch14-336``, is known by
    its last part.
    """
    last = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    for known, tower in PUBLISHED_TOWERS.items():
        if known == name or known.rsplit("/", 1)[-1] == last:
            return tower
    return None


def vision_config_from(data: Mapping[str, Any]) -> PreTrainedConfig:
    """Read the vision part of a tower's ``config.json``.

    Args:
        data: the JSON data, of a vision model or of a whole text-image model.

    Raises:
        UsageError: a ``model_type`` that is no known tower.
    """
    kind = data.get("model_type")
    if kind in _WHOLE_MODELS:
        data, kind = data.get("vision_config") or {}, _WHOLE_MODELS[kind]
    if kind not in _CONFIG_CLASSES:
        raise unknown_name("vision tower model_type", kind, [*_CONFIG_CLASSES, *_WHOLE_MODELS])
    return _CONFIG_CLASSES[kind](**{k: v for k, v in data.items() if k != "model_type"})


def tower_kind(vision_config: PreTrainedConfig, s2: bool = False) -> str:
    """Return the key of ``VISION_TOWERS`` for a configuration."""
    if vision_config.model_type not in _KINDS:
        raise unknown_name("vision tower model_type", vision_config.model_type, _KINDS)
    kind = _KINDS[vision_config.model_type]
    return f"{kind}_s2" if s2 else kind


def as_llava_stores_it(
    vision_config: PreTrainedConfig, settings: VisionSettings, n_layers: int | None = None
) -> tuple[PreTrainedConfig, VisionSettings]:
    """Adapt a tower's own configuration to what a LLaVA checkpoint holds of it.

    LLaVA-NeXT deletes SigLIP's last layer and its pooling head, saves the rest, and takes the
    output of the last layer left, whatever ``mm_vision_select_layer`` says (published OneVision
    files say -2, which means the same state of the complete tower). Other towers are complete.

    Args:
        vision_config: of the complete tower, as published.
        settings: as LLaVA's file gives them.
        n_layers: encoder layers that the checkpoint really holds; None for LLaVA's one less.

    Returns:
        The configuration and the settings to build with.

    Raises:
        CheckpointError: fewer layers than the features need, or more than the tower has.
    """
    if vision_config.model_type != "siglip_vision_model":
        return vision_config, settings
    depth = vision_config.num_hidden_layers
    held = depth - 1 if n_layers is None else n_layers
    if not depth - 1 <= held <= depth:
        raise CheckpointError(
            f"The checkpoint holds {held} layers of a SigLIP tower that has {depth}; LLaVA's "
            f"features need the first {depth - 1}. Is it the right tower?"
        )
    if settings.select_layer != -2 or settings.select_feature not in ("patch", "cls_patch"):
        logger.warning(
            "LLaVA's SigLIP tower ignores select_layer %s and select_feature %r: the features are "
            "the patches of the last layer but one.",
            settings.select_layer,
            settings.select_feature,
        )
    data = vision_config.to_dict() | {"num_hidden_layers": held, "vision_use_head": False}
    config = type(vision_config)(**{k: v for k, v in data.items() if k != "model_type"})
    return config, settings.replace(select_layer=depth - held - 2, select_feature="patch")
