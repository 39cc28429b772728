"""Tokens that a model adds to a tokenizer, and their rows in the embedding and the head.

Contract: a matrix is resized only when the tokenizer really outgrew it, and never shrunk (public
vocabularies are often padded). A new row is the mean of the rows in use, in the embedding and in
an untied head, as LLaVA initialises its image tokens; so no answer can change by adding one. Rows
are saved and restored by the token's string, never by its id.

LLaVA's loader takes a missing ``mm_use_im_patch_token`` for true and adds ``<im_patch>``; here a
token is added only where the configuration says so: a checkpoint that does not speak of it was
trained without it, and the row would be one more word that the model may say.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from av_llava.checkpoints.shards import mean_row
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.settings import AU_END_TOKEN, AU_START_TOKEN

logger = logging.getLogger(__name__)

IMAGE_TOKENS = ("<im_start>", "<im_end>")
PATCH_TOKEN = "<im_patch>"
INPUT, OUTPUT = "input.", "output."
"""What stands before a token's string in the names of its rows."""


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
    known = tokenizer.get_vocab()
    new = [t for t in dict.fromkeys(tokens) if t not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
        grow(model, len(tokenizer), _ids(tokenizer, new))
    return _ids(tokenizer, tokens)


def _ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    return [int(i) for i in cast(list[int], tokenizer.convert_tokens_to_ids(list(tokens)))]


def tokens_of(config: AVLlavaConfig) -> list[str]:
    """The tokens that a configuration speaks of."""
    wanted = [PATCH_TOKEN] if config.sequence.use_image_patch_token else []
    if config.sequence.use_image_start_end:
        wanted += IMAGE_TOKENS
    if config.au_token_ids is not None:
        wanted += [AU_START_TOKEN, AU_END_TOKEN]
    return wanted


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, config: AVLlavaConfig) -> list[int]:
    """Add the tokens that a configuration speaks of and the tokenizer lacks.

    Returns:
        The ids of all tokens that the configuration speaks of.
    """
    wanted = tokens_of(config)
    new = [t for t in wanted if t not in tokenizer.get_vocab()]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    if config.au_token_ids is not None:
        start, end = _ids(tokenizer, (AU_START_TOKEN, AU_END_TOKEN))
        config.au_token_ids = (start, end)
    return _ids(tokenizer, wanted)


def grow_for(model: AVLlavaForConditionalGeneration, ids: Sequence[int]) -> None:
    """Give rows to the tokens of a whole checkpoint that its matrix ends before.

    Rows that are there are the checkpoint's own, whether its tokenizer knew the tokens or not.
    """
    rows = embedding_of(model).shape[0]
    if ids and max(ids) >= rows:
        grow(model, max(ids) + 1, [i for i in ids if i >= rows])


@torch.no_grad()
def grow(model: AVLlavaForConditionalGeneration, rows: int, fresh: Sequence[int] = ()) -> None:
    """Bring both matrices to ``rows`` rows, if they have fewer, and set rows to the mean.

    Args:
        model: changed in place.
        rows: at least so many.
        fresh: ids whose rows are new, besides those that are added.

    Raises:
        CheckpointError: the embedding is offloaded, so that it cannot be changed.
    """
    before = embedding_of(model).shape[0]
    new = sorted({*fresh, *range(before, rows)})
    if not new:
        return
    if embedding_of(model).is_meta:
        raise CheckpointError(
            f"The model needs rows for {len(new)} new token(s), but its embedding is offloaded. "
            f"Load it without offloading once, and save it with save_pretrained."
        )
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
        logger.info("Embeddings: %d rows grow to %d.", before, rows)
    used = rows_in_use(new, before)
    for table in _tables(model).values():
        table[new] = mean_row(table[:used].cpu(), used).to(table.device)


def rows_in_use(new: Sequence[int], before: int) -> int:
    """How many first rows a new row is the mean of.

    Args:
        new: ids of the new rows, in order.
        before: rows that there were.
    """
    return min(new[0], before) or before


def embedding_of(model: AVLlavaForConditionalGeneration) -> Tensor:
    """The embedding matrix. [V, D]"""
    return cast(Tensor, cast(Any, model.get_input_embeddings()).weight)


