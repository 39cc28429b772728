"""How much memory a run takes, before it is run, and which setting would fit when it did not.

Contract: weights, gradients and optimiser are counted, not guessed; activations are estimated from
the sizes of the layers and called an estimate. Bytes are those of one device.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from av_llava.checkpoints.quantize import stored_bytes
from av_llava.checkpoints.staging import size
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.training.parts import PartsTable
from av_llava.training.settings import TrainSettings

_MIB = 2**20
_OVERHEAD = 1.1
"""Fragmentation and buffers of libraries."""
_SAFETY = 0.8
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

# Bytes that an optimiser keeps for each parameter that trains.
_STATE_BYTES = {"sgd": 0, "adafactor": 0, "8bit": 2, "4bit": 1, "lion": 4}
_ADAM_BYTES = 8


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Of the largest batch; an estimate."""
    logits: int
    """Of the largest batch; an estimate."""

    @property
    def together(self) -> int:
        """Everything, with some for fragmentation."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits)
        return round(sum(parts) * _OVERHEAD)

    def lines(self) -> list[str]:
        """The estimate for people."""
        rows = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimiser", self.optimizer),
            ("activations (estimate)", self.activations),
            ("logits (estimate)", self.logits),
            ("together, with 10 % spare", self.together),
        ]
        return [f"{name:<28}{size(value):>12}" for name, value in rows]


def estimate(
    model: AVLlavaForConditionalGeneration,
    table: PartsTable,
    settings: TrainSettings,
    args: TrainingArguments,
    *,
    tokens: int | None = None,
    learned_share: float = 0.25,
) -> Estimate:
    """Estimate the memory of one device.

    Args:
        model: with its parts settled.
        table: what trains.
        settings: of the run.
        args: made of them.
        tokens: of the largest batch, padding included; None takes ``batch.max_tokens``.
        learned_share: share of a batch's positions that need logits.
    """
    shards = args.world_size if args.fsdp or args.deepspeed else 1
    trained = table.n_trained
    width = 2 if args.bf16 or args.fp16 else 4
    tokens = settings.batch.max_tokens if tokens is None else tokens
    text = model.config.text_config
    return Estimate(
        weights=stored_bytes(model) // shards,
        gradients=4 * trained // shards,
        optimizer=_state_bytes(str(getattr(args.optim, "value", args.optim))) * trained // shards,
        activations=_activations(model, table, settings, tokens, width),
        # In the computing type, in float32, and their gradient.
        logits=round(tokens * learned_share * text.vocab_size * (width + 8)),
    )


def _state_bytes(optimizer: str) -> int:
    found = [n for word, n in _STATE_BYTES.items() if word in optimizer]
    return min(found) if found else _ADAM_BYTES


def _activations(
    model: AVLlavaForConditionalGeneration,
    table: PartsTable,
    settings: TrainSettings,
    tokens: int,
    width: int,
) -> int:
    """What the backward pass needs of the forward pass."""
    text, layers = model.config.text_config, model.config.text_config.num_hidden_layers
    last = settings.trainable.language_model.last_layers
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * head
    # Inputs of the norms, of attention and of the feed-forward layers, and what lies between.
    layer = tokens * (6 * text.hidden_size + 2 * heads * head + 2 * keys
                      + 4 * text.intermediate_size) * width  # fmt: skip
    first_trained = any(
        table.of(n).n_trained for n in ("mm_projector", "mm_audio_projector", "audio_token_rows")
    )
    depth = layers if last is None or first_trained else last
    if settings.gradient_checkpointing:
        kept = depth * tokens * text.hidden_size * width + layer
    else:
        kept = depth * layer
    return kept + _encoder_bytes(model, table, settings, width)


def _encoder_bytes(
    model: AVLlavaForConditionalGeneration, table: PartsTable, settings: TrainSettings, width: int
) -> int:
    """The vision tower: one layer at a time if it is frozen, all layers if it trains."""
    config, vision = model.config.vision_config, model.config.vision
    if config is None:
        return 0
    patches = (config.image_size // config.patch_size) ** 2
    frames = min(vision.max_batch, model.config.sampling.frames or vision.max_batch)
    layer = frames * patches * (8 * config.hidden_size + 2 * config.intermediate_size) * width
    trained = table.of("vision_tower").n_trained > 0
    if not trained:
        return layer
    if settings.gradient_checkpointing:
        return layer + config.num_hidden_layers * frames * patches * config.hidden_size * width
    return layer * config.num_hidden_layers


# ---------------------------------------------------------------- when it did not fit


def advice(error: BaseException, settings: TrainSettings, padded: int | None, longest: int) -> str:
    """Say what ran out, and which settings would likely fit.

    Args:
        error: see :func:`av_llava.errors.is_out_of_memory`.
        settings: of the run.
        padded: tokens of the batch that did not fit, padding included; None if no batch had begun.
        longest: tokens of the longest sample.
    """
    first = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "no memory"
    ways: list[str] = []
    if padded is not None:
        fitting = int(padded * _share(str(error)))
        if fitting >= longest:
            ways.append(f"batch.max_tokens={fitting}")
        elif settings.batch.max_tokens > longest:
            ways.append(f"batch.max_tokens={longest}")
    ways += _other_ways(settings, padded)
    tokens = f" in a batch of {padded:,} tokens" if padded is not None else ""
    return (
        f"The training does not fit into memory{tokens} ({first}). Likely to fit: "
        f"{'; or '.join(ways)}. av-llava train --check estimates the memory of a recipe."
    )


def _other_ways(settings: TrainSettings, padded: int | None) -> list[str]:
    ways = []
    if padded is not None and not settings.gradient_checkpointing:
        ways.append("gradient_checkpointing=true")
    mode = settings.trainable.language_model.train
    if mode == "full":
        ways.append("trainable.language_model=lora")
    elif settings.model.quantize is None:
        ways.append("model.quantize=4bit")
    if settings.data.frames is not None and settings.data.frames > 1:
        ways.append(f"data.frames={settings.data.frames // 2}")
    elif padded is not None:
        ways.append("fewer frames (data.frames)")
    return ways


def _share(message: str) -> float:
    """The share of the batch that would likely fit, at most a half."""
    match = re.search(r"Tried to allocate ([\d.]+) (\w+)", message)
    if match is None or match[2] not in _UNITS or not torch.cuda.is_available():
        return 0.5
    asked = float(match[1]) * _UNITS[match[2]]
    total = torch.cuda.mem_get_info()[1]
    peak = torch.cuda.max_memory_allocated()
    held = torch.cuda.memory_allocated()
    return max(0.1, min(0.5, _SAFETY * (total - held) / max(peak - held + asked, 1)))


def peak_bytes(device: torch.device) -> int:
    """Most memory that was held so far: of the device, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def learned_share(supervised: Sequence[int] | Any, lengths: Sequence[int] | Any) -> float:
    """Share of learned positions, over all samples."""
    total = float(sum(int(n) for n in lengths)) or 1.0
    return min(1.0, float(sum(int(n) for n in supervised)) / total)
