"""What a folder's files say about a model: configuration, settings of generation, tensor names.

Contract: no weights are read. What a wrong value in a file ends in, in transformers, torch or our
own settings, is an error that names the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig

from av_llava.budgeting import frames_that_fit
from av_llava.checkpoints import hf_format
from av_llava.checkpoints.folder import CheckpointFolder, read_json, sentence
from av_llava.checkpoints.overwrite import overwritten
from av_llava.checkpoints.quantize import plain_keys, stored_scheme
from av_llava.checkpoints.towers import Tower, find_tower
from av_llava.config import AVLlavaConfig, is_llava_config, tower_name
from av_llava.errors import AVLlavaError, CheckpointError, UsageError
from av_llava.images import PixelSpec
from av_llava.weight_names import ignored, memory_name

# What a wrong value in a file ends in, in transformers, torch, or our own settings.
_WRONG_VALUES = (
    AVLlavaError,
    StrictDataclassError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
)

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def read_config(
    folder: CheckpointFolder,
    overwrite: Mapping[str, Any] | None = None,
    *,
    need_tower: bool = True,
) -> tuple[AVLlavaConfig, Tower | None]:
    """The configuration of a folder, and its vision tower when the folder only names it.

    Args:
        folder: of the checkpoint.
        overwrite: values of its config.json to change.
        need_tower: the tower's weights have to be at hand; False is content to know what it is.

    Raises:
        CheckpointError: config.json is wrong or of another kind of model, or the tower is nowhere.
    """
    data = overwritten(folder.config, overwrite)
    with blamed_on(folder, overwrite):
        _check_dtype(data)
    if data.get("model_type") == AVLlavaConfig.model_type:
        data.pop("model_type")
        with blamed_on(folder, overwrite):
            return AVLlavaConfig(**data), None
    if hf_format.is_hf_llava_config(data):
        config = hf_format.read_hf_config(folder, data)
        pixels = hf_format.image_processor(folder)
        inside = Tower("inside the checkpoint", None, config.vision_config, pixels)
        return _with_preprocessor(config, inside), None
    if is_llava_config(data):
        return _read_llava(folder, data, overwrite, need_tower)
    raise CheckpointError(
        f"{folder.path / 'config.json'} (model_type {data.get('model_type')!r}) is not a "
        f"checkpoint of the LLaVA family: it names no vision tower (mm_vision_tower)."
    )


def _check_dtype(data: Mapping[str, Any]) -> None:
    """Refuse a type of weights that is none, with the name of its field."""
    for key in ("torch_dtype", "dtype"):
        value = data.get(key)
        name = value.removeprefix("torch.") if isinstance(value, str) else ""
        if value not in (None, "auto") and not isinstance(getattr(torch, name, None), torch.dtype):
            raise CheckpointError(f"{key} {value!r} is not a type of torch such as 'bfloat16'.")


def _read_llava(
    folder: CheckpointFolder,
    data: dict[str, Any],
    overwrite: Mapping[str, Any] | None,
    need_tower: bool,
) -> tuple[AVLlavaConfig, Tower | None]:
    """The configuration of a folder in LLaVA's own layout, and its tower."""
    with blamed_on(folder, overwrite):
        name = tower_name(data)
    tower = None
    if name is not None:
        beside = need_tower and not holds_vision_tower(folder)
        tower = find_tower(name, folder.path, weights=beside)
    if "tie_word_embeddings" not in data:  # transformers 4 leaves it out where it is the default
        data["tie_word_embeddings"] = not folder.has("lm_head.")
    with blamed_on(folder, overwrite):
        config = AVLlavaConfig.from_llava(
            data, tower.config if tower else None, n_tower_layers=_tower_layers(folder)
        )
    config = _with_preprocessor(_with_marks(config, folder), tower)
    if tower is not None and config.sampling.frames is not None:
        with blamed_on(folder, overwrite):
            most = frames_that_fit(config, config.sampling.frames)
        config.sampling = config.sampling.replace(frames=most)
    return config, tower


