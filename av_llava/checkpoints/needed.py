"""What a configuration needs: names and shapes of tensors, known without making any."""

from __future__ import annotations

import copy

import torch

from av_llava.config import AVLlavaConfig
from av_llava.modeling import AVLlavaForConditionalGeneration


def empty_model(config: AVLlavaConfig) -> AVLlavaForConditionalGeneration:
    """The model of a configuration without values: it costs no memory, and has all shapes."""
    with torch.device("meta"):
        return AVLlavaForConditionalGeneration(copy.deepcopy(config))


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors, by their names in memory."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def without_senses(config: AVLlavaConfig) -> AVLlavaConfig:
    """A copy of a configuration with the language model only."""
    out = copy.deepcopy(config)
    out.vision_config = out.audio_config = out.au_token_ids = None
    out.extra_modalities = ()
    return out
