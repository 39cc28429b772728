"""Names on disk (LLaVA's) and in memory (ours), through transformers' reversible renaming.

Contract: a folder in LLaVA's layout loads without a missing or unexpected key, and
``save_pretrained`` writes LLaVA's names back. Patterns stand without ``$``: transformers 5.23
writes a wrong key for an anchored one.
"""

from __future__ import annotations

import re

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

# (pattern on disk, name in memory), tried in this order.
LLAVA_TO_MEMORY = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower.vision_tower."),
    (r"^model\.image_newline", "model.media_tokens.image_newline"),
    (r"^model\.faster_token", "model.media_tokens.faster_token"),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
)

_MEMORY_TO_LLAVA = (
    (r"^(model\.vision_tower\.vision_tower\.)(?!vision_model\.)", r"\1vision_model."),
    (r"^model\.(?:media_tokens|language_model)\.", "model."),
)

# Keys of published files that hold nothing the model uses: buffers that old releases saved, the
# SigLIP pooling head, and LLaVA's inert resampler.
IGNORED = (
    r"rotary_emb\.inv_freq",
    r"embeddings\.position_ids",
    r"vision_tower\.head\.",
    r"vision_model\.head\.",
    r"vision_resampler",
)


def memory_name(key: str) -> str:
    """The name in memory of a key on disk."""
    for pattern, target in LLAVA_TO_MEMORY:
        renamed, count = re.subn(pattern, target, key)
        if count:
            return renamed
    return key


def disk_name(key: str) -> str:
    """The name on disk of a key in memory; a name on disk stays as it is."""
    for pattern, target in _MEMORY_TO_LLAVA:
        renamed, count = re.subn(pattern, target, key)
        if count:
            return renamed
    return key


def ignored(key: str) -> bool:
    """Whether a key on disk holds nothing that the model uses."""
    return any(re.search(pattern, key) for pattern in IGNORED)


def register() -> None:
    """Tell transformers the names (idempotent); done when the model classes are imported."""
    renames = [WeightRenaming(source, target) for source, target in LLAVA_TO_MEMORY]
    register_checkpoint_conversion_mapping(
        "AVLlavaForConditionalGeneration", renames, overwrite=True
    )
