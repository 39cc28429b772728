"""Tensors of a stand-alone tower's file, named as a tower of this package wants them.

Contract: nothing is guessed or repaired. What the tower does not have is left out and named to
the caller; what is left is to be loaded strictly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
# Parts of a whole text-image model, and a buffer that old versions of transformers saved.
_OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_")
_POSITION_IDS = "embeddings.position_ids"


def tower_weights(state: Mapping[str, Tensor], tower: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Rename and choose the tensors for ``tower.vision_tower.load_state_dict``.

    Args:
        state: of a published tower: CLIP or SigLIP, vision part or whole, with or without the
            ``vision_model.`` level.
        tower: the tower to fill.

    Returns:
        The tensors by name, and the names in ``state`` that the tower has no place for: a text
        model, the head and the last layer of SigLIP, buffers.
    """
    own = set(tower.vision_tower.state_dict())
    n_layers = tower.config.num_hidden_layers
    prefixed = any(name.startswith("vision_model.") for name in state)
    kept, left_out = {}, []
    for name, tensor in state.items():
        short = name.removeprefix("vision_model.")
        layer = _LAYER.match(short)
        foreign = (prefixed and short == name) or short.startswith(_OTHER_PARTS)
        beyond = layer is not None and int(layer.group(1)) >= n_layers
        headless = short.startswith("head.") and short not in own
        if foreign or beyond or headless or short == _POSITION_IDS:
            left_out.append(name)
        else:
            kept[short] = tensor
    return kept, left_out
