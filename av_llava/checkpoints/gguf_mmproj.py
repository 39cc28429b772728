"""Tower and projector as a GGUF file (``mmproj``), as llama.cpp's loader of LLaVA models reads it.

Contract: what the loader computes from the file is what this model computes for one view of an
image; everything else that belongs to this model and not to llama.cpp is named in a sentence, and
what would give other features is refused. Facts: ``tools/mtmd`` of llama.cpp (clip.cpp,
models/llava.cpp, mtmd-image.cpp), as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from av_llava.checkpoints.gguf_file import FILE_TYPES, Planned, PlannedFile, kind_for
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError
from av_llava.geometry import parse_pinpoints
from av_llava.vision import select_states

PROJECTORS = {"mlp2x_gelu": "mlp", "ldpnet": "ldp", "ldpnetv2": "ldpv2"}
"""Our name of a projector to llama.cpp's."""

_GRID = (24, 24)  # llama.cpp's LDP projectors are written for this one
_LDP_EPSILON = 1e-5  # the projector's; llama.cpp takes the tower's
_ACTIVATIONS = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}
_PAD_COLOUR = (122, 116, 104)

_TOWER = "model.vision_tower.vision_tower.vision_model."
_PROJECTOR = "model.mm_projector."
_POSITIONS = "v.position_embd.weight"
_NEWLINE = "model.image_newline"
_WHOLE = {
    f"{_TOWER}embeddings.class_embedding": "v.class_embd",
    f"{_TOWER}embeddings.patch_embedding.weight": "v.patch_embd.weight",
    f"{_TOWER}embeddings.patch_embedding.bias": "v.patch_embd.bias",
    f"{_TOWER}embeddings.position_embedding.weight": _POSITIONS,
    f"{_TOWER}pre_layrnorm.weight": "v.pre_ln.weight",
    f"{_TOWER}pre_layrnorm.bias": "v.pre_ln.bias",
    _NEWLINE: "v.image_newline",
}
_IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_LAYER_NAME = re.compile(re.escape(_TOWER) + r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
# What is at the same place in llama.cpp under another name.
_PROJECTOR_NAMES = {
    "mlp": (r"^(\d)\.", r"mm.\1."),
    "ldp": (r"^model\.", "mm.model."),
    "ldpv2": (r"^(mlp|peg)\.\1\.", r"mm.model.\1."),
}


def plan_mmproj(
    config: AVLlavaConfig,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str,
    name: str,
    class_token: str = "first",
) -> PlannedFile:
    """Plan the file of tower and projector.

    Args:
        config: of the model.
        shapes: of all its tensors by LLaVA's names.
        dtype: of the matrices: f32, f16, q8_0.
        name: of the model, for people.
        class_token: first, where CLIP has it and the format means it to be; or last, where
            llama.cpp puts it (its issue 25814): positions are then stored in that order.

    Raises:
        CheckpointError: llama.cpp's loader would compute other features.
    """
    state = _state(config)
    projector = _projector(config)
    metadata = {
        "general.type": "mmproj",
        "general.name": name,
        "general.file_type": FILE_TYPES[dtype],
        **({"general.quantization_version": 2} if dtype == "q8_0" else {}),
        **_numbers(config, state, projector),
        **_tiling(config),
    }
    tensors = []
    for source, shape in shapes.items():
        target = _target(source, state, projector)
        if target is not None:
            planned = _planned(target, source, shape, dtype)
            if target == _POSITIONS and class_token == "last" and config.vision.kind == "clip":
                planned = replace(planned, change=_class_last)
            tensors.append(planned)
    return PlannedFile("clip", metadata, tuple(tensors), _left_out(config, class_token))


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}, so tower and projector cannot be exported to GGUF. The language model alone "
        f"can: export only the part 'text'."
    )


