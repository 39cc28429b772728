"""What readers share: turns, media and what else a row holds become one sample.

Contract: a :class:`Draft` is what a reader has found in a row; ``finish`` binds its media to the
placeholders in order (those without any go before the first question), and refuses counts that do
not match. Nothing of a row is lost: what the conversation has no place for is in ``meta``, and
what a person should know about is a :class:`Note`.
"""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from av_llava.chat import MEDIA_TOKENS, MediaPart, Message, normalize_messages, read_medium
from av_llava.chat.messages import ROLES
from av_llava.chat.parts import placeholder_kind, placeholder_pattern, read_audio_mode
from av_llava.errors import DataError, UsageError
from av_llava.training.media_roots import MediaRoots
from av_llava.training.samples import Sample, check_sources

Row = dict[str, Any]

MEDIA_KEYS: dict[str, tuple[str, ...]] = {
    "image": ("image", "images"),
    "video": ("video", "videos"),
    "audio": ("audio", "audios"),
}
"""Kind of medium → keys of a row under which its files stand."""

SOUND_KEYS: tuple[str, ...] = ("use_audio", "use_audio_in_video", "audio_from_video")
"""Keys that say whether the videos of a row are used with their own sound."""

TURN_ROLES: dict[str, str] = {
    **ROLES,
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "user",
    "tool": "user",
    "tool_response": "user",
}
"""Role names of public data → the roles that templates know; open to extension."""

PREFERENCE_ROLES: tuple[str, ...] = ("reject_gpt", "gt", "rejected", "reject")
"""Turns that only preference training (DPO) learns from."""

ABOUT_KEYS: tuple[str, ...] = (
    "data_source", "source", "dataset", "dataset_name", "task", "type", "kind", "needs", "split",
    "category", "duration", "fps", "resolution", "width", "height", "model", "timestamp", "tags",
    "answers", "answer", "choices", "question", "question_id", "video_id", "metadata", "meta",
    "info", "turns", "preference_turns",
)  # fmt: skip
"""Keys that are known to say something about a row; they are kept in ``meta`` without a note."""

NOISE = "QA_GT_caption_based_noisy"
"""What VideoInstruct's authors left in some of its texts."""

ID_KEYS: tuple[str, ...] = ("id", "sample_id", "uid")


class PlaceholderError(DataError):
    """A row whose media do not match the placeholders of its texts."""


class Note(NamedTuple):
    """Something that a person should know about a row, and that does not make it unusable."""

    kind: str
    """``unknown key``, ``preference turns``, ``cleaned text``."""
    text: str


@dataclass(frozen=True)
class RowContext:
    """Where a row stands and how its file is read."""

    where: str = ""
    default_id: str = "0"
    roots: MediaRoots = field(default_factory=MediaRoots)
    tags: Mapping[str, str] = field(default_factory=dict)
    """LLaMA-Factory's names of roles and of the keys of a turn."""


@dataclass(frozen=True)
class Reading:
    """A sample, and notes about its row."""

    sample: Sample
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Reader:
    """One format of rows."""

    name: str
    about: str
    """One line of documentation."""
    claims: Callable[[Mapping[str, Any]], bool]
    """Whether a row looks like this format; keys only."""
    read: Callable[[Row, RowContext], Reading]
    columns: Mapping[str, str] = field(default_factory=dict)
    """Other names by which ``columns`` may call this format's keys."""


