"""Adds special tokens to a model: the tokenizer's entry, the embedding row, the head's row.

Contract: a matrix is resized only when the tokenizer really outgrew it, and never shrunk (public
vocabularies are often padded). A new row is the mean of the rows in use, in the embedding and in
an untied head, as LLaVA initialises its image tokens; so no answer can change by adding one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.settings import AU_END_TOKEN, AU_START_TOKEN

logger = logging.getLogger(__name__)

IMAGE_TOKENS = ("<im_start>", "<im_end>")
PATCH_TOKEN = "<im_patch>"


def add_tokens(
    model: AVLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
) -> list[int]:
    """Make sure that tokens exist; those that do keep their rows.

    Args:
        model: its matrices are changed in place.
        tokenizer: gets the tokens as special ones.
        tokens: their strings.

    Returns:
        Their ids, in order.
    """
    used = len(tokenizer)
    known = tokenizer.get_vocab()
    new = [t for t in dict.fromkeys(tokens) if t not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
        rows = len(cast(Any, model.get_input_embeddings()).weight)
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            logger.info("Embeddings: %d rows grow to %d.", rows, len(tokenizer))
        _set_to_mean(model, used, tokenizer.convert_tokens_to_ids(new))
    return [int(i) for i in tokenizer.convert_tokens_to_ids(list(tokens))]


@torch.no_grad()
def _set_to_mean(model: Any, used: int, ids: Sequence[int]) -> None:
    """Set rows to the mean of the first ``used`` rows, in both matrices."""
    tables: list[Tensor] = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings().weight
    if head is not tables[0]:
        tables.append(head)
    for table in tables:
        mean = table[:used].float().mean(0).to(table.dtype)
        for i in ids:
            table[i] = mean


def ensure_tokens(
    model: AVLlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Add the tokens that the model's configuration speaks of and the tokenizer lacks."""
    sequence, config = model.config.sequence, model.config
    wanted = list(IMAGE_TOKENS) if sequence.use_image_start_end else []
    if sequence.use_image_patch_token:
        wanted.append(PATCH_TOKEN)
    if wanted:
        add_tokens(model, tokenizer, wanted)
    if config.au_token_ids is not None:
        pair = add_tokens(model, tokenizer, (AU_START_TOKEN, AU_END_TOKEN))
        config.au_token_ids = (pair[0], pair[1])
