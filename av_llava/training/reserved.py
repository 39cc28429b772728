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
    "ignore_data_skip": False,  # a resumed run goes on where it was
}
"""Fields of TrainingArguments that have one value here, which a recipe may not set either."""

UNSUPPORTED: dict[str, str] = {
    "label_smoothing_factor": "the loss is that of the language model",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "auto_find_batch_size": "a batch has at most batch.max_tokens, and --check tells what fits",
    "eval_accumulation_steps": "evaluation keeps no logits",
    "prediction_loss_only": "evaluation keeps no logits",
    "batch_eval_metrics": "evaluation is described in the section evaluation",
    "include_for_metrics": "evaluation is described in the section evaluation",
    "label_names": "labels are made from the conversations",
    "bf16_full_eval": "evaluation runs in the types that training runs in",
    "fp16_full_eval": "evaluation runs in the types that training runs in",
    "dataloader_drop_last": "every process gets the same number of batches by plan",
    "dataloader_pin_memory": "it is done where there is a GPU",
    "dataloader_persistent_workers": "workers stay for the whole run",
    "dataloader_multiprocessing_context": "workers start as torch's default is",
    "dataloader_in_order": "batches come in the order of the plan",
    "accelerator_config": "batches are spread over processes by their plan",
    "length_column_name": "lengths are measured",
    "use_liger_kernel": "its kernels know other models by name and would leave this one alone",
    "liger_kernel_config": "its kernels know other models by name and would leave this one alone",
    "do_train": "av-llava train always trains",
    "do_eval": "training.eval_strategy says when it evaluates",
    "do_predict": "av-llava eval runs benchmarks on the folder final",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        "nothing is uploaded in training, so upload the folder final afterwards",
    ),
}
"""Fields that would do nothing here, or harm, and why."""


def check_reserved(training: Mapping[str, Any]) -> None:
    """Refuse them.

    Args:
        training: the section of a recipe.

    Raises:
        UsageError: it sets one; the error says what sets it, what it always is, or why it cannot.
    """
    for key in training:
        if key in OURS:
            raise UsageError(f"training.{key} is set by {OURS[key]}: write it there.")
        if key in FIXED:
            raise UsageError(f"training.{key} is always {FIXED[key]}; leave it out.")
        if key in UNSUPPORTED:
            raise UsageError(f"training.{key} cannot be set: {UNSUPPORTED[key]}. Leave it out.")
