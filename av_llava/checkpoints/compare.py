"""Compares the two sides of a conversion: the logits of both on one fixed input, in float32.

Contract: one model is in memory at a time. The input is the same for the same architecture; it
holds text, and a picture, a video and sound where the model takes them.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from av_llava.checkpoints.configuration import read_config
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.load import load_checkpoint
from av_llava.checkpoints.needed import without_senses
from av_llava.checkpoints.quiet import quiet_loading
from av_llava.checkpoints.source import Source
from av_llava.checkpoints.staging import size
from av_llava.checkpoints.stored import TensorReader
from av_llava.config import AVLlavaConfig
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


def fixed_input(
    model: AVLlavaForConditionalGeneration, videos: bool = True, avoid: Iterable[int] = ()
) -> dict[str, Any]:
    """Expanded ids and media for one prompt, in transformers' calling convention.

    Args:
        model: decides which media there are, and how many rows they take.
        videos: whether a video may be among them.
        avoid: ids that must not be in the text, beside the model's own media ids.
    """
    config, planner = model.config, model.model.planner
    generator = torch.Generator().manual_seed(_SEED)
    text = _text(config, 20, {*avoid, *config.media_token_ids.values()}, generator)
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


def _text(config: AVLlavaConfig, n: int, avoid: set[int], generator: torch.Generator) -> list[int]:
    """Random ids of the vocabulary."""
    known = [i for i in range(config.text_config.vocab_size) if i not in avoid]
    return [known[i] for i in torch.randint(len(known), (n,), generator=generator).tolist()]


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
    theirs, _ = read_config(CheckpointFolder(made))
    names = ("image_token_id", "video_token_id", "audio_token_id")
    renamed = {getattr(model.config, name): getattr(theirs, name) for name in names}
    inputs = fixed_input(model, avoid=renamed.values())
    expected = logits_of(model, inputs)
    del model
    gc.collect()
    ids = inputs["input_ids"].clone()
    for old, new in renamed.items():
        ids[inputs["input_ids"] == old] = new
    inputs["input_ids"] = ids
    return largest_difference(expected, logits_of(load_float32(made), inputs))


def compare_hf(source: str | Path, made: Path, rounded_to: torch.dtype | None = None) -> float:
    """Largest difference of logits between a folder and its form for transformers' class."""
    kind = AutoConfig.from_pretrained(made)
    renamed = {"image_token_id": kind.image_token_index}
    if kind.model_type in ("llava_next_video", "llava_onevision"):
        renamed["video_token_id"] = kind.video_token_index
    model = load_float32(source, rounded_to)
    inputs = fixed_input(model, "video_token_id" in renamed, renamed.values())
    expected = logits_of(model, inputs)
    ids = inputs["input_ids"].clone()
    for name, value in renamed.items():
        ids[inputs["input_ids"] == getattr(model.config, name)] = value
    del model
    gc.collect()
    inputs["input_ids"] = ids
    if kind.model_type == "llava":
        inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
        del inputs["image_sizes"]
    return largest_difference(expected, logits_of(load_hf(made), inputs))


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
        with quiet_loading():
            model, report = kind.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load what was made: {error}") from error
    wrong = {k: sorted(map(str, v)) for k, v in report.items() if v}
    if wrong:
        raise CheckpointError(f"transformers loads what was made incompletely: {wrong}.")
    return model.eval()


def compare_text(opened: Source, made: Path, rounded_to: torch.dtype | None = None) -> float:
    """Largest difference of logits on text between a folder and its language model alone.

    The folder's side is our model without eyes and ears, so that no tower needs to be at hand.
    """
    model = _without_senses(opened, rounded_to)
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.tensor([_text(model.config, 24, set(), generator)])
    expected = logits_of(model, {"input_ids": ids})
    del model
    gc.collect()
    return largest_difference(expected, logits_of(load_causal_lm(made), {"input_ids": ids}))


def _without_senses(
    opened: Source, rounded_to: torch.dtype | None
) -> AVLlavaForConditionalGeneration:
    """Our model with the language model of a folder only, in float32."""
    config = without_senses(opened.light_config())
    state = {}
    with TensorReader() as reader:
        for name, stored in opened.language_model().saved():
            read = reader.read(stored)
            state[name] = (read if rounded_to is None else read.to(rounded_to)).float()
    with quiet_loading():
        model = AVLlavaForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32
        )
    return model.eval()
