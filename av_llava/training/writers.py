"""Training data written: in the normal form, or as LLaVA's rows.

Contract: nothing is lost. What LLaVA's own loaders do not know (times of a medium, whether an
answer is learned) is written in a way that our reader of that format takes back. A file appears
whole or not at all; relative paths are written relative to its folder.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from av_llava import files
from av_llava.chat import MediaPart
from av_llava.errors import DataError, UsageError, unknown_name
from av_llava.media import is_remote
from av_llava.training.samples import Sample, part_options, sound_file
from av_llava.training.store import SampleStore

_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
_LLAVA_KEYS = ("id", "image", "video", "audio", "use_audio", "conversations", "weight")


def to_normal(sample: Sample) -> dict[str, Any]:
    """A sample as a row of the normal form."""
    return sample.to_row()


def to_llava(sample: Sample) -> dict[str, Any]:
    """A sample as a row of LLaVA's.

    Raises:
        DataError: a kind of medium that LLaVA's rows have no key for, or a key that is taken.
    """
    row: dict[str, Any] = {"id": sample.id, **_media_of(sample)}
    flags = iter(sample.train_turns or ())
    turns = []
    for message in sample.messages:
        turn: dict[str, Any] = {"from": _ROLES[message.role], "value": message.text}
        if message.role == "assistant" and sample.train_turns is not None:
            turn["train"] = next(flags)
        turns.append(turn)
    row["conversations"] = turns
    if sample.weight != 1.0:
        row["weight"] = sample.weight
    for key, value in sample.meta.items():
        if key in _LLAVA_KEYS or key in ("images", "videos", "audios"):
            raise DataError(f"The sample keeps {key!r} in its meta, which LLaVA uses itself.")
        row[key] = value
    return row


WRITERS: dict[str, Callable[[Sample], dict[str, Any]]] = {"normal": to_normal, "llava": to_llava}
"""Name of a format → what writes a sample in it; open to extension."""


def _media_of(sample: Sample) -> dict[str, Any]:
    """The media of a sample under LLaVA's keys."""
    media: dict[str, list[Any]] = {"image": [], "video": [], "audio": []}
    videos = [part for part in sample.media if part.kind == "video"]
    heard = any(part.kind == "audio" for part in sample.media)
    own = {part.audio for part in videos}
    beside = bool(videos) and not heard and all(sound_file(part) for part in videos)
    told = len(own) == 1 and own <= {"auto", "off", "on"}
    for part in sample.media:
        if part.kind not in media:
            raise DataError(f"LLaVA's rows have no key for a medium of kind {part.kind!r}.")
        if part.kind == "video" and beside:
            media["audio"].append(part.audio)
        bare = replace(part, audio=None) if part.kind == "video" and (beside or told) else part
        media[part.kind].append(_named(bare))
    row: dict[str, Any] = {k: v[0] if len(v) == 1 else v for k, v in media.items() if v}
    if told:
        mode = own.pop()
        row["use_audio"] = {"auto": True, "off": False}.get(str(mode), mode)
    return row


def _named(part: MediaPart) -> Any:
    """A path, or an object where more than a path is to be said."""
    options = part_options(part)
    if isinstance(part.source, str) and not options:
        return part.source
    if isinstance(part.source, (bytes, bytearray)):
        return {"base64": base64.b64encode(part.source).decode(), **options}
    if not isinstance(part.source, str):
        raise DataError(f"A {part.kind} given as an array cannot be written as JSON.")
    return {"path": part.source, **options}


@dataclass
class Converted:
    """What a conversion did."""

    written: int = 0
    skipped: int = 0
    """Rows that could not be used."""
    reasons: list[str] = field(default_factory=list)
    """Why, of the first of them."""


def convert(
    store: SampleStore,
    destination: str | Path,
    *,
    to: str = "normal",
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    max_reasons: int = 20,
) -> Converted:
    """Write a store to one file.

    Args:
        store: the samples.
        destination: ``.jsonl`` for a row a line, ``.json`` for one array.
        to: one of ``WRITERS``.
        skip_bad: leave out rows that cannot be used, and count them; otherwise the first one
            ends the conversion.
        overwrite: whether a file that exists may be replaced.
        progress: called with the rows that are done and all rows.
        max_reasons: how many reasons are kept.

    Raises:
        DataError: a row cannot be used, or the file cannot be written; nothing is left behind.
        UsageError: an unknown format or suffix, or the file exists.
    """
    path = Path(destination).expanduser()
    if to not in WRITERS:
        raise unknown_name("format to write", to, WRITERS)
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise UsageError(f"{path} must end in .jsonl (a row a line) or .json (one array).")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already; choose another file, or allow it (--overwrite).")
    result = Converted()
    with replacing(path) as file:
        rows = _rows(store, WRITERS[to], path.parent, result, skip_bad, max_reasons)
        array = path.suffix.lower() == ".json"
        for row in rows:
            before = "" if not array else ",\n" if result.written else "[\n"
            file.write(before + _json(row) + ("" if array else "\n"))
            result.written += 1
            if progress is not None:
                progress(result.written + result.skipped, len(store))
        if result.written == 0:
            raise DataError(f"No row could be used; {path} was not written. {result.reasons[0]}")
        file.write("\n]\n" if array else "")
    return result


def _json(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which JSON can only write as a number
        text = json.dumps(row)
    return text


def _rows(
    store: SampleStore,
    write: Callable[[Sample], dict[str, Any]],
    folder: Path,
    result: Converted,
    skip_bad: bool,
    max_reasons: int,
) -> Iterator[dict[str, Any]]:
    for index in range(len(store)):
        try:
            sample = store[index]
        except DataError as error:
            if not skip_bad:
                raise
            result.skipped += 1
            if len(result.reasons) < max_reasons:
                result.reasons.append(str(error))
            continue
        try:
            yield write(relative_to(sample, folder))
        except DataError as error:
            raise DataError(f"{store.where(index)}: {error}") from error


def relative_to(sample: Sample, folder: Path) -> Sample:
    """The sample with its relative paths written as seen from a folder."""

    def seen(path: Any) -> Any:
        if not isinstance(path, str) or is_remote(path) or os.path.isabs(path):
            return path
        return Path(os.path.relpath(path, folder)).as_posix()

    def moved(part: Any) -> Any:
        if not isinstance(part, MediaPart):
            return part
        audio = part.audio if sound_file(part) is None else seen(part.audio)
        return replace(part, source=seen(part.source), audio=audio)

    messages = tuple(
        replace(message, parts=tuple(moved(part) for part in message.parts))
        for message in sample.messages
    )
    return replace(sample, messages=messages)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A file that takes its place when it is whole; what was there stays until then.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as handle:
            yield handle
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}.") from error
