"""One encoding of media, many questions: the prefix cache is copied or repeated, never cropped.

Contract: an answer equals that of a full computation (in float32, to rounding). Everything up to
the last medium is encoded and prefilled once; a question adds only its own tokens. Cropping a
cache fails past a sliding window, so each question gets a copy.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from av_llava.answers import Answer, Usage
from av_llava.budgeting import check_room
from av_llava.chat import MEDIA_TOKENS, Message, TextPart, tokenize_with_media
from av_llava.errors import UsageError
from av_llava.generation import AnswerStream
from av_llava.options import Options, conversation
from av_llava.planning import check_token_ids

if TYPE_CHECKING:
    from av_llava.inference import AVLlava

# Stands for the question while the media are prepared; its tokens are never used.
_QUESTION = "\x00question\x00"


class Session:
    """Media that are encoded already.

    Args:
        owner: the loaded model.
        media: see :func:`av_llava.inference.as_media`; at least one.
        options: of the session; those of generation may change with each question.
    """

    def __init__(self, owner: AVLlava, media: Any, options: Options) -> None:
        self.owner, self.options = owner, options
        self.history: list[tuple[str, str]] = []
        started = time.perf_counter()
        talk = conversation(media, _QUESTION, options.system)
        if not any(m.media for m in talk):
            raise UsageError("A session needs at least one medium; use ask for text alone.")
        prepared, _ = owner.prepare([talk], options)
        self.media = prepared.used[0]
        self.messages = prepared.messages[0]
        loaded = time.perf_counter()
        plan = prepared.media.splice
        self.n_prefix = plan.lengths[0] - len(self._suffix(self.messages))
        usage = prepared.usage(0)
        self._usage = replace(usage, text_tokens=self._text_rows(usage))
        with torch.no_grad():
            embeds = owner.model.prepare_inputs(prepared.media, **owner.on_device(prepared))
            self._cache = DynamicCache(config=owner.model.config.text_config)
            owner.model(
                inputs_embeds=embeds[:, : self.n_prefix],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.timing_s = {"media": loaded - started, "prefill": time.perf_counter() - loaded}

    def _text_rows(self, usage: Usage) -> int:
        return self.n_prefix - usage.image_tokens - usage.video_tokens - usage.audio_tokens

    def _suffix(self, messages: Sequence[Message]) -> list[int]:
        """Ids after the last medium."""
        processor = self.owner.processor
        rendered = processor.template.render(messages, add_generation_prompt=True)
        ids = tokenize_with_media(rendered.text, processor.tokenizer, add_bos=rendered.add_bos)
        check_token_ids(ids, processor.config)
        last = max(i for i, token in enumerate(ids) if token < 0)
        return ids[last + 1 :]

    def __repr__(self) -> str:
        media = ", ".join(m.line() for m in self.media)
        return f"Session({media}; {self.n_prefix} tokens encoded)"

    def _asking(self, prompt: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Ids of a question after the prefix, with earlier turns between."""
        questions = [*(q for q, _ in history), prompt]
        if not all(isinstance(q, str) and q.strip() for q in questions):
            raise UsageError("The prompt is empty; ask a question.")
        if any(token in question for question in questions for token in MEDIA_TOKENS.values()):
            raise UsageError(
                "A question of a session holds no placeholders: its media are encoded already and "
                "stand before it."
            )
        messages = [_with_question(m, questions[0]) for m in self.messages]
        for (_, answer), question in zip(history, questions[1:], strict=True):
            messages.append(Message("assistant", (TextPart(answer),)))
            messages.append(Message("user", (TextPart(question),)))
        return self._suffix(messages)

    def ask(self, prompt: str, **changes: Any) -> Answer:
        """Answer one question about the media; earlier questions are not seen."""
        return self._answer([self._asking(prompt)], self._changed(changes))[0]

    def chat(self, prompt: str, **changes: Any) -> Answer:
        """Answer the next turn of a conversation about the media."""
        answer = self._answer([self._asking(prompt, self.history)], self._changed(changes))[0]
        self.history.append((prompt, answer.text))
        return answer

    def ask_many(self, prompts: Sequence[str], **changes: Any) -> list[Answer]:
        """Answer several questions, as one batch where the model allows it."""
        options = self._changed(changes)
        suffixes = [self._asking(p) for p in prompts]
        if not suffixes:
            return []
        if self._slides(max(map(len, suffixes)) + options.max_new_tokens):
            # Padding between prefix and question would push content out of the window.
            return [self._answer([s], options)[0] for s in suffixes]
        return self._answer(suffixes, options)

    def stream(self, prompt: str, *, chat: bool = False, **changes: Any) -> AnswerStream:
        """As :meth:`ask` (or :meth:`chat`), piece by piece."""
        options = self._changed(changes)
        suffix = self._asking(prompt, self.history if chat else ())
        room = check_room(self.owner.processor, self.n_prefix + len(suffix), options.max_new_tokens)
        started = time.perf_counter()

        def run(streamer: Any, **hooks: Any) -> Tensor:
            skipping = _SkipPrompt(streamer)
            return self._generate([suffix], room, options, streamer=skipping, **hooks)[0]

        def finish(ids: Tensor, interrupted: bool) -> Answer:
            timing = {"generate": time.perf_counter() - started}
            answer = self._finished(ids, suffix, room, timing, options, interrupted)
            if chat:
                self.history.append((prompt, answer.text))
            return answer

        stops = self.owner.stops(options)
        return AnswerStream(self.owner.processor.tokenizer, run, finish, stops)

    def _changed(self, changes: dict[str, Any]) -> Options:
        """The session's options with those of generation changed."""
        allowed = ("max_new_tokens", "temperature", "top_p", "seed", "stop")
        for key in changes:
            if key not in allowed:
                raise UsageError(
                    f"{key!r} is fixed when a session starts; a question can change "
                    f"{', '.join(allowed)}."
                )
        return replace(self.options, **changes)

    def _slides(self, n_more: int) -> bool:
        """Whether some layer's window is shorter than prefix and question."""
        text = self.owner.model.config.text_config
        window: Any = getattr(text, "sliding_window", None)
        kinds = getattr(text, "layer_types", None)
        sliding = window is not None and (kinds is None or "sliding_attention" in kinds)
        return bool(sliding and window < self.n_prefix + n_more)

    @torch.no_grad()
    def _answer(self, suffixes: list[list[int]], options: Options) -> list[Answer]:
        started = time.perf_counter()
        longest = self.n_prefix + max(map(len, suffixes))
        room = check_room(self.owner.processor, longest, options.max_new_tokens)
        ids = self._generate(suffixes, room, options)
        timing = {"generate": time.perf_counter() - started}
        return [
            self._finished(row, suffix, room, timing, options)
            for row, suffix in zip(ids, suffixes, strict=True)
        ]

    def _generate(
        self, suffixes: list[list[int]], room: int, options: Options, **hooks: Any
    ) -> Tensor:
        """New ids of each question. [K, n]"""
        device = self.owner.device
        width, k = max(map(len, suffixes)), len(suffixes)
        pad = self.owner.processor.tokenizer.pad_token_id or 0
        ids = torch.full((k, width), pad)
        mask = torch.ones((k, self.n_prefix + width), dtype=torch.int64)
        for i, suffix in enumerate(suffixes):
            ids[i, width - len(suffix) :] = torch.tensor(suffix)
            mask[i, self.n_prefix : self.n_prefix + width - len(suffix)] = 0
        cache = copy.deepcopy(self._cache)
        if k > 1:
            cache.batch_repeat_interleave(k)
        out = self.owner.generate(
            options,
            room,
            inputs=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            **hooks,
        )
        return out[:, width:]

    def _finished(
        self,
        ids: Tensor,
        suffix: Sequence[int],
        room: int,
        timing: dict[str, float],
        options: Options,
        interrupted: bool = False,
    ) -> Answer:
        usage = replace(self._usage, text_tokens=self._usage.text_tokens + len(suffix))
        return self.owner.answer(ids, room, usage, self.media, timing, options, interrupted)


class _SkipPrompt:
    """Drops the first ids of a streamed generation, which repeat the question."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.first = True

    def put(self, value: Tensor) -> None:
        """Pass on all but the first call."""
        if self.first:
            self.first = False
        else:
            self.inner.put(value)

    def end(self) -> None:
        """End the inner streamer."""
        self.inner.end()


def _with_question(message: Message, question: str) -> Message:
    """Put the question where its stand-in is."""
    parts = tuple(
        TextPart(p.text.replace(_QUESTION, question)) if isinstance(p, TextPart) else p
        for p in message.parts
    )
    return replace(message, parts=parts)
