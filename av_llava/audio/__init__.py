"""The listening half: resampling, features, towers, projector, and placement of sound.

Contract: a waveform here is float32 mono at 16 kHz. Counts come from ``placement.plan_audio``
before anything is encoded; importing this package or ``placement`` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "LogMel": "features",
    "KaldiFbank": "features",
    "load_audio": "resample",
    "AUDIO_TOWERS": "towers",
    "AudioTower": "towers",
    "build_audio_tower": "towers",
    "AUDIO_PROJECTORS": "projector",
    "build_audio_projector": "projector",
    "AudioPlan": "placement",
    "plan_audio": "placement",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'av_llava.audio' has no attribute {name!r}")
    return getattr(importlib.import_module(f"av_llava.audio.{_NAMES[name]}"), name)
