"""Compares the two sides of a conversion: the logits of both on one fixed input, in float32.

Contract: one model is in memory at a time. The input is the same for the same architecture; it
holds text, and a picture, a video and sound where the model takes them.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from av_llava.checkpoints.load import load_checkpoint
from av_llava.checkpoints.staging import size
from av_llava.errors import BudgetError, CheckpointError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.planning import MediaPlanner

logger = logging.getLogger(__name__)

_SEED = 20240607
_SOUND_SAMPLES = 16_000
# Sides of the picture in tiles; the first that both rules of unpadding cut alike is taken.
_PICTURES = ((1.5, 1.0), (2.0, 1.0), (1.0, 1.0))


def check_memory(n_bytes: int, stored_itemsize: int = 2) -> None:
    """Raise unless a model of so many stored bytes fits the free memory in float32.

    Raises:
        BudgetError: it does not.
    """
    needed = n_bytes * 4 // stored_itemsize
    free = _free_memory()
    if free is not None and needed > free:
        raise BudgetError(
            f"Comparing needs the model in float32, about {size(needed)}, and {size(free)} of "
            f"memory are free. Leave --verify out, or run it on a larger machine."
        )


def _free_memory() -> int | None:
    """Memory that can be taken without swapping, in bytes; None where it is not told."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(match[1]) * 1024 if match else None


def load_float32(
    path: str | Path, rounded_to: torch.dtype | None = None
) -> AVLlavaForConditionalGeneration:
    """Load a checkpoint in float32; its weights rounded to another type if that is given."""
    model = load_checkpoint(path, device="cpu", dtype=rounded_to or torch.float32).model
    return model.float()


def fixed_input(model: AVLlavaForConditionalGeneration, videos: bool = True) -> dict[str, Any]:
    """Expanded ids and media for one prompt, in transformers' calling convention.

    Args:
        model: decides which media there are, and how many rows they take.
        videos: whether a video may be among them.
    """
    config, planner = model.config, model.model.planner
    generator = torch.Generator().manual_seed(_SEED)
    text = torch.randint(config.text_config.vocab_size, (20,), generator=generator).tolist()
    ids, media = text[:6], {}
    if config.vision_config is not None:
        side = max((config.vision_config.image_size, *config.vision.s2_scales))
        shape, n_tiles, n_tokens = _picture(planner, side)
        pixels = torch.randn((1, n_tiles, 3, side, side), generator=generator)
        media = {"pixel_values": pixels, "image_sizes": torch.tensor([shape[::-1]])}
        ids += [config.image_token_id] * n_tokens + text[6:11]
    if videos and config.vision_config is not None and "cls" not in config.vision.select_feature:
        media["pixel_values_videos"] = torch.randn((1, 3, 3, side, side), generator=generator)
        ids += [config.video_token_id] * planner.video(3).n_tokens + text[11:15]
    if config.audio_config is not None:
        wave = torch.randn(_SOUND_SAMPLES, generator=generator) / 10
        media["input_features"] = model.model.audio_tower.features([wave]).features
        media["audio_lengths"] = torch.tensor([_SOUND_SAMPLES])
        ids += [config.audio_token_id] * planner.audio(_SOUND_SAMPLES).n_tokens
    return {"input_ids": torch.tensor([ids + text[15:]]), **media}


def _picture(planner: MediaPlanner, side: int) -> tuple[tuple[int, int], int, int]:
    """(width, height), tiles and tokens of a picture that every rule of rounding cuts alike."""
    settings = planner.config.image
    shapes = [(int(width * side), int(height * side)) for width, height in _PICTURES]
    for shape in shapes:
        counts = []
        for rule in ("llava", "hf"):
            planner.config.image = settings.replace(unpad_rounding=rule)
            counts.append(planner.image(shape).n_tokens)
        planner.config.image = settings
        if counts[0] == counts[1]:
            break
    plan = planner.image(shape)
    return shape, plan.n_tiles, plan.n_tokens


