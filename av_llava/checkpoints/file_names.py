"""Names of files that tell what a folder holds; importing them costs nothing."""

from __future__ import annotations

PART_FILES = (
    "mm_projector.safetensors",
    "mm_projector.bin",
    "non_lora_trainables.safetensors",
    "non_lora_trainables.bin",
    "multimodal.safetensors",
    "adapter_config.json",
    "av_llava_adapter.json",
)
"""Any of them, without whole weights, makes a folder one with parts of a model (:mod:`parts`)."""
DELTA_RECORD = "av_llava_delta.json"
"""What a delta that was made here says about its base."""