@dataclass
class Draft:
    """What a reader has found in a row; rows are consumed key by key."""

    row: Row
    context: RowContext
    turns: list[dict[str, Any]] = field(default_factory=list)
    media: list[MediaPart] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    answer_flags: list[bool | None] = field(default_factory=list)

    def take(self, *names: str) -> Any:
        """Take the value of the first of some keys that the row has; None if it has none."""
        for name in names:
            if name in self.row:
                return self.row.pop(name)
        return None

    def take_list(self, name: str) -> list[Any]:
        """Take a list that must be there.

        Raises:
            DataError: it is something else, or empty.
        """
        value = self.take(name)
        if not isinstance(value, list) or not value:
            raise DataError(f"{name!r} must be a list with at least one turn, not {_shown(value)}.")
        return value

    def take_text(self, *names: str) -> str:
        """Take a text; an absent one is empty.

        Raises:
            DataError: it is no text.
        """
        value = self.take(*names)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{names[0]!r} must be a text, not {_shown(value)}.")
        return value or ""

    def say(self, role: str, content: Any) -> None:
        """Add a turn."""
        turn = {"role": role, "content": content}
        self.turns.append(turn)
        if role == "assistant":
            self.answer_flags.append(None)

    def take_turns(
        self, turns: Iterable[Any], keys: tuple[str, str], roles: Mapping[str, str] = TURN_ROLES
    ) -> None:
        """Add turns whose role and content stand under two keys.

        Raises:
            DataError: a turn that is none, or a role that nobody knows.
        """
        for index, turn in enumerate(turns):
            if not isinstance(turn, Mapping) or turn.get(keys[0]) is None:
                raise DataError(
                    f"Turn {index} is {_shown(turn)}; a turn has {keys[0]!r} and {keys[1]!r}."
                )
            self._take_turn(index, dict(turn), keys, roles)

    def _take_turn(
        self, index: int, turn: dict[str, Any], keys: tuple[str, str], roles: Mapping[str, str]
    ) -> None:
        role, content = turn.pop(keys[0]), turn.pop(keys[1], None)
        if isinstance(role, str) and role in PREFERENCE_ROLES:
            self.meta.setdefault("preference_turns", []).append(
                {"at": index, keys[0]: role, keys[1]: content, **turn}
            )
            self.notes.append(Note("preference turns", f"turns from {role!r} are not learned"))
            return
        if not isinstance(role, str) or role not in roles:
            known = ", ".join(sorted(roles))
            raise DataError(f"Turn {index} has the unknown role {role!r}. Known: {known}.")
        if not isinstance(content, (str, list)):
            raise DataError(f"Turn {index} has no text under {keys[1]!r}: {_shown(content)}.")
        self.say(roles[role], content)
        if roles[role] == "assistant":
            self.answer_flags[-1] = _flag(index, turn)
        rest = turn if role in ROLES else {keys[0]: role, **turn}
        if rest:
            self.meta.setdefault("turns", {})[str(len(self.turns) - 1)] = rest
        for key in turn:
            self.notes.append(Note("unknown key", f"{key!r} of a turn is not used"))

    def take_media(self) -> None:
        """Take the media of the row and what it says about the sound of its videos."""
        found = {kind: self._take_kind(kind, keys) for kind, keys in MEDIA_KEYS.items()}
        used = [key for key in SOUND_KEYS if self.row.get(key) is not None]
        if len(used) > 1:
            raise DataError(f"The row has {' and '.join(used)}; give one of them.")
        if used and found["video"]:  # otherwise it says nothing, and is kept in meta
            mode = read_audio_mode(self.row.pop(used[0]))
            found["video"] = [replace(video, audio=mode) for video in found["video"]]
        if found["video"] and found["audio"] and "audio" not in self._placeholders():
            found["video"] = _with_sound(found["video"], found["audio"])
            found["audio"] = []
        self.media += [part for kind in found for part in found[kind]]

    def _take_kind(self, kind: str, keys: Sequence[str]) -> list[MediaPart]:
        present = [key for key in keys if self.row.get(key) not in (None, "", [])]
        if len(present) > 1:
            raise DataError(f"The row has {' and '.join(present)}; give one of them.")
        value = self.row[present[0]] if present else []
        for key in keys:
            self.row.pop(key, None)
        values = value if isinstance(value, list) else [value]
        return [_medium(kind, v) for v in values]

    def _placeholders(self) -> set[str]:
        """Kinds of media that the turns have a place for."""
        kinds = set()
        for turn in self.turns:
            content = turn["content"]
            for part in [content] if isinstance(content, str) else content:
                text = part.get("text") if isinstance(part, Mapping) else part
                if isinstance(text, str):
                    kinds |= {placeholder_kind(p) for p in placeholder_pattern().findall(text)}
                elif isinstance(part, Mapping):  # what is neither is refused by `finish`
                    kinds.add(str(part.get("type")))
        return kinds

    def finish(self) -> Reading:
        """Bind the media, keep what is left of the row, and make the sample.

        Raises:
            DataError, UsageError: placeholders and media that do not match, unknown parts.
        """
        self._clean()
        given = self.take(*ID_KEYS)
        if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int))):
            raise DataError(f"The id must be a text or a whole number, not {_shown(given)}.")
        identity = str(given) if given not in (None, "") else self.context.default_id
        weight = self.take("weight")
        for key, value in self.row.items():
            self.meta[key] = value
            if key not in ABOUT_KEYS:
                self.notes.append(Note("unknown key", f"{key!r} is not used{_perhaps(key)}"))
        messages = self._messages()
        check_sources(messages)
        roots = self.context.roots
        flags = [flag is not False for flag in self.answer_flags]
        sample = Sample(
            id=identity,
            messages=tuple(
                replace(
                    m,
                    parts=tuple(roots.part(p) if isinstance(p, MediaPart) else p for p in m.parts),
                )
                for m in messages
            ),
            source=self.context.where,
            train_turns=tuple(flags) if any(f is not None for f in self.answer_flags) else None,
            weight=1.0 if weight is None else weight,
            meta=self.meta,
        )
        return Reading(sample, tuple(self.notes))

    def _messages(self) -> list[Message]:
        try:
            return normalize_messages(self.turns, self.media)
        except UsageError as error:
            normalize_messages(self.turns)  # raises if the turns themselves are wrong
            raise PlaceholderError(str(error)) from error

    def _clean(self) -> None:
        for turn in self.turns:
            if isinstance(turn["content"], str) and NOISE in turn["content"]:
                turn["content"] = turn["content"].replace(NOISE, "")
                self.notes.append(Note("cleaned text", f"{NOISE!r} was taken out of a text"))


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a row; json would take the last of two values and say nothing.

    Raises:
        DataError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        counted = Counter(key for key, _ in pairs)
        twice = counted.most_common(1)[0][0]
        raise DataError(f"the key {_shown(twice)} stands twice in one object; leave one out.")
    return found


