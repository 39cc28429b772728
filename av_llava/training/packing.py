"""Several samples in one row: no padding, and no sample sees another one.

Contract: a packed batch has the loss and the gradients of the same samples side by side. Positions
restart with each sample, and attention is block-diagonal, as transformers makes it of restarted
positions; whether it does for a family of language models is measured, and refused where not.
Token-budget batches leave less than 1 % of padding, so packing is for kernels that gain by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_llava.errors import DataError, UsageError
from av_llava.planning import MediaPlan
from av_llava.settings import IGNORE_INDEX
from av_llava.splice import TEXT
from av_llava.training.index import LengthIndex
from av_llava.training.store import SampleStore

_LENGTHS = (7, 5)


def packed(media: MediaPlan, rows: Sequence[Sequence[int]] | None = None) -> MediaPlan:
    """The same batch with its samples one behind the other.

    Args:
        media: the plan of a batch, padded on the right.
        rows: samples of each row; None puts all into one.

    Returns:
        A plan of fewer, longer rows. What the first token of a sample would be learned from is the
        sample before it, so that it is not learned.
    """
    splice = media.splice
    groups = [list(row) for row in (rows or [range(len(splice.samples))])]
    if sorted(chain(*groups)) != list(range(len(splice.samples))):
        raise UsageError(f"Every sample of a batch belongs into one row, not {groups}.")
    labels = splice.text_labels
    if labels is not None:
        labels = labels.copy()
        firsts = [segments[0] for segments in splice.samples if segments]
        labels[[s.lo for s in firsts if s.kind == TEXT]] = IGNORE_INDEX
    joined = replace(
        splice,
        samples=tuple(tuple(chain(*(splice.samples[i] for i in row))) for row in groups),
        text_labels=labels,
        length=None,
        packed=tuple(tuple(splice.lengths[i] for i in row) for row in groups),
    )
    return replace(media, splice=joined)


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Measure whether the language model keeps packed samples apart.

    Args:
        model: with or without head.

    Raises:
        UsageError: it does not: a sample would see the one before it.
    """
    body = model.get_decoder()
    table = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    # Any ids will do that have a row; the table may be inside a module for rows that train alone.
    n_rows = model.config.text_config.vocab_size
    ids = torch.randint(0, n_rows, (1, sum(_LENGTHS)), generator=generator)
    embeds = table(ids.to(next(table.parameters()).device))
    parts = embeds.split(_LENGTHS, dim=1)
    was_training = body.training
    body.eval()
    try:
        apart = torch.cat([_states(body, part) for part in parts], dim=1)
        positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(embeds.device)
        together = _states(body, embeds, position_ids=positions)
        seeing = _states(body, embeds, position_ids=positions, attention_mask=positions >= 0)
    finally:
        body.train(was_training)
    error = float((together - apart).abs().max())
    seen = float((seeing - apart).abs().max())
    if error > 0.05 * seen:
        kind = model.config.text_config.model_type
        raise UsageError(
            f"Samples cannot be packed for this language model ({kind}): each would see the one "
            f"before it, since its attention does not follow positions that restart. Leave "
            f"packing out (batch.packing=false); batches of one length waste less than 2 % anyway."
        )


def check_weights(store: SampleStore, index: LengthIndex) -> None:
    """Refuse weights of samples: the loss is weighted by rows, of which they have none alone.

    All rows are read for it: otherwise a run would end at the first batch that holds such a one.

    Args:
        store: the samples.
        index: what is known of them; rows that cannot be used have no weight.

    Raises:
        DataError: a sample has a weight other than 1.
    """
    for row in np.flatnonzero(index.usable).tolist():
        sample = store[row]
        if sample.weight != 1.0:
            raise DataError(
                f"{store.where(row)}: sample {sample.id!r} has a weight of {sample.weight:g}, "
                f"which packed rows cannot take into account. Leave packing out "
                f"(batch.packing=false), or the weight."
            )


def _states(body: Any, embeds: Tensor, **inputs: Any) -> Tensor:
    """Last hidden states, in float32. [1, n, D]"""
    return body(inputs_embeds=embeds, use_cache=False, **inputs).last_hidden_state.float()
