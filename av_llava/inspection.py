"""What a request will cost and what a checkpoint is, from headers alone: no weights are loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from av_llava.answers import SCHEMA, MediumUse, Usage
from av_llava.budgeting import check_context, context_length
from av_llava.checkpoints.base import with_rows
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.load import locate, memory_keys, read_config
from av_llava.checkpoints.partial import open_partial
from av_llava.checkpoints.parts import PartialFolder, is_partial
from av_llava.checkpoints.parts_info import describe_parts
from av_llava.checkpoints.public_audio import refuse_public
from av_llava.checkpoints.quantize import stored_scheme
from av_llava.checkpoints.tokenizers import load_tokenizer
from av_llava.checkpoints.tokens import complete_tokenizer
from av_llava.config import AVLlavaConfig
from av_llava.demo_model import tiny_config, tiny_tokenizer
from av_llava.errors import AVLlavaError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.options import Options, conversation
from av_llava.planning import MediaPlan, MediaPlanner
from av_llava.processor import AVLlavaProcessor

_VISION_PREFIX = "model.vision_tower."


@dataclass(frozen=True)
class RequestPlan:
    """The tokens of one request, exactly, before anything is decoded."""

    usage: Usage
    media: tuple[MediumUse, ...]
    context_length: int
    max_new_tokens: int
    """New tokens that fit after the prompt, up to what was asked for."""
    layout: tuple[str, ...]
    """One line a medium: how its tokens come about."""

    def describe(self) -> str:
        """A text for people."""
        u = self.usage
        lines = [m.line() for m in self.media]
        lines += list(self.layout)
        lines.append(
            f"prompt {u.prompt_tokens} tokens: {u.text_tokens} text, {u.image_tokens} image, "
            f"{u.video_tokens} video, {u.audio_tokens} audio"
        )
        lines.append(f"context {self.context_length}, room for {self.max_new_tokens} new tokens")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        out = asdict(self)
        out["usage"]["prompt_tokens"] = self.usage.prompt_tokens
        out["media"] = [m.to_dict() for m in self.media]
        return {"schema": SCHEMA, "plan": out}


def light_processor(path: str | Path | None) -> AVLlavaProcessor:
    """Processor of a checkpoint, from its config and tokenizer only; None is the default model."""
    if path is None:
        tokenizer = tiny_tokenizer()
        return AVLlavaProcessor(tokenizer, tiny_config(tokenizer))
    folder = locate(path)
    if is_partial(folder):
        opened = open_partial(path)
        return AVLlavaProcessor(opened.tokenizer, with_rows(opened.config, opened.rows))
    config, _ = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    ids = complete_tokenizer(tokenizer, config)
    rows = max([config.text_config.vocab_size, *(i + 1 for i in ids)])  # as loading grows them
    config.text_config.vocab_size = rows
    return AVLlavaProcessor(tokenizer, config)


def plan(path: str | Path | None, media: Any, prompt: str, **options: Any) -> RequestPlan:
    """Plan one request; see :meth:`av_llava.AVLlava.ask` for the arguments.

    Raises:
        BudgetError: it does not fit the context.
    """
    chosen = Options.of(options)
    processor = light_processor(path)
    prepared = processor.prepare(
        [conversation(media, prompt, chosen.system)],
        chosen.media(processor),
        aggregator=chosen.aggregator,
        max_visual_tokens=chosen.max_visual_tokens,
        decode=False,
    )
    room = check_context(processor, prepared, chosen.max_new_tokens)
    return RequestPlan(
        usage=prepared.usage(0),
        media=tuple(prepared.used[0]),
        context_length=context_length(processor.config),
        max_new_tokens=room,
        layout=_layout(prepared.media),
    )


def _layout(media: MediaPlan) -> tuple[str, ...]:
    lines = [f"image {i}: {p.n_tokens} tokens" for i, p in enumerate(media.images)]
    lines += [f"video {i}: {p.describe()}" for i, p in enumerate(media.videos)]
    for i, p in enumerate(media.audios):
        lines.append(
            f"audio {i}: {p.n_tokens} tokens of {p.seconds_per_token:.2f} s, "
            f"{len(p.chunks)} chunk(s)"
        )
        lines += [f"audio {i}: {note}" for note in p.notes]
    return tuple(lines)


def describe(path: str | Path | None) -> dict[str, Any]:
    """What a checkpoint is, and what is missing from it."""
    if path is None:
        config = light_processor(None).config
        return {"name": "av-llava tiny (random weights)", **_parts(config, None)}
    folder = locate(path)
    if is_partial(folder):
        parts, whole = describe_parts(PartialFolder(folder.path))
        rest = {} if whole is None else _parts(whole, None)
        return {"name": str(path), "folder": str(folder.path), **parts, **rest}
    refuse_public(folder)
    config, tower = read_config(folder)
    found: dict[str, Any] = {"name": str(path), "folder": str(folder.path)}
    found["layout"] = folder.config.get("model_type")
    found["architecture"] = (folder.config.get("architectures") or [None])[0]
    found["quantization"] = stored_scheme(folder)
    found |= _parts(config, folder)
    inside = any(key.startswith(_VISION_PREFIX) for key in memory_keys(folder))
    if config.vision_config is not None:
        where = "inside the checkpoint" if inside else str(tower.folder if tower else None)
        found["vision_tower"] |= {"name": config.vision.tower, "weights": where}
    found["tokenizer"] = _tokenizer(folder, config)
    return found


def _tokenizer(folder: CheckpointFolder, config: AVLlavaConfig) -> dict[str, Any]:
    try:
        processor = AVLlavaProcessor(load_tokenizer(folder, config), config)
        return {"size": len(processor.tokenizer), "template": processor.template.name}
    except AVLlavaError as error:
        return {"error": str(error)}


def _parts(config: AVLlavaConfig, folder: CheckpointFolder | None) -> dict[str, Any]:
    """Sizes and counts of the parts, and keys that do not match."""
    with torch.device("meta"):
        model = AVLlavaForConditionalGeneration(config)
    out: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(config.dtype).removeprefix("torch."),
        "context_length": context_length(config),
        "language_model": {
            "type": config.text_config.model_type,
            "layers": config.text_config.num_hidden_layers,
            "width": config.text_config.hidden_size,
            "vocabulary": config.text_config.vocab_size,
            "parameters": _count(model.model.language_model),
        },
    }
    if config.vision_config is not None:
        planner = MediaPlanner(config)
        out["vision_tower"] = {
            "kind": config.vision.kind,
            "image_size": config.vision_config.image_size,
            "parameters": _count(model.model.vision_tower),
        }
        out["projector"] = config.projector.kind
        out["images"] = config.image.aspect_ratio
        out["video_tokens"] = {str(n): planner.video(n).n_tokens for n in (1, 8, 32, 64)}
    if config.audio_config is not None:
        planner = MediaPlanner(config)
        out["audio_tower"] = {
            "kind": config.audio.kind,
            "parameters": _count(model.model.audio_tower),
            "placement": config.audio.placement,
            "tokens_per_minute": planner.audio(60 * 16_000).n_tokens,
        }
    if folder is not None:
        out |= _keys(model, folder)
    return out


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _keys(model: AVLlavaForConditionalGeneration, folder: CheckpointFolder) -> dict[str, Any]:
    """Keys that the model needs and the folder lacks, and the reverse."""
    stored = memory_keys(folder)
    wanted = set(model.state_dict())
    if model.config.tie_word_embeddings:
        wanted -= {"lm_head.weight"}
        stored -= {"lm_head.weight"}
    if not any(key.startswith(_VISION_PREFIX) for key in stored):
        wanted = {k for k in wanted if not k.startswith(_VISION_PREFIX)}
    return {"missing": sorted(wanted - stored), "unexpected": sorted(stored - wanted)}
