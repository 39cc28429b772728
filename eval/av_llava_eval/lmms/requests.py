"""What lmms-eval asks, in this package's terms: messages, generation options, groups of questions.

Contract: pure functions of what lmms-eval hands over (six values a request, messages with parts of
the types text, image, video and audio, and a mapping of generation options). Questions that stand
after the same media, with the same options, share a key and can be answered from one encoding.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from av_llava.chat import MediaPart, Message, TextPart
from av_llava.errors import UsageError

logger = logging.getLogger(__name__)

_UNUSED = {"num_beams", "image_aspect_ratio", "use_cache", "max_gen_toks"}
"""Options of tasks that mean nothing here, or only their default."""


@dataclass(frozen=True)
class Talk:
    """The messages of one request."""

    messages: tuple[Message, ...]

    @property
    def question(self) -> tuple[tuple[MediaPart, ...], str, str | None] | None:
        """Media, text and system prompt, where a session can answer; else None.

        That is one user turn whose media are files and stand before its text.
        """
        system = None
        turns = list(self.messages)
        if turns and turns[0].role == "system":
            system = turns.pop(0).text
        if len(turns) != 1 or turns[0].role != "user":
            return None
        parts = turns[0].parts
        media = tuple(p for p in parts if isinstance(p, MediaPart))
        text = parts[len(media) :]
        if not media or not all(isinstance(p, TextPart) for p in text):
            return None
        if not all(isinstance(m.source, (str, Path)) for m in media):
            return None
        asked = "".join(p.text for p in text if isinstance(p, TextPart))
        return (media, asked, system) if asked.strip() else None


def group_key(talk: Talk, options: Mapping[str, Any]) -> str | None:
    """Equal for questions that one encoding can answer; None for those that stand alone."""
    found = talk.question
    if found is None:
        return None
    media, _, system = found
    files = [[m.kind, str(m.source), m.start_s, m.end_s] for m in media]
    return json.dumps([files, system, options], sort_keys=True)


def read_talk(messages: Sequence[Mapping[str, Any]]) -> Talk:
    """Messages as lmms-eval's chat models get them.

    Raises:
        UsageError: a part of an unknown type.
    """
    return Talk(
        tuple(Message(m["role"], tuple(_part(p) for p in _parts(m["content"]))) for m in messages)
    )


def _parts(content: Any) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: Mapping[str, Any]) -> TextPart | MediaPart:
    kind = part["type"]
    if kind == "text":
        return TextPart(part["text"])
    if kind not in ("image", "video", "audio"):
        raise UsageError(f"lmms-eval gave a content part of type {kind!r}, which is not known.")
    source = part["url"]
    if kind == "audio":
        source = _sound(source)
    return MediaPart(kind, source, part.get("start_time"), part.get("end_time"))


def _sound(source: Any) -> Any:
    """A path as it is; decoded sound as float samples [S] at 16 kHz."""
    if hasattr(source, "get_all_samples"):  # torchcodec, of newer versions of datasets
        samples = source.get_all_samples()
        source = {"array": samples.data.numpy(), "sampling_rate": samples.sample_rate}
    if not isinstance(source, Mapping):
        return source
    if source.get("array") is None:
        return source.get("bytes") or source["path"]
    from av_llava.audio.resample import resample

    wave = np.asarray(source["array"], np.float32)
    if wave.ndim == 2:  # [channels, S], or [S, channels] as soundfile has it
        wave = wave.mean(axis=0 if wave.shape[0] <= wave.shape[1] else 1)
    return resample(wave, int(source["sampling_rate"]))


def read_options(given: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Generation options of a request as those of ``AVLlava.chat``.

    Args:
        given: of the task, such as ``{"max_new_tokens": 16, "temperature": 0, "until": [...]}``.
        max_new_tokens: where the task does not say.

    Raises:
        UsageError: beam search, which would change scores without a sign if it were ignored.
    """
    if (given.get("num_beams") or 1) > 1:
        raise UsageError(
            f"The task asks for {given['num_beams']} beams, which av_llava does not have. Override "
            f"it with --gen_kwargs num_beams=1."
        )
    known = {"max_new_tokens", "temperature", "top_p", "do_sample", "until", *_UNUSED}
    for name in sorted(set(given) - known):
        logger.warning("The generation option %s=%r has no effect here.", name, given[name])
    until = given.get("until") or []
    temperature = given.get("temperature") or 0.0
    if not given.get("do_sample", temperature > 0):
        temperature = 0.0
    options: dict[str, Any] = {
        "max_new_tokens": int(given.get("max_new_tokens") or max_new_tokens),
        "temperature": float(temperature),
        "stop": [s for s in ([until] if isinstance(until, str) else until) if s],
    }
    if temperature > 0 and given.get("top_p") is not None:
        options["top_p"] = float(given["top_p"])
    return options
