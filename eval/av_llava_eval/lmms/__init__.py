"""av_llava as a model of lmms-eval (``lmms-eval --model av_llava``), through its entry points.

Contract: lmms-eval finds :func:`manifest` by the entry point group ``lmms_eval.models`` and imports
the model only when it is chosen. ``requests`` needs neither lmms-eval nor torch.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "av_llava"


def manifest() -> Any:
    """What lmms-eval registers: the name of the model and the place of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path="av_llava_eval.lmms.model.AVLlavaChat")
