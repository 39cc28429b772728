"""The optimiser's groups: each part with its own learning rate and weight decay.

Contract: every parameter that requires gradients is in exactly one group. Biases, norms, learned
vectors and token rows never decay. Which optimiser it is, is up to ``TrainingArguments.optim``. The
largest rate of a part is the optimiser's own: a schedule's last rate is that part's, and the others
fall by the same share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from av_llava.errors import UsageError
from av_llava.training.parts import PartsTable, part_of

_NEVER_DECAYS = ("media_tokens", "audio_token_rows")


def parameter_groups(model: nn.Module, table: PartsTable) -> list[dict[str, Any]]:
    """Groups for a torch optimiser, named after their parts."""
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            decays = parameter.ndim > 1 and part not in _NEVER_DECAYS
            found.setdefault((part, decays), []).append(parameter)
    groups = []
    for (part, decays), parameters in found.items():
        row = table.of(part)
        groups.append(
            {
                "params": parameters,
                "lr": row.lr,
                "weight_decay": row.weight_decay if decays else 0.0,
                "name": part if decays else f"{part} (no decay)",
            }
        )
    return groups


def build_optimizer(
    model: nn.Module, table: PartsTable, args: TrainingArguments
) -> torch.optim.Optimizer:
    """Make the optimiser of the training arguments over the parts' groups.

    Raises:
        UsageError: its package is not installed, or it does not take its options.
    """
    name = getattr(args.optim, "value", args.optim)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    except (ImportError, ValueError) as error:
        raise _refused(name, args.optim_args, error) from error
    options = {k: v for k, v in options.items() if k not in ("params", "model", "optimizer_dict")}
    groups = parameter_groups(model, table)
    # Schedules that end at a rate of their own (min_lr, lr_end) reckon from the optimiser's.
    options["lr"] = max(group["lr"] for group in groups)
    try:
        return kind(groups, **options)
    except (ImportError, ValueError, TypeError) as error:
        raise _refused(name, args.optim_args, error) from error


def _refused(name: str, given: str | None, error: Exception) -> UsageError:
    said = " ".join(str(error).split()).rstrip(".")
    options = f" with training.optim_args={given!r}" if given else ""
    return UsageError(
        f"The optimiser training.optim={name}{options} cannot be made: {said}. Install what it "
        f"needs, or choose another one, such as adamw_torch."
    )
