"""Reads checkpoints that transformers' own LLaVA classes wrote (``llava-hf`` on the hub).

Contract: ``config_from_hf`` gives a configuration with which our model computes what transformers'
class computes; a field that it cannot express is a :class:`CheckpointError` that names the field.
Renaming is one way: such a checkpoint is read under transformers' names and saved under LLaVA's.
Sizes are (height, width) in these files and (width, height) in ours.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from av_llava.aggregators import settings_for, settings_of
from av_llava.checkpoints.folder import CheckpointFolder, read_json
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError, UsageError, unknown_name
from av_llava.geometry import anyres_max_tiles, parse_pinpoints
from av_llava.settings import (
    VIDEO_TOKEN_INDEX,
    AggregatorSettings,
    ImageSettings,
    ProjectorSettings,
    SequenceSettings,
    VisionSettings,
)
from av_llava.vision import select_states, tower_kind

logger = logging.getLogger(__name__)

HF_MODEL_TYPES = ("llava", "llava_next", "llava_next_video", "llava_onevision")

# (pattern on disk, name in memory), all applied in this order. Files of transformers 4 hold
# "vision_model.", those of 5 do not; some were saved with the names in memory ("model." first).
HF_TO_MEMORY = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(?:model\.)?language_model\.(?:model\.)?", "model.language_model."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower.vision_tower."),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^(?:model\.)?image_newline", "model.media_tokens.image_newline"),
)

_HALF = (0.5, 0.5, 0.5)


def is_hf_llava_config(data: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of one of transformers' LLaVA classes (not LLaVA's own)."""
    return data.get("model_type") in HF_MODEL_TYPES and bool(
        data.keys() & {"text_config", "vision_config"}
    )


def memory_name(key: str) -> str:
    """The name in memory of a key in a file of transformers' LLaVA classes."""
    for pattern, target in HF_TO_MEMORY:
        key = re.sub(pattern, target, key, count=1)
    return key


def read_hf_config(folder: CheckpointFolder, data: Mapping[str, Any]) -> AVLlavaConfig:
    """The configuration of a folder, with what its processor's files say.

    Args:
        folder: where ``tokenizer_config.json`` and the processor's files are.
        data: of ``config.json``, changed or not.
    """
    tokenizer = "tokenizer_config.json"
    held = folder.holds(tokenizer)
    side = read_json(folder.path / tokenizer).get("padding_side") if held else None
    pixels = image_processor(folder)
    videos = _processor_part(folder, "video_processor", "video_preprocessor_config.json")
    for name in ("image_mean", "image_std", "size", "resample"):
        if pixels and videos and name in videos and videos[name] != pixels.get(name):
            logger.warning(
                "%s: frames of videos are processed as still images are; the folder's video "
                "processor says another %s (%s instead of %s).",
                folder.path,
                name,
                videos[name],
                pixels.get(name),
            )
    return config_from_hf(data, image_processor=pixels, padding_side=side or "right")


def image_processor(folder: CheckpointFolder) -> dict[str, Any] | None:
    """The JSON data of a folder's image processor, if it has one."""
    return _processor_part(folder, "image_processor", "preprocessor_config.json")


def _processor_part(folder: CheckpointFolder, part: str, old_name: str) -> dict[str, Any] | None:
    """A part of ``processor_config.json``, or its own file, as transformers 4 wrote it."""
    whole = "processor_config.json"
    found = read_json(folder.path / whole).get(part) if folder.holds(whole) else None
    if found is None and folder.holds(old_name):
        found = read_json(folder.path / old_name)
    return found


def config_from_hf(
    data: Mapping[str, Any],
    *,
    image_processor: Mapping[str, Any] | None = None,
    padding_side: str = "right",
) -> AVLlavaConfig:
    """Translate the ``config.json`` of a LLaVA class of transformers.

    Args:
        data: the JSON data; ``model_type`` is one of ``HF_MODEL_TYPES``.
        image_processor: JSON data of the folder's image processor.
        padding_side: of the folder's tokenizer.

    Raises:
        CheckpointError: a field is broken, or says what our model cannot do.
    """
    kind = data.get("model_type")
    if kind not in HF_MODEL_TYPES:
        raise CheckpointError(str(unknown_name("model_type", kind, HF_MODEL_TYPES)))
    hf = _parsed(data)
    _check_projector(hf)
    tiled = kind != "llava"
    return AVLlavaConfig(
        text_config=hf.text_config,
        vision_config=hf.vision_config,
        vision=_vision_settings(hf),
        projector=ProjectorSettings("mlp2x_gelu"),
        image=_image_settings(hf, image_processor or {}),
        aggregator=_aggregator_settings(hf),
        sequence=SequenceSettings(
            padding_side=padding_side, media_tokens=("newline",) if tiled else ()
        ),
        image_token_id=hf.image_token_index,
        video_token_id=hf.video_token_index if kind in _WITH_VIDEO else VIDEO_TOKEN_INDEX,
        tie_word_embeddings=hf.tie_word_embeddings,
        dtype=hf.dtype or hf.text_config.dtype,
    )


