"""Fields of transformers' ``TrainingArguments`` that a recipe may not set.

Contract: no torch, so that such a recipe is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from av_llava.errors import UsageError

OURS: dict[str, str] = {
    "output_dir": "output",
    "seed": "seed",
    "data_seed": "seed",
    "per_device_train_batch_size": "batch.max_tokens and batch.max_samples",
    "per_device_eval_batch_size": "batch.max_tokens and batch.max_samples",
    "dataloader_num_workers": "batch.workers",
    "dataloader_prefetch_factor": "batch.prefetch",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "torch_compile": "compile",
    "resume_from_checkpoint": "--resume",
    "train_sampling_strategy": "batch",
}
"""Fields of TrainingArguments that a recipe may not set, and what sets them instead."""

FIXED: dict[str, Any] = {
    "logging_nan_inf_filter": False,  # a loss that is no number ends the run
    "remove_unused_columns": False,
    "disable_tqdm": True,  # callbacks.py shows progress
    "average_tokens_across_devices": True,
    "restore_callback_states_from_checkpoint": False,
}
"""Fields of TrainingArguments that have one value here, which a recipe may not set either."""


def check_reserved(training: Mapping[str, Any]) -> None:
    """Refuse them.

    Args:
        training: the section of a recipe.

    Raises:
        UsageError: it sets one; the error says what sets it, or what it always is.
    """
    for key in training:
        if key in OURS:
            raise UsageError(f"training.{key} is set by {OURS[key]}: write it there.")
        if key in FIXED:
            raise UsageError(f"training.{key} is always {FIXED[key]}; leave it out.")
