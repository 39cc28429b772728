"""Loads a checkpoint folder into a model, strictly.

Contract: what a checkpoint is comes from its config and its keys. Every parameter of the model is
found in the checkpoint or in a tower's folder, with its shape; every tensor of the checkpoint is
used; otherwise :class:`CheckpointError` lists what is wrong. Originals are only read.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from av_llava.budgeting import frames_that_fit
from av_llava.checkpoints import hf_format
from av_llava.checkpoints.folder import (
    CheckpointFolder,
    read_json,
    refuse_delta,
    sentence,
    unreadable,
)
from av_llava.checkpoints.needed import empty_model
from av_llava.checkpoints.overwrite import overwritten
from av_llava.checkpoints.quantize import (
    WeightsPlan,
    check_scheme,
    plain_keys,
    plan_weights,
    settle,
    stored_scheme,
)
from av_llava.checkpoints.quiet import quiet_loading
from av_llava.checkpoints.target import (
    check_device_map,
    check_tied_offload,
    resolve_device,
    stored_dtype,
)
from av_llava.checkpoints.tokenizers import load_tokenizer
from av_llava.checkpoints.tokens import complete_tokenizer, grow_for
from av_llava.checkpoints.towers import Tower, fetch, find_tower, read_tensors
from av_llava.config import AVLlavaConfig, is_llava_config, tower_name
from av_llava.errors import AVLlavaError, CheckpointError, UsageError
from av_llava.images import PixelSpec
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.vision import tower_weights
from av_llava.weight_names import disk_name, ignored, memory_name

logger = logging.getLogger(__name__)

_SHOWN_KEYS = 12
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
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


@dataclass
class Loaded:
    """A model with its tokenizer and where both came from."""

    model: AVLlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    vision_tower: Tower | None


def locate(path: str | Path) -> CheckpointFolder:
    """The local folder of a path or hub id.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    if not str(path).strip():
        raise CheckpointError("The path of the checkpoint is empty: give a folder or a hub id.")
    try:
        local = Path(path).expanduser()
        is_folder, is_there = local.is_dir(), local.exists()
    except OSError as error:
        raise unreadable(Path(path), error) from error
    except RuntimeError as error:  # "~name" without such a user
        raise CheckpointError(f"{str(path)!r} names no folder: {error}") from error
    if is_folder:
        return CheckpointFolder(local)
    if is_there:
        raise CheckpointError(f"{local} is a file; a checkpoint is a folder with a config.json.")
    if local.is_absolute():
        raise CheckpointError(f"The checkpoint folder {str(path)!r} does not exist.")
    try:
        return CheckpointFolder(fetch(str(path)))
    except CheckpointError as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is not a folder here, and not on the hub: {error}"
        ) from error


def load_checkpoint(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    overwrite_config: Mapping[str, Any] | None = None,
    quantize: str | None = None,
) -> Loaded:
    """Load a full checkpoint.

    Args:
        path: folder, or id of a repository on the hub.
        device: where the model goes; ignored with ``device_map``.
        dtype: of the weights; auto keeps the checkpoint's.
        device_map: of accelerate, e.g. ``"auto"``.
        attn_implementation: sdpa (default), eager, flash_attention_2.
        overwrite_config: values to change in the folder's config before it is read.
        quantize: 4bit, 8bit or int8; see :mod:`av_llava.checkpoints.quantize`.

    Raises:
        CheckpointError: the folder cannot be loaded completely.
    """
    check_device_map(device_map)
    check_scheme(quantize)
    target = resolve_device(device)
    folder = locate(path)
    refuse_delta(folder)
    folder.check_files()
    if folder.holds("adapter_config.json"):
        # transformers would attach it without a word.
        raise CheckpointError(
            f"{folder.path} holds an adapter (adapter_config.json) beside full weights. Move one "
            f"of them to another folder, and load the one that you mean."
        )
    config, tower = read_config(folder, overwrite_config)
    with blamed_on(folder, overwrite_config):
        stored = stored_dtype(config.dtype)
        empty_model(config)  # shows whether such a model can be made
    tokenizer = load_tokenizer(folder, config)
    tokens = complete_tokenizer(tokenizer, config)
    generation = generation_config(folder, config)
    plan = plan_weights(
        folder, quantize, dtype=dtype, own_dtype=stored, device=target, device_map=device_map
    )
    model, report = materialise(folder, config, plan, attn_implementation=attn_implementation)
    missing = set(report["missing_keys"])
    if tower is not None and not _has_vision_tower(folder):
        missing -= fill_vision_tower(model, tower)
    check_report(folder, missing, report)
    grow_for(model, tokens)
    model.generation_config = generation
    if plan.device_map is None:
        model.to(target)
    return Loaded(model.eval(), tokenizer, folder.path, tower)


