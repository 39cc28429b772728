"""The one form of a training sample: a conversation with typed parts, and what is learned of it.

Contract: every format that a reader knows becomes a :class:`Sample`, without loss: what has no
place in the conversation is kept in ``meta``. ``to_row`` and ``from_row`` are exact inverses; a row
is JSON, one object a sample, and carries :data:`SCHEMA`. Texts are verbatim and hold no
placeholders: a medium stands as a part at its place. Nothing is opened here.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from av_llava.chat import MediaPart, Message, Part, TextPart
from av_llava.chat.parts import AUDIO_MODES, is_number, placeholder_pattern, read_part
from av_llava.errors import DataError, UsageError, unknown_name

SCHEMA = "av-llava-sample/1"
"""What the rows of the normal form carry under ``schema``."""

ROW_KEYS = ("schema", "id", "messages", "source", "weight", "meta")
TURN_KEYS = ("role", "content", "train")


@dataclass(frozen=True)
class Sample:
    """One conversation to learn from.

    Raises:
        DataError: a value that cannot be, or a text that holds a placeholder.
    """

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    """Where it was read: ``file:line``, or ``file[row]`` of a JSON array."""
    train_turns: tuple[bool, ...] | None = None
    """One flag for each assistant turn, in order: whether it is learned; None learns all."""
    weight: float = 1.0
    """Factor of its loss."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What else the row held; JSON."""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise DataError(
                f"The id of a sample must be a text that is not empty, not {self.id!r}."
            )
        if not self.messages:
            raise DataError("The sample has no turns; it needs a question and an answer.")
        if not is_number(self.weight) or self.weight < 0:
            raise DataError(
                f"The weight of a sample must be a number from 0, not {self.weight!r:.60}."
            )
        answers = sum(m.role == "assistant" for m in self.messages)
        if self.train_turns is not None and len(self.train_turns) != answers:
            raise DataError(
                f"The sample says of {len(self.train_turns)} answers whether they are learned, "
                f"but has {answers}."
            )
        for message in self.messages:
            _check_parts(message.parts)

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """All media in prompt order."""
        return tuple(part for message in self.messages for part in message.media)

    @property
    def modalities(self) -> frozenset[str]:
        """Kinds of media, without text; audio also where a video says that its sound is used."""
        kinds = {part.kind for part in self.media}
        heard = any(part.audio not in (None, "off", "auto") for part in self.media)
        return frozenset(kinds | {"audio"} if heard else kinds)

    def check_learned(self) -> None:
        """Refuse a conversation of which nothing would be learned.

        An answer without text would teach the end token alone: to say nothing.

        Raises:
            DataError: no answer that is learned has text.
        """
        answers = [m for m in self.messages if m.role == "assistant"]
        flags = self.train_turns or (True,) * len(answers)
        for flag, answer in zip(flags, answers, strict=True):
            if flag and any(isinstance(p, TextPart) and p.text.strip() for p in answer.parts):
                return
        raise DataError(
            "nothing of the conversation would be learned: it has no answer of the assistant that "
            "is learned and has text. Give it one, or leave it out."
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file and address that the sample names, sound files of videos included."""
        named = [p for part in self.media for p in (part.source, sound_file(part))]
        return tuple(p for p in named if isinstance(p, str))

    def to_row(self) -> dict[str, Any]:
        """The sample as JSON data.

        Raises:
            DataError: a medium that is given as an array, which JSON cannot hold.
        """
        flags = iter(self.train_turns or ())
        turns = []
        for message in self.messages:
            turn: dict[str, Any] = {"role": message.role, "content": _content(message)}
            if message.role == "assistant" and self.train_turns is not None:
                turn["train"] = next(flags)
            turns.append(turn)
        row: dict[str, Any] = {"schema": SCHEMA, "id": self.id, "messages": turns}
        if self.source:
            row["source"] = self.source
        if self.weight != 1.0:
            row["weight"] = self.weight
        if self.meta:
            row["meta"] = dict(self.meta)
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, id: str = "", source: str = "") -> Sample:
        """Read a row of the normal form.

        Args:
            row: JSON data.
            id: of a row that has none.
            source: of a row that has none.

        Raises:
            DataError: it is not of this form.
        """
        _only_keys("a sample", row, ROW_KEYS)
        turns = row.get("messages")
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise DataError(f"'messages' must be a list of turns, not {turns!r}.")
        meta = row.get("meta", {})
        if not isinstance(meta, Mapping):
            raise DataError(f"'meta' must be an object, not {meta!r}.")
        messages = tuple(_message(turn, i) for i, turn in enumerate(turns))
        check_sources(messages)
        return cls(
            id=row.get("id", id),
            messages=messages,
            source=row.get("source", source),
            train_turns=_train_turns(turns),
            weight=row.get("weight", 1.0),
            meta=dict(meta),
        )


def sound_file(part: MediaPart) -> str | None:
    """The sound file that a video names in place of its own sound."""
    return None if part.audio in (None, *AUDIO_MODES) else part.audio


def part_options(part: MediaPart) -> dict[str, Any]:
    """What a medium says beside its source, under the keys of a content part."""
    options = {
        "start": part.start_s,
        "end": part.end_s,
        "fps": part.fps,
        "frames": part.frames,
        "audio": part.audio,
        "source_fps": part.source_fps,
    }
    return {k: v for k, v in options.items() if v is not None}


def check_sources(messages: Sequence[Message]) -> None:
    """Raise DataError for a medium of a row that is neither a path nor bytes."""
    for part in (part for message in messages for part in message.media):
        if not isinstance(part.source, (str, bytes)) or not part.source:
            raise DataError(f"The path of a {part.kind} must be a text, not {part.source!r}.")


def _check_parts(parts: Sequence[Part]) -> None:
    for part in parts:
        if isinstance(part, MediaPart):
            if part.source is None:
                raise DataError(f"A {part.kind} of the sample has no source.")
        elif "<" in part.text and (found := placeholder_pattern().search(part.text)):
            raise DataError(
                f"The text {part.text[:40]!r} holds the placeholder {found[0]}. Put the medium "
                "there as a part of its own, or spell the word differently ('< image >')."
            )


def _content(message: Message) -> str | list[dict[str, Any]]:
    """A turn's parts as JSON; a string where there is nothing but one text."""
    if len(message.parts) == 1 and isinstance(message.parts[0], TextPart):
        return message.parts[0].text
    return [_part_row(part) for part in message.parts]


def _part_row(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    row: dict[str, Any] = {"type": part.kind}
    if isinstance(part.source, (bytes, bytearray)):
        row["base64"] = base64.b64encode(part.source).decode()
    elif isinstance(part.source, str):
        row["path"] = part.source
    else:
        raise DataError(
            f"A {part.kind} given as {type(part.source).__name__} cannot be written as JSON; "
            "store it in a file and name its path."
        )
    return {**row, **part_options(part)}


def _message(turn: Any, index: int) -> Message:
    """Read a turn as it is: no seams are added, no text is searched for media."""
    if not isinstance(turn, Mapping):
        raise DataError(f"Turn {index} is a {type(turn).__name__}, not an object with a role.")
    _only_keys(f"turn {index}", turn, TURN_KEYS)
    role, content = turn.get("role"), turn.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    if not isinstance(role, str) or not isinstance(content, list):
        raise DataError(f"Turn {index} needs a 'role' and a 'content': a text or a list of parts.")
    try:
        return Message(role, tuple(_part(part) for part in content))
    except UsageError as error:
        raise DataError(f"Turn {index}: {error}") from error


def _part(part: Any) -> Part:
    """Read a part; one of ours keeps a data URL and an empty text as they are."""
    if not isinstance(part, Mapping):
        raise UsageError(f"A part is a {type(part).__name__}, not an object with a type.")
    return read_part(part)


def _train_turns(turns: Sequence[Any]) -> tuple[bool, ...] | None:
    """The flags of the assistant turns; None if no turn has one."""
    if not any("train" in turn for turn in turns):
        return None
    flags = []
    for i, turn in enumerate(turns):
        flag = turn.get("train", True)
        if not isinstance(flag, bool):
            raise DataError(f"'train' of turn {i} must be true or false, not {flag!r}.")
        if turn["role"] == "assistant":
            flags.append(flag)
        elif "train" in turn and flag:
            raise DataError(f"Turn {i} is not the assistant's: it cannot be learned.")
    return tuple(flags)


def _only_keys(what: str, data: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in data:
        if key not in known:
            raise DataError(str(unknown_name(f"key of {what}", key, known)))
