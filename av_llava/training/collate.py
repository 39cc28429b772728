"""What one batch looks like between the worker that makes it and the model.

Contract: a plain mapping of tensors and the media plan, as ``model.forward`` takes it, plus
``info``, which the trainer takes out. Padding is on the right; the mask is made from lengths, never
from ids. Everything pickles, and tensors can be pinned.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from av_llava.config import AVLlavaConfig
from av_llava.prepared import Prepared
from av_llava.settings import IGNORE_INDEX
from av_llava.training.bad_media import BadMedium

T = TypeVar("T")
_KINDS = ("text", "image", "video", "audio")


@dataclass(frozen=True)
class BatchInfo:
    """What the trainer wants to know about a batch, beside its tensors."""

    ids: tuple[str, ...]
    """Of the samples."""
    sources: tuple[str, ...]
    """Files and lines of the samples."""
    indices: tuple[int, ...]
    """Numbers of the samples, replacements included."""
    epoch: int
    modalities: tuple[int, ...]
    """Codes of what each sample holds, after modality dropout (``index.modality_name``)."""
    lengths: tuple[int, ...]
    """Tokens of each sample."""
    padded: int
    """Tokens of the whole batch, padding included."""
    supervised: tuple[int, ...]
    """Tokens of each sample that are learned."""
    tokens: Mapping[str, int]
    """Tokens of each kind: text, image, video, audio."""
    weights: tuple[float, ...]
    """Factor of each sample's loss."""
    bad: tuple[BadMedium, ...] = ()
    """Media that could not be read, and what took their place."""
    warnings: tuple[str, ...] = ()
    """What was wrong with media that could be read."""
    seconds: float = 0.0
    """Time that reading took."""
    rss_bytes: int = 0
    """Memory of the process that read."""


def collate(
    prepared: Prepared, config: AVLlavaConfig, pad_token_id: int, info: BatchInfo
) -> dict[str, Any]:
    """The batch as ``model.forward`` takes it.

    Args:
        prepared: the batch on the host, supervised.
        config: the model's.
        pad_token_id: written where there is padding.
        info: see the class.

    Returns:
        ``input_ids`` (expanded, negative on media), ``attention_mask``, ``labels`` (all int64
        [B, L]), ``media``, the encoders' tensors, and ``info``.
    """
    splice = prepared.media.splice
    return {
        "input_ids": splice.input_ids(config.media_token_ids, pad_token_id),
        "attention_mask": splice.attention_mask(),
        "labels": splice.labels(),
        "media": prepared.media,
        **prepared.tensors,
        "info": info,
    }


def counts_of(prepared: Prepared) -> tuple[tuple[int, ...], dict[str, int]]:
    """Supervised tokens of each sample, and tokens of each kind in the batch."""
    splice = prepared.media.splice
    labels = splice.labels()
    assert labels is not None
    # The first row of a sample has no token before it that could predict it.
    supervised = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
    return tuple(supervised), {kind: splice.n_tokens(kind) for kind in _KINDS}


def as_is(batch: T) -> T:
    """For ``DataLoader(collate_fn=…)``: the data set has made the batch, or failed, already."""
    return batch


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def pad_token_id(tokenizer: Any) -> int:
    """The id that padding is written with; it is masked, so that any will do."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
