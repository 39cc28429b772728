"""A chat template as data, and the one rendering that prompts and labels share.

Contract: ``Template.render`` concatenates fixed strings around the turns and never changes a
turn's text. What is supervised is what the model would generate after the open prompt: from
the end of the header of an assistant turn to the end of its end token. A rendering equals
LLaVA's (conversation.py of LLaVA-NeXT) in all its separator styles, with these differences:
a system text that is empty leaves no trace, a system message replaces the default one, and
roles must alternate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from av_llava.chat.messages import Message
from av_llava.chat.parts import MediaPart, TextPart, placeholder_pattern
from av_llava.errors import UsageError


class Span(NamedTuple):
    """Characters ``[start, end)`` of a rendering."""

    start: int
    end: int


class MediaSpan(NamedTuple):
    """The characters of one placeholder, and the medium that it stands for."""

    start: int
    end: int
    part: MediaPart


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with what later steps need to know about its characters."""

    text: str
    spans: tuple[Span, ...]
    """Supervised characters: each answer with its end token, one span per assistant turn."""
    media: tuple[MediaSpan, ...]
    """All placeholders, in order."""
    add_bos: bool = True
    """Whether the tokenizer's own first token goes before the text (it is not in the text)."""


class ChatTemplate(Protocol):
    """What prompts are made with: a :class:`Template`, or the tokenizer's own."""

    @property
    def name(self) -> str:
        """Name under which a checkpoint stores it."""

    @property
    def stop(self) -> str:
        """Text that ends an answer."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """Render normalised messages."""


@dataclass(frozen=True)
class Template:
    """The fixed strings around system text, questions and answers."""

    name: str
    """Name in the registry, and in checkpoints."""
    system: str = ""
    """Default system text; a system message replaces it."""
    system_start: str = ""
    """Text before the system text; left out with it."""
    system_end: str = ""
    """Text after the system text; left out with it."""
    system_in_user: bool = False
    """Whether the system text stands inside the first user turn (Llama 2)."""
    user_start: str = ""
    """Text before a question."""
    user_end: str = ""
    """Text after a question."""
    between: str = ""
    """Text before every user turn but the first."""
    assistant_start: str = ""
    """Header of an answer: what an open prompt ends with."""
    answer_start: str = ""
    """What the model generates between the header and its first word."""
    answer_end: str = ""
    """What the model generates after its last word: the end token."""
    after_answer: str = ""
    """Text after the end token, which is not generated."""
    examples: tuple[tuple[str, str], ...] = ()
    """Questions and answers shown before the conversation; they are not supervised."""
    media_tag: tuple[str, str] | None = None
    """What :func:`av_llava.chat.messages.lead_with_media` puts around the first medium."""
    bare_media: bool = False
    """Whether a user turn of media alone has no ``user_end`` (captions)."""

    @property
    def stop(self) -> str:
        """Text that ends an answer, without white space around it unless that is all."""
        return self.answer_end.strip() or self.answer_end

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """Render a conversation.

        Args:
            messages: an optional system turn, then user and assistant turns in alternation.
            add_generation_prompt: whether to end with the header of the next answer.

        Raises:
            UsageError: roles out of order, or a placeholder in the text of a part.
        """
        system, turns = _split_system(messages, self.system)
        _check_order(turns, add_generation_prompt)
        writer = _Writer()
        examples = [
            Message(role, (TextPart(text),))
            for pair in self.examples
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        if not self.system_in_user:
            self._write_system(writer, system)
        for i, turn in enumerate([*examples, *turns]):
            if turn.role == "user":
                writer.write(self.between if i else "", self.user_start)
                if i == 0 and self.system_in_user:
                    self._write_system(writer, system)
                self._write_question(writer, turn)
            else:
                self._write_answer(writer, turn, supervised=i >= len(examples))
        if add_generation_prompt:
            writer.write(self.assistant_start)
        return writer.rendered()

    def _write_system(self, writer: _Writer, system: str) -> None:
        if system:
            writer.write(self.system_start, system, self.system_end)

    def _write_question(self, writer: _Writer, turn: Message) -> None:
        writer.write_parts(turn)
        media_alone = bool(turn.parts) and all(isinstance(p, MediaPart) for p in turn.parts)
        if not (self.bare_media and media_alone):
            writer.write(self.user_end)

    def _write_answer(self, writer: _Writer, turn: Message, supervised: bool) -> None:
        writer.write(self.assistant_start)
        start = writer.length
        writer.write(self.answer_start)
        writer.write_parts(turn)
        writer.write(self.answer_end)
        if supervised:
            writer.spans.append(Span(start, writer.length))
        writer.write(self.after_answer)


class _Writer:
    """Collects text and remembers where things stand in it."""

    def __init__(self) -> None:
        self.length = 0
        self.spans: list[Span] = []
        self._pieces: list[str] = []
        self._media: list[MediaSpan] = []

    def write(self, *texts: str) -> None:
        for text in texts:
            self._pieces.append(text)
            self.length += len(text)

    def write_parts(self, turn: Message) -> None:
        check_no_placeholder(turn)
        for part in turn.parts:
            start = self.length
            if isinstance(part, MediaPart):
                self.write(part.token)
                self._media.append(MediaSpan(start, self.length, part))
            else:
                self.write(part.text)

    def rendered(self) -> Rendered:
        return Rendered("".join(self._pieces), tuple(self.spans), tuple(self._media))


def check_no_placeholder(turn: Message) -> None:
    """Raise when text holds a placeholder, which would later count as a medium."""
    for part in turn.parts:
        found = placeholder_pattern().search(part.text) if isinstance(part, TextPart) else None
        if found:
            raise UsageError(
                f"The text of a {turn.role} turn holds {found[0]!r}; build messages with "
                "normalize_messages, which turns placeholders into media."
            )


def check_turns(messages: Sequence[Message]) -> None:
    """Raise for turns that no :class:`Template` renders; a tokenizer's own may take them.

    Raises:
        UsageError: roles out of order, or a medium in the system message.
    """
    _check_order(_split_system(messages, "")[1], add_generation_prompt=False)


def _split_system(messages: Sequence[Message], default: str) -> tuple[str, list[Message]]:
    """Return the system text and the other turns."""
    if not messages or messages[0].role != "system":
        return default, list(messages)
    if messages[0].media:
        raise UsageError("A system message holds a medium; put media into user turns.")
    check_no_placeholder(messages[0])
    return messages[0].text, list(messages[1:])


def _check_order(turns: Sequence[Message], add_generation_prompt: bool) -> None:
    """Raise unless user and assistant alternate, the user first."""
    if not turns:
        raise UsageError("The conversation has no user turn; give at least one.")
    for i, turn in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if turn.role != expected:
            raise UsageError(
                f"Turn {i} (not counting the system message) has the role {turn.role!r} instead of "
                f"{expected!r}: the user begins, and turns alternate."
            )
    if add_generation_prompt and turns[-1].role == "assistant":
        raise UsageError("The conversation ends with an answer, so nothing can be generated.")