_WITH_VIDEO = ("llava_next_video", "llava_onevision")


def _parsed(data: Mapping[str, Any]) -> Any:
    """Let transformers' own class read the data, so that its defaults hold."""
    for part in ("text_config", "vision_config"):
        kind = (data.get(part) or {}).get("model_type")
        if kind is not None and kind not in CONFIG_MAPPING:
            raise _refused(f"{part}.model_type", kind, "this version of transformers lacks it")
    try:
        return CONFIG_MAPPING[data["model_type"]].from_dict(dict(data))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The config.json of type {data['model_type']!r} cannot be read: {error}"
        ) from error


def _refused(field: str, value: Any, reason: str) -> CheckpointError:
    return CheckpointError(f"config.json: {field} {value!r} is not supported: {reason}.")


def _check_projector(hf: Any) -> None:
    if hf.projector_hidden_act != "gelu":
        raise _refused(
            "projector_hidden_act", hf.projector_hidden_act, "projectors of this model use gelu"
        )
    if not hf.multimodal_projector_bias:
        raise _refused("multimodal_projector_bias", False, "projectors of this model have a bias")


def _vision_settings(hf: Any) -> VisionSettings:
    try:
        kind = tower_kind(hf.vision_config)
    except UsageError as error:
        raise _refused(
            "vision_config.model_type",
            hf.vision_config.model_type,
            "vision towers are CLIP (clip_vision_model) or SigLIP (siglip_vision_model)",
        ) from error
    strategy = hf.vision_feature_select_strategy
    if kind == "siglip" and strategy != "full":
        raise _refused(
            "vision_feature_select_strategy",
            strategy,
            "SigLIP has no class token, so it would drop the first patch",
        )
    feature = "cls_patch" if kind == "clip" and strategy == "full" else "patch"
    layer, prefix = _select_layer(hf)
    pixels: dict[str, Any] = {}
    if kind == "siglip":
        pixels = {"image_mean": _HALF, "image_std": _HALF, "resize": "exact"}
    return VisionSettings(kind=kind, select_layer=layer, select_feature=prefix + feature, **pixels)


_SLICES = "slice_m25811_f6_"


def _select_layer(hf: Any) -> tuple[int, str]:
    """The hidden state that is chosen, and the prefix of the select feature for five of them."""
    given = hf.vision_feature_layer
    layers = [given] if isinstance(given, int) else list(given)
    n_states = hf.vision_config.num_hidden_layers + 1
    if any(not -n_states <= layer < n_states for layer in layers):
        raise _refused("vision_feature_layer", given, f"the tower has {n_states - 1} layers")
    if len(layers) == 1:
        return layers[0], ""
    if n_states > 11:  # LLaVA's one choice of several states starts eleven from the end
        five = select_states(f"{_SLICES}patch", -2, n_states).states
        if tuple(layer % n_states for layer in layers) == five:
            return -2, _SLICES
    raise _refused(
        "vision_feature_layer",
        given,
        "of lists with several layers only [-2, -5, -8, -11, 6] can be expressed",
    )


def _image_settings(hf: Any, processor: Mapping[str, Any]) -> ImageSettings:
    """How still images are cut and merged.

    LLaVA-OneVision pads each of several images to one view; LLaVA-NeXT tiles them all.
    """
    if hf.model_type == "llava":
        aspect = "pad" if processor.get("do_pad") else "square"
        return ImageSettings(aspect_ratio=aspect, patch_merge_type="flat")
    onevision = hf.model_type == "llava_onevision"
    aspect = hf.vision_aspect_ratio if onevision else "anyres"
    if onevision and anyres_max_tiles(aspect) is None:
        raise _refused("vision_aspect_ratio", aspect, "it must be anyres_max_N")
    return ImageSettings(
        aspect_ratio=aspect,
        patch_merge_type="spatial_unpad",
        grid_pinpoints=_pinpoints(hf.image_grid_pinpoints, hf.vision_config.image_size),
        several="pad" if onevision else "same",
        unpad_rounding="hf",
    )


def _pinpoints(given: Sequence[Sequence[int]], tile: int) -> tuple[tuple[int, int], ...]:
    """(height, width) to (width, height), in the same order, which breaks ties."""
    try:
        return parse_pinpoints([(width, height) for height, width in given], tile)
    except (UsageError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json: image_grid_pinpoints cannot be used: {error}"
        ) from error


def _aggregator_settings(hf: Any) -> AggregatorSettings:
    """How videos are pooled; the image-only classes do as LLaVA's own folders of that version."""
    if hf.model_type == "llava_onevision":
        return settings_of("llava_onevision")
    if hf.model_type == "llava_next_video":
        if hf.spatial_pool_mode not in ("average", "max"):
            raise _refused(
                "spatial_pool_mode", hf.spatial_pool_mode, "videos are pooled by average or max"
            )
        pooling = {"pool": hf.spatial_pool_mode, "stride": hf.spatial_pool_stride, "stage": "pre"}
        return settings_of("llava_next_video", pooling)
    flat = hf.model_type == "llava"
    return settings_for("average", 2, "one_token", unpad=not flat, flat=flat)