def _state(config: AVLlavaConfig) -> int:
    """The hidden state that is used: the number of layers that are run."""
    if config.vision_config is None:
        raise _refused("The model has no vision tower")
    vision, tower = config.vision, config.vision_config
    if vision.kind not in ("clip", "siglip"):
        raise _refused(f"llama.cpp has no vision tower of the kind {vision.kind!r}")
    chosen = select_states(vision.select_feature, vision.select_layer, tower.num_hidden_layers + 1)
    if len(chosen.states) != 1 or chosen.keep_cls:
        raise _refused(
            f"The model uses the features {vision.select_feature!r}; llama.cpp's LLaVA takes the "
            f"patches of one hidden state"
        )
    if chosen.states[0] == 0:
        raise _refused("The model uses the tower's embeddings, before its first layer")
    if tower.hidden_act not in _ACTIVATIONS:
        raise _refused(f"llama.cpp's towers do not know the activation {tower.hidden_act!r}")
    return chosen.states[0]


def _projector(config: AVLlavaConfig) -> str:
    kind = config.projector.kind
    if kind not in PROJECTORS:
        raise _refused(
            f"llama.cpp's LLaVA has no projector {kind!r} (it has {', '.join(PROJECTORS)})"
        )
    target = PROJECTORS[kind]
    tower = config.vision_config
    side = tower.image_size // tower.patch_size
    if target != "mlp" and (side, side) != _GRID:
        raise _refused(
            f"llama.cpp computes {kind} on {_GRID[0]}x{_GRID[1]} patches only, and this tower has "
            f"{side}x{side}"
        )
    if target == "ldp" and abs(tower.layer_norm_eps - _LDP_EPSILON) > 1e-12:
        raise _refused(
            f"llama.cpp computes {kind} with the tower's layer_norm_eps, which is "
            f"{tower.layer_norm_eps} here where the projector's is {_LDP_EPSILON}"
        )
    return target


def _numbers(config: AVLlavaConfig, state: int, projector: str) -> dict[str, Any]:
    tower = config.vision_config
    return {
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": projector,
        "clip.use_gelu": _ACTIVATIONS[tower.hidden_act],
        "clip.vision.image_size": tower.image_size,
        "clip.vision.patch_size": tower.patch_size,
        "clip.vision.embedding_length": tower.hidden_size,
        "clip.vision.feed_forward_length": tower.intermediate_size,
        "clip.vision.projection_dim": config.text_config.hidden_size,
        "clip.vision.block_count": state,
        "clip.vision.feature_layer": [state],
        "clip.vision.attention.head_count": tower.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(tower.layer_norm_eps),
        "clip.vision.image_mean": [float(v) for v in config.vision.image_mean],
        "clip.vision.image_std": [float(v) for v in config.vision.image_std],
    }


def _is_tiled(config: AVLlavaConfig) -> bool:
    """Whether llama.cpp cuts images into tiles as this model does."""
    return config.image.aspect_ratio == "anyres"


def _tiling(config: AVLlavaConfig) -> dict[str, Any]:
    """The canvases among which llama.cpp chooses, (width, height) one after the other."""
    if not _is_tiled(config):
        return {}
    pinpoints = parse_pinpoints(config.image.grid_pinpoints, config.vision_config.image_size)
    return {
        "clip.vision.image_grid_pinpoints": [int(side) for point in pinpoints for side in point],
        "clip.vision.mm_patch_merge_type": config.image.patch_merge_type,
    }


def _target(source: str, state: int, projector: str) -> str | None:
    """Name in the file; None for what the loader has no place for."""
    if source == _NEWLINE and projector != "mlp":
        return None
    if source in _WHOLE:
        return _WHOLE[source]
    match = _LAYER_NAME.fullmatch(source)
    if match is not None:
        place = f"v.blk.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"
        return place if int(match[1]) < state else None
    if not source.startswith(_PROJECTOR):
        return None
    pattern, target = _PROJECTOR_NAMES[projector]
    return re.sub(pattern, target, source.removeprefix(_PROJECTOR))


def _planned(target: str, source: str, shape: tuple[int, ...], dtype: str) -> Planned:
    if len(shape) == 4 and target != "v.patch_embd.weight":
        # A 1x1 convolution is a matrix there; a depthwise one lacks the axis of its one channel,
        # and llama.cpp computes it from float16 only.
        squeezed = tuple(n for n in shape if n != 1)
        kind = "f16" if len(squeezed) == 3 else kind_for(squeezed, dtype)
        return Planned(target, source, squeezed, kind, _squeeze)
    kept = "f32" if target == _POSITIONS else kind_for(shape, dtype)
    return Planned(target, source, shape, kept)


