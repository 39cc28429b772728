"""BEATs, an audio transformer over spectrogram patches (Chen et al., 2022, arXiv:2212.09058).

Own implementation of the published inference network, with the published parameter names. Differs
in form only: the relative position table is held once (the published files repeat it in every
layer), and dropouts and layer drop of the published training are left out.

B chunks, T input frames, L patches (time-major: ``index = t * bands + band``), D width, H heads.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from av_llava.audio.configs import BeatsConfig


class BeatsPositionalConv(nn.Module):
    """Grouped convolution over time with weight normalisation, as a position embedding."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width, self.groups, kernel = (
            config.encoder_embed_dim,
            config.conv_pos_groups,
            config.conv_pos,
        )
        self.kernel = kernel
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.ones(width, width // self.groups, kernel))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the position embedding of x [B, L, D], the same shape."""
        # In float32: the norm runs over 36 864 squares, too many for bfloat16.
        v = self.weight_v.float()
        weight = self.weight_g.float() * v / v.square().sum(dim=(0, 1), keepdim=True).sqrt()
        weight = weight.to(self.weight_v.dtype)
        out = F.conv1d(
            x.transpose(1, 2), weight, self.bias, padding=self.kernel // 2, groups=self.groups
        )
        if self.kernel % 2 == 0:  # an even kernel gives one output too many
            out = out[:, :, :-1]
        return F.gelu(out).transpose(1, 2)


class BeatsAttention(nn.Module):
    """Self-attention whose relative position bias is scaled by a gate of the query."""

    def __init__(self, config: BeatsConfig, has_table: bool) -> None:
        super().__init__()
        self.config = config
        width, self.heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // self.heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))
        if has_table:  # one for all layers
            self.relative_attention_bias = nn.Embedding(config.num_buckets, self.heads)

    def position_bias(self, length: int, device: torch.device | None = None) -> Tensor:
        """Bias of every pair of positions before gating, [H, L, L]."""
        table = self.relative_attention_bias
        distance = torch.arange(1 - length, length, device=device)
        buckets = _bucket(distance, self.config.num_buckets, self.config.max_distance)
        values = table(buckets).T  # [H, 2 L - 1], by distance key - query
        # Row q of the matrix is values[:, L - 1 - q : 2 L - 1 - q].
        return values.unfold(1, length, 1).flip(1)

    def forward(self, x: Tensor, bias: Tensor, hidden: Tensor | None) -> Tensor:
        """Attend; ``hidden`` [B, 1, 1, L] is true at the keys that are padding."""
        shape = (*x.shape[:-1], self.heads, -1)
        q, k, v = (
            proj(x).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, H, L, D / H]
        gates = torch.sigmoid(self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1))
        gate_a, gate_b = gates.unsqueeze(-1).unbind(-2)  # [B, H, L, 1]
        gated = (gate_a * (gate_b * self.grep_a - 1.0) + 2.0) * bias
        if hidden is not None:
            gated = gated.masked_fill(hidden, torch.finfo(gated.dtype).min)
        out = self._attend(q, k, v, gated)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        if self.config._attn_implementation == "eager":
            weights = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5 + bias
            return weights.softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


class BeatsLayer(GradientCheckpointingLayer):
    """Post-norm transformer layer with DeepNorm's scaled residual."""

    def __init__(self, config: BeatsConfig, has_table: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.self_attn = BeatsAttention(config, has_table)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.alpha = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0

    def forward(self, x: Tensor, bias: Tensor, hidden: Tensor | None) -> Tensor:
        """Return the next hidden state [B, L, D]."""
        x = self.self_attn_layer_norm(x * self.alpha + self.self_attn(x, bias, hidden))
        return self.final_layer_norm(x * self.alpha + self.fc2(F.gelu(self.fc1(x))))


class BeatsTransformer(nn.Module):
    """The layers of BEATs; ``encoder.*`` of the published names."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.pos_conv = nn.Sequential(BeatsPositionalConv(config))
        self.layers = nn.ModuleList(
            BeatsLayer(config, has_table=i == 0) for i in range(config.encoder_layers)
        )
        self.layer_norm = nn.LayerNorm(config.encoder_embed_dim)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Encode x [B, L, D]; ``valid`` [B, L] is false at padding, which is then not attended."""
        hidden = None
        if valid is not None:
            x = x * valid[:, :, None]
            hidden = ~valid[:, None, None, :]
        x = self.layer_norm(x + self.pos_conv(x))
        bias = cast(BeatsLayer, self.layers[0]).self_attn.position_bias(x.shape[1], x.device)
        for layer in self.layers:
            x = layer(x, bias, hidden)
        return x


class BeatsEncoder(PreTrainedModel):
    """BEATs from normalised filterbanks to patch features."""

    config_class = BeatsConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["BeatsLayer"]  # noqa: RUF012 (transformers declares it so)

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__(config)
        patch = config.input_patch_size
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, patch, stride=patch, bias=False)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj = (
            nn.Linear(config.embed_dim, config.encoder_embed_dim)
            if config.embed_dim != config.encoder_embed_dim
            else nn.Identity()
        )
        self.encoder = BeatsTransformer(config)
        self.post_init()

    def forward(self, input_features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Encode filterbanks.

        Args:
            input_features: normalised filterbanks [B, 128, T]; frames after the last whole patch
                are not used.
            valid: bool [B, L], false at patches of padding; None attends to everything.

        Returns:
            Patch features [B, L, D], time-major.
        """
        patches = self.patch_embedding(input_features.transpose(1, 2)[:, None])  # [B, E, t, bands]
        x = self.layer_norm(patches.flatten(2).transpose(1, 2))
        return self.encoder(self.post_extract_proj(x), valid)

    def _init_weights(self, module: nn.Module) -> Any:
        super()._init_weights(module)
        if isinstance(module, BeatsAttention):
            init.ones_(module.grep_a)
        elif isinstance(module, BeatsPositionalConv):
            # Only the direction of weight_v counts; weight_g holds the size.
            init.normal_(module.weight_v, mean=0.0, std=1.0)
            width = module.weight_v.shape[1]
            init.constant_(module.weight_g, math.sqrt(4 * width / module.kernel))
            init.zeros_(module.bias)


def _bucket(distance: Tensor, n_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each signed distance: exact near zero, logarithmic up to ``max_distance``.

    Half of the buckets are for keys after the query (T5, arXiv:1910.10683, bidirectional).
    """
    half = n_buckets // 2
    exact = half // 2
    away = distance.abs()
    scale = (half - exact) / math.log(max_distance / exact)
    far = exact + (torch.log(away.clamp(min=1).float() / exact) * scale).long()
    bucket = torch.where(away < exact, away, far.clamp(max=half - 1))
    return bucket + half * (distance > 0)
