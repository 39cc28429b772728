"""The table of memory in docs/training.md, made from the recipes themselves.

``python tests/training_page.py`` brings the page up to date.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2Config, SiglipVisionConfig, WhisperConfig

from av_llava.demo_model import tiny_config, tiny_tokenizer
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.training.arguments import training_arguments
from av_llava.training.estimate import estimate
from av_llava.training.parts import apply_trainable, decoder_layers
from av_llava.training.recipe import read_recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "training.md"
BLOCK = re.compile(r"(<!-- memory -->\n).*?(<!-- end -->)", re.DOTALL)
GPUS = 8
_NF4_BYTES = 0.5 + 1 / 64 + 4 / 64 / 256
"""Of a weight in nf4: four bits, a quantised scale for 64, a scale for 256 of those."""

ROWS = (
    ("qlora.yaml", ()),
    ("lora.yaml", ()),
    ("align_audio.yaml", ()),
    ("av_sft.yaml", ()),
    ("full.yaml", ()),
    ("video_sft.yaml", ()),
)


def large_model() -> AVLlavaForConditionalGeneration:
    """A model of 7B without any weights."""
    config = tiny_config(tiny_tokenizer())
    config.text_config = Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    config.tie_word_embeddings = False
    config.vision_config = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        image_size=384, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    config.audio_config = WhisperConfig(
        d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120,
        num_mel_bins=128, decoder_layers=1, decoder_attention_heads=20,
    )  # fmt: skip
    config.audio = config.audio.replace(projector_hidden_size=2048)
    with torch.device("meta"):
        return AVLlavaForConditionalGeneration(config)


def row(name: str, words: tuple[str, ...]) -> str:
    """One line of the table."""
    settings = read_recipe(ROOT / "scripts" / "recipes" / name, ["output=x", *words])
    trained = dict(settings.training)
    sharded = trained.pop("fsdp", None) is not None
    trained.pop("fsdp_config", None)
    settings = settings.replace(training={**trained, "use_cpu": True, "report_to": []})
    model = large_model()
    model.config.sampling = model.config.sampling.replace(frames=settings.data.frames or 32)
    if settings.trainable.language_model.train in ("freeze", "lora"):
        model.to(torch.bfloat16)
    small = sum(
        m.weight.numel()
        for layer in decoder_layers(model)
        for m in layer.modules()
        if isinstance(m, torch.nn.Linear)
    )
    table = apply_trainable(model, settings.trainable, settings.lora)
    with tempfile.TemporaryDirectory() as place:
        args = training_arguments(settings, Path(place))
    found = estimate(model, table, settings, args)
    shards = GPUS if sharded else 1
    weights = found.weights / shards
    if settings.model.quantize:
        weights -= small * (2 - _NF4_BYTES)
    state = (found.gradients + found.optimizer) / shards
    batch = found.activations + found.logits
    together = (weights + state + batch) * 1.1
    devices = f"{GPUS} GPUs (FSDP2)" if sharded else "1 GPU"
    command = f"av-llava train scripts/recipes/{name}"
    return (
        f"| `{command}` | {devices} | {table.n_trained / 1e6:,.0f} M | {weights / 1e9:.1f} | "
        f"{state / 1e9:.1f} | {batch / 1e9:.1f} | **{together / 1e9:.0f} GB** |"
    )


def updated(page: str) -> str:
    """The page with its table made anew."""
    head = (
        "| command | on | trained | weights | gradients, optimiser | activations | together |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    body = "\n".join(row(name, words) for name, words in ROWS)
    return BLOCK.sub(lambda m: f"{m[1]}{head}{body}\n{m[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
