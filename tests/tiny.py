"""Tiny models for tests: any language model family, towers, audio, aggregator."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING

from av_llava.demo_model import tiny_config, tiny_tokenizer
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor

TEXT = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
}


def text_config(kind="qwen2", vocab_size=None, **changes):
    """A two-layer language model of a family, with grouped-query attention."""
    tokenizer = tiny_tokenizer()
    fields = {
        "vocab_size": vocab_size or len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    return CONFIG_MAPPING[kind](**{**fields, **TEXT.get(kind, {}), **changes})


def tiny(kind="qwen2", seed=0, text=None, audio=None, placement=None, **parts):
    """A model and its processor.

    Args:
        kind: family of the language model.
        seed: of the weights.
        text: changes to the language model's configuration.
        audio: False leaves the ears out.
        placement: of a video's own sound.
        parts: replacements for parts of the configuration.
    """
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    config.text_config = text_config(kind, **(text or {}))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    if audio is False:
        config.audio_config = None
        config.au_token_ids = None
    if placement is not None:
        config.audio = config.audio.replace(placement=placement)
    for name, value in parts.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = AVLlavaForConditionalGeneration(config).eval()
    return model, AVLlavaProcessor(tokenizer, config)
