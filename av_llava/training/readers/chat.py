"""Rows with ``messages`` of role and content: our own form, Hugging Face, OpenAI, TRL, ms-swift.

Content is a text, or a list of typed parts; media stand in the parts, or in lists beside the
messages for the placeholders of the texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from av_llava.chat import MediaPart
from av_llava.errors import DataError
from av_llava.training.readers.common import (
    MEDIA_KEYS,
    SOUND_KEYS,
    Draft,
    Note,
    Reader,
    Reading,
    Row,
    RowContext,
)
from av_llava.training.samples import SCHEMA, Sample

_KEYS = ("role", "content")
_SWIFT_KEYS = ("rejected_response", "rejected_messages", "label", "objects", "channel")
_UNREADABLE = ("<bbox>", "<ref-object>")


def _is_ours(row: Mapping[str, Any]) -> bool:
    return row.get("schema") == SCHEMA


def _read_ours(row: Row, context: RowContext) -> Reading:
    row.setdefault("schema", SCHEMA)
    if row["schema"] != SCHEMA:
        raise DataError(f"The row is of the form {row['schema']!r}; {SCHEMA!r} is known here.")
    sample = Sample.from_row(row, id=context.default_id, source=context.where)
    messages = tuple(
        type(m)(
            m.role,
            tuple(context.roots.part(p) if isinstance(p, MediaPart) else p for p in m.parts),
        )
        for m in sample.messages
    )
    return Reading(
        Sample(sample.id, messages, sample.source, sample.train_turns, sample.weight, sample.meta)
    )


def _has_parts(row: Mapping[str, Any]) -> bool:
    turns = row.get("messages")
    return isinstance(turns, list) and any(
        isinstance(t, Mapping) and isinstance(t.get("content"), list) for t in turns
    )


def _is_swift(row: Mapping[str, Any]) -> bool:
    lists = (key for keys in MEDIA_KEYS.values() for key in keys)
    return any(key in row for key in (*lists, *SOUND_KEYS, *_SWIFT_KEYS))


def _claims_chat(row: Mapping[str, Any]) -> bool:
    return "messages" in row and not _is_ours(row) and (_has_parts(row) or not _is_swift(row))


def _claims_swift(row: Mapping[str, Any]) -> bool:
    return "messages" in row and not _is_ours(row) and not _has_parts(row) and _is_swift(row)


def _read_messages(row: Row, context: RowContext) -> Reading:
    draft = Draft(row, context)
    system = draft.take_text("system")
    if system:
        draft.say("system", system)
    draft.take_turns(draft.take_list("messages"), _KEYS)
    return _with_extras(draft)


def _with_extras(draft: Draft) -> Reading:
    """Take the media and what ms-swift and TRL put beside a conversation."""
    draft.take_media()
    for key in ("rejected_response", "rejected_messages", "rejected_images"):
        if draft.row.get(key) is not None:
            draft.meta[key] = draft.row.pop(key)
            draft.notes.append(Note("preference turns", f"{key!r} is not learned"))
    label = draft.take("label")
    if label is not None:
        draft.meta["label"] = label
        if label is False:
            raise DataError(
                "'label' is false: the row shows a bad answer, which only preference training "
                "(KTO) learns from. Leave such rows out."
            )
    texts = [t["content"] for t in draft.turns if isinstance(t["content"], str)]
    for word in _UNREADABLE:
        if any(word in text for text in texts):
            raise DataError(
                f"A text holds {word}, which stands for a value in 'objects'. Write the value "
                "itself into the text."
            )
    return draft.finish()


def _read_prompt_completion(row: Row, context: RowContext) -> Reading:
    draft = Draft(row, context)
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = draft.take(name)
        if isinstance(value, list):
            draft.take_turns(value, _KEYS)
        elif isinstance(value, str):
            draft.say(role, value)
        else:
            raise DataError(f"{name!r} must be a text or a list of turns, not {value!r}.")
    return _with_extras(draft)


def _claims_query(row: Mapping[str, Any]) -> bool:
    return {"query", "response"} <= row.keys()


def _read_query(row: Row, context: RowContext) -> Reading:
    draft = Draft(row, context)
    system = draft.take_text("system")
    if system:
        draft.say("system", system)
    say_history(draft)
    draft.say("user", draft.take_text("query"))
    draft.say("assistant", draft.take_text("response"))
    return _with_extras(draft)


def say_history(draft: Draft) -> None:
    """Add earlier turns that stand as pairs under ``history``."""
    history = draft.take("history") or []
    if not isinstance(history, list):
        raise DataError(f"'history' must hold pairs of a question and an answer, not {history!r}.")
    for pair in history:
        if not isinstance(pair, list) or [type(x) for x in pair] != [str, str]:
            raise DataError(f"'history' must hold pairs of a question and an answer, not {pair!r}.")
        draft.say("user", pair[0])
        draft.say("assistant", pair[1])


def _claims_pairs(row: Mapping[str, Any]) -> bool:
    turns = row.get("conversation")
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, Mapping) and "human" in first


def _read_pairs(row: Row, context: RowContext) -> Reading:
    draft = Draft(row, context)
    system = draft.take_text("system")
    if system:
        draft.say("system", system)
    for index, pair in enumerate(draft.take_list("conversation")):
        if not isinstance(pair, Mapping) or not {"human", "assistant"} == pair.keys():
            raise DataError(f"Pair {index} of 'conversation' needs 'human' and 'assistant' only.")
        draft.say("user", pair["human"])
        draft.say("assistant", pair["assistant"])
    return _with_extras(draft)


NORMAL = Reader("normal", "the normal form, which convert writes", _is_ours, _read_ours)
CHAT = Reader(
    "chat",
    "Hugging Face and OpenAI: messages, with content parts",
    _claims_chat,
    _read_messages,
)
SWIFT = Reader(
    "swift",
    "ms-swift: messages with placeholders, and images, videos, audios",
    _claims_swift,
    _read_messages,
)
SWIFT_QUERY = Reader(
    "swift_query", "ms-swift: query, response, history", _claims_query, _read_query
)
SWIFT_PAIRS = Reader(
    "swift_pairs", "ms-swift: conversation of human/assistant", _claims_pairs, _read_pairs
)
PROMPT_COMPLETION = Reader(
    "prompt_completion",
    "TRL: prompt and completion",
    lambda row: {"prompt", "completion"} <= row.keys(),
    _read_prompt_completion,
)
