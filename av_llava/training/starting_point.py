"""What a run starts from, as a digest: a run that goes on must start from the same.

Contract: made of the loaded model before anything trains; the same on every rank and device. Of
each weight up to 4096 values count, so that it costs little; quantised layers count by name.
"""

from __future__ import annotations

import hashlib
import json

import torch

from av_llava.inference import AVLlava

_VALUES = 4096


@torch.no_grad()
def starting_digest(model: AVLlava) -> str:
    """SHA-256 of weights and vocabulary.

    Args:
        model: as it was loaded.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        if weight.is_floating_point():
            flat = weight.detach().flatten()
            some = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES]
            digest.update(some.float().cpu().numpy().tobytes())
    vocabulary = model.processor.tokenizer.get_vocab()
    digest.update(json.dumps(vocabulary, sort_keys=True).encode())
    return digest.hexdigest()