def materialise(
    folder: CheckpointFolder,
    config: AVLlavaConfig,
    plan: WeightsPlan,
    *,
    attn_implementation: str | None = None,
) -> tuple[AVLlavaForConditionalGeneration, dict[str, Any]]:
    """Make the model and read a folder's weights into it.

    Returns:
        The model, and transformers' report of missing, unexpected and mismatched keys.
    """
    renames = dict(hf_format.HF_TO_MEMORY) if hf_format.is_hf_llava_config(folder.config) else None
    device_map = plan.device_map
    # For weights on disk that cannot be read from the checkpoint's own files, such as .bin.
    offload = TemporaryDirectory(prefix="av-llava-") if device_map is not None else None
    try:
        with quiet_loading():
            model, report = AVLlavaForConditionalGeneration.from_pretrained(
                folder.path,
                config=config,
                dtype=plan.dtype,
                device_map=device_map,
                quantization_config=plan.prepare(config),
                attn_implementation=attn_implementation,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
                key_mapping=renames,
                offload_folder=None if offload is None else offload.name,
            )
    except (ValueError, ImportError) as error:
        tied = isinstance(device_map, Mapping) and config.tie_word_embeddings
        hint = " Its embeddings and head are one matrix: place them together." if tied else ""
        raise UsageError(
            f"{folder.path} cannot be loaded with attn_implementation={attn_implementation!r} and "
            f"device_map={device_map!r}: {error}{hint}"
        ) from error
    if offload is not None:
        weakref.finalize(model, offload.cleanup)
        check_tied_offload(model)
    if plan.scheme is not None:
        report["mismatched_keys"] = [*report["mismatched_keys"], *settle(model, plan)]
    return model, report


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
        beside = need_tower and not _has_vision_tower(folder)
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


def memory_keys(folder: CheckpointFolder) -> set[str]:
    """Names in memory of the tensors in a folder, without those that hold nothing used."""
    hf = hf_format.is_hf_llava_config(folder.config)
    rename = hf_format.memory_name if hf else memory_name
    keys = folder.keys if stored_scheme(folder) is None else plain_keys(folder.keys)
    return {rename(key) for key in keys if not ignored(key)}


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
    return _n_layers(k for k in folder.keys if "vision_tower." in k)


def _n_layers(keys: Iterable[str]) -> int | None:
    found = [re.search(r"encoder\.layers\.(\d+)\.", key) for key in keys]
    return max((int(m[1]) + 1 for m in found if m), default=None)


def _has_vision_tower(folder: CheckpointFolder) -> bool:
    return folder.has("model.vision_tower.")


def fill_vision_tower(model: AVLlavaForConditionalGeneration, tower: Tower) -> set[str]:
    """Copy the weights of a tower's own folder into the model; return the keys that it filled."""
    if tower.folder is None:
        raise CheckpointError(f"The weights of the tower {tower.name!r} are not at hand.")
    own = model.model.vision_tower.vision_tower.state_dict()
    held = read_tensors(tower.folder)
    depth = _n_layers(key for key in held if not key.startswith("text_model."))
    if depth is not None and depth > tower.config.num_hidden_layers:
        # Layers are counted from the end, so with fewer of them the features would be others.
        raise CheckpointError(
            f"The tower {tower.folder} holds {depth} layers, but its config.json says "
            f"{tower.config.num_hidden_layers}."
        )
    state, left_out = tower_weights(held, model.model.vision_tower)
    absent = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    wrong = [
        f"{k}: the tower has {tuple(state[k].shape)}, the model needs {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if absent or wrong or unexpected:
        raise CheckpointError(
            f"The tower {tower.folder} does not fit its configuration."
            + _listed("Missing", absent)
            + _listed("Unexpected", unexpected)
            + _listed("Wrong shape", wrong)
        )
    if any(v.is_meta for v in own.values()):
        raise CheckpointError(
            f"The vision tower's weights lie beside the checkpoint ({tower.folder}), so they "
            f"cannot be offloaded: give a device_map that keeps model.vision_tower on a device, or "
            f"save the loaded model once with save_pretrained and load that."
        )
    logger.info("Tower %s: %d tensors are not used.", tower.name, len(left_out))
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])
    prefix = "model.vision_tower.vision_tower."
    return {prefix + k for k in own}


def check_report(folder: CheckpointFolder, missing: set[str], report: Mapping[str, Any]) -> None:
    """Turn transformers' loading report into an error when anything is left over."""
    own = not hf_format.is_hf_llava_config(folder.config)
    shown = disk_name if own else str
    unexpected = sorted(shown(k) for k in report["unexpected_keys"] if not ignored(k))
    unused = sorted(k for k in folder.keys if ignored(k))
    if unused:
        logger.info(
            "%s: %d tensors hold nothing that is used: %s", folder.path, len(unused), unused
        )
    wrong = [
        f"{shown(key)}: the file has {tuple(found)}, the model needs {tuple(wanted)}"
        for key, found, wanted in report["mismatched_keys"]
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(
            f"{folder.path} does not fit its config.json."
            + _listed("Missing", sorted(map(shown, missing)))
            + _listed("Unexpected", unexpected)
            + _listed("Wrong shape", sorted(wrong))
        )


def _listed(title: str, entries: list[str]) -> str:
    if not entries:
        return ""
    more = f" and {len(entries) - _SHOWN_KEYS} more" if len(entries) > _SHOWN_KEYS else ""
    return f" {title} ({len(entries)}): {'; '.join(entries[:_SHOWN_KEYS])}{more}."
