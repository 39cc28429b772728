"""Readers of public data formats: from one row of JSON to one sample.

Contract: the format of a row is told by its keys alone, or given; two formats that both claim a row
are an error that names them. ``READERS`` is a plain dict, open to extension. A reader raises
:class:`~av_llava.errors.DataError` or ``UsageError`` without the row's place; the store adds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from av_llava.errors import DataError, unknown_name
from av_llava.training.readers.chat import (
    CHAT,
    NORMAL,
    PROMPT_COMPLETION,
    SWIFT,
    SWIFT_PAIRS,
    SWIFT_QUERY,
)
from av_llava.training.readers.common import Draft, Note, Reader, Reading, Row, RowContext
from av_llava.training.readers.llama_factory import ALPACA, SHAREGPT
from av_llava.training.readers.llava import LLAVA, SHI_LABS, VIDEO_INSTRUCT

READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        NORMAL,
        LLAVA,
        VIDEO_INSTRUCT,
        SHI_LABS,
        CHAT,
        SWIFT,
        SWIFT_QUERY,
        SWIFT_PAIRS,
        PROMPT_COMPLETION,
        ALPACA,
        SHAREGPT,
    )
}
"""Name of a format → its reader."""

ALIASES: dict[str, str] = {
    "llava_video": "llava",
    "llava_video_178k": "llava",
    "video_salmonn2": "llava",
    "videoinstruct": "video_instruct",
    "hf": "chat",
    "openai": "chat",
    "ms_swift": "swift",
    "trl": "prompt_completion",
}
"""Other names of formats."""


def reader_named(name: str) -> Reader:
    """The reader of a format.

    Raises:
        UsageError: nobody knows it.
    """
    name = ALIASES.get(name, name)
    if name not in READERS:
        raise unknown_name("format of training data", name, [*READERS, *ALIASES])
    return READERS[name]


def detect(row: Mapping[str, Any]) -> Reader:
    """The one reader that claims a row.

    Raises:
        DataError: none does, or several do; the message names them.
    """
    found = [reader for reader in READERS.values() if reader.claims(row)]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(repr(k) for k in list(row)[:12])
    if found:
        names = ", ".join(reader.name for reader in found)
        raise DataError(
            f"The keys {keys} fit several formats: {names}. Say which one it is with format=…"
        )
    raise DataError(
        f"No known format has the keys {keys}. Formats: {', '.join(READERS)}. Say which one "
        "it is with format=…, and how its keys are called with columns."
    )


def renamed(row: Row, columns: Mapping[str, str], reader: Reader | None) -> Row:
    """A row with its keys called as the reader knows them.

    Args:
        row: as it stands in the file.
        columns: the reader's name, or an other name of it, → the key in the file.
        reader: of the format, if it is known.
    """
    if not columns:
        return row
    row = dict(row)
    known = {} if reader is None else reader.columns
    moved = {known.get(name, name): row.pop(key) for name, key in columns.items() if key in row}
    return {**row, **moved}


__all__ = [
    "ALIASES",
    "Draft",
    "Note",
    "READERS",
    "Reader",
    "Reading",
    "Row",
    "RowContext",
    "detect",
    "reader_named",
    "renamed",
]
