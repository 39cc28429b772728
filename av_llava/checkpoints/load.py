"""Loads a checkpoint folder into a model, strictly.

Contract: what a checkpoint is comes from its config and its keys. Every parameter of the model is
found in the checkpoint or in a tower's folder, with its shape; every tensor of the checkpoint is
used; otherwise :class:`CheckpointError` lists what is wrong. Originals are only read.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from av_llava.checkpoints import hf_format
from av_llava.checkpoints.configuration import (
    blamed_on,
    generation_config,
    holds_vision_tower,
    n_encoder_layers,
    read_config,
)
from av_llava.checkpoints.folder import (
    CheckpointFolder,
    refuse_delta,
    unreadable,
)
from av_llava.checkpoints.needed import empty_model
from av_llava.checkpoints.quantize import (
    WeightsPlan,
    check_scheme,
    plan_weights,
    settle,
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
from av_llava.checkpoints.towers import Tower, fetch, read_tensors
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError, UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.vision import tower_weights
from av_llava.weight_names import disk_name, ignored

logger = logging.getLogger(__name__)

_SHOWN_KEYS = 12


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
    float32: Collection[str] = (),
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
        float32: names in memory of modules that are read in float32 whatever ``dtype`` is.

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
    model, report = materialise(
        folder, config, plan, attn_implementation=attn_implementation, float32=float32
    )
    missing = set(report["missing_keys"])
    if tower is not None and not holds_vision_tower(folder):
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
    float32: Collection[str] = (),
) -> tuple[AVLlavaForConditionalGeneration, dict[str, Any]]:
    """Make the model and read a folder's weights into it.

    Args:
        folder, config, plan: what is read, and how.
        attn_implementation: as for :func:`load_checkpoint`.
        float32: likewise; also what the folder lacks is made so.

    Returns:
        The model, and transformers' report of missing, unexpected and mismatched keys.
    """
    renames = dict(hf_format.HF_TO_MEMORY) if hf_format.is_hf_llava_config(folder.config) else None
    device_map = plan.device_map
    # For weights on disk that cannot be read from the checkpoint's own files, such as .bin.
    offload = TemporaryDirectory(prefix="av-llava-") if device_map is not None else None
    try:
        with quiet_loading(), _read_in_float32(float32):
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
    prefixes = tuple(f"{name}." for name in float32)
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):  # transformers makes what the folder lacks in plan.dtype
            parameter.data = parameter.data.float()
    return model, report


@contextmanager
def _read_in_float32(modules: Collection[str]) -> Iterator[None]:
    """Name the modules that transformers does not round; it asks the class for them."""
    kind = AVLlavaForConditionalGeneration
    before = kind._keep_in_fp32_modules_strict
    kind._keep_in_fp32_modules_strict = {*(before or ()), *modules}
    try:
        yield
    finally:
        kind._keep_in_fp32_modules_strict = before


def fill_vision_tower(model: AVLlavaForConditionalGeneration, tower: Tower) -> set[str]:
    """Copy the weights of a tower's own folder into the model; return the keys that it filled."""
    if tower.folder is None:
        raise CheckpointError(f"The weights of the tower {tower.name!r} are not at hand.")
    own = model.model.vision_tower.vision_tower.state_dict()
    held = read_tensors(tower.folder)
    depth = n_encoder_layers(held)
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
