"""From frames of an audio tower to tokens of the language model: pool, project, add marks.

Contract: exactly ``AudioPlan.n_tokens`` rows per clip; what the plan counts as padding is dropped
before it is projected, so that only tokens cost anything. All lengths come from the plans, on the
host: nothing waits for the device.

L tower frames, D tower channels, H language-model width, k stride of the pooling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from av_llava.audio.placement import AudioPlan
from av_llava.errors import unknown_name
from av_llava.geometry import audio_tokens
from av_llava.settings import AudioSettings

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
"""Activations of ``stack_mlp`` by name."""

LayerMaker = Callable[[AudioSettings, int, int], list[nn.Module]]


def _linear(settings: AudioSettings, in_width: int, out_width: int) -> list[nn.Module]:
    return [nn.Linear(in_width, out_width)]


def _stack_mlp(settings: AudioSettings, in_width: int, out_width: int) -> list[nn.Module]:
    if settings.projector_activation not in ACTIVATIONS:
        raise unknown_name("activation", settings.projector_activation, ACTIVATIONS)
    hidden = settings.projector_hidden_size
    activation = ACTIVATIONS[settings.projector_activation]()
    return [nn.Linear(in_width, hidden), activation, nn.Linear(hidden, out_width)]


def _mlp_gelu(settings: AudioSettings, in_width: int, out_width: int) -> list[nn.Module]:
    depth = int(cast(re.Match[str], _MLP.fullmatch(settings.projector))[1])
    layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_width, out_width)]
    return layers


_MLP = re.compile(r"mlp([1-9]\d*)x_gelu")

AUDIO_PROJECTORS: dict[str, LayerMaker] = {
    "linear": _linear,
    "mlpNx_gelu": _mlp_gelu,
    "stack_mlp": _stack_mlp,
}
"""Makers of the layers by name; ``mlpNx_gelu`` stands for ``mlp1x_gelu``, ``mlp2x_gelu``, …"""


class AudioProjector(nn.Sequential):
    """Layers ``0``, ``1``, … with pooling before and learned marks after them.

    The marks are parameters of this module, so that saving, adapters and offloading treat them
    like its layers: ``audio_newline`` after each chunk, ``audio_begin`` and ``audio_end`` around a
    clip (Ola, arXiv:2502.04328), each only if the settings ask for it.
    """

    def __init__(
        self, layers: Sequence[nn.Module], settings: AudioSettings, in_width: int, out_width: int
    ) -> None:
        super().__init__(*layers)
        self.settings, self.in_width, self.out_width = settings, in_width, out_width
        bounds = settings.use_start_end and settings.token_mode == "param"
        self.audio_newline = self._mark(settings.chunk_newline)
        self.audio_begin, self.audio_end = self._mark(bounds), self._mark(bounds)
        self.init_marks()

    def _mark(self, wanted: bool) -> nn.Parameter | None:
        return nn.Parameter(torch.empty(self.out_width)) if wanted else None

    @property
    def marks(self) -> list[nn.Parameter]:
        """The learned marks that there are, each [H]."""
        marks = (self.audio_newline, self.audio_begin, self.audio_end)
        return [mark for mark in marks if mark is not None]

    def init_marks(self) -> None:
        """Draw the marks anew, as long as embeddings are; for models that initialise weights."""
        for mark in self.marks:
            nn.init.normal_(mark, std=self.out_width**-0.5)

    def forward(self, frames: Tensor, plans: Sequence[AudioPlan]) -> list[Tensor]:  # type: ignore[override]
        """Make the tokens of some clips.

        Args:
            frames: [N, L, D], the chunks of all clips one after another.
            plans: one per clip.

        Returns:
            For each clip [n_tokens, H].
        """
        n_chunks = sum(len(plan.frames) for plan in plans)
        assert len(frames) == n_chunks, f"got {len(frames)} chunks, planned {n_chunks}"
        if not plans:
            return []
        pooled, chunk = [], 0
        for plan in plans:
            for n_frames in plan.frames:
                pooled.append(self._pool(frames[chunk], n_frames, plan.stride))
                chunk += 1
        tokens = self._project(torch.cat(pooled)).split([len(p) for p in pooled])
        out, chunk = [], 0
        for plan in plans:
            n = len(plan.frames)
            out.append(self._with_marks(tokens[chunk : chunk + n], plan))
            chunk += n
        return out

    def dummy(self, frames: Tensor | None = None) -> Tensor:
        """Zero rows [0, H] that depend on every parameter, for ranks without sound.

        Args:
            frames: [n, L, D] of a tower that is trained too; None takes one frame of silence.
        """
        if frames is None:
            weight = self._weight
            frames = torch.zeros(1, 1, self.in_width, device=weight.device)
        rows = self._project(self._pool(frames[0], 1, self._base_stride))
        return torch.cat([rows, *(mark[None].to(rows.dtype) for mark in self.marks)])[:0]

    @property
    def _weight(self) -> Tensor:
        """The first weight of the layers."""
        return next(p for layer in self for p in layer.parameters())

    @property
    def _base_stride(self) -> int:
        return 1 if self.settings.pool_mode == "none" else self.settings.pool_stride

    def _pool(self, frames: Tensor, n_frames: int, stride: int) -> Tensor:
        """Pool one chunk [L, D], of which ``n_frames`` hold sound, to [n, width].

        Averages are over frames with sound only. Stacks take the tower's frames as they come, the
        first ones of the padding included, as models with stacks were trained; what the chunk does
        not have is zero.
        """
        if self.settings.pool_mode != "stack":
            return _mean(frames[:n_frames], stride)
        k = self.settings.pool_stride
        n_tokens = audio_tokens(n_frames, stride)
        parts = _mean(frames[: n_tokens * stride], stride // k)
        parts = F.pad(parts, (0, 0, 0, n_tokens * k - len(parts)))
        return parts.reshape(n_tokens, -1)

    def _project(self, rows: Tensor) -> Tensor:
        if self._weight.is_floating_point():  # quantised weights choose for themselves
            rows = rows.to(self._weight.dtype)
        for layer in self:
            rows = layer(rows)
        return rows

    def _with_marks(self, chunks: Sequence[Tensor], plan: AudioPlan) -> Tensor:
        rows: list[Tensor] = []
        for chunk in chunks:
            rows.append(chunk)
            if self.audio_newline is not None:
                rows.append(self.audio_newline[None].to(chunk.dtype))
        if self.audio_begin is not None and self.audio_end is not None:
            begin, end = (m[None].to(rows[0].dtype) for m in (self.audio_begin, self.audio_end))
            rows = [begin, *rows, end]
        tokens = torch.cat(rows) if len(rows) > 1 else rows[0]
        assert len(tokens) == plan.n_tokens, f"got {len(tokens)} tokens, planned {plan.n_tokens}"
        return tokens


def _mean(frames: Tensor, window: int) -> Tensor:
    """Average each ``window`` frames of [n, D]; the last average may be over fewer."""
    if window == 1:
        return frames
    whole = len(frames) // window * window
    means = frames[:whole].unflatten(0, (-1, window)).mean(1)
    if whole == len(frames):
        return means
    return torch.cat([means, frames[whole:].mean(0, keepdim=True)])


def build_audio_projector(settings: AudioSettings, in_width: int, out_width: int) -> AudioProjector:
    """Make the projector from tower width ``in_width`` to language-model width ``out_width``.

    Raises:
        UsageError: an unknown projector or activation.
    """
    name = "mlpNx_gelu" if _MLP.fullmatch(settings.projector) else settings.projector
    if name not in AUDIO_PROJECTORS or settings.projector == "mlpNx_gelu":
        known = [n.replace("mlpNx", "mlp2x") for n in AUDIO_PROJECTORS]
        raise unknown_name("audio projector", settings.projector, known)
    width = in_width * settings.pool_stride if settings.pool_mode == "stack" else in_width
    layers = AUDIO_PROJECTORS[name](settings, width, out_width)
    return AudioProjector(layers, settings, in_width, out_width)
