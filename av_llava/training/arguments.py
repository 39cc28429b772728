"""The ``training`` section of a recipe as transformers' TrainingArguments.

Contract: a field's name and type are checked here, with a did-you-mean; what the recipe leaves out
gets this package's defaults rather than the library's. Making them starts the process group that
torchrun asks for.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from av_llava.errors import UsageError
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
_FIXED: dict[str, Any] = {
    "logging_nan_inf_filter": False,  # a loss that is no number ends the run
    "remove_unused_columns": False,
    "disable_tqdm": True,  # callbacks.py shows progress
    "average_tokens_across_devices": True,
    "restore_callback_states_from_checkpoint": False,
}


def training_arguments(settings: TrainSettings, output: Path) -> TrainingArguments:
    """Make the arguments of one run.

    Raises:
        UsageError: an unknown field, a value that the library refuses, or a package that a field
            needs is not installed.
    """
    given = dict(settings.training)
    _check_names(given)
    if "report_to" not in given:
        given["report_to"] = ["tensorboard"] if _is_there("tensorboard") else []
    if given.get("deepspeed") and not _is_there("deepspeed"):
        raise UsageError(
            "training.deepspeed needs the package deepspeed, which does not come with this one: "
            "pip install deepspeed"
        )
    if not torch.accelerator.is_available():
        given.setdefault("use_cpu", True)  # else bf16 is refused
    values = {**DEFAULTS, **given, **_FIXED}
    values |= {
        "output_dir": str(output),
        "seed": settings.seed,
        "data_seed": settings.seed,
        "dataloader_num_workers": settings.batch.workers,
    }
    values |= _checkpointing(settings)
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"transformers refuses the section training: {said}") from error


def _check_names(given: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    for key in given:
        if key in _FIXED:
            raise UsageError(f"training.{key} is always {_FIXED[key]}; leave it out.")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean 'training.{close[0]}'?" if close else ""
            raise UsageError(
                f"Unknown key 'training.{key}': TrainingArguments of this version of transformers "
                f"have no such field.{hint}"
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
