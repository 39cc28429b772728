"""LLaVA's rows and the data sets that write them in their own way.

``{"id", "image" | "video" | "audio", "conversations": [{"from", "value"}]}``: LLaVA and LLaVA-NeXT,
LLaVA-Video-178K (folders of frames, ``data_source``), video-SALMONN-2 (a sound file beside the
video, turns of preference data), SHI-Labs (``conversation``), and VideoInstruct-100K (``q``, ``a``,
``video_id``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from av_llava.chat import MediaPart
from av_llava.errors import DataError
from av_llava.training.readers.common import Draft, Reader, Reading, Row, RowContext

_KEYS = ("from", "value")
_PLURAL = ("images", "videos", "audios")


def _has_turns(row: Mapping[str, Any], name: str) -> bool:
    """Whether a key holds turns in the spelling from/value."""
    turns = row.get(name)
    if not isinstance(turns, list) or not turns:
        return name in row
    return isinstance(turns[0], Mapping) and "from" in turns[0]


def _claims_llava(row: Mapping[str, Any]) -> bool:
    plural = any(key in row for key in (*_PLURAL, "tools"))
    singular = any(key in row for key in ("image", "video", "audio"))
    return "conversations" in row and (singular or not plural)


def _read_turns(name: str, row: Row, context: RowContext) -> Reading:
    draft = Draft(row, context)
    system = draft.take_text("system", "system_prompt")
    if system:
        draft.say("system", system)
    draft.take_turns(draft.take_list(name), _KEYS)
    draft.take_media()
    return draft.finish()


def _read_llava(row: Row, context: RowContext) -> Reading:
    return _read_turns("conversations", row, context)


def _read_shi_labs(row: Row, context: RowContext) -> Reading:
    return _read_turns("conversation", row, context)


def _read_video_instruct(row: Row, context: RowContext) -> Reading:
    draft = Draft(row, context)
    draft.say("user", draft.take_text("q"))
    draft.say("assistant", draft.take_text("a"))
    name = draft.take("video_id")
    if not isinstance(name, str) or not name:
        raise DataError(f"'video_id' must be the name of a video, not {name!r}.")
    draft.media.append(MediaPart("video", context.roots.find_video(name)))
    draft.meta["video_id"] = name
    return draft.finish()


LLAVA = Reader(
    "llava",
    "LLaVA, LLaVA-NeXT, LLaVA-Video-178K, video-SALMONN-2: conversations of from/value",
    _claims_llava,
    _read_llava,
)
SHI_LABS = Reader(
    "shi_labs",
    "SHI-Labs: the key conversation, media before the first question",
    lambda row: "conversation" in row and _has_turns(row, "conversation"),
    _read_shi_labs,
)
VIDEO_INSTRUCT = Reader(
    "video_instruct",
    "VideoInstruct-100K: q, a, video_id without an extension",
    lambda row: {"q", "a", "video_id"} <= row.keys(),
    _read_video_instruct,
    {"question": "q", "answer": "a"},
)
