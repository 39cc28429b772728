"""The loss of a batch: logits only where something is learned, and samples with weights.

Contract: the same loss and gradients as logits over all positions, up to rounding. A video's
thousands of tokens need no logits; with large vocabularies these would be most of the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from av_llava.settings import IGNORE_INDEX

_WORTH_IT = 0.75


def where_learned(inputs: dict[str, Any]) -> dict[str, Any]:
    """Have the model make logits only where the next token is learned in some sample.

    Args:
        inputs: of ``model.forward``, with ``labels`` on the host or the device. [B, L]

    Returns:
        Inputs with ``logits_to_keep`` [K], and labels for those positions [B, K].
    """
    labels: Tensor = inputs["labels"]
    learned = (labels[:, 1:] != IGNORE_INDEX).any(dim=0)
    places = learned.nonzero()[:, 0]
    if not len(places) or len(places) > _WORTH_IT * labels.shape[1]:
        return inputs
    # The loss compares each row of logits with the label after it, and the last with none: so a
    # label stands before the first, and one row more is kept than is learned.
    first = labels.new_full((len(labels), 1), IGNORE_INDEX)
    wanted = torch.cat([first, labels[:, places + 1]], dim=1)
    kept = torch.cat([places, places[-1:] + 1])
    return {**inputs, "labels": wanted, "logits_to_keep": kept}


def weighted_loss(
    logits: Tensor, labels: Tensor, weights: tuple[float, ...], num_items: Any
) -> Tensor:
    """Cross entropy with a factor for each sample.

    Args:
        logits: [B, L, V]
        labels: -100 where nothing is learned. [B, L]
        weights: one a sample.
        num_items: tokens of the whole step; None takes those of this batch.
    """
    wanted = labels[:, 1:].to(logits.device)
    each = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=IGNORE_INDEX, reduction="none"
    )  # [B, L - 1]
    factor = torch.tensor(weights, device=each.device, dtype=each.dtype)
    count = (wanted != IGNORE_INDEX).sum() if num_items is None else num_items
    return (each * factor[:, None]).sum() / count
