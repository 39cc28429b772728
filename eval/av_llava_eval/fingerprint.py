"""What identifies a loaded model: its weights, its configuration, its tokenizer.

Contract: made from the model in memory, so that neither the path nor the date of a file matters,
and a LoRA, a quantisation or another dtype does. The same on every device: integer sums over the
bits of every weight, which any single changed bit changes, and a hash of some of them in order.
Weights that are offloaded to the disk are known by name and shape only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from av_llava.inference import AVLlava

_SAMPLED = 4096
_CHUNK = 1 << 24
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_fingerprint(loaded: AVLlava) -> dict[str, str]:
    """Short hashes of a model's parts, by name."""
    config = loaded.model.config.to_dict()
    tokenizer = loaded.processor.tokenizer
    template = {
        "name": loaded.processor.chat_template,
        "text": getattr(tokenizer, "chat_template", None),
    }
    return {
        "weights": weights_hash(loaded.model),
        "config": _hash({k: v for k, v in config.items() if k not in _NOT_ANSWERS}),
        "tokenizer": _hash(tokenizer.get_vocab()),
        "template": _hash(template),
    }


_NOT_ANSWERS = ("_name_or_path", "transformers_version")


def weights_hash(model: torch.nn.Module) -> str:
    """Hash of all parameters and persistent buffers with their names, shapes and types."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        for name, tensor in _plain(key, value):
            about = f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode()
            digest.update(about + _bits(tensor.detach()))
    return digest.hexdigest()[:16]


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a value holds: quantised and sharded ones are made of several."""
    if hasattr(value, "__tensor_flatten__"):
        for inner in value.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{inner}", getattr(value, inner))
    elif isinstance(value, Tensor):
        yield name, value


def _bits(tensor: Tensor) -> bytes:
    """A few bytes that tell a tensor from another of its shape."""
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = 0
    for at in range(0, len(flat), _CHUNK):
        total += int(flat[at : at + _CHUNK].sum(dtype=torch.int64))
    step = max(len(flat) // _SAMPLED, 1)
    some = flat[::step][:_SAMPLED].cpu().numpy().tobytes()
    return hashlib.sha256(f"{total % 2**64}".encode() + some).digest()


def _hash(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
