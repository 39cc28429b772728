"""What is to be known about training data: what is wrong with them, and how they are made up.

Contract: one pass over the rows; memory for a few integers a row, whatever the rows hold. Nothing
is changed and nothing is printed. What makes a row unusable is a problem; what a person should only
know (an unknown key, an id that occurs twice) is a warning.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from av_llava.chat import MediaPart
from av_llava.chat.templates import check_turns
from av_llava.errors import AVLlavaError, DataError, UsageError
from av_llava.media import (
    DEFAULT_LIMITS,
    Limits,
    is_remote,
    probe,
    read_audio,
    read_frames,
    read_image,
)
from av_llava.media.source import describe
from av_llava.settings import SamplingSettings
from av_llava.training.readers.common import PlaceholderError
from av_llava.training.samples import Sample, sound_file
from av_llava.training.store import SampleStore

Progress = Callable[[int, int], None]

PROBLEMS: dict[str, str] = {
    "malformed row": "a row that is no JSON, or of no known format",
    "placeholders": "media that do not match the placeholders of the text",
    "no answer": "a conversation of which nothing would be learned",
    "missing media": "a file that is not there",
    "unreadable media": "a file that cannot be decoded (with --decode)",
}
"""What makes a row unusable → in words."""

WARNINGS: dict[str, str] = {
    "duplicate id": "an id that an earlier row has",
    "unknown key": "a key that no reader uses; it is kept in meta",
    "turn order": "turns that only a template of the tokenizer's own (jinja) may take",
    "preference turns": "answers of preference data, which are not learned",
    "cleaned text": "text that was taken out, since it is known to be noise",
}
"""What a person should know → in words."""

_BLOCK = 64


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    kind: str
    where: str
    """File and line."""
    text: str


@dataclass
class Validation:
    """What is wrong with training data."""

    n_rows: int
    n_bad: int = 0
    """Rows that cannot be used."""
    problems: Counter[str] = field(default_factory=Counter)
    """Kind of problem → how often."""
    warnings: Counter[str] = field(default_factory=Counter)
    """Kind of warning → how often."""
    findings: list[Finding] = field(default_factory=list)
    """The first of each kind."""
    n_media: int = 0
    """Files that the rows name, each time they name them."""
    n_decoded: int = 0
    """Files that were decoded on trial, each once."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "rows": self.n_rows,
            "bad_rows": self.n_bad,
            "problems": dict(self.problems),
            "warnings": dict(self.warnings),
            "media": self.n_media,
            "decoded": self.n_decoded,
            "findings": [vars(finding) for finding in self.findings],
        }


def validate(
    store: SampleStore,
    *,
    decode: bool = False,
    workers: int = 1,
    first: int = 10,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress | None = None,
) -> Validation:
    """Look at every row and, if asked, into every file.

    Args:
        store: the samples.
        decode: decode a little of every file, each once, in processes that can be killed.
        workers: files that are decoded at a time.
        first: how many findings of each kind are kept.
        limits: what a file may cost.
        progress: called with the rows that are done and all rows.
    """
    checker = _Checker(store, decode, first, limits)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        rows = iter(range(len(store)))
        while block := list(islice(rows, _BLOCK)):
            checker.block(block, pool)
            if progress is not None:
                progress(block[-1] + 1, len(store))
    checker.duplicates()
    return checker.result


