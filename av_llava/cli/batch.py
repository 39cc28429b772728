"""``av-llava ask --batch``: a file of questions, answered one by one and kept as they come.

Contract: rows are checked before any work. Of a row only its own answer depends; one that fails
leaves an error object in its place, and the exit code says at the end that some did. With --out a
finished row is on the disk before the next is begun (append-only), and is never asked again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from av_llava.answers import SCHEMA, Answer
from av_llava.cli import engine, inputs
from av_llava.cli.failures import INTERRUPTED, ROWS_FAILED, Failure, attempt
from av_llava.cli.options import Loading, Request, parse_time
from av_llava.cli.output import Output
from av_llava.cli.rows_file import RowsFile
from av_llava.errors import AVLlavaError, DataError, UsageError, unknown_name

if TYPE_CHECKING:
    from av_llava.inference import AVLlava

ROW_KEYS = ("id", "media", "prompt", "frames", "fps", "start", "end", "audio", "system")


@dataclass(frozen=True)
class Settings:
    """The flags of a batch."""

    file: Path
    out: Path | None = None
    batch_size: int = 1
    retry_failed: bool = False
    prompt: str | None = None
    """Question of the rows that have none."""


@dataclass(frozen=True)
class Row:
    """One question of the file."""

    id: str | int
    media: tuple[str, ...]
    prompt: str
    request: Request
    """The command's options, changed by the row's own."""

    def asked(self, model: str | None) -> dict[str, Any]:
        """What an answer depends on; kept beside it, and compared when a run is resumed."""
        return {
            "media": list(self.media),
            "prompt": self.prompt,
            "model": model,
            "options": self.request.given(),
        }


@dataclass
class Tally:
    """How many rows went which way."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0
    skipped_failed: int = 0

    def line(self) -> str:
        """One line for people."""
        said = f"{self.answered} answered, {self.failed} failed, {self.skipped} were there already"
        if self.skipped_failed:
            said += f" ({self.skipped_failed} of them failed; --retry-failed tries them again)"
        return said


def run(settings: Settings, loading: Loading, request: Request, output: Output) -> int:
    """Answer the rows of a file.

    Returns:
        0, 7 if rows failed, or 130 if the run was interrupted.

    Raises:
        UsageError: the output cannot be written.
        DataError: the rows cannot be used, or the output holds answers to other questions.
    """
    rows = read_rows(settings.file, request, settings.prompt)
    engine.check_model(loading.model)
    if settings.prompt == "-":
        raise UsageError(
            "--batch does not read standard input; give the prompt with --prompt TEXT."
        )
    if settings.retry_failed and settings.out is None:
        raise UsageError("--retry-failed needs --out, where the failed rows are.")
    with ExitStack() as stack:
        kept: RowsFile | None = None
        if settings.out is not None:
            if settings.out.exists() and settings.out.samefile(settings.file):
                raise UsageError(f"--out and --batch are the same file, {str(settings.out)!r}.")
            kept = stack.enter_context(RowsFile(settings.out))
            if kept.repaired:
                output.warn(f"{settings.out}: {kept.repaired}")
        tally = Tally()
        left = _left_to_do(rows, kept, settings.retry_failed, loading.model, tally)
        if left:
            loaded = engine.load(loading)
            if loaded.is_random:
                output.warn(engine.RANDOM)
            work = _Work(loaded, loading.model, kept, output, tally, len(left))
            interrupted = work.all(left, settings.batch_size)
            if interrupted:
                again = " The same command goes on from here." if kept else ""
                output.warn(f"interrupted: {tally.line()}.{again}")
                return INTERRUPTED
        output.note(tally.line())
        return ROWS_FAILED if tally.failed or tally.skipped_failed else 0


def read_rows(file: Path, request: Request, prompt: str | None = None) -> list[Row]:
    """Read and check all rows of a file.

    Args:
        file: one JSON object a line; blank lines are skipped.
        request: the command's options.
        prompt: question of rows without one.

    Raises:
        UsageError: the file cannot be opened.
        DataError: a line is wrong; the message names it.
    """
    try:
        # Not splitlines(): it also splits at characters that JSON allows inside a string.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"--batch {str(file)!r}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}).") from error
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _row(line, number, file, request, prompt)
        key = json.dumps(row.id)
        if key in seen:
            raise DataError(f"{file}, line {number}: the id {key} is line {seen[key]}'s too.")
        seen[key] = number
        rows.append(row)
    if not rows:
        raise DataError(f"{file} holds no rows; it needs one JSON object a line.")
    return rows


def _row(line: str, number: int, file: Path, request: Request, prompt: str | None) -> Row:
    where = f"{file}, line {number}"
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error}).") from error
    if not isinstance(data, dict):
        raise DataError(f"{where}: a row is a JSON object, not a {type(data).__name__}.")
    for key in data:
        if key not in ROW_KEYS:
            raise DataError(f"{where}: {unknown_name('key of a row', key, ROW_KEYS)}")
    data = {k: v for k, v in data.items() if v is not None}
    identity = data.get("id", number)
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise DataError(f"{where}: the id must be a string or a whole number, not {identity!r}.")
    media = data.get("media", [])
    media = [media] if isinstance(media, str) else media
    if not isinstance(media, list) or not all(isinstance(m, str) and m for m in media):
        raise DataError(f"{where}: 'media' must be a path or a list of paths, not {media!r}.")
    question = data.get("prompt", prompt)
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: 'prompt' must be a question, and there is no --prompt.")
    try:
        own = _own_options(data, request)
        own.check(has_media=bool(media))
    except (AVLlavaError, typer.BadParameter) as error:
        raise DataError(f"{where}: {error}") from error
    return Row(identity, tuple(media), question, own)


