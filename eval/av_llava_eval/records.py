"""The folder of a run: what was asked, of which model, and every answer, safe against any end.

Contract: answers are appended, and on the disk (fsync) when :meth:`AnswerFile.append` returns; a
line that a crash left unfinished is ignored, and taken out when its file is appended to again.
Nothing else is ever changed. A run can be continued by any number of processes; one with another
model, other data or other settings is refused. One run at a time holds the folder (``locks``).

    manifest.json             what identifies the run, and what it ran with
    samples.jsonl             the questions in their normal form, so that scoring needs no data
    answers.<rank>of<world>.jsonl
    locks/                    held while processes run
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from av_llava.errors import DataError, UsageError
from av_llava.files import append_whole, replacing
from av_llava_eval.failures import OK
from av_llava_eval.sample import Sample
from av_llava_eval.sharding import Place

SCHEMA = "av-llava-eval/1"
MANIFEST, SAMPLES = "manifest.json", "samples.jsonl"

Answer = dict[str, Any]
"""A line of an answers file: ``arm``, ``id``, ``group``, ``status``, ``raw`` or ``error``, ..."""
Key = tuple[str, str]
"""Arm and id of an answer."""


# -------------------------------------------------------------------- samples as JSON


def sample_row(sample: Sample, root: Path) -> dict[str, Any]:
    """JSON-ready data of a sample, with paths relative to ``root`` where they lie below it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value.relative_to(root) if value.is_relative_to(root) else value)
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    row = {f.name: plain(getattr(sample, f.name)) for f in fields(sample)}
    row["meta"] = dict(sample.meta)
    return {k: v for k, v in row.items() if v not in (None, [], {})}


def sample_of_row(row: Mapping[str, Any], root: Path) -> Sample:
    """The sample that :func:`sample_row` wrote."""
    data = dict(row)
    for name in ("video", "audio", "subtitles"):
        if data.get(name) is not None:
            data[name] = root / data[name]
    data["images"] = tuple(root / p for p in data.get("images", ()))
    if data.get("options") is not None:
        data["options"] = tuple(data["options"])
    return Sample(**data)


# -------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class Manifest:
    """What a run is."""

    identity: Mapping[str, Any]
    """Task, data, model and settings: another one is another run."""
    about: Mapping[str, Any]
    """Versions, dates, folders: for information."""

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.identity["task"])

    @property
    def root(self) -> Path:
        """Folder of the data when the run was started."""
        return Path(self.about["data"])

    @property
    def arms(self) -> list[dict[str, Any]]:
        """The columns."""
        return list(self.identity["arms"])


class RunFolder:
    """One run on disk.

    Args:
        path: is made when a run is started.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def manifest(self) -> Manifest | None:
        """The manifest; None for a folder without one.

        Raises:
            DataError: it cannot be read.
        """
        file = self.path / MANIFEST
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({error}). It is needed to go on.") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise DataError(f"{file} is no manifest of a run of this program ({SCHEMA}).")
        identity: Any = data.get("identity")
        about: Any = data.get("about")
        if not _holds(identity, _IDENTITY) or not _holds(about, ("data",)):
            raise DataError(f"{file} is damaged: it does not say what the run is.")
        return Manifest(identity, about)

    def need(self) -> Manifest:
        """The manifest.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        found = self.manifest()
        if found is None:
            raise DataError(f"{self.path} is no folder of a run: it has no {MANIFEST}.")
        return found

    def begin(self, manifest: Manifest, samples: Iterable[Mapping[str, Any]]) -> None:
        """Write what the run is, or compare it with what is there.

        Raises:
            DataError: the folder holds a run with another model, other data or other settings.
            UsageError: it cannot be written.
        """
        there = self.manifest()
        if there is None:
            # Looked for again: another process may write the manifest before its first answer.
            if any(self.path.glob("answers.*.jsonl")) and self.manifest() is None:
                raise DataError(f"{self.path} holds answers but no {MANIFEST}; choose another.")
            lines = (json.dumps(s, ensure_ascii=False, sort_keys=True) for s in samples)
            write_whole(self.path / SAMPLES, "".join(line + "\n" for line in lines))
            data = {"schema": SCHEMA, **asdict(manifest)}
            write_whole(self.path / MANIFEST, json.dumps(data, indent=1, default=str) + "\n")
            there = self.need()  # another process may have been first
        now = json.loads(json.dumps(dict(manifest.identity), default=str))
        other = list(_differences(there.identity, now))
        if other:
            raise DataError(
                f"{self.path} holds another run, and the two cannot be mixed: "
                f"{'; '.join(other[:6])}. Choose another folder, or go on as it was begun."
            )

    def samples(self, root: Path | None = None) -> list[Sample]:
        """The questions of the run.

        Args:
            root: folder of the data; by default where it was.
        """
        base, file = self.need().root if root is None else root, self.path / SAMPLES
        try:
            found = [sample_of_row(row, base) for row in _whole_lines(file)]
        except (TypeError, ValueError) as error:
            raise DataError(f"{file} is damaged: a line is no question ({error}).") from error
        for sample in found:
            if wrong := sample.not_text():
                raise DataError(f"{file} is damaged: {wrong}.")
        return found

    def answers(self) -> dict[Key, Answer]:
        """The last answer to each question of each arm; one that is ok wins over failures.

        Raises:
            DataError: a line that is not the last of its file cannot be read.
        """
        found: dict[Key, Answer] = {}
        for row in self.lines():
            key = (row["arm"], row["id"])
            if key not in found or row["status"] == "ok" or found[key]["status"] != "ok":
                found[key] = row
        return found

    def states(self) -> dict[Key, str]:
        """The status of each answered question, without the answers."""
        found: dict[Key, str] = {}
        for row in self.lines():
            key = (row["arm"], row["id"])
            if found.get(key) != "ok":
                found[key] = row["status"]
        return found

    def lines(self) -> Iterator[Answer]:
        """All complete lines of all answers files."""
        for file in sorted(self.path.glob("answers.*.jsonl")):
            yield from answer_lines(file)


