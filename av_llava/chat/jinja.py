"""The tokenizer's own (Jinja) chat template as one of our templates.

Contract: the text is what ``tokenizer.apply_chat_template`` returns for turns whose content is
a string with placeholders, so it holds its own first token and the tokenizer adds none. Answers
are found by rendering prefixes of the conversation: with the header of the answer, and with the
answer. Both must be prefixes of the whole; a template for which that is not so (one that drops
earlier reasoning, for example) is refused for labels. An open prompt has no supervised spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from av_llava.chat.messages import Message, media_of
from av_llava.chat.parts import MEDIA_TOKENS, placeholder_kind, placeholder_pattern
from av_llava.chat.templates import MediaSpan, Rendered, Span, check_no_placeholder
from av_llava.errors import UsageError

JINJA = "jinja"


class TokenizerWithTemplate(Protocol):
    """The part of a tokenizer of transformers that is used here."""

    @property
    def eos_token(self) -> str | None:
        """Text of the end token."""

    @property
    def chat_template(self) -> Any:
        """The Jinja source, or None."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render turns with string content."""


@dataclass(frozen=True)
class JinjaTemplate:
    """Renders through a tokenizer's own template."""

    tokenizer: TokenizerWithTemplate

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise UsageError(
                "The tokenizer has no chat template of its own; name one of av_llava's instead."
            )

    @property
    def name(self) -> str:
        """Name under which a checkpoint stores this choice."""
        return JINJA

    @property
    def stop(self) -> str:
        """The tokenizer's end token."""
        return self.tokenizer.eos_token or ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """Render a conversation; see :meth:`av_llava.chat.templates.Template.render`.

        Raises:
            UsageError: what the template refuses, media that it loses or moves, or answers
                whose characters cannot be found.
        """
        for message in messages:
            check_no_placeholder(message)
        if not messages:
            raise UsageError("The conversation has no user turn; give at least one.")
        if add_generation_prompt and messages[-1].role == "assistant":
            raise UsageError("The conversation ends with an answer, so nothing can be generated.")
        text = self._apply(messages, add_generation_prompt)
        spans = tuple(
            self._answer_span(messages, i, text)
            for i, message in enumerate(messages)
            if message.role == "assistant" and not add_generation_prompt
        )
        return Rendered(text, spans, _find_media(text, messages), add_bos=False)

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        turns = [{"role": m.role, "content": m.text} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise UsageError(
                f"The tokenizer's chat template refuses the conversation: {error}."
            ) from error
        assert isinstance(text, str)
        return text

    def _answer_span(self, messages: Sequence[Message], index: int, text: str) -> Span:
        """Return the characters of one answer and its end token."""
        opened = self._apply(messages[:index], add_generation_prompt=True)
        closed = self._apply(messages[: index + 1], add_generation_prompt=False)
        if not (text.startswith(closed) and closed.startswith(opened)):
            raise UsageError(
                f"The tokenizer's chat template renders turn {index} differently once other turns "
                "follow, so the characters of the answer cannot be found. Choose one of av_llava's "
                "templates by name."
            )
        generated = closed[len(opened) :]
        answer = messages[index].text.strip()
        where = generated.find(answer)
        lead, tail = generated[: max(where, 0)], generated[where + len(answer) :]
        if where < 0 or lead.strip():
            raise UsageError(
                f"The tokenizer's chat template does not write the answer of turn {index} right "
                "after its header. Choose one of av_llava's templates by name."
            )
        # What follows the end token (a newline, usually) is written by the next turn.
        kept = generated.rstrip() if tail.strip() else generated
        return Span(len(opened), len(opened) + len(kept))


def _find_media(text: str, messages: Sequence[Message]) -> tuple[MediaSpan, ...]:
    """Find the placeholders in a rendering, and pair them with the media in order."""
    found = list(placeholder_pattern().finditer(text))
    media = media_of(messages)
    if [placeholder_kind(m[0]) for m in found] != [part.kind for part in media]:
        raise UsageError(
            f"The tokenizer's chat template wrote {len(found)} placeholders for {len(media)} media "
            f"({', '.join(MEDIA_TOKENS[p.kind] for p in media) or 'none'}), or in another order."
        )
    return tuple(MediaSpan(m.start(), m.end(), part) for m, part in zip(found, media, strict=True))
