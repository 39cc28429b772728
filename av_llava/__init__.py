"""av_llava: a LLaVA-architecture language model that watches and listens.

Names are lazy: importing the package costs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "load": "inference",
    "add_audio": "inference",
    "AVLlava": "inference",
    "Answer": "inference",
    "Options": "inference",
    "plan": "inference",
    "describe": "inference",
    "MediaPart": "chat",
    "Session": "sessions",
    "load_pretrained_model": "checkpoints.llava_api",
    "AVLlavaConfig": "config",
    "AVLlavaProcessor": "processor",
    "AVLlavaModel": "modeling",
    "AVLlavaForConditionalGeneration": "modeling",
    "MediaPlan": "planning",
    "MediaPlanner": "planning",
    "SplicePlan": "splice",
    "tokenizer_image_token": "chat",
    "process_images": "processor",
    "IMAGE_TOKEN_INDEX": "settings",
    "VIDEO_TOKEN_INDEX": "settings",
    "AUDIO_TOKEN_INDEX": "settings",
    "IGNORE_INDEX": "settings",
}
# With these come models or configurations, which transformers' Auto classes must know.
_NEED_AUTO = ("inference", "sessions", "checkpoints.llava_api", "config", "processor", "modeling")
_SUBMODULES = (
    "aggregators",
    "audio",
    "chat",
    "modalities",
    "images",
    "media",
    "projectors",
    "sampling",
    "splice",
    "vision",
)

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"av_llava.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'av_llava' has no attribute {name!r}")
    if _NAMES[name] in _NEED_AUTO:
        importlib.import_module("av_llava.auto")
    return getattr(importlib.import_module(f"av_llava.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_SUBMODULES])
