"""Tokenizers without any model: LLaVA's two test families, and one in the manner of Llama."""

from __future__ import annotations

import json

import pytest
from golden_data import golden
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def bos_tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(golden("llava/_families/tokenizer_bos"))


@pytest.fixture(scope="session")
def nobos_tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(golden("llava/_families/tokenizer_nobos"))


@pytest.fixture(scope="session")
def llama_tokenizer():
    """Pieces that swallow the space before them, bytes for the rest, a first and an end token."""
    pieces = [
        "▁A",
        "▁dog",
        "▁",
        "US",
        "ER",
        "ASSISTANT",
        "▁ASSISTANT",
        "▁USER",
        "on",
        "sofa",
        "\n\n",
    ]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:?,'#<>|_/[]\n"
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys([*names, *letters]))}
    merges = []
    for piece in pieces:
        for end in range(1, len(piece) + 1):
            if piece[:end] not in vocabulary:
                vocabulary[piece[:end]] = len(vocabulary)
            if end > 1 and (piece[: end - 1], piece[end - 1]) not in merges:
                merges.append((piece[: end - 1], piece[end - 1]))
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def trimming_tokenizer(nobos_tokenizer):
    """The family without a first token, but cutting spaces off the offsets, as GPT-2's does."""
    backend = Tokenizer.from_str(nobos_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def conversations():
    """LLaVA's renderings of one conversation in all its templates."""
    return json.loads(golden("llava/conversations.json").read_text())
