"""Make the small model before it has learned anything: tokenizer, configuration, random weights.

python scripts/tiny/build.py FOLDER

Contract: every part of the architecture is there, as small as the synthetic world needs. The
tokenizer knows the world's words as whole tokens and any other text by bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig, WhisperConfig

from av_llava.config import AVLlavaConfig
from av_llava.demo_model import byte_tokenizer
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor
from av_llava.settings import (
    AU_END_TOKEN,
    AU_START_TOKEN,
    AggregatorSettings,
    AudioSettings,
    ImageSettings,
    PoolSettings,
    SamplingSettings,
    SelectSettings,
    SequenceSettings,
    StreamSettings,
    VisionSettings,
)
from av_llava.training.world import KINDS
from av_llava.training.world.parts import COLOURS, SHAPES, SOUNDS

NAME = "av-llava-tiny"
VOCABULARY = 600
TEMPLATE = "chatml_direct"
CLIP_S = 4.0
FRAMES = 12
"""Frames that the model sees of a clip."""
IMAGE_SIDE, PATCH_SIDE = 64, 8


def world_texts() -> list[str]:
    """Everything that the world says: each wording filled in once, each answer, the roles."""
    blanks: dict[str, tuple[str, ...]] = {
        "shape": SHAPES,
        "colour": tuple(COLOURS),
        "one": SHAPES,
        "other": SHAPES,
        "a_thing": (*(f"a {c} shape" for c in COLOURS), "an orange shape", *SHAPES),
        "a_sound": (*(f"a {s}" for s in SOUNDS), "a beep"),
    }
    texts = ["system", "user", "assistant", "Answer the questions."]
    for kind in KINDS.values():
        for wording in kind.phrasings:
            longest = max(map(len, blanks.values()))
            texts += [
                wording.format(**{name: words[i % len(words)] for name, words in blanks.items()})
                for i in range(longest)
            ]
        texts += [form for answer in kind.answers for form in (answer, f" {answer}")]
    return texts


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the world's words."""
    return byte_tokenizer(world_texts(), VOCABULARY)


def make_config(
    tokenizer: PreTrainedTokenizerFast,
    aggregator: AggregatorSettings | None = None,
    frames: int = FRAMES,
) -> AVLlavaConfig:
    """Every part of the architecture; about 1.7 million weights.

    Args:
        tokenizer: of :func:`make_tokenizer`.
        aggregator: instead of the slow and the fast stream.
        frames: that the model sees of a clip.
    """
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIDE,
        vision_use_head=False,
    )
    audio = WhisperConfig(
        d_model=96,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=192,
        num_mel_bins=64,
        max_source_positions=round(50 * CLIP_S),  # a chunk is as long as a clip
        vocab_size=len(tokenizer),
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    half = (0.5, 0.5, 0.5)
    slow = StreamSettings(
        SelectSettings("every", step=4), PoolSettings("average", 2, tail="partial")
    )
    fast = StreamSettings(pool=PoolSettings("average", 4, tail="partial"))
    return AVLlavaConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        vision=VisionSettings(
            tower=NAME,
            kind="siglip",
            select_layer=-1,
            image_mean=half,
            image_std=half,
            resize="exact",
            max_batch=512,
        ),
        image=ImageSettings(aspect_ratio="pad", patch_merge_type="spatial_unpad"),
        # Pooled before the projector: a ninth of its work, and the towers learn on pooled features.
        aggregator=aggregator
        or AggregatorSettings(layout="slow_then_fast", slow=slow, fast=fast, stage="pre"),
        audio=AudioSettings(
            tower=NAME,
            projector="mlp2x_gelu",
            pool_mode="average",
            pool_stride=8,
            placement="interleave",
        ),
        sampling=SamplingSettings(frames=frames),
        sequence=SequenceSettings(media_tokens=("newline",), template=TEMPLATE),
        au_token_ids=[tokenizer.convert_tokens_to_ids(t) for t in (AU_START_TOKEN, AU_END_TOKEN)],
    )


def plane_waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of a grid's rows and columns, [side * side, width].

    As the first position embedding, they tell from the start which patches are neighbours.
    """
    frequency = 2 * 30 ** (-torch.arange(width // 4) / (width // 4))
    place = torch.arange(side) / side * torch.pi
    rows, columns = (g.reshape(-1, 1) for g in torch.meshgrid(place, place, indexing="ij"))
    waves = [f(g * frequency) for g in (rows, columns) for f in (torch.sin, torch.cos)]
    return 0.5 * torch.cat(waves, 1)


@torch.no_grad()
def start_wide(model: AVLlavaForConditionalGeneration) -> None:
    """Draw the language model's and projectors' matrices as wide as their inputs allow.

    The families' usual deviation of 0.02 is made for widths of thousands: at 128, attention would
    begin uniform, and learning takes half as long again (docs/tiny.md).
    """
    parts = model.model
    depth = model.config.text_config.num_hidden_layers
    for part in (parts.language_model, parts.mm_projector, parts.mm_audio_projector):
        for name, layer in part.named_modules():
            if isinstance(layer, torch.nn.Linear):
                ends_branch = name.endswith(("o_proj", "down_proj"))
                scale = (2 * depth) ** -0.5 if ends_branch else 1.0
                layer.weight.normal_(0, scale * layer.in_features**-0.5)
    model.get_input_embeddings().weight.normal_(0, 0.05)


def build(
    seed: int = 0, aggregator: AggregatorSettings | None = None, frames: int = FRAMES
) -> tuple[AVLlavaForConditionalGeneration, AVLlavaProcessor]:
    """Make the model and its processor in memory, the same for the same seed."""
    tokenizer = make_tokenizer()
    config = make_config(tokenizer, aggregator, frames)
    torch.manual_seed(seed)
    model = AVLlavaForConditionalGeneration(config)
    start_wide(model)
    position = model.model.vision_tower.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        position.copy_(plane_waves(IMAGE_SIDE // PATCH_SIDE, position.shape[1]))
    return model, AVLlavaProcessor(tokenizer, config)


def save(folder: str | Path, seed: int = 0) -> Path:
    """Write the untrained checkpoint folder."""
    model, processor = build(seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    print(f"Wrote {save(sys.argv[1])}: random weights, nothing is learned yet.")
