"""A synthetic world to learn in: clips of coloured shapes and sounds, with questions and answers.

`scene` samples what happens, `picture` and `sound` show it, `questions` asks about it, `write`
makes media files, `generate` whole data sets in LLaVA's format. All but `write` needs only numpy.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "KINDS": "kinds",
    "Kind": "kinds",
    "Question": "questions",
    "Scene": "parts",
    "SceneSettings": "parts",
    "frames": "picture",
    "questions": "questions",
    "sample_scene": "scene",
    "synthesize": "generate",
    "waveform": "sound",
    "write_clip": "write",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