def _with_marks(config: AVLlavaConfig, folder: CheckpointFolder) -> AVLlavaConfig:
    """Own the learned marks that the checkpoint holds, whether its config asks for them or not."""
    held = {"newline": "model.image_newline", "frame_end": "model.faster_token"}
    marks = {*config.sequence.media_tokens, *(m for m, k in held.items() if k in folder.keys)}
    config.sequence = config.sequence.replace(media_tokens=tuple(sorted(marks)))
    return config


def _with_preprocessor(config: AVLlavaConfig, tower: Tower | None) -> AVLlavaConfig:
    """Take resizing and pixel statistics from the tower's preprocessor file, if it has one."""
    if tower is None or tower.preprocessor is None:
        return config
    try:
        spec = PixelSpec.from_preprocessor_config(tower.preprocessor)
        side = spec.side
    except (UsageError, CheckpointError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"preprocessor_config.json of {tower.place}: {sentence(str(error))}"
        ) from error
    if side != tower.config.image_size:
        raise CheckpointError(
            f"The tower {tower.place} takes images of {tower.config.image_size} pixels a side, "
            f"but its preprocessor_config.json makes {side}."
        )
    mean, std = spec.unit_mean_std
    config.vision = config.vision.replace(
        image_mean=mean,
        image_std=std,
        resize="shortest_edge" if isinstance(spec.size, int) else "exact",
        resample=spec.resample,
    )
    return config


def _tower_layers(folder: CheckpointFolder) -> int | None:
    """Layers of the vision tower inside the checkpoint; None when it holds no tower."""
    return n_encoder_layers(k for k in folder.keys if "vision_tower." in k)


def memory_keys(folder: CheckpointFolder) -> set[str]:
    """Names in memory of the tensors in a folder, without those that hold nothing used."""
    hf = hf_format.is_hf_llava_config(folder.config)
    rename = hf_format.memory_name if hf else memory_name
    keys = folder.keys if stored_scheme(folder) is None else plain_keys(folder.keys)
    return {rename(key) for key in keys if not ignored(key)}


def generation_config(folder: CheckpointFolder, config: AVLlavaConfig) -> GenerationConfig:
    """The folder's settings of generation, with the special tokens of the language model.

    Without a file of them, transformers would take LLaVA's config.json for one, with a max_length
    of 20 in it.
    """
    text, name = config.text_config, "generation_config.json"
    generation = GenerationConfig()
    if folder.holds(name):
        data = read_json(folder.path / name)
        with blamed_on(folder, None, name):
            generation = GenerationConfig.from_dict(data)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, token) is None:
            setattr(generation, token, getattr(text, token, None))
    if not generation.do_sample:
        # Published files hold temperatures without sampling, which transformers refuses to save.
        for name in _SAMPLING:
            setattr(generation, name, None)
    return generation


@contextmanager
def blamed_on(
    folder: CheckpointFolder, overwrite: Mapping[str, Any] | None, name: str = "config.json"
) -> Iterator[None]:
    """Turn what a wrong value in a file ends in into an error that names the file."""
    try:
        yield
    except _WRONG_VALUES as error:
        changed = f" (with overwrite_config of {', '.join(overwrite)})" if overwrite else ""
        why = str(error) if isinstance(error, AVLlavaError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{folder.path / name}{changed}: {sentence(why)}") from error


def n_encoder_layers(keys: Iterable[str]) -> int | None:
    """Layers of a vision tower among names of tensors; None when there are none."""
    vision = (key for key in keys if not key.startswith("text_model."))  # of a whole CLIP
    found = [re.search(r"encoder\.layers\.(\d+)\.", key) for key in vision]
    return max((int(m[1]) + 1 for m in found if m), default=None)


def holds_vision_tower(folder: CheckpointFolder) -> bool:
    """Whether a folder in LLaVA's names holds the vision tower's weights."""
    return folder.has("model.vision_tower.")
