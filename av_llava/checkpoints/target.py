"""Where a model goes and in which type: the spellings that users give, checked before loading."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import accelerate
import torch
from packaging.version import Version

from av_llava.errors import UsageError, unknown_name

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_OTHER_SPELLINGS = {
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp64": "float64",
    "double": "float64",
}
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")


def resolve_device(device: str | int | torch.device | None) -> torch.device:
    """The device of a spelling: ``auto`` or None takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        UsageError: no such device, or it is not there.
    """
    name = str(device).strip().lower() if device is not None else "auto"
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name.isdigit():
        name = f"cuda:{name}"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"Unknown device {str(device)!r}. Use auto, cpu, cuda, cuda:0, mps."
        ) from error
    _check_present(found)
    return found


def _check_present(device: torch.device) -> None:
    """Raise unless a model can be put there."""
    if device.type == "meta":
        raise UsageError("A model cannot be loaded onto the device 'meta', which holds no data.")
    if device.type == "cpu":
        return
    backend = getattr(torch, device.type, None)
    if device.type == "mps":
        present, count = torch.backends.mps.is_available(), 1
    elif backend is None or not hasattr(backend, "is_available"):
        present, count = False, 0
    else:
        present = backend.is_available()
        count = backend.device_count() if present else 0
    if not present:
        raise UsageError(
            f"The device {str(device)!r} is not available to this PyTorch ({torch.__version__}). "
            f"Use cpu, or auto for what is there."
        )
    if device.index is not None and device.index >= count:
        raise UsageError(f"The device {str(device)!r} is not there: this machine has {count}.")


def named_dtype(dtype: Any) -> torch.dtype | None:
    """The type of a name such as bf16, float16 or torch.float32; None for any other."""
    name = str(dtype).strip().lower().removeprefix("torch.")
    return DTYPES.get(_OTHER_SPELLINGS.get(name, name))


def stored_dtype(stored: Any) -> torch.dtype:
    """The type that a config gives for its weights; float32 for None.

    Raises:
        UsageError: it is no floating-point type.
    """
    own = torch.float32 if stored is None else named_dtype(stored)
    if own is None:
        raise unknown_name("dtype of a checkpoint", stored, DTYPES)
    return own


def resolve_dtype(
    dtype: str | torch.dtype | None, stored: Any, device: torch.device
) -> torch.dtype:
    """The type of a spelling: ``auto`` or None takes the checkpoint's own.

    float16 overflows and is slow on a CPU: a checkpoint stored so is computed in bfloat16 there.
    float16 that was asked for by name is heeded.

    Args:
        dtype: what was asked for.
        stored: the checkpoint's own type, as its config gives it; float32 if None.
        device: where the model goes.

    Raises:
        UsageError: a name that is no floating-point type.
    """
    if dtype is not None and str(dtype).strip().lower() != "auto":
        asked = named_dtype(dtype)
        if asked is None:
            raise unknown_name("dtype", dtype, ["auto", *DTYPES])
        if asked is torch.float16 and device.type == "cpu":
            logger.warning("float16 was asked for on a CPU, where it is slow and overflows.")
        return asked
    own = stored_dtype(stored)
    if own is torch.float16 and device.type == "cpu":
        logger.info("float16 is slow and overflows on a CPU: using bfloat16.")
        return torch.bfloat16
    return own


def check_device_map(device_map: Any) -> None:
    """Raise unless accelerate can read a placement: a strategy, a device, or one by module."""
    if device_map is None or device_map in _PLACEMENTS:
        return
    if isinstance(device_map, Mapping):
        for module, place in device_map.items():
            if place != "disk":
                _check_place(f"device_map[{module!r}]", place)
        return
    _check_place("device_map", device_map)


def _check_place(what: str, place: Any) -> None:
    try:
        resolve_device(place)
    except UsageError as error:
        more = f" or a strategy: {', '.join(_PLACEMENTS)}" if what == "device_map" else " or disk"
        raise UsageError(f"{what} is {place!r}; it must be a device{more}. {error}") from error


def check_tied_offload(model: Any) -> None:
    """Refuse what old versions of accelerate compute wrongly.

    They know tied weights by their address, and all weights on disk have address 0: any of them
    may then be taken for the embeddings.
    """
    on_disk = model.get_input_embeddings().weight.is_meta
    old = Version(accelerate.__version__) < Version("1.15")
    if on_disk and old and model.config.tie_word_embeddings:
        raise UsageError(
            f"accelerate {accelerate.__version__} cannot keep tied embeddings on disk: install "
            f"accelerate 1.15 or later, or keep model.language_model on a device."
        )
