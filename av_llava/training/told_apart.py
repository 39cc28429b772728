"""Loss told apart by what samples hold, and gradient norms by what trains.

Contract: nothing here changes training. Losses are means over learned tokens since the last log,
without the weights of samples; adding never waits for a device. Norms are those before clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from av_llava.settings import IGNORE_INDEX
from av_llava.training.collate import BatchInfo
from av_llava.training.index import modality_name
from av_llava.training.parts import part_of

Gather = Callable[[Tensor], Tensor]
"""From [n, m] on each rank to [ranks * n, m]."""

_CODES = 16
_ELEMENTS = 2**24
"""Logits that are turned to float32 at a time."""


class KindLosses:
    """Sums of losses by modality: text, image, video, audio, and their combinations."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(
        self, logits: Tensor, labels: Tensor, info: BatchInfo, kept: Tensor | None = None
    ) -> None:
        """Take note of a batch.

        Args:
            logits: [B, K, V]
            labels: -100 where nothing is learned. [B, K]
            info: of the batch; its rows are samples, or one row holds them all (packing).
            kept: positions that the logits are of, in ascending order; None is all of them. [K]
        """
        wanted = labels[:, 1:].to(logits.device)
        codes = _codes(wanted, info, kept)
        if self._sums is None:
            self._sums = torch.zeros(_CODES, 2, device=logits.device)
        step = max(1, _ELEMENTS // (logits.shape[0] * logits.shape[2]))
        for start in range(0, wanted.shape[1], step):
            columns = slice(start, min(start + step, wanted.shape[1]))
            some = wanted[:, columns].flatten()
            each = nn.functional.cross_entropy(
                logits[:, columns].flatten(0, 1).float(),
                some,
                ignore_index=IGNORE_INDEX,
                reduction="none",
            )
            both = torch.stack([each, (some != IGNORE_INDEX).float()], dim=1)
            self._sums.index_add_(0, codes[:, columns].flatten(), both)

    def take(self, device: torch.device, gather: Gather | None = None) -> dict[str, float]:
        """Return the mean losses of all ranks since the last call, and begin anew.

        Args:
            device: of this rank, which may have seen nothing.
            gather: where there are several ranks.
        """
        sums = torch.zeros(_CODES, 2, device=device) if self._sums is None else self._sums
        self._sums = None
        if gather is not None:
            sums = gather(sums).reshape(-1, _CODES, 2).sum(0)
        rows = sums.tolist()
        return {f"loss/{modality_name(c)}": s / n for c, (s, n) in enumerate(rows) if n}


def _codes(wanted: Tensor, info: BatchInfo, kept: Tensor | None) -> Tensor:
    """The modality's code of each label. int64 [B, K - 1]"""
    codes = torch.tensor(info.modalities, device=wanted.device)
    if len(wanted) == len(info.ids):
        return codes[:, None].expand_as(wanted)
    ends = torch.tensor(info.lengths, device=wanted.device).cumsum(0)
    # A label stands one behind the position that it is learned from.
    places = torch.arange(wanted.shape[1] + 1) if kept is None else kept
    at = places[:-1].to(wanted.device) + 1
    return codes[torch.searchsorted(ends, at, right=True)][None].expand_as(wanted)


@torch.no_grad()
def part_norms(model: nn.Module, total: Any, max_norm: float) -> dict[str, Tensor]:
    """The norm of each part's gradients, as it was before they were clipped.

    Args:
        model: after backward and clipping.
        total: norm of all gradients before clipping.
        max_norm: what they were clipped to; 0 where they were not.

    Returns:
        Part → norm, of parts that have gradients. Every rank must call it, since shards are
        gathered.
    """
    found: dict[str, dict[Any, list[Tensor]]] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            found.setdefault(part_of(name), {}).setdefault(mesh, []).append(gradient)
    clipped = (max_norm / (total + 1e-6)) if max_norm > 0 else 1.0
    scale = torch.as_tensor(clipped).clamp(max=1.0)
    return {part: _norm(meshes) / scale for part, meshes in found.items()}


def _norm(meshes: dict[Any, list[Tensor]]) -> Tensor:
    norms = [get_total_norm(gradients) for gradients in meshes.values()]
    whole = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    return torch.linalg.vector_norm(torch.stack(whole))