def _own_options(data: dict[str, Any], request: Request) -> Request:
    """The command's options, changed by those that a row gives itself."""
    changes: dict[str, Any] = {}
    for key in ("frames", "fps", "audio", "system"):
        kinds = {"frames": int, "fps": (int, float), "audio": str, "system": str}[key]
        if key in data:
            if isinstance(data[key], bool) or not isinstance(data[key], kinds):  # type: ignore[arg-type]
                raise UsageError(f"{key!r} cannot be {data[key]!r}.")
            changes[key] = data[key]
    for key in ("start", "end"):
        if key in data:
            if isinstance(data[key], bool) or not isinstance(data[key], (str, int, float)):
                raise UsageError(f"{key!r} cannot be {data[key]!r}.")
            changes[f"{key}_s"] = parse_time(data[key])
    return replace(request, **changes)


def _left_to_do(
    rows: Sequence[Row], kept: RowsFile | None, retry: bool, model: str | None, tally: Tally
) -> list[Row]:
    """Rows that the output does not hold; those that it holds must be the same questions."""
    if kept is None:
        return list(rows)
    left = []
    for row in rows:
        there = kept.rows.get(json.dumps(row.id))
        if there is None:
            left.append(row)
            continue
        _check_same(row, there.get("asked"), kept.path, model)
        if "error" in there and retry:
            left.append(row)
        else:
            tally.skipped += 1
            tally.skipped_failed += "error" in there
    return left


def _check_same(row: Row, asked: Any, path: Path, model: str | None) -> None:
    now = json.loads(json.dumps(row.asked(model)))
    if asked == now:
        return
    before = asked if isinstance(asked, dict) else {}
    other = [k for k in now if before.get(k) != now[k]]
    raise DataError(
        f"{path} holds the row {row.id!r} with another {' and '.join(other)} than now "
        f"({', '.join(f'{k}: {before.get(k)!r}, now {now[k]!r}' for k in other)}). "
        "Choose another --out."
    )


class _Work:
    """Answers rows in groups and writes what comes of them."""

    def __init__(
        self,
        loaded: AVLlava,
        model: str | None,
        kept: RowsFile | None,
        output: Output,
        tally: Tally,
        total: int,
    ) -> None:
        self.loaded, self.model = loaded, model
        self.kept, self.output, self.tally = kept, output, tally
        self.total = total

    def all(self, rows: Sequence[Row], batch_size: int) -> bool:
        """Answer all rows; returns whether the run was interrupted."""
        from tqdm import tqdm

        progress = tqdm(
            total=self.total, unit="row", disable=not self.output.shows_progress, leave=False
        )
        try:
            for group in _groups(rows, batch_size):
                for row, result in self._results(group):
                    self._keep(row, result)
                    progress.update()
        except KeyboardInterrupt:
            return True
        finally:
            progress.close()
        return False

    def _results(self, group: Sequence[Row]) -> Iterator[tuple[Row, Answer | Failure]]:
        """Answer rows together; if that fails, one by one, so that only the bad one fails."""
        if len(group) > 1:
            answers, failure = attempt(functools.partial(self._together, group))
            _pass_on_interruption(failure)
            if answers is not None:
                yield from zip(group, answers, strict=True)
                return
        for row in group:
            answer, failure = attempt(functools.partial(self._single, row))
            _pass_on_interruption(failure)
            yield row, failure if answer is None else answer  # type: ignore[misc]

    def _together(self, group: Sequence[Row]) -> list[Answer]:
        options = group[0].request.given()
        media = [list(row.media) for row in group]
        if media[0] and all(m == media[0] for m in media):
            return self.loaded.ask_many(media[0], [row.prompt for row in group], **options)
        rows = [{"media": m, "prompt": r.prompt} for m, r in zip(media, group, strict=True)]
        return self.loaded.ask_batch(rows, batch_size=len(rows), **options)

    def _single(self, row: Row) -> Answer:
        found = inputs.check_media(row.media, row.request.audio)
        with engine.memory_guard(self.loaded, row.request, found.values()):
            return self.loaded.ask(list(row.media), row.prompt, **row.request.given())

    def _keep(self, row: Row, result: Answer | Failure) -> None:
        data = result.to_dict()
        data.pop("schema")
        line = {"schema": SCHEMA, "id": row.id, "asked": row.asked(self.model), **data}
        if isinstance(result, Failure):
            self.tally.failed += 1
            self.output.warn(f"row {row.id!r}: {result.message}")
        else:
            self.tally.answered += 1
        if self.kept is None:
            self.output.data(line)
        else:
            self.kept.append(line)


def _pass_on_interruption(failure: Failure | None) -> None:
    if failure is not None and failure.exit_code == INTERRUPTED:
        raise KeyboardInterrupt


def _groups(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Consecutive rows with equal options, at most ``size`` at a time."""
    group: list[Row] = []
    for row in rows:
        if group and (len(group) == size or row.request != group[0].request):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
