"""The first sample as the model gets it, with what is learned marked.

Contract: made from the very ids and labels of the first batch, so that a wrong template or mask is
seen. Media are counted, not shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from av_llava.settings import IGNORE_INDEX

OPEN, CLOSE = "⟦", "⟧"


def preview(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor,
    tokenizer: Any,
    media_token_ids: Mapping[str, int],
) -> str:
    """One sample as text.

    Args:
        input_ids: expanded ids, negative on media. [L]
        labels: -100 where nothing is learned. [L]
        attention_mask: 0 on padding. [L]
        tokenizer: of the model.
        media_token_ids: kind of medium to its negative id.

    Returns:
        The text: ``<video × 120>`` for media, ``⟦…⟧`` around what is learned.
    """
    kinds = {i: kind for kind, i in media_token_ids.items()}
    content = attention_mask.bool()
    ids, wanted = input_ids[content].tolist(), labels[content].tolist()
    pieces = []
    marked = [(i, label != IGNORE_INDEX) for i, label in zip(ids, wanted, strict=True)]
    for (kind, learned), run in itertools.groupby(marked, lambda m: (kinds.get(m[0]), m[1])):
        own = [i for i, _ in run]
        if kind is not None:
            pieces.append(f"<{kind} × {len(own)}>")
        else:
            text = tokenizer.decode(own, skip_special_tokens=False)
            pieces.append(f"{OPEN}{text}{CLOSE}" if learned else text)
    return "".join(pieces)
