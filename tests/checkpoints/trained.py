"""Tiny models that were trained a little, for the tests of adapters and of merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import tiny
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast, WhisperConfig

import av_llava
from av_llava.checkpoints.compare import fixed_input, logits_of
from av_llava.checkpoints.model_state import unwrapped
from av_llava.checkpoints.tokens import grow
from av_llava.inference import AVLlava

torch.set_num_threads(1)

WHISPER = WhisperConfig(
    d_model=32,
    encoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=64,
    num_mel_bins=80,
    max_source_positions=100,
    vocab_size=60,
    decoder_layers=1,
    decoder_attention_heads=4,
    decoder_ffn_dim=64,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
    decoder_start_token_id=0,
)
TARGETS = r".*language_model.*\.(q_proj|v_proj|down_proj)"
PROJECTORS = ["mm_projector", "mm_audio_projector", "media_tokens"]
NEW = ("<ding>", "<dong>")


def base_folder(
    folder: Path, tied: bool = False, rows: int | None = None, kind: str = "llama", seed: int = 0
) -> Path:
    """A model that sees and does not hear, as a checkpoint."""
    text = {"tie_word_embeddings": tied} | ({"vocab_size": rows} if rows else {})
    model, processor = tiny(kind, seed=seed, audio=False, text={"vocab_size": 364, **text})
    processor.tokenizer = deaf_tokenizer(processor.tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def deaf_tokenizer(tokenizer: Any) -> Any:
    """The tiny tokenizer before anyone thought of sound: 364 tokens."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    gone = ("<au_start>", "<au_end>")
    ids = data["model"]["vocab"]
    kept = {token: i for i, token in enumerate(sorted(set(ids) - set(gone), key=ids.get))}
    data["model"]["vocab"] = kept
    data["added_tokens"] = [
        {**t, "id": kept[t["content"]]} for t in data["added_tokens"] if t["content"] not in gone
    ]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def hearing(base: Path, **options: Any) -> AVLlava:
    """The base with ears and two tokens that it does not know."""
    m = av_llava.load(base, device="cpu", **options)
    tokenizer = m.processor.tokenizer
    av_llava.add_audio(m, WHISPER)
    tokenizer.add_tokens([AddedToken(t, special=True) for t in NEW])
    grow(m.model, len(tokenizer))
    return m


def new_ids(m: AVLlava) -> list[int]:
    return m.processor.tokenizer.convert_tokens_to_ids(["<au_start>", "<au_end>", *NEW])


def train(model: Any, seed: int = 1, std: float = 0.1) -> None:
    """Move everything that is trainable."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            step = torch.randn(parameter.shape, generator=generator) * std
            parameter.data += step.to(parameter)


def lora(m: AVLlava, inside: bool = False, **settings: Any) -> Any:
    """A trained LoRA on the model, around it or inside it."""
    given = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **settings}
    config = LoraConfig(**given)
    if inside:
        wrapped = inject_adapter_in_model(config, m.model)
    else:
        wrapped = get_peft_model(m.model, config)
    train(wrapped)
    return wrapped.eval()


def answers(model: Any, ids: list[int] | None = None) -> torch.Tensor:
    """Logits on text, picture, video and sound, and on the given ids."""
    inputs = fixed_input(unwrapped(model))
    extra = torch.tensor([ids or []], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], extra], dim=1)
    return logits_of(model, inputs)
