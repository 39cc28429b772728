"""Media that cannot be read in training: what takes their place, and how much is tolerated.

Contract: nothing is silent. A sample whose media cannot be read is replaced by one of the same
modality and about the same length, chosen by a hash of (seed, epoch, sample): the same on every
run and rank. Each replacement is counted, each bad file is written once to a quarantine file
(JSON lines), and training ends with an error when their share is too large.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from av_llava.errors import DataError, UsageError
from av_llava.settings import Settings, check_choice, check_range
from av_llava.training.choices import hashed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

POLICIES = ("replace", "error")
# Replacements come from so many samples of about the same length.
_NEIGHBOURS = 256
# Fewer than this, and longer ones are taken, too.
_FEWEST = 16
_LINE_BEGINS = b'{"file": '


@dataclass(frozen=True)
class BadMediaSettings(Settings):
    """What happens to samples whose media cannot be read."""

    policy: str = "replace"
    """replace: another sample of the same modality takes the place; error: stop."""
    max_fraction: float = 0.02
    """Share of replaced samples above which training stops."""
    grace: int = 10
    """So many replaced samples are tolerated whatever their share."""
    max_tries: int = 8
    """Replacements tried for one sample before training stops."""
    quarantine: str | None = None
    """File that lists bad media; None writes none."""

    def __post_init__(self) -> None:
        check_choice("bad_media.policy", self.policy, POLICIES)
        check_range("bad_media.max_fraction", self.max_fraction, 0, 1)
        check_range("bad_media.grace", self.grace, 0)
        check_range("bad_media.max_tries", self.max_tries, 1)


@dataclass(frozen=True)
class BadMedium:
    """One medium that could not be read, and what took its sample's place."""

    file: str
    """Path or address."""
    reason: str
    """The error."""
    sample: str
    """Id of the sample."""
    source: str
    """Where the sample stands: file and line."""
    index: int
    """Number of the sample."""
    epoch: int
    """When it was read."""
    replacement: str = ""
    """Id of the sample that took the place."""


class Replacements:
    """Chooses what takes the place of a sample, in one epoch.

    Args:
        modality: code of each sample's modality. uint8 [n]
        lengths: tokens of each sample; 0 where nothing is known. [n]
        seed, epoch: of the run.
    """

    def __init__(self, modality: np.ndarray, lengths: np.ndarray, seed: int, epoch: int) -> None:
        self.seed, self.epoch = seed, epoch
        self._modality, self._lengths = modality, lengths
        order = np.lexsort((lengths, modality))
        self._order = order[lengths[order] > 0].astype(np.int64)
        self._codes = modality[self._order]
        self._sorted = lengths[self._order]

    def choose(self, index: int, attempt: int = 0, limit: int | None = None) -> int | None:
        """The sample that takes the place of another one, or None when there is none left.

        Args:
            index: the sample that cannot be read.
            attempt: 0, then 1 if that one cannot be read either, and so on.
            limit: tokens that it should not exceed, so that the batch keeps its budget; the
                shortest samples may, where nothing else is left.
        """
        found = self._candidates(index, limit)
        if attempt >= len(found):
            return None
        keys = hashed(self.seed, self.epoch, found, f"replacement of {index}")
        return int(found[np.argsort(keys, kind="stable")[attempt]])

    def _candidates(self, index: int, limit: int | None) -> np.ndarray:
        """Samples of the same modality and about the same length, or shorter. int64 [k]"""
        first = int(np.searchsorted(self._codes, self._modality[index], side="left"))
        stop = int(np.searchsorted(self._codes, self._modality[index], side="right"))
        length = self._lengths[index]
        if length > 0:
            end = first + int(np.searchsorted(self._sorted[first:stop], length, side="right"))
        else:
            drawn = int(hashed(self.seed, self.epoch, index, "place of an unknown length")[0])
            end = first + 1 + drawn % max(1, stop - first)
        low = max(first, end - _NEIGHBOURS)
        window = slice(low, min(stop, max(end, low + _FEWEST)))
        keep = self._order[window] != index
        if limit is not None:
            fits = keep & (self._sorted[window] <= limit)
            if not fits.any():
                window = slice(first, min(stop, first + _FEWEST))
                fits = self._order[window] != index
            keep = fits
        return self._order[window][keep]


