"""What a request will cost and what a checkpoint is, from headers alone: no weights are loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from av_llava.answers import SCHEMA, MediumUse, Usage
from av_llava.budgeting import check_context, context_length
from av_llava.checkpoints import description
from av_llava.checkpoints.base import with_rows
from av_llava.checkpoints.configuration import read_config
from av_llava.checkpoints.load import locate
from av_llava.checkpoints.partial import open_partial
from av_llava.checkpoints.parts import is_partial
from av_llava.checkpoints.tokenizers import load_tokenizer
from av_llava.checkpoints.tokens import complete_tokenizer
from av_llava.demo_model import shipped, tiny_config, tiny_tokenizer
from av_llava.options import Options, conversation
from av_llava.planning import MediaPlan
from av_llava.processor import AVLlavaProcessor


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


def light_processor(path: str | Path | None, base: str | Path | None = None) -> AVLlavaProcessor:
    """Processor of a checkpoint, from its config and tokenizer only; None is the default model."""
    path = shipped() if path is None else path
    if path is None:
        tokenizer = tiny_tokenizer()
        return AVLlavaProcessor(tokenizer, tiny_config(tokenizer))
    folder = locate(path)
    if is_partial(folder):
        opened = open_partial(path, base)
        return AVLlavaProcessor(opened.tokenizer, with_rows(opened.config, opened.rows))
    config, _ = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    ids = complete_tokenizer(tokenizer, config)
    rows = max([config.text_config.vocab_size, *(i + 1 for i in ids)])  # as loading grows them
    config.text_config.vocab_size = rows
    return AVLlavaProcessor(tokenizer, config)


def plan(
    path: str | Path | None,
    media: Any,
    prompt: str,
    *,
    base: str | Path | None = None,
    **options: Any,
) -> RequestPlan:
    """Plan one request; see :meth:`av_llava.AVLlava.ask` for the options, and
    :func:`av_llava.load` for path and base.

    Raises:
        BudgetError: it does not fit the context.
    """
    chosen = Options.of(options)
    processor = light_processor(path, base)
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


def describe(path: str | Path | None, base: str | Path | None = None) -> dict[str, Any]:
    """What a checkpoint is, and what is missing from it.

    Args:
        path: see :func:`av_llava.checkpoints.description.describe`; None is the default model.
        base: of parts of a model; None takes what they name.
    """
    if path is None:
        config = light_processor(None).config
        about = description.describe_model(config)
        folder = shipped()
        name = folder.name if folder else "av-llava tiny (random weights)"
        return {"name": name, **about}
    return description.describe(path, base)
