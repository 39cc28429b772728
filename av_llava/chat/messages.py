"""One form for every way of writing a conversation: roles, text and media, in order.

Contract: :func:`normalize_messages` accepts plain strings, Hugging Face content parts, OpenAI
content parts and LLaVA's ``from``/``value`` turns, and returns :class:`Message` objects whose
parts follow each other verbatim. Afterwards no text holds a placeholder: each one has become a
:class:`MediaPart`. Nothing is opened or downloaded here; a base64 source becomes ``bytes``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from av_llava.chat.parts import (
    SAMPLING_KEYS,
    MediaPart,
    Part,
    TextPart,
    placeholder_kind,
    placeholder_pattern,
    read_medium,
    read_part,
)
from av_llava.errors import UsageError, unknown_name

ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Role names of the accepted spellings → the three roles that templates know."""


@dataclass(frozen=True)
class Message:
    """One turn: a role (system, user, assistant) and parts that follow each other verbatim."""

    role: str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in set(ROLES.values()):
            raise unknown_name("role", self.role, set(ROLES.values()))

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """The media of this turn, in order."""
        return tuple(p for p in self.parts if isinstance(p, MediaPart))

    @property
    def text(self) -> str:
        """The turn as text, with a placeholder for each medium."""
        return "".join(p.text if isinstance(p, TextPart) else p.token for p in self.parts)


def normalize_messages(
    conversation: str | Sequence[Message | Mapping[str, Any]],
    media: Sequence[MediaPart | Mapping[str, Any]] | None = None,
) -> list[Message]:
    """Bring a conversation into one form.

    Args:
        conversation: one user question as a string, or a list of turns: ``{"role", "content"}``
            with a string or content parts (Hugging Face or OpenAI spelling), LLaVA's
            ``{"from", "value"}``, or :class:`Message`. Parts of one turn are separated by a
            newline unless one side of the seam has white space already.
        media: media given separately, in order. Placeholders in the text (``<image>``,
            ``<video>``, ``<audio>`` and the aliases) and parts without a source take them in
            order; ``<image>`` may stand for a video, as in LLaVA's data. Sight and sound are
            matched separately, and those without any placeholder go to the start of the
            first user turn, each followed by a newline. ``None`` says that the media are not
            known yet: placeholders stay without a source. An empty list says that there are
            none.

    Raises:
        UsageError: unknown roles, parts or keys, placeholders and media that do not match.
    """
    turns = [conversation] if isinstance(conversation, (str, Mapping)) else list(conversation)
    messages = [_split_placeholders(_message(turn, i)) for i, turn in enumerate(turns)]
    if not messages:
        raise UsageError("The conversation has no turns; give at least one user turn.")
    if media is not None:
        messages = _fill(messages, [read_medium(m) for m in media])
    return [replace(m, parts=_merge_text(m.parts)) for m in messages]


def media_of(messages: Iterable[Message]) -> list[MediaPart]:
    """Return all media of a conversation in prompt order."""
    return [part for message in messages for part in message.media]


def media_only(messages: Iterable[Message]) -> list[Message]:
    """Drop the text of user turns and keep their media: LLaVA's captions of stage 1."""
    return [replace(m, parts=m.media) if m.role == "user" else m for m in messages]


def wrap_media(messages: Iterable[Message], before: str, after: str) -> list[Message]:
    """Put text around every medium, e.g. LLaVA's ``<im_start>`` and ``<im_end>``."""
    wrapped = []
    for message in messages:
        parts: list[Part] = []
        for part in message.parts:
            around = isinstance(part, MediaPart)
            parts += [TextPart(before), part, TextPart(after)] if around else [part]
        wrapped.append(replace(message, parts=_merge_text(parts)))
    return wrapped


def lead_with_media(
    messages: Sequence[Message], tag: tuple[str, str] | None = None
) -> list[Message]:
    """Move the medium of a user turn to its front, as LLaVA's demos and data loader do.

    A turn with exactly one medium that does not start with it becomes the medium, a newline,
    and the stripped text. With ``tag`` (the templates whose names end in ``_mmtag``) a first
    turn with one medium becomes a turn of its own, tagged and answered by "Received.".
    """
    moved = []
    for message in messages:
        alone = message.role == "user" and len(message.media) == 1
        if alone and not isinstance(message.parts[0], MediaPart):
            parts = (message.media[0], TextPart("\n" + _rest(message)))
            message = replace(message, parts=parts)
        moved.append(message)
    if tag is None or len(moved[0].media) != 1:
        return moved
    first = moved[0]
    shown = Message("user", (TextPart(tag[0]), first.media[0], TextPart(tag[1])))
    received = Message("assistant", (TextPart("Received."),))
    asked = Message("user", (TextPart(_rest(first)),))
    return [shown, received, asked, *moved[1:]]


