"""The ``training`` section of a recipe as transformers' TrainingArguments.

Contract: a field's name and type are checked here, with a did-you-mean; what the recipe leaves out
gets this package's defaults rather than the library's. Making them starts the process group that
torchrun asks for.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import typing
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.training_args import ParallelMode

from av_llava.errors import UsageError, unknown_name
from av_llava.settings import check_whole
from av_llava.training.recipe import typed
from av_llava.training.reserved import FIXED
from av_llava.training.settings import TrainSettings

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a share of all steps
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "logging_first_step": True,
    "save_steps": 500,
    "save_total_limit": 3,
    "eval_strategy": "no",
    # All ranks have one graph (missing modalities run a dummy), so that nothing is left over.
    "ddp_find_unused_parameters": False,
}
_RANGES: dict[str, tuple[float, bool]] = {
    "learning_rate": (0, True),
    "weight_decay": (0, True),
    "max_grad_norm": (0, True),
    "warmup_steps": (0, True),
    "warmup_ratio": (0, True),
    "adam_epsilon": (0, True),
    "num_train_epochs": (0, False),
    "gradient_accumulation_steps": (1, True),
    "logging_steps": (0, False),
    "save_steps": (0, False),
    "eval_steps": (0, False),
    "save_total_limit": (1, True),
}
"""Field → its lower bound, and whether that itself is allowed; the library lets some mistakes
through."""


def training_arguments(settings: TrainSettings, output: Path) -> TrainingArguments:
    """Make the arguments of one run.

    Raises:
        UsageError: an unknown field, a value that the library refuses, or a package that a field
            needs is not installed.
    """
    given = dict(settings.training)
    given = {key: _checked(key, value) for key, value in given.items()}
    if "report_to" not in given:
        given["report_to"] = ["tensorboard"] if _is_there("tensorboard") else []
    _check_loggers(given["report_to"])
    if given.get("deepspeed") and not _is_there("deepspeed"):
        raise UsageError(
            "training.deepspeed needs the package deepspeed, which does not come with this one: "
            "pip install deepspeed"
        )
    if not torch.accelerator.is_available():
        given.setdefault("use_cpu", True)  # else bf16 is refused
    if given.get("fp16") and (given.get("use_cpu") or not torch.accelerator.is_available()):
        raise UsageError(
            "training.fp16 needs a GPU, and this run is on the CPU: set training.bf16=true, which "
            "works there, or leave both out."
        )
    values = {**DEFAULTS, **given, **FIXED}
    values |= {
        "output_dir": str(output),
        "seed": settings.seed,
        "data_seed": settings.seed,
        "dataloader_num_workers": settings.batch.workers,
    }
    values |= _checkpointing(settings)
    try:
        args = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"transformers refuses the section training: {said}") from error
    if args.fsdp and (args.fsdp_config or {}).get("version") in (1, "1"):
        raise UsageError(
            "training.fsdp_config.version = 1 flattens parameters, so that parts cannot have "
            "settings of their own: leave it out, which takes FSDP2."
        )
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UsageError(
            "training.fsdp spreads a model over several processes, but this is one alone: start "
            "it with torchrun --nproc_per_node N -m av_llava.cli train ..., or leave it out "
            "(training.fsdp=null)."
        )
    return args


def _checked(key: str, value: Any) -> Any:
    """A value of the section, of the type that its field has.

    Raises:
        UsageError: no such field, another type, or out of range.
    """
    known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    path = f"training.{key}"
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f" Did you mean 'training.{close[0]}'?" if close else ""
        raise UsageError(
            f"Unknown key {path!r}: TrainingArguments of this version of transformers have no such "
            f"field.{hint}"
        )
    if key == "max_steps" and value != -1:
        value = typed(int, value, path, "the recipe")
        check_whole(path, value, 1)
    wanted = _hints()[key]
    if set(typing.get_args(wanted) or (wanted,)) <= {bool, int, float, type(None)}:
        value = typed(wanted, value, path, "the recipe")
    if key in _RANGES and value is not None:
        least, itself = _RANGES[key]
        if value < least or (value == least and not itself):
            bound = f"at least {least:g}" if itself else f"more than {least:g}"
            raise UsageError(f"{path} must be {bound}, not {value!r}.")
    return value


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(TrainingArguments)


def _check_loggers(names: Any) -> None:
    """Refuse a service that transformers does not know, or whose package is not installed."""
    for name in [names] if isinstance(names, str) else names or []:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown_name("service of training.report_to", name, INTEGRATION_TO_CALLBACK)
        if name not in get_available_reporting_integrations():
            raise UsageError(
                f"training.report_to={name} needs the package of {name}, which is not installed."
            )


def _checkpointing(settings: TrainSettings) -> dict[str, Any]:
    """Under the name that this version of transformers has."""
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing"
    if name not in names:
        name = "gradient_checkpointing"
    if not settings.gradient_checkpointing:
        return {}
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
