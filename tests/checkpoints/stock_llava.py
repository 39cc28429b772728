"""Tiny models of transformers' own LLaVA classes with random weights, and inputs for them."""

from __future__ import annotations

import torch
import transformers
from transformers import CONFIG_MAPPING

from av_llava.demo_model import tiny_tokenizer

IMAGE_ID, VIDEO_ID, PAD_ID, VOCABULARY = 60, 61, 0, 64

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD_ID,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
    "projection_dim": 8,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
    "vision_use_head": False,
}
# (height, width); taller ones first, so that an exchange of the two is noticed.
PINPOINTS = [[24, 12], [36, 12], [12, 24], [24, 24], [12, 36], [36, 36]]
CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}


def stock_config(kind, text="llama", vision=None, **changes):
    """The configuration of a tiny model."""
    fields = {
        "text_config": {"model_type": text, **TEXT},
        "vision_config": vision or (SIGLIP if kind == "llava_onevision" else CLIP),
        "image_token_index": IMAGE_ID,
    }
    if kind != "llava":
        fields["image_grid_pinpoints"] = PINPOINTS
    if kind in ("llava_next_video", "llava_onevision"):
        fields["video_token_index"] = VIDEO_ID
    if kind == "llava_onevision":
        fields["vision_aspect_ratio"] = "anyres_max_3"
    return CONFIG_MAPPING[kind](**{**fields, **changes})


def stock_model(kind, **changes):
    """A tiny model."""
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[kind])(stock_config(kind, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual 0.02 would hide differences
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def stock_folder(model, folder):
    """Save a model with a tokenizer."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_ids(n, generator):
    """Ids of text. [n]"""
    return torch.randint(2, IMAGE_ID, (n,), generator=generator).tolist()