@functools.lru_cache(maxsize=256)
def _perhaps(key: str) -> str:
    """What a key that nobody uses may have been meant as."""
    known = [*ID_KEYS, *SOUND_KEYS, *(k for keys in MEDIA_KEYS.values() for k in keys), "system"]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f"; was {close[0]!r} meant?" if close else ""


def _flag(index: int, turn: dict[str, Any]) -> bool | None:
    """Whether an answer is learned, in the spellings of ms-swift and OpenAI; None if not said."""
    said = None
    for key in ("train", "loss", "weight"):
        if turn.get(key) is not None:
            said = turn.pop(key)
            if said not in (0, 1, True, False):
                raise DataError(f"{key!r} of turn {index} must be true or false, not {said!r}.")
    return None if said is None else bool(said)


def _medium(kind: str, value: Any) -> MediaPart:
    """One medium of a row: a path, or an object with a path and times."""
    if isinstance(value, Mapping):
        fields = {k: v for k, v in value.items() if k != "bytes" or v is not None}
        return read_medium({"type": kind, **fields})
    if not isinstance(value, str) or not value:
        hint = " Put the pictures of a video into a folder." if isinstance(value, list) else ""
        raise DataError(
            f"The {kind} must be a path, a list of paths, or an object with a path, not "
            f"{_shown(value)}.{hint}"
        )
    return read_medium({"type": kind, "path": value})


def _with_sound(videos: list[MediaPart], sounds: list[MediaPart]) -> list[MediaPart]:
    """Give each video the sound file that stands beside it."""
    if len(videos) != len(sounds):
        raise PlaceholderError(
            f"The row has {len(videos)} videos and {len(sounds)} sounds, and no "
            f"{MEDIA_TOKENS['audio']} says where the sounds belong. Give one sound for each video."
        )
    said = [v.audio for v in videos if v.audio is not None]
    if said:
        raise DataError(
            f"The row has sound files for its videos and says use_audio ({said[0]}); give one."
        )
    return [replace(v, audio=s.source) for v, s in zip(videos, sounds, strict=True)]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
