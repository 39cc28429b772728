"""Registers the classes with transformers' Auto classes; imported with any model name."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from av_llava.audio.configs import BeatsConfig, DualAudioConfig
from av_llava.config import AVLlavaConfig
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor


def register() -> None:
    """Register everything (idempotent)."""
    for config in (AVLlavaConfig, BeatsConfig, DualAudioConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(AVLlavaConfig, AVLlavaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(AVLlavaConfig, AVLlavaProcessor, exist_ok=True)


register()
