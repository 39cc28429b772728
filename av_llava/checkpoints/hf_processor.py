"""Files with which ``AutoProcessor`` of transformers prepares inputs for an exported model.

Contract: plain JSON, so that making them needs none of transformers' image processors. Sizes are
(height, width) in them. Both ends of the supported versions read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from av_llava.aggregators import build
from av_llava.chat import MEDIA_TOKENS
from av_llava.chat.templates import Template
from av_llava.checkpoints.chat_source import jinja_source
from av_llava.config import AVLlavaConfig
from av_llava.geometry import parse_pinpoints
from av_llava.prepared import IM_END, IM_START
from av_llava.processor import AVLlavaProcessor

PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_next_video": "LlavaNextVideoProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
}
_IMAGE_PROCESSORS = {
    "llava_next": "LlavaNextImageProcessor",
    "llava_next_video": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
}
_VIDEO_PROCESSORS = {
    "llava_next_video": "LlavaNextVideoVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
}


def write_processor(
    folder: Path, kind: str, processor: AVLlavaProcessor, tokens: Mapping[str, str]
) -> list[str]:
    """Write ``processor_config.json`` and ``chat_template.jinja``.

    Args:
        folder: to write into.
        kind: transformers' model type.
        processor: of the model.
        tokens: placeholder by the kind of medium.

    Returns:
        Sentences on what transformers' processor cannot do.
    """
    config = processor.config
    data: dict[str, Any] = {
        "processor_class": PROCESSORS[kind],
        "image_processor": _image_processor(kind, processor),
        "image_token": tokens["image"],
        "vision_feature_select_strategy": strategy(config),
    }
    has_cls = config.vision.kind == "clip"
    grid = config.vision_config.image_size // config.vision_config.patch_size
    if kind == "llava_onevision":
        data["num_image_tokens"] = grid**2 + has_cls
        data["vision_aspect_ratio"] = config.image.aspect_ratio
    else:
        data["patch_size"] = config.vision_config.patch_size
        data["num_additional_image_tokens"] = int(has_cls)
    if kind in _VIDEO_PROCESSORS:
        data["video_token"] = tokens["video"]
        data["video_processor"] = _pixels(processor) | {
            "video_processor_type": _VIDEO_PROCESSORS[kind],
            "do_sample_frames": False,
        }
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    (folder / "processor_config.json").write_text(text, encoding="utf-8")
    return [*_chat_template(folder, processor, tokens), *_notes(kind, config, grid)]


def strategy(config: AVLlavaConfig) -> str:
    """``vision_feature_select_strategy``: default drops the class token, full keeps all."""
    drops = config.vision.kind == "clip" and "cls" not in config.vision.select_feature
    return "default" if drops else "full"


def hf_pinpoints(config: AVLlavaConfig) -> list[list[int]]:
    """Canvas sizes as (height, width), in their order."""
    given = parse_pinpoints(config.image.grid_pinpoints, config.vision_config.image_size)
    return [[height, width] for width, height in given]


def _pixels(processor: AVLlavaProcessor) -> dict[str, Any]:
    """What is common to the processors of images and of frames."""
    data = processor.pixels.to_preprocessor_config()
    data.pop("image_processor_type")
    side = processor.pixels.side
    # transformers' tiling takes the tile's size from crop_size, cropped or not.
    data.setdefault("do_center_crop", False)
    data.setdefault("crop_size", {"height": side, "width": side})
    return data


def _image_processor(kind: str, processor: AVLlavaProcessor) -> dict[str, Any]:
    if kind == "llava" and processor.config.image.aspect_ratio != "pad":
        return processor.pixels.to_preprocessor_config()
    if kind == "llava":
        return _pixels(processor) | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return _pixels(processor) | {
        "image_processor_type": _IMAGE_PROCESSORS[kind],
        "image_grid_pinpoints": hf_pinpoints(processor.config),
        "do_pad": True,
    }


def write_chat_template(
    folder: Path, processor: AVLlavaProcessor, tokens: Mapping[str, str] = MEDIA_TOKENS
) -> bool:
    """Write the prompt format as ``chat_template.jinja``.

    Args:
        folder: to write into.
        processor: of the model.
        tokens: placeholder by the kind of medium.

    Returns:
        Whether there is one: not for a format of the tokenizer's own, which it holds already.
    """
    template = processor.template
    if not isinstance(template, Template):
        return False
    around = (IM_START, IM_END) if processor.config.sequence.use_image_start_end else ("", "")
    source = jinja_source(
        template, adds_bos=adds_bos(processor.tokenizer), tokens=tokens, around_media=around
    )
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return True


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its first token before a text."""
    first = tokenizer("a").input_ids[:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def _chat_template(
    folder: Path, processor: AVLlavaProcessor, tokens: Mapping[str, str]
) -> list[str]:
    if write_chat_template(folder, processor, tokens):
        return []
    return [
        "The prompt format is the tokenizer's own chat template, which must handle media parts."
    ]


def _notes(kind: str, config: AVLlavaConfig, grid: int) -> list[str]:
    if kind != "llava_next_video":
        return []
    n_tokens = build(config.aggregator).plan(1, grid, grid).n_tokens
    if n_tokens == grid**2 // 4:
        return []
    return [
        f"transformers' LlavaNextVideoProcessor writes {grid**2 // 4} placeholders a frame, but "
        f"the model makes {n_tokens} tokens: expand the prompts of videos yourself."
    ]