@torch.no_grad()
def logits_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of the whole sequence, in float32. [1, L, V]"""
    logits: Tensor = model(**inputs).logits
    return logits.float()


def largest_difference(first: Tensor, second: Tensor) -> float:
    """The largest difference over the vocabulary that both have.

    Raises:
        CheckpointError: the two are of different lengths.
    """
    if first.shape[:-1] != second.shape[:-1]:
        raise CheckpointError(
            f"The two sides give logits of shapes {tuple(first.shape)} and {tuple(second.shape)}."
        )
    n = min(first.shape[-1], second.shape[-1])
    return float((first[..., :n] - second[..., :n]).abs().max())


def compare_ours(source: str | Path, made: Path, rounded_to: torch.dtype | None = None) -> float:
    """Largest difference of logits between two folders that this package loads."""
    model = load_float32(source, rounded_to)
    inputs = fixed_input(model)
    expected = logits_of(model, inputs)
    own = {name: getattr(model.config, name) for name in _MEDIA_IDS}
    del model
    gc.collect()
    made_model = load_float32(made)
    inputs["input_ids"] = _renamed(inputs["input_ids"], own, made_model.config)
    return largest_difference(expected, logits_of(made_model, inputs))


_MEDIA_IDS = ("image_token_id", "video_token_id", "audio_token_id")


def _renamed(ids: Tensor, own: Mapping[str, int], config: Any) -> Tensor:
    """Ids with another model's media ids in the place of one's own."""
    out = ids.clone()
    for name, value in own.items():
        out[ids == value] = getattr(config, name)
    return out


def compare_hf(source: str | Path, made: Path, rounded_to: torch.dtype | None = None) -> float:
    """Largest difference of logits between a folder and its form for transformers' class."""
    model = load_float32(source, rounded_to)
    theirs = load_hf(made)
    kind = theirs.config.model_type
    inputs = fixed_input(model, videos=kind in ("llava_next_video", "llava_onevision"))
    expected = logits_of(model, inputs)
    own = {name: getattr(model.config, name) for name in _MEDIA_IDS[:2]}
    del model
    gc.collect()
    ids = inputs["input_ids"]
    inputs["input_ids"] = ids.where(ids != own["image_token_id"], theirs.config.image_token_index)
    if "pixel_values_videos" in inputs:
        video = theirs.config.video_token_index
        inputs["input_ids"] = inputs["input_ids"].where(ids != own["video_token_id"], video)
    if kind == "llava":
        inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
        del inputs["image_sizes"]
    return largest_difference(expected, logits_of(theirs, inputs))


def load_hf(folder: Path) -> Any:
    """Load a folder with transformers' own class, strictly, in float32."""
    from transformers import AutoModelForImageTextToText

    return _strictly(AutoModelForImageTextToText, folder)


def load_causal_lm(folder: Path) -> Any:
    """Load a folder as a plain language model, strictly, in float32."""
    from transformers import AutoModelForCausalLM

    return _strictly(AutoModelForCausalLM, folder)


def _strictly(kind: Any, folder: Path) -> Any:
    try:
        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load what was made: {error}") from error
    wrong = {k: sorted(map(str, v)) for k, v in report.items() if v}
    if wrong:
        raise CheckpointError(f"transformers loads what was made incompletely: {wrong}.")
    return model.eval()


def compare_text(source: str | Path, made: Path, rounded_to: torch.dtype | None = None) -> float:
    """Largest difference of logits on text between a folder and its language model alone."""
    ids, expected = _text_logits(source, rounded_to)
    return largest_difference(expected, logits_of(load_causal_lm(made), {"input_ids": ids}))


def _text_logits(source: str | Path, rounded_to: torch.dtype | None) -> tuple[Tensor, Tensor]:
    model = load_float32(source, rounded_to)
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(model.config.text_config.vocab_size, (1, 24), generator=generator)
    return ids, logits_of(model, {"input_ids": ids})