def _message(turn: str | Message | Mapping[str, Any], index: int) -> Message:
    """Read one turn in any spelling."""
    if isinstance(turn, Message):
        return turn
    if isinstance(turn, str):
        return Message("user", (TextPart(turn),))
    if not isinstance(turn, Mapping):
        raise UsageError(f"Turn {index} is a {type(turn).__name__}, not a mapping with a role.")
    turn = {k: v for k, v in turn.items() if v is not None}
    keys = ("from", "value") if "from" in turn else ("role", "content")
    for key in turn:
        if key not in keys:
            raise unknown_name(f"key of turn {index}", key, keys)
    for key in keys:
        if key not in turn:
            raise UsageError(f"Turn {index} has no {key!r}; every turn needs {keys[0]!r} and it.")
    role, content = turn[keys[0]], turn[keys[1]]
    if not isinstance(role, str) or role not in ROLES:
        raise unknown_name("role", role, ROLES)
    if isinstance(content, str):
        return Message(ROLES[role], (TextPart(content),))
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise UsageError(
            f"The content of turn {index} is a {type(content).__name__}; "
            "it must be a string or a list of parts."
        )
    return Message(ROLES[role], _with_seams([read_part(p) for p in content]))


def _with_seams(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Put a newline between neighbours unless one side has white space there."""
    kept = [p for p in parts if not (isinstance(p, TextPart) and not p.text)]
    joined: list[Part] = []
    for part in kept:
        if joined and not _spaced(joined[-1], -1) and not _spaced(part, 0):
            joined.append(TextPart("\n"))
        joined.append(part)
    return tuple(joined)


def _spaced(part: Part, index: int) -> bool:
    return isinstance(part, TextPart) and part.text[index].isspace()


def _merge_text(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Join neighbouring texts and drop empty ones."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, TextPart) and merged and isinstance(merged[-1], TextPart):
            merged[-1] = TextPart(merged[-1].text + part.text)
        elif isinstance(part, MediaPart) or part.text:
            merged.append(part)
    return tuple(merged)


def _rest(message: Message) -> str:
    """Return the text of a turn without its media, stripped."""
    return "".join(p.text for p in message.parts if isinstance(p, TextPart)).strip()


def _split_placeholders(message: Message) -> Message:
    """Turn placeholders in text into media parts without a source."""
    pattern = placeholder_pattern()
    parts: list[Part] = []
    for part in message.parts:
        if isinstance(part, MediaPart):
            parts.append(part)
            continue
        for i, piece in enumerate(pattern.split(part.text)):
            parts.append(MediaPart(placeholder_kind(piece)) if i % 2 else TextPart(piece))
    return replace(message, parts=tuple(p for p in parts if p != TextPart("")))


def _sense(kind: str) -> str:
    """Return which media are matched together: pictures of both kinds, or one kind."""
    return "visual" if kind in ("image", "video") else kind


def _fill(messages: list[Message], media: list[MediaPart]) -> list[Message]:
    """Give every placeholder its medium, and put the rest before the first question."""
    slots = [p for p in media_of(messages) if p.source is None]
    filled: list[MediaPart] = list(slots)
    for sense in {_sense(s.kind) for s in slots}:
        where = [i for i, s in enumerate(slots) if _sense(s.kind) == sense]
        given = [m for m in media if _sense(m.kind) == sense]
        for i, medium in zip(where, _matched([slots[i] for i in where], given), strict=True):
            filled[i] = replace(medium, **_given_options(slots[i]))
    source = iter(filled)
    messages = [
        replace(
            m,
            parts=tuple(
                next(source) if isinstance(p, MediaPart) and p.source is None else p
                for p in m.parts
            ),
        )
        for m in messages
    ]
    written = {_sense(s.kind) for s in slots}
    return _put_first(messages, [m for m in media if _sense(m.kind) not in written])


def _given_options(slot: MediaPart) -> dict[str, Any]:
    """Return the options that a content part without a source carries."""
    fields = {*SAMPLING_KEYS.values(), "audio"}
    return {f: v for f, v in vars(slot).items() if f in fields and v is not None}


def _matched(slots: list[MediaPart], given: list[MediaPart]) -> list[MediaPart]:
    """Return the medium of each placeholder; all are of one sense."""
    if not given:
        raise UsageError(
            f"The text holds {_counts(slots, tokens=True)} but no such medium was given. "
            "Give it, or spell the words differently (for example '< image >') when the text "
            "is only about them."
        )
    wanted, have = Counter(s.kind for s in slots), Counter(m.kind for m in given)
    if wanted == have:
        queues = {kind: iter([m for m in given if m.kind == kind]) for kind in have}
        return [next(queues[s.kind]) for s in slots]
    if set(wanted) == {"image"} and len(slots) == len(given):
        return given  # LLaVA writes <image> for a video, too
    raise UsageError(
        f"The text holds {_counts(slots, tokens=True)} but the media given are "
        f"{_counts(given, tokens=False)}. Write one placeholder for each medium, or none to put "
        "them before the first question."
    )


def _counts(parts: Iterable[MediaPart], tokens: bool) -> str:
    """Say how many parts of each kind there are."""
    counted = Counter(p.token if tokens else p.kind for p in parts)
    return ", ".join(f"{n} × {name}" for name, n in sorted(counted.items()))


def _put_first(messages: list[Message], media: list[MediaPart]) -> list[Message]:
    """Put media at the start of the first user turn, a newline after each."""
    if not media:
        return messages
    first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if first is None:
        raise UsageError("The conversation has no user turn that the media could stand in.")
    turn = messages[first]
    parts: list[Part] = []
    for medium in media:
        parts += [medium, TextPart("\n")]
    if not turn.parts:
        parts.pop()
    messages = list(messages)
    messages[first] = replace(turn, parts=(*parts, *turn.parts))
    return messages
