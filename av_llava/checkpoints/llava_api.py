"""``load_pretrained_model`` with the signature and the four values that LLaVA's users know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from av_llava.budgeting import context_length
from av_llava.checkpoints.partial import load_any
from av_llava.errors import UsageError
from av_llava.processor import AVLlavaProcessor


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = None,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    overwrite_config: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, AVLlavaProcessor, int]:
    """Load a checkpoint.

    Args:
        model_path: folder or hub id.
        model_base: what an adapter, a LoRA or a projector-only folder stands on.
        model_name: accepted and ignored: what a checkpoint is comes from its content.
        load_8bit, load_4bit: quantise the language model's linear layers with bitsandbytes; at most
            one of them.
        device_map: of accelerate.
        device: cpu, cuda, ...; None chooses.
        dtype: None keeps the checkpoint's.
        attn_implementation: sdpa (default), eager, flash_attention_2.
        overwrite_config: values of ``config.json`` to change: by LLaVA's names in LLaVA's folders
            (``mm_spatial_pool_mode``), by ours in folders that av_llava saved (``aggregator``).
            A name that the folder's layout does not know is an error.

    Returns:
        tokenizer, model, processor (with LLaVA's ``preprocess``), context length in tokens.
    """
    del model_name
    if load_8bit and load_4bit:
        raise UsageError("load_8bit and load_4bit were both given; choose one.")
    loaded = load_any(
        model_path,
        model_base,
        device=device,
        dtype=dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        overwrite_config=overwrite_config,
        quantize="4bit" if load_4bit else "8bit" if load_8bit else None,
    )
    processor = AVLlavaProcessor(loaded.tokenizer, loaded.model.config)
    return loaded.tokenizer, loaded.model, processor, context_length(loaded.model.config)
