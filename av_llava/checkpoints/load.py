"""Loads a checkpoint folder into a model, strictly.

Contract: what a checkpoint is comes from its config and its keys. Every parameter of the model is
found in the checkpoint or in a tower's folder, with its shape; every tensor of the checkpoint is
used; otherwise :class:`CheckpointError` lists what is wrong. Originals are only read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from av_llava.checkpoints import hf_format
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.tokenizers import load_tokenizer
from av_llava.checkpoints.towers import Tower, find_tower, hub_folder, read_tensors
from av_llava.config import AVLlavaConfig, is_llava_config, tower_name
from av_llava.errors import CheckpointError, UsageError
from av_llava.images import PixelSpec
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.vision import tower_weights
from av_llava.weight_names import ignored, memory_name

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
    local = Path(path).expanduser()
    if local.is_dir():
        return CheckpointFolder(local)
    if local.exists():
        raise CheckpointError(f"{local} is a file; a checkpoint is a folder with a config.json.")
    found = hub_folder(str(path)) if not local.is_absolute() else None
    if found is None:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is not a folder here, and the hub does not give it "
            f"(no connection, no such repository, or no permission)."
        )
    return CheckpointFolder(found)


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto`` takes CUDA, then Apple's MPS, then the CPU."""
    if str(device) != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise UsageError(f"Unknown device {device!r}: {error}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_dtype(
    dtype: str | torch.dtype | None, stored: Any, device: torch.device
) -> torch.dtype:
    """``auto`` takes the checkpoint's own type, with bfloat16 for float16 on a CPU."""
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in (None, "auto"):
        found = getattr(torch, names.get(str(dtype), str(dtype)), None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise UsageError(f"Unknown dtype {dtype!r}. Known: auto, float32, bfloat16, float16.")
        return found
    own = getattr(torch, str(stored).removeprefix("torch."), None) or torch.float32
    if own is torch.float16 and device.type == "cpu":
        logger.info("float16 is slow and overflows on a CPU: using bfloat16.")
        return torch.bfloat16
    return own


def load_checkpoint(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    overwrite_config: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load a full checkpoint.

    Args:
        path: folder, or id of a repository on the hub.
        device: where the model goes; ignored with ``device_map``.
        dtype: of the weights; auto keeps the checkpoint's.
        device_map: of accelerate, e.g. ``"auto"``.
        attn_implementation: sdpa (default), eager, flash_attention_2.
        overwrite_config: values to change in the folder's config before it is read.

    Raises:
        CheckpointError: the folder cannot be loaded completely.
    """
    folder = locate(path)
    folder.check_files()
    config, tower = read_config(folder, overwrite_config)
    target = resolve_device(device)
    renames = dict(hf_format.HF_TO_MEMORY) if hf_format.is_hf_llava_config(folder.config) else None
    with _quiet_loading():
        model, report = AVLlavaForConditionalGeneration.from_pretrained(
            folder.path,
            config=config,
            dtype=resolve_dtype(dtype, config.dtype, target),
            device_map=device_map,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
            key_mapping=renames,
        )
    missing = set(report["missing_keys"])
    if tower is not None and not _has_vision_tower(folder):
        missing -= fill_vision_tower(model, tower)
    _check_report(folder, missing, report)
    if not (folder.path / "generation_config.json").exists():
        # transformers would take LLaVA's config.json for one, with a max_length of 20 in it.
        model.generation_config = _end_tokens(config)
    if device_map is None:
        model.to(target)
    return Loaded(model.eval(), load_tokenizer(folder, config), folder.path, tower)


def _end_tokens(config: AVLlavaConfig) -> GenerationConfig:
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hold back transformers' report of missing keys: a tower beside the checkpoint is in it.

    What is really missing becomes an error of ours.
    """
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def read_config(
    folder: CheckpointFolder, overwrite: Mapping[str, Any] | None = None
) -> tuple[AVLlavaConfig, Tower | None]:
    """The configuration of a folder, and its vision tower when the folder only names it."""
    data = {**folder.config, **(overwrite or {})}
    if data.get("model_type") == AVLlavaConfig.model_type:
        data.pop("model_type")
        return AVLlavaConfig(**data), None
    if hf_format.is_hf_llava_config(data):
        config = hf_format.read_hf_config(folder, data)
        pixels = hf_format.image_processor(folder)
        inside = Tower("inside the checkpoint", None, config.vision_config, pixels)
        return _with_preprocessor(config, inside), None
    if is_llava_config(data):
        name = tower_name(data)
        tower = None
        if name is not None:
            tower = find_tower(name, folder.path, weights=not _has_vision_tower(folder))
        config = AVLlavaConfig.from_llava(
            data, tower.config if tower else None, n_tower_layers=_tower_layers(folder)
        )
        return _with_preprocessor(_with_marks(config, folder), tower), tower
    raise CheckpointError(
        f"{folder.path / 'config.json'} (model_type {data.get('model_type')!r}) is not a "
        f"checkpoint of the LLaVA family: it names no vision tower (mm_vision_tower)."
    )


def memory_keys(folder: CheckpointFolder) -> set[str]:
    """Names in memory of the tensors in a folder, without those that hold nothing used."""
    hf = hf_format.is_hf_llava_config(folder.config)
    rename = hf_format.memory_name if hf else memory_name
    return {rename(key) for key in folder.keys if not ignored(key)}


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
    spec = PixelSpec.from_preprocessor_config(tower.preprocessor)
    if spec.side != tower.config.image_size:
        raise CheckpointError(
            f"The tower {tower.name} takes images of {tower.config.image_size} pixels a side, but "
            f"its preprocessor_config.json makes {spec.side}."
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
    found = [re.search(r"vision_tower\..*encoder\.layers\.(\d+)\.", k) for k in folder.keys]
    return max((int(m[1]) + 1 for m in found if m), default=None)


def _has_vision_tower(folder: CheckpointFolder) -> bool:
    return folder.has("model.vision_tower.")


def fill_vision_tower(model: AVLlavaForConditionalGeneration, tower: Tower) -> set[str]:
    """Copy the weights of a tower's own folder into the model; return the keys that it filled."""
    if tower.folder is None:
        raise CheckpointError(f"The weights of the tower {tower.name!r} are not at hand.")
    own = model.model.vision_tower.vision_tower.state_dict()
    state, left_out = tower_weights(read_tensors(tower.folder), model.model.vision_tower)
    absent = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    wrong = [
        f"{k}: the tower has {tuple(state[k].shape)}, the model needs {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if absent or wrong or unexpected:
        raise CheckpointError(
            f"The tower {tower.folder} does not fit its configuration. "
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


def _check_report(folder: CheckpointFolder, missing: set[str], report: Mapping[str, Any]) -> None:
    """Turn transformers' loading report into an error when anything is left over."""
    unexpected = sorted(k for k in report["unexpected_keys"] if not ignored(k))
    wrong = [
        f"{key}: the file has {tuple(found)}, the model needs {tuple(wanted)}"
        for key, found, wanted in report["mismatched_keys"]
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(
            f"{folder.path} does not fit its config.json. "
            + _listed("Missing", sorted(missing))
            + _listed("Unexpected", unexpected)
            + _listed("Wrong shape", wrong)
        )


def _listed(title: str, entries: list[str]) -> str:
    if not entries:
        return ""
    more = f" and {len(entries) - _SHOWN_KEYS} more" if len(entries) > _SHOWN_KEYS else ""
    return f"{title} ({len(entries)}): {'; '.join(entries[:_SHOWN_KEYS])}{more}. "
