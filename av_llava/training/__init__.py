"""Fine-tuning: samples and where they come from, batches of them, and the trainer.

Names are lazy: importing the package costs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "Sample": "samples",
    "SampleStore": "store",
    "open_store": "store",
    "READERS": "readers",
    "LengthIndex": "index",
    "build_index": "index",
}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'av_llava.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"av_llava.training.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
