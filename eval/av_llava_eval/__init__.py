"""Evaluation of av_llava on video and audio-visual benchmarks, with scores that can be trusted.

Contract: names are lazy, and importing this package costs the standard library only. Layers, each
using those before it: ``sample`` → ``annotations`` → ``task`` → ``tasks/*`` → ``scoring``,
``records``, ``answerer`` → ``runner`` → ``experiment``, ``compare``. Scoring needs no model.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Prediction": "sample",
    "Sample": "sample",
    "Task": "task",
    "get_task": "task",
    "register": "task",
    "task_names": "task",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