def _tables(model: AVLlavaForConditionalGeneration) -> dict[str, Tensor]:
    """The embedding, and the head if it is not tied, by what stands before the names of rows."""
    embedding = embedding_of(model)
    head = cast(Any, model.get_output_embeddings()).weight
    return {INPUT: embedding} if head is embedding else {INPUT: embedding, OUTPUT: head}


@torch.no_grad()
def restore_rows(
    model: AVLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Tensor],
    where: Path,
) -> None:
    """Copy rows to the places of their tokens.

    Raises:
        CheckpointError: see :func:`rows_by_id`.
    """
    tables = _tables(model)
    width = tables[INPUT].shape[1]
    for kind, found in rows_by_id(tokenizer, rows, tables[INPUT].shape[0], width, where).items():
        for i, row in found.items():
            if kind in tables:
                tables[kind][i] = row.to(tables[kind])


def rows_by_id(
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Tensor],
    n_rows: int,
    width: int,
    where: Path,
) -> dict[str, dict[int, Tensor]]:
    """Rows of tokens, by table and id.

    Args:
        tokenizer: says which id a token has.
        rows: ``input.<token>`` and ``output.<token>``, each [D].
        n_rows: of the matrices.
        width: of the matrices, D.
        where: the file, for errors.

    Raises:
        CheckpointError: a token that the tokenizer lacks or the matrix has no row for, or a row of
            another width.
    """
    vocabulary = tokenizer.get_vocab()
    out: dict[str, dict[int, Tensor]] = {INPUT: {}, OUTPUT: {}}
    for key, row in rows.items():
        kind = next((k for k in out if key.startswith(k)), None)
        if kind is None:
            raise CheckpointError(f"{where} holds {key!r}, which is no row of a token.")
        token = key.removeprefix(kind)
        if token not in vocabulary:
            raise CheckpointError(
                f"{where} holds the row of the token {token!r}, which the tokenizer beside it does "
                f"not know. The folder is not complete."
            )
        i = vocabulary[token]
        if i >= n_rows:
            raise CheckpointError(
                f"{where}: the token {token!r} has the id {i}, but the embedding matrix has "
                f"{n_rows} rows. The config.json beside it is another adapter's."
            )
        if tuple(row.shape) != (width,):
            raise CheckpointError(
                f"{where}: {key!r} has shape {tuple(row.shape)}, but rows of this base have shape "
                f"({width},). It was made for another base."
            )
        out[kind][i] = row
    return out


def stage_one_rows(
    tokenizer: PreTrainedTokenizerBase, table: Tensor, n_rows: int, width: int, where: Path
) -> dict[str, Tensor]:
    """The rows of the start and end tokens from a projector's file of LLaVA's first stage.

    The file holds the two rows, or the whole matrix as it was with the tokens at its end; as in
    LLaVA's own second stage, only the two rows are taken.

    Args:
        tokenizer: knows the tokens.
        table: as the file holds it. [2, D] or [V, D]
        n_rows: of the model's matrix.
        width: of the model's matrix, D.
        where: the folder, for errors.

    Raises:
        CheckpointError: another number of rows or another width, or no such tokens.
    """
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary.get(token) for token in IMAGE_TOKENS]
    if None in ids:
        raise CheckpointError(
            f"{where}: the projector's file holds embeddings, but config.json does not speak of "
            f"start and end tokens (mm_use_im_start_end)."
        )
    n = len(IMAGE_TOKENS)
    if table.ndim != 2 or table.shape[1] != width:
        rows = None
    elif table.shape[0] in (n, len(tokenizer)):
        rows = table[-n:]
    else:
        rows = table[ids] if table.shape[0] == n_rows else None
    if rows is None:
        raise CheckpointError(
            f"{where}: model.embed_tokens.weight in the projector's file has shape "
            f"{tuple(table.shape)}. Expected the {n} rows of the start and end tokens, "
            f"({n}, {width}), or the matrix with them, ({len(tokenizer)}, {width})."
        )
    return {INPUT + token: row for token, row in zip(IMAGE_TOKENS, rows, strict=True)}
