"""What a configuration needs: names and shapes of tensors, known without making any."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from av_llava.config import AVLlavaConfig
from av_llava.modeling import AVLlavaForConditionalGeneration


def empty_model(config: AVLlavaConfig) -> AVLlavaForConditionalGeneration:
    """The model of a configuration without values: it costs no memory, and has all shapes."""
    with torch.device("meta"):
        return AVLlavaForConditionalGeneration(copy.deepcopy(config))


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors, by their names in memory."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def disk_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors, by the names under which it is saved.

    They differ by more than the name for mixtures of experts: files hold each expert's matrices,
    memory holds those of a layer as one.
    """
    saved = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(value.shape) for name, value in saved.items()}


def on_disk(config: AVLlavaConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in memory, as a model of the configuration is saved."""
    return dict(revert_weight_conversion(empty_model(config), dict(state)))


def without_senses(config: AVLlavaConfig) -> AVLlavaConfig:
    """A copy of a configuration with the language model only."""
    out = copy.deepcopy(config)
    out.vision_config = out.audio_config = out.au_token_ids = None
    out.extra_modalities = ()
    return out
