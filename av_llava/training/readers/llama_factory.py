"""LLaMA-Factory's two formats, alpaca and sharegpt, and its ``dataset_info.json``.

The columns and tags of a ``dataset_info.json`` say under which names a file keeps what these
formats need. Turns of tools become user and assistant turns; their own role names are in ``meta``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from av_llava.errors import DataError, unknown_name
from av_llava.training.readers.chat import say_history
from av_llava.training.readers.common import (
    TURN_ROLES,
    Draft,
    Note,
    Reader,
    Reading,
    Row,
    RowContext,
    once,
)

_PLURAL = ("images", "videos", "audios")
_ENTRY_KEYS = (
    "file_name", "formatting", "columns", "tags", "ranking", "split", "num_samples", "subset",
    "folder", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name",
)  # fmt: skip
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_TAG_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "user",
    "function_tag": "assistant",
    "system_tag": "system",
}


def _read_alpaca(row: Row, context: RowContext) -> Reading:
    draft = Draft(row, context)
    system = draft.take_text("system")
    if system:
        draft.say("system", system)
    say_history(draft)
    question = [draft.take_text("instruction"), draft.take_text("input")]
    draft.say("user", "\n".join(text for text in question if text))
    if isinstance(row.get("output"), list):
        raise DataError("'output' is a list of answers to choose from; only one can be learned.")
    draft.say("assistant", draft.take_text("output"))
    _keep_tools(draft)
    draft.take_media()
    return draft.finish()


def _claims_sharegpt(row: Mapping[str, Any]) -> bool:
    return "conversations" in row and any(key in row for key in (*_PLURAL, "tools"))


def _read_sharegpt(row: Row, context: RowContext) -> Reading:
    draft = Draft(row, context)
    tags = {**_TAGS, **context.tags}
    roles = {**TURN_ROLES, **{tags[tag]: role for tag, role in _TAG_ROLES.items()}}
    system = draft.take_text("system")
    turns = draft.take_list("conversations")
    if system:
        draft.say("system", system)
    draft.take_turns(turns, (tags["role_tag"], tags["content_tag"]), roles)
    _keep_tools(draft)
    draft.take_media()
    return draft.finish()


def _keep_tools(draft: Draft) -> None:
    tools = draft.take("tools")
    if tools:
        draft.meta["tools"] = tools
        draft.notes.append(Note("unknown key", "'tools' is not shown to the model"))


ALPACA = Reader(
    "alpaca",
    "LLaMA-Factory, alpaca: instruction, input, output, history",
    lambda row: {"instruction", "output"} <= row.keys(),
    _read_alpaca,
    {"prompt": "instruction", "query": "input", "response": "output"},
)
SHAREGPT = Reader(
    "sharegpt",
    "LLaMA-Factory, sharegpt: conversations with images, videos, audios, tools",
    _claims_sharegpt,
    _read_sharegpt,
    {"messages": "conversations"},
)


@dataclass(frozen=True)
class InfoEntry:
    """One data set of a ``dataset_info.json``."""

    name: str
    path: Path
    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    n_samples: int | None = None
    """Rows that are drawn, some again where there are fewer; None takes each once."""


def read_dataset_info(file: Path) -> list[InfoEntry]:
    """Read a ``dataset_info.json``.

    Raises:
        DataError: an entry that names no local file, ranks answers, or has unknown keys.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(data, dict) or not all(isinstance(e, dict) for e in data.values()):
        raise DataError(f"{file} must be an object with one object for each data set.")
    return [_entry(file, name, entry) for name, entry in data.items()]


def _entry(file: Path, name: str, entry: Mapping[str, Any]) -> InfoEntry:
    where = f"{file}, data set {name!r}"
    for key in entry:
        if key not in _ENTRY_KEYS:
            raise DataError(f"{where}: {unknown_name('key', key, _ENTRY_KEYS)}")
    if not isinstance(entry.get("file_name"), str):
        raise DataError(
            f"{where} has no 'file_name': only files on this machine are read. Download it first."
        )
    if entry.get("ranking"):
        raise DataError(f"{where} ranks answers (DPO), which this trainer does not learn from.")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        raise DataError(
            f"{where}: {unknown_name('formatting', formatting, ('alpaca', 'sharegpt'))}"
        )
    columns, tags = (_names(where, key, entry.get(key, {})) for key in ("columns", "tags"))
    n = entry.get("num_samples")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise DataError(f"{where}: 'num_samples' must be a whole number from 1, not {n!r}.")
    for tag in tags:
        if tag not in _TAGS:
            raise DataError(f"{where}: {unknown_name('tag', tag, _TAGS)}")
    return InfoEntry(
        name,
        file.parent / entry["file_name"],
        formatting,
        columns,
        tags,
        n,
    )


def _names(where: str, key: str, value: Any) -> dict[str, str]:
    """Check that a value maps names to names."""
    pairs = value.items() if isinstance(value, dict) else [(None, None)]
    if not all(isinstance(name, str) for pair in pairs for name in pair):
        raise DataError(f"{where}: {key!r} must map names to names, not {value!r}.")
    return dict(value)