class _Checker:
    """Looks at rows, block by block."""

    def __init__(self, store: SampleStore, decode: bool, first: int, limits: Limits) -> None:
        self.store, self.decode, self.first, self.limits = store, decode, first, limits
        self.result = Validation(len(store))
        self._ids = np.zeros(len(store), np.uint64)
        self._tried: dict[int, str | None] = {}
        self._exists = functools.lru_cache(maxsize=1 << 15)(os.path.exists)

    def block(self, rows: list[int], pool: ThreadPoolExecutor) -> None:
        """Check some rows; their files are decoded side by side."""
        samples = {row: self._read(row) for row in rows}
        if self.decode:
            self._try(samples.values(), pool)
        for row, sample in samples.items():
            good = sample is not None and self._check(row, sample)
            self.result.n_bad += not good

    def _read(self, row: int) -> Sample | None:
        try:
            reading = self.store.reading(row)
        except DataError as error:
            kind = "placeholders" if isinstance(error, PlaceholderError) else "malformed row"
            self._find(self.result.problems, kind, row, str(error))
            return None
        for note in reading.notes:
            self._find(self.result.warnings, note.kind, row, note.text)
        self._ids[row] = _hashed(reading.sample.id)
        return reading.sample

    def _check(self, row: int, sample: Sample) -> bool:
        """Whether a row that could be read can be used."""
        problems = self.result.problems
        before = problems.total()
        try:
            sample.check_learned()
        except DataError as error:
            self._find(problems, "no answer", row, str(error))
        self._check_order(row, sample)
        self.result.n_media += len(sample.paths) + _n_inline(sample)
        gone = [p for p in sample.paths if not is_remote(p) and not self._exists(p)]
        for path in gone:
            self._find(problems, "missing media", row, f"there is no file {path}")
        if self.decode:
            for part in _single(sample):
                reason = self._tried.get(_key(part))
                if reason is not None and part.source not in gone:
                    self._find(problems, "unreadable media", row, reason)
        return problems.total() == before

    def _check_order(self, row: int, sample: Sample) -> None:
        """Name turns that every template of ours refuses; which one trains is not known here."""
        try:
            check_turns(sample.messages)
        except UsageError as error:
            text = f"{error} Training refuses it, unless the template is the tokenizer's (jinja)."
            self._find(self.result.warnings, "turn order", row, text)

    def _try(self, samples: Iterable[Sample | None], pool: ThreadPoolExecutor) -> None:
        """Decode a little of every file that was not tried yet."""
        new = {
            _key(part): part
            for sample in samples
            if sample is not None
            for part in _single(sample)
            if _key(part) not in self._tried
        }
        trial = functools.partial(try_medium, limits=self.limits)
        self._tried.update(zip(new, pool.map(trial, new.values()), strict=True))
        self.result.n_decoded += len(new)

    def duplicates(self) -> None:
        """Find ids that occur twice; a row that a mixture repeats is no other row."""
        order = np.argsort(self._ids, kind="stable")
        sorted_ids = self._ids[order]
        again = np.flatnonzero((sorted_ids[1:] == sorted_ids[:-1]) & (sorted_ids[1:] != 0)) + 1
        for at in again.tolist():
            row, earlier = int(order[at]), int(order[np.searchsorted(sorted_ids, sorted_ids[at])])
            if self.store.where(row) != self.store.where(earlier):
                text = f"the id is that of {self.store.where(earlier)}, too"
                self._find(self.result.warnings, "duplicate id", row, text)

    def _find(self, counter: Counter[str], kind: str, row: int, text: str) -> None:
        counter[kind] += 1
        if counter[kind] <= self.first:
            where = self.store.where(row)
            self.result.findings.append(Finding(kind, where, text.removeprefix(f"{where}: ")))


def try_medium(part: MediaPart, limits: Limits = DEFAULT_LIMITS) -> str | None:
    """Decode a little of a medium in a process that can be killed; return why it fails, or None."""
    try:
        if part.kind == "image":
            read_image(part.source, limits)
        elif part.kind == "video":
            read_frames(
                part.source,
                SamplingSettings(frames=2),
                start_s=part.start_s,
                end_s=part.end_s,
                limits=limits,
                isolate=True,
                threads=1,
            )
            own = probe(part.source, limits).audio is not None and part.audio in (None, "auto")
            sound = sound_file(part) or (part.source if own or part.audio == "on" else None)
            if sound is not None:
                _try_sound(sound, part, limits, strict=not own)
        elif part.kind == "audio":
            _try_sound(part.source, part, limits, strict=True)
    except (AVLlavaError, OSError) as error:
        names = [describe(source) for source in (part.source, sound_file(part)) if source]
        named = any(name in str(error) for name in names)
        return str(error) if named else f"{names[0]}: {error}"
    return None


def _try_sound(source: Any, part: MediaPart, limits: Limits, strict: bool) -> None:
    read_audio(
        source,
        start_s=part.start_s,
        end_s=part.end_s,
        max_seconds=1.0,
        strict=strict,
        limits=limits,
        isolate=True,
    )


def _single(sample: Sample) -> Iterator[MediaPart]:
    """The media of a sample that lie in files of this machine, or in the row itself."""
    for part in sample.media:
        if isinstance(part.source, (str, bytes)) and not is_remote(part.source):
            yield part


def _n_inline(sample: Sample) -> int:
    """How many media stand in the row itself, as data URLs or base64."""
    named = [source for part in sample.media for source in (part.source, sound_file(part))]
    return sum(isinstance(source, bytes) for source in named)


def _key(part: MediaPart) -> int:
    return hash((part.kind, part.source, part.start_s, part.end_s, part.audio))


def _hashed(text: str) -> int:
    """64 bits of a text, never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