_IDENTITY = ("task", "version", "split", "arms")


def _holds(data: Any, names: Iterable[str]) -> bool:
    return isinstance(data, dict) and all(name in data for name in names)


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Sentences about what differs between two JSON values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif before != now:
        yield f"{name} was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    named = isinstance(value, list) and all(_holds(v, ("name",)) for v in value)
    shown = [v["name"] for v in value] if named else value
    text = json.dumps(shown, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all.

    Raises:
        UsageError: the disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, errors="backslashreplace") as handle:
            handle.write(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from error


def answer_lines(file: Path) -> Iterator[Answer]:
    """Complete lines of an answers file; an unfinished last one is left out.

    Raises:
        DataError: another line is no answer.
    """
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            row = _answer_of(line)
            if row is None and line.endswith(b"\n") and line.strip():
                raise DataError(
                    f"{file}, line {number} is no answer of this program. The file was damaged or "
                    f"changed; remove the line to have that question asked again."
                )
            if row is not None:
                yield row


def _json_of(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _answer_of(line: bytes) -> Answer | None:
    row = _json_of(line)
    return row if isinstance(row, dict) and _is_answer(row) else None


def _is_answer(row: Mapping[str, Any]) -> bool:
    texts = ["arm", "id", "group", "status", *(["raw"] if row.get("status") == OK else [])]
    accounts = [row.get(k) for k in ("used", "timing_s")]
    return all(isinstance(row.get(k), str) for k in texts) and all(
        account is None or isinstance(account, dict) for account in accounts
    )


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        yield from (json.loads(line) for line in text.split("\n") if line)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error


class AppendedFile:
    """A file of JSON lines to which one process appends.

    Args:
        path: is made if it is not there.
        is_row: whether a JSON value is a line of this file, so that a last line that lacks only
            its end can be told from a torn one.

    Raises:
        UsageError: it cannot be written.
    """

    def __init__(self, path: Path, is_row: Callable[[Any], bool]) -> None:
        self.path, self._is_row = path, is_row
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror}.") from error
        self.torn = self._mend()
        """Bytes of an unfinished last line that were taken out."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def append(self, rows: Sequence[Answer]) -> None:
        """Write some lines and wait until they are on the disk.

        Raises:
            UsageError: the disk is full, or the file can no longer be written; what was written
                before is kept.
        """
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        data = text.encode("utf-8", "backslashreplace")
        try:
            append_whole(self._fd, data)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written any more: {error.strerror}. What it holds is "
                f"kept; the same command goes on from there."
            ) from error

    def _mend(self) -> int:
        """Finish or take out a last line without its end; return the bytes taken out."""
        with os.fdopen(os.dup(self._fd), "rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            start = _start_of_last_line(handle, size)
            handle.seek(start)
            tail = handle.read()
        if not tail:
            return 0
        row = _json_of(tail)
        if isinstance(row, dict) and self._is_row(row):
            os.write(self._fd, b"\n")
            return 0
        os.ftruncate(self._fd, start)
        return len(tail)


class AnswerFile(AppendedFile):
    """The answers of one process.

    Args:
        folder: of the run.
        place: of this process.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        super().__init__(folder / f"answers.{place.name}.jsonl", _is_answer)


def _start_of_last_line(handle: Any, size: int, step: int = 1 << 16) -> int:
    """Where what follows the last line break begins."""
    end = size
    while end > 0:
        begin = max(end - step, 0)
        handle.seek(begin)
        found = handle.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0