class Quarantine:
    """A file of bad media, each listed once; several processes may write to it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._known: set[str] = set()
        self._read_to = 0

    def add(self, media: Sequence[BadMedium]) -> int:
        """List what is not listed yet; return how many that are.

        Raises:
            UsageError: the file cannot be written.
            DataError: it is no such list.
        """
        if not media:
            return 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._append(media)
        except OSError as error:
            raise self._unwritable(error) from error

    def check(self) -> None:
        """Make the file's folder, and try to write there; no file is left.

        Raises:
            UsageError: it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                open(self.path, "ab").close()
            else:
                tempfile.TemporaryFile(dir=self.path.parent).close()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UsageError:
        return UsageError(
            f"The list of bad media {self.path} cannot be written ({error.strerror}): name another "
            f"file with data.bad_media.quarantine=..., or make room for it."
        )

    def _append(self, media: Sequence[BadMedium]) -> int:
        with open(self.path, "a+b") as file, _locked(file):
            self._catch_up(file)
            new = {m.file: m for m in reversed(media) if m.file not in self._known}
            lines = [json.dumps(asdict(m), ensure_ascii=False) + "\n" for m in new.values()]
            if file.seek(0, os.SEEK_END) and not _ends_a_line(file):  # written by hand
                lines.insert(0, "\n")
            file.write("".join(lines).encode())
            file.flush()
            self._known.update(new)
            self._read_to = file.tell()
        return len(new)

    def _catch_up(self, file: IO[bytes]) -> None:
        """Read what other processes, or an earlier run, have written."""
        file.seek(self._read_to)
        for line in file:
            try:
                self._known.add(json.loads(line)["file"])
            except (ValueError, KeyError, TypeError) as error:
                if _is_torn(line):  # the process that wrote it ended, or its disk was full
                    file.truncate(file.tell() - len(line))
                    break
                raise DataError(
                    f"{self.path} is not a list of bad media (JSON lines with 'file'): "
                    f"{line[:80]!r}. Move it away, or name another file."
                ) from error


def _is_torn(line: bytes) -> bool:
    """Whether it is the beginning of a line of ours."""
    return not line.endswith(b"\n") and line[: len(_LINE_BEGINS)] == _LINE_BEGINS[: len(line)]


def _ends_a_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


class BadMediaWatch:
    """Counts bad media in the process that trains, lists them, and stops when they are many.

    Args:
        settings: how many are too many.
        alone: judge each batch; else someone calls :meth:`judge` with the sums of all ranks, so
            that they end together.

    Raises:
        UsageError: the file that lists them cannot be written.
    """

    def __init__(self, settings: BadMediaSettings, alone: bool = True) -> None:
        self.settings, self.alone = settings, alone
        self.quarantine = None if settings.quarantine is None else Quarantine(settings.quarantine)
        if self.quarantine is not None:
            self.quarantine.check()
        self.n_samples = 0
        self.n_bad = 0
        self.last: BadMedium | None = None

    @property
    def fraction(self) -> float:
        """Share of samples that were replaced."""
        return self.n_bad / max(1, self.n_samples)

    def update(self, n_samples: int, bad: Sequence[BadMedium]) -> None:
        """Take note of one batch.

        Args:
            n_samples: samples of the batch.
            bad: media that could not be read for it.

        Raises:
            DataError: too large a share of the samples seen so far was replaced (if ``alone``).
        """
        self.n_samples += n_samples
        self.n_bad += len({m.index for m in bad})
        if not bad:
            return
        self.last = bad[-1]
        for medium in bad:
            logger.warning(
                "Sample %s: %s Sample %s takes its place.",
                medium.sample, medium.reason, medium.replacement,
            )  # fmt: skip
        if self.quarantine is not None:
            self.quarantine.add(bad)
        if self.alone:
            self.judge(self.n_samples, self.n_bad)

    def judge(self, n_samples: int, n_bad: int) -> None:
        """Judge what was seen since the run began, on this rank or on all of them.

        Args:
            n_samples: samples that were read.
            n_bad: those that others took the place of.

        Raises:
            DataError: too large a share was replaced.
        """
        settings, fraction = self.settings, n_bad / max(1, n_samples)
        if n_bad <= settings.grace or fraction <= settings.max_fraction:
            return
        last = "" if self.last is None else f"; the last one: {self.last.reason}"
        listed = f" They are listed in {settings.quarantine}." if settings.quarantine else ""
        raise DataError(
            f"{n_bad} of {n_samples} samples could not be read ({fraction:.1%}, more than "
            f"bad_media.max_fraction = {settings.max_fraction:.1%}){last}{listed or '.'} Repair or "
            f"remove these files, or allow a larger share."
        )


@contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Hold a file for this process alone."""
    if fcntl is None:
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
