"""What can be chosen for one request, and how its media and prompt become messages.

Contract: an option that is wrong raises here, before weights or media are touched.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from av_llava.chat import MediaPart, Message, TextPart, normalize_messages, read_medium
from av_llava.errors import UsageError, unknown_name
from av_llava.media import Limits, LocalFile, probe
from av_llava.media_inputs import MediaOptions, check_audio_mode, kept
from av_llava.processor import AVLlavaProcessor


@dataclass(frozen=True)
class Options:
    """Everything that can be chosen for one request. None means the model's own setting."""

    frames: int | None = None
    """Upper bound of the number of frames."""
    fps: float | None = None
    """Frames per second to sample, up to ``frames``."""
    start_s: float | None = None
    """First second used of every video and sound."""
    end_s: float | None = None
    """Last second used."""
    audio: Any = "auto"
    """The sound of videos: auto, on, off, or a sound file."""
    time_instruction: bool | None = None
    """Tell the model duration and frame times in words, as LLaVA-Video does."""
    backend: str | None = None
    """Decoder: auto, pyav, decord."""
    source_fps: float | None = None
    """Frame rate of a folder of pictures or of frames given as an array; 1 if None."""
    aggregator: Any = None
    """Spec of another aggregator, such as ``llava_video`` or ``budget:2048``."""
    max_visual_tokens: int | None = None
    """At most so many tokens for all pictures and videos of a prompt; videos are pooled more
    coarsely where the model's own way would give more."""
    limits: Limits | None = None
    """What a file may cost (size, duration, pixels, time); None means safe limits."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    top_p: float | None = None
    """Draw from the likeliest tokens that hold this share of the probability."""
    seed: int | None = None
    """Seed of the drawing."""
    system: str | None = None
    """System prompt."""
    stop: Sequence[str] = ()
    """Further text, or texts, that end an answer."""

    def __post_init__(self) -> None:
        for name in ("frames", "max_visual_tokens", "max_new_tokens", "seed"):
            _check_number(name, getattr(self, name), whole=True)
        for name in ("fps", "start_s", "end_s", "temperature", "top_p", "source_fps"):
            _check_number(name, getattr(self, name), whole=False)
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if self.temperature < 0:
            raise UsageError(f"temperature must be 0 or more, not {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if self.max_visual_tokens is not None and self.aggregator is not None:
            raise UsageError("Give either aggregator or max_visual_tokens, not both.")
        if self.max_visual_tokens is not None and self.max_visual_tokens < 1:
            raise UsageError(f"max_visual_tokens must be at least 1, not {self.max_visual_tokens}.")
        check_audio_mode(self.audio)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Options:
        """Make options from keywords; an unknown one raises with the nearest known."""
        names = [f.name for f in fields(cls)]
        for key in values:
            if key not in names:
                raise unknown_name("option", key, names)
        return cls(**values)

    def without_effect(self, kinds: Collection[str]) -> tuple[str, ...]:
        """Sentences about options that were given for media that the prompt does not have."""
        video = ("frames", "fps", "aggregator", "time_instruction", "backend", "source_fps")
        window = ("start_s", "end_s")
        idle = [n for n in video if "video" not in kinds and getattr(self, n) is not None]
        if not {"video", "audio"} & set(kinds):
            idle += [n for n in window if getattr(self, n) is not None]
        return tuple(f"{name} has no effect: the prompt has no video." for name in idle)

    def media(self, processor: AVLlavaProcessor) -> MediaOptions:
        """The part of the options that the processor reads."""
        return processor.media_options(
            frames=self.frames,
            fps=self.fps,
            start_s=self.start_s,
            end_s=self.end_s,
            audio=self.audio,
            time_instruction=self.time_instruction,
            backend=self.backend,
            source_fps=self.source_fps,
            limits=self.limits,
        )


def _check_number(name: str, value: Any, whole: bool) -> None:
    """Raise unless an option is None or a finite number."""
    if value is None:
        return
    number = isinstance(value, (int, np.integer) if whole else (int, float, np.number))
    if isinstance(value, bool) or not number or not math.isfinite(value):
        kind = "a whole number" if whole else "a number"
        raise UsageError(f"{name} must be {kind}, not {value!r}.")


def as_media(media: Any) -> list[MediaPart]:
    """Media in any accepted form to parts whose kind is known from their content.

    Args:
        media: None, one source or a list: paths, URLs, bytes, PIL images, uint8 frames
            [T, H, W, 3] or pictures [H, W, 3], float samples [S] at 16 kHz, content parts such as
            ``{"type": "video", "path": ...}``, or :class:`MediaPart`.
    """
    if media is None:
        return []
    sources = list(media) if isinstance(media, (list, tuple)) else [media]
    sources = [read_medium(s) if isinstance(s, Mapping) else s for s in sources]
    parts = [s if isinstance(s, MediaPart) else None for s in sources]
    held = [s if p else kept(s) for p, s in zip(parts, sources, strict=True)]
    return [p or MediaPart(kind_of(s), s) for p, s in zip(parts, held, strict=True)]


def kind_of(source: Any) -> str:
    """image, video or audio, from the content of a source."""
    if isinstance(source, (np.ndarray, Tensor)):
        kinds = {1: "audio", 3: "image", 4: "video"}
        if source.ndim not in kinds or (source.ndim > 1 and source.shape[-1] != 3):
            raise UsageError(
                f"An array of shape {list(source.shape)} is no medium: give sound as [S], a "
                f"picture as [H, W, 3], or frames as [T, H, W, 3]."
            )
        return kinds[source.ndim]
    if isinstance(source, (str, Path, LocalFile)):
        kind = probe(source).kind
        return "video" if kind == "frames" else kind
    return "image"


def conversation(media: Any, prompt: str, system: str | None = None) -> list[Message]:
    """Messages of one question about some media."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError("The prompt is empty; ask a question.")
    messages = normalize_messages(prompt, as_media(media))
    return with_system(messages, system)


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Put a system prompt first."""
    if system is None:
        return messages
    if messages and messages[0].role == "system":
        raise UsageError("The conversation has a system prompt already; leave out the option.")
    return [Message("system", (TextPart(system),)), *messages]
