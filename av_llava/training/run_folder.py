"""The folder of a run: one run at a time, and checkpoints that are whole or not there.

Contract: a run holds a lock on its folder, which the system releases when the process ends,
however it ends. A folder with a run in it is only gone on with when that is asked for. What a crash
left half written is removed then. No torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any

from av_llava.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

RECIPE, RECORD, LOG, FINAL = "recipe.yaml", "run.json", "train_log.jsonl", "final"
QUARANTINE = "bad_media.jsonl"
LENGTHS = "lengths"
"""Folder of measured lengths."""
STATE = "trainer_state.json"
TENSORBOARD = "runs"
_UNUSED = {RECIPE, RECORD, LENGTHS, LOG, QUARANTINE, TENSORBOARD}
"""What a run may leave that took no step."""
_LOCK = ".lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PARTIAL = re.compile(r"\.(checkpoint-\d+|final)\.partial-[0-9a-f]+")


class RunFolder:
    """The output of one run.

    Args:
        path: of the folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock: IO[str] | None = None

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE

    @property
    def log(self) -> Path:
        """One JSON object a log step."""
        return self.path / LOG

    @property
    def final(self) -> Path:
        """The result: a folder that loads alone."""
        return self.path / FINAL

    @property
    def is_used(self) -> bool:
        """Whether a run logged a step here, or anything else lies here.

        What a run leaves that was refused before its first step, or failed in it, is no use: its
        recipe is corrected, and started again.
        """
        names = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        names = {n for n in names if n != _LOCK and not _PARTIAL.fullmatch(n)}
        return bool(names) and (not {RECIPE, RECORD} <= names <= _UNUSED or self._has_step)

    @property
    def _has_step(self) -> bool:
        """Whether the log has a whole line."""
        return self.log.is_file() and b"\n" in self.log.read_bytes()

    @property
    def is_finished(self) -> bool:
        """Whether the run's result is here."""
        return self.final.is_dir()

    def claim(self, resume: bool) -> None:
        """Lock the folder for this process.

        Args:
            resume: go on with the run that is here, if there is one.

        Raises:
            UsageError: another run holds it, or it is used and must not be.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"The output {self.path} is a file; name a folder.")
        if self.is_used and not resume:
            raise UsageError(
                f"The output folder {self.path} is not empty. Go on with its run with --resume, or "
                f"name another folder (output=...)."
            )
        if resume and self.is_used and not self.recipe.is_file():
            raise UsageError(
                f"The folder {self.path} holds no run that could be resumed (no {RECIPE})."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / _LOCK, "a+", encoding="utf-8")  # noqa: SIM115  held to the end
        except OSError as error:
            raise UsageError(
                f"The output folder {self.path} cannot be written: {error.strerror}. Name another "
                f"one (output=...)."
            ) from error
        try:
            _lock(lock)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip()
            lock.close()
            raise UsageError(
                f"Another run writes into {self.path}{f' (process {holder})' if holder else ''}. "
                f"Wait for it, stop it, or name another folder (output=...)."
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock
        for left in self.path.iterdir():
            if _PARTIAL.fullmatch(left.name):
                shutil.rmtree(left)
        if not self.is_used:
            self.log.unlink(missing_ok=True)  # at most the torn beginning of a line

    def note_failure(self, error: BaseException) -> None:
        """Say in the record that the run ended, unless it says how already.

        Args:
            error: that ended it.
        """
        # What ended the run must be told, whatever state its folder is in.
        with contextlib.suppress(OSError, ValueError):
            if self._lock is not None and self.record().get("status") == "running":
                stopped = isinstance(error, KeyboardInterrupt)
                self.update_record(status="interrupted" if stopped else "failed")

    def release(self) -> None:
        """Give the folder up."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, or None."""
        found = [
            (int(match[1]), path)
            for path in (self.path.iterdir() if self.path.is_dir() else ())
            if (match := _CHECKPOINT.fullmatch(path.name)) and (path / STATE).is_file()
        ]
        return max(found)[1] if found else None

    def write(self, name: str, text: str) -> None:
        """Write a small file at once: readers see the old text or the new."""
        file = self.path / name
        partial = file.with_name(f".{name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)

    def record(self) -> dict[str, Any]:
        """What the run says about itself."""
        file = self.path / RECORD
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def update_record(self, **changes: Any) -> None:
        """Change some of what the run says about itself."""
        data = {**self.record(), **changes}
        self.write(RECORD, json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop the log's lines after a step, from which the run goes on, and a torn last line."""
        if not self.log.is_file():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line, cut by a crash
                continue
            if row.get("step", 0) <= step and "train_runtime" not in row:
                kept.append(line + "\n")
        self.write(LOG, "".join(kept))


def _lock(file: IO[str]) -> None:
    """Lock a file for this process, or raise OSError at once."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        # Far behind the content, so that others can still read who holds it.
        file.seek(2**30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