def _class_last(positions: Tensor) -> Tensor:
    """Positions of the patches, then that of the class token. [P+1, D] to the same."""
    return positions.roll(-1, 0)


def _squeeze(weight: Tensor) -> Tensor:
    return weight.squeeze()


_CLASS_TOKEN = {
    "first": "Class token: llama.cpp since May 2025 (seen in llama-cpp-python 0.3.36) puts CLIP's "
    "class token after the patches but reads positions and features as if it stood before them "
    "(its issue 25814), so features come out wrong there. Where that is not mended yet, "
    "class_token 'last' makes all but one of an image's features right.",
    "last": "Class token: the file is for a llama.cpp that puts CLIP's class token last (its issue "
    "25814). There the first patch is lost, the others move up by one, and the last feature is "
    "that of the class token. Where that is mended, export again with class_token 'first'.",
}


def _left_out(config: AVLlavaConfig, class_token: str) -> tuple[str, ...]:
    """Sentences on what this model does and llama.cpp does not."""
    said = [_CLASS_TOKEN[class_token]] if config.vision.kind == "clip" else []
    said.append(
        "Video: llama.cpp shows single images to this kind of model, so frames over time, pooling "
        "and slow and fast streams are left out."
    )
    if config.audio_config is not None:
        said.append(
            "Sound: llama.cpp has no place for this audio tower, so it is left out with its "
            "projector."
        )
    if config.extra_modalities:
        said.append(f"Other media are left out: {', '.join(config.extra_modalities)}.")
    said += _left_out_of_tiling(config)
    said += _left_out_of_pixels(config)
    if config.sequence.use_image_start_end:
        said.append(
            "Marks: llama.cpp writes no <im_start> and <im_end> around an image; put them into "
            "the prompt, around the place of the image."
        )
    return tuple(said)


def _left_out_of_tiling(config: AVLlavaConfig) -> list[str]:
    image, side = config.image, config.vision_config.image_size
    if _is_tiled(config):
        said = [
            f"Tiles: llama.cpp shows the overview of an image after its tiles, this model before "
            f"them. An image of at most {side}x{side} pixels is a single view there."
        ]
        if image.patch_merge_type != "flat":
            said.append(
                f"Rows: llama.cpp shows tile after tile, each whole, where this model makes rows "
                f"of all tiles ({image.patch_merge_type}): padding is not cut off there, and the "
                f"learned newline, though in the file, is not inserted."
            )
        return said
    said = []
    if image.aspect_ratio not in ("pad", "square"):
        said.append(
            f"Tiles: llama.cpp cannot cut images as {image.aspect_ratio!r} does, so it shows each "
            f"as one padded view of {side}x{side} pixels and less detail is seen."
        )
    if config.has_image_newline:
        said.append(
            "Newline: llama.cpp does not insert the learned newline after an image, though it is "
            "in the file."
        )
    return said


def _left_out_of_pixels(config: AVLlavaConfig) -> list[str]:
    image, vision = config.image, config.vision
    said = []
    colour = tuple(int(255 * mean) for mean in vision.image_mean)
    if image.aspect_ratio == "square":
        done = "cuts off their edges" if vision.resize == "shortest_edge" else "stretches them"
        said.append(f"Shape: llama.cpp pads images that are not square, where this model {done}.")
    elif not _is_tiled(config):
        other = f", with the colour {_PAD_COLOUR}" if colour != _PAD_COLOUR else ""
        said.append(
            f"Shape: llama.cpp resizes images that are not square before it pads them{other}; this "
            f"model pads them first{f', with {colour}' if other else ''}."
        )
    if vision.resample != 3:
        said.append(
            f"Resizing: llama.cpp resizes bicubically, this model with Pillow's filter "
            f"{vision.resample}."
        )
    return said
