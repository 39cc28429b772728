"""The models that need no checkpoint: the small trained one that ships, and a random one.

``SHIPPED`` is the folder of ``av-llava-tiny``, which knows one synthetic world (docs/tiny.md). The
random one runs through the whole path and knows nothing: it is for tests, and stands in where the
shipped folder is missing. Its answers are noise, and everything that shows them says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    WhisperConfig,
)

from av_llava.config import AVLlavaConfig
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor
from av_llava.settings import (
    AU_END_TOKEN,
    AU_START_TOKEN,
    AggregatorSettings,
    AudioSettings,
    ImageSettings,
    SamplingSettings,
    SequenceSettings,
    VisionSettings,
)

SHIPPED = Path(__file__).with_name("av-llava-tiny")
"""Folder of the default model."""

_TEXT = (
    "You are a helpful assistant. What happens in this video? A red ball moves to the left while "
    "a bell rings. The video lasts for seconds, and frames are uniformly sampled from it."
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", AU_START_TOKEN, AU_END_TOKEN)


def shipped() -> Path | None:
    """The folder of the default model, or None where an installation left it out."""
    return SHIPPED if (SHIPPED / "config.json").is_file() else None


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The random model's tokenizer."""
    return byte_tokenizer([_TEXT], 400)


def byte_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's and our own special tokens.

    Args:
        texts: to learn its merges from.
        vocab_size: at most so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[AU_START_TOKEN, AU_END_TOKEN],
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> AVLlavaConfig:
    """Every part of the architecture, as small as it goes."""
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=7,
        vision_use_head=False,
    )
    audio = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        num_mel_bins=80,
        max_source_positions=1500,
        vocab_size=len(tokenizer),
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    half = (0.5, 0.5, 0.5)
    return AVLlavaConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        vision=VisionSettings(
            tower="tiny-random",
            kind="siglip",
            select_layer=-1,
            image_mean=half,
            image_std=half,
            resize="exact",
        ),
        image=ImageSettings(aspect_ratio="pad", patch_merge_type="spatial_unpad"),
        aggregator=AggregatorSettings(),
        audio=AudioSettings(tower="tiny-random", projector_hidden_size=64),
        sampling=SamplingSettings(frames=16),
        sequence=SequenceSettings(media_tokens=("newline",), template="qwen_1_5"),
        au_token_ids=[tokenizer.convert_tokens_to_ids(t) for t in (AU_START_TOKEN, AU_END_TOKEN)],
    )


def build_tiny(
    seed: int = 0, attn_implementation: str | None = None
) -> tuple[AVLlavaForConditionalGeneration, AVLlavaProcessor]:
    """Make the model and its processor in memory, the same for the same seed."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AVLlavaForConditionalGeneration(config)
    return model.eval(), AVLlavaProcessor(tokenizer, config)


def tiny_random(folder: str | Path, seed: int = 0) -> Path:
    """Write the tiny model as a checkpoint folder."""
    model, processor = build_tiny(seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
