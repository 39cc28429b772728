"""Names of published audio checkpoints, turned into the names of our encoders.

Contract: pure renaming; values are neither changed nor copied. A key that is neither known nor
known to be unused raises, so that nothing is lost in silence. A tower holds its encoder as
``audio_tower``, so the tower's own keys have that prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from av_llava.errors import CheckpointError

StateDict = dict[str, Tensor]

_WHISPER_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
_WHISPER_BLOCK = {
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}
_WHISPER_TOP = {
    "conv1.weight": "conv1.weight",
    "conv1.bias": "conv1.bias",
    "conv2.weight": "conv2.weight",
    "conv2.bias": "conv2.bias",
    "positional_embedding": "embed_positions.weight",
    "ln_post.weight": "layer_norm.weight",
    "ln_post.bias": "layer_norm.bias",
}
_WHISPER_UNUSED = ("decoder.", "alignment_heads")
_WHISPER_BLOCK_KEY = re.compile(
    r"blocks\.(\d+)\.(?:attn\.(query|key|value|out)|(attn_ln|mlp\.0|mlp\.2|mlp_ln))\.(weight|bias)"
)


def convert_openai_whisper_keys(state_dict: Mapping[str, Any]) -> StateDict:
    """Return the encoder of an OpenAI ``whisper`` file under transformers' names.

    Args:
        state_dict: the file's ``model_state_dict``, the whole file, or an encoder alone. The
            decoder is left out.

    Raises:
        CheckpointError: an encoder key that is not known, or no encoder at all.
    """
    weights: Mapping[str, Any] = state_dict.get("model_state_dict", state_dict)
    prefix = "encoder." if any(key.startswith("encoder.") for key in weights) else ""
    out: StateDict = {}
    for key, value in weights.items():
        if key.startswith(_WHISPER_UNUSED):
            continue
        out[_whisper_key(key.removeprefix(prefix))] = value
    if not out:
        raise CheckpointError(
            "This is no Whisper checkpoint: it holds no encoder (keys 'encoder.blocks.…')."
        )
    return out


def _whisper_key(key: str) -> str:
    if key in _WHISPER_TOP:
        return _WHISPER_TOP[key]
    match = _WHISPER_BLOCK_KEY.fullmatch(key)
    if match is None:
        raise CheckpointError(f"Unknown key {key!r} in the encoder of a Whisper checkpoint.")
    layer, attention, other, kind = match.groups()
    part = f"self_attn.{_WHISPER_ATTENTION[attention]}" if attention else _WHISPER_BLOCK[other]
    return f"layers.{layer}.{part}.{kind}"


# The classification head of fine-tuned files; nothing here uses it.
_BEATS_UNUSED = ("predictor.",)
_BEATS_TABLE = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.weight")
# torch's newer weight normalisation names the same two tensors so.
_BEATS_WEIGHT_NORM = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


def convert_beats_keys(state_dict: Mapping[str, Any]) -> StateDict:
    """Return the weights of a published BEATs file under the names of ``BeatsEncoder``.

    The published file repeats the shared position table in every layer; the first one is kept.

    Args:
        state_dict: the file's ``model`` entry, or the whole file.

    Raises:
        CheckpointError: position tables that differ between layers, or no BEATs at all.
    """
    weights: Mapping[str, Any] = state_dict.get("model", state_dict)
    if "patch_embedding.weight" not in weights:
        raise CheckpointError(
            "This is no BEATs checkpoint: it holds no key 'patch_embedding.weight'."
        )
    out: StateDict = {}
    for key, value in weights.items():
        if key.startswith(_BEATS_UNUSED):
            continue
        table = _BEATS_TABLE.fullmatch(key)
        if table and table[1] != "0":
            _check_shared(weights, key, value)
            continue
        for new, old in _BEATS_WEIGHT_NORM.items():
            key = key.replace(new, old)
        out[key] = value
    return out


def _check_shared(weights: Mapping[str, Any], key: str, value: Tensor) -> None:
    first = "encoder.layers.0.self_attn.relative_attention_bias.weight"
    if first not in weights or not weights[first].equal(value):
        raise CheckpointError(
            f"{key!r} differs from the position table of the first layer; BEATs shares one table."
        )
