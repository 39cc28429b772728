"""The language model as a GGUF file: what llama.cpp's llama, qwen2 and qwen3 architectures read.

Contract: the plan is made from configuration and shapes alone. Every tensor of the language model
has a place in the file, or the export is refused; nothing is dropped.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from av_llava.checkpoints.gguf_file import FILE_TYPES, Planned, PlannedFile, kind_for
from av_llava.errors import CheckpointError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``model_type`` of the language model to the architecture in llama.cpp."""

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def plan_text(
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    vocabulary: Mapping[str, Any],
    *,
    dtype: str,
    name: str,
) -> PlannedFile:
    """Plan the file of the language model.

    Args:
        config: of the language model (transformers').
        shapes: of the language model's tensors by LLaVA's names.
        vocabulary: metadata of the tokenizer.
        dtype: of the matrices: f32, f16, q8_0.
        name: of the model, for people.

    Raises:
        CheckpointError: llama.cpp has no architecture that computes this model.
    """
    fields = config.to_dict()
    architecture = architecture_of(fields)
    metadata = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[dtype],
        **({"general.quantization_version": 2} if dtype == "q8_0" else {}),
        **_sizes(architecture, fields),
        **vocabulary,
    }
    tensors = [
        _planned(source, shape, architecture, fields, dtype) for source, shape in shapes.items()
    ]
    factors = _rope_factors(fields)
    if factors is not None:
        tensors.append(Planned("rope_freqs.weight", factors, tuple(factors.shape), "f32"))
    return PlannedFile(architecture, metadata, tuple(tensors), _left_out(fields))


def architecture_of(fields: Mapping[str, Any]) -> str:
    """llama.cpp's architecture for a language model's configuration.

    Raises:
        CheckpointError: it has none that computes it.
    """
    kind = fields["model_type"]
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"A language model of type {kind!r} cannot be exported to GGUF. Those that can: "
            f"{', '.join(ARCHITECTURES)}."
        )
    activation = fields["hidden_act"]
    if activation not in ("silu", "swish"):
        raise CheckpointError(
            f"The language model's activation is {activation!r}; llama.cpp computes {kind} models "
            f"with silu only, so it cannot be exported to GGUF."
        )
    return ARCHITECTURES[kind]


def _head_dim(fields: Mapping[str, Any]) -> int:
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def _sizes(architecture: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    heads = fields["num_attention_heads"]
    rope = fields["rope_parameters"]
    sizes = {
        "vocab_size": fields["vocab_size"],
        "context_length": fields["max_position_embeddings"],
        "embedding_length": fields["hidden_size"],
        "block_count": fields["num_hidden_layers"],
        "feed_forward_length": fields["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": fields.get("num_key_value_heads") or heads,
        "attention.key_length": _head_dim(fields),
        "attention.value_length": _head_dim(fields),
        "attention.layer_norm_rms_epsilon": float(fields["rms_norm_eps"]),
        "rope.dimension_count": _head_dim(fields),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        sizes["rope.scaling.type"] = "linear"
        sizes["rope.scaling.factor"] = float(rope["factor"])
    return {f"{architecture}.{key}": value for key, value in sizes.items()}


def _rope_factors(fields: Mapping[str, Any]) -> Tensor | None:
    """By what Llama 3 divides each rotary frequency; None without such scaling. [head_dim/2]

    Raises:
        CheckpointError: another kind of scaling, or a part of the channels only.
    """
    rope = fields["rope_parameters"]
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError(
            f"The language model's rotary embedding ({rope}) cannot be exported to GGUF: only "
            f"the types default, linear and llama3, over all channels."
        )
    if kind != "llama3":
        return None
    dim = _head_dim(fields)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    # Few turns within the old context: slowed by the whole factor; many: as they were.
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / factor)).to(torch.float32)


def _planned(
    source: str, shape: tuple[int, ...], architecture: str, fields: Mapping[str, Any], dtype: str
) -> Planned:
    target = _WHOLE.get(source)
    change: Callable[[Tensor], Tensor] | None = None
    if target is None:
        match = _LAYER_NAME.fullmatch(source)
        if match is None or match[2] not in _IN_LAYER:
            raise CheckpointError(
                f"The tensor {source} of the language model has no place in llama.cpp's "
                f"architecture {architecture!r}, so it cannot be exported to GGUF."
            )
        part = _IN_LAYER[match[2]]
        target = f"blk.{match[1]}.{part}.{match[3]}"
        if architecture == "llama" and part in ("attn_q", "attn_k"):
            change = functools.partial(interleave_heads, head_dim=_head_dim(fields))
    return Planned(target, source, shape, kind_for(shape, dtype), change)


def interleave_heads(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a query or key projection (or its bias) for llama.cpp's llama.

    transformers turns channel i of a head together with channel i + head_dim/2; llama.cpp's llama
    architecture turns neighbours, as Meta's own files do. [heads*head_dim, ...] to the same.
    """
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def _left_out(fields: Mapping[str, Any]) -> tuple[str, ...]:
    window = fields.get("sliding_window")
    if fields.get("use_sliding_window") is False or window is None:
        return ()
    if window >= fields["max_position_embeddings"]:
        return ()
    return (
        f"Sliding window: llama.cpp attends to the whole context in this architecture, so answers "
        f"agree up to {window} tokens, the model's window.",
    )
