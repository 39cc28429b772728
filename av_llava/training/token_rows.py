"""Rows of an embedding that train alone, without a copy of the matrix in every step.

Contract: the same values, gradients, names and saved tensors as PEFT's layer for trainable tokens.
PEFT puts the rows into a copy of the whole matrix, whose gradient is as large again: gigabytes for
two rows of a large vocabulary. Here looked-up vectors are replaced instead.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn


class LeanTokenRows(TrainableTokensLayer):
    """PEFT's layer with another way through an embedding."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look ids up; those with a row of their own get it. [...] to [..., D]"""
        if self.disable_adapters or self.merged or not self.active_adapters:
            return super().forward(x, *args, **kwargs)
        found: Tensor = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            rows = self.trainable_tokens_delta[name].to(found.dtype)
            scale = getattr(self.base_layer, "embed_scale", None)  # of Gemma's embeddings
            if scale is not None:
                rows = rows * torch.as_tensor(scale).to(found)
            for i, token in enumerate(self.token_indices[name]):
                found = torch.where((x == token)[..., None], rows[i], found)
        return found


def make_lean(model: nn.Module) -> None:
    """Let PEFT's layers around embeddings take the other way, in place."""
    for module in model.modules():
        if type(module) is TrainableTokensLayer and isinstance(module.base_layer, nn.Embedding):
            module.__class__ = LeanTokenRows
