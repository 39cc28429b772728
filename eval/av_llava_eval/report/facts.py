"""What a report shows: plain data, made by ``gather``, shown by ``markdown`` and ``page``.

Contract: scores and ends of intervals are 0 to 1 (or what the task's metric is), never percent. A
report has one column a run; a single run is a report of one column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A score with its 95 % interval."""

    name: str
    score: float
    low: float
    high: float
    n: int
    """Questions behind it."""

    def percent(self) -> str:
        """Score and interval for a table: ``61.3 (58.0–64.5)``."""
        return f"{100 * self.score:.1f} ({100 * self.low:.1f}–{100 * self.high:.1f})"


@dataclass(frozen=True)
class Column:
    """One run."""

    label: str
    """What distinguishes it from the others, such as ``audio=off``."""
    headline: Estimate
    groups: Mapping[str, tuple[Estimate, ...]]
    """By grouping, such as ``duration``; in the order of the annotations."""
    by_length: tuple[Estimate, ...] = ()
    """By length of the video, shortest first; empty where lengths are not known."""
    letters: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Letter → share of the answers, share of the right answers."""
    stage_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage, summed over the run: decode, encode, generate."""
    n_unparsed: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    """Failures by kind; they count as wrong."""
    answered: float | None = None
    """Score over the questions that were answered, where some failed."""
    visual_tokens: float | None = None
    """Mean number of tokens that the pictures of a video became."""
    media_tokens: float | None = None
    """The same, sound included."""
    sound: str = ""
    """What was heard: only columns that hear the same are a sweep of tokens."""
    run: str = ""
    """What tells its run from others; empty for the only one."""
    chance: float | None = None
    """What guessing would give."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Further metrics by name, those of other harnesses among them."""

    @property
    def n_failed(self) -> int:
        """All failures."""
        return sum(self.failed.values())


@dataclass(frozen=True)
class Difference:
    """Two runs on the questions that both have."""

    first: str
    second: str
    difference: float
    """Second less first."""
    low: float
    high: float
    p: float | None
    """By exchanging the sides of videos; None for a single video."""
    gained: int
    """Questions that only the second has right."""
    lost: int
    """Questions that only the first has right."""
    n: int
    p_holm: float | None = None
    """The same, corrected for the number of differences."""
    p_mcnemar: float | None = None
    """Exact McNemar, question by question; None for scores between 0 and 1."""


@dataclass(frozen=True)
class Miss:
    """A question that a run has wrong."""

    id: str
    question: str
    options: tuple[str, ...]
    answer: str
    said: str
    """What was read from the answer; empty where nothing could be."""
    raw: str
    why: str
    """``wrong``, ``unparsed``, or the kind of failure with its message."""
    source: str
    """File of the video or sound."""
    groups: Mapping[str, str] = field(default_factory=dict)
    frames: tuple[bytes, ...] = ()
    """Pictures, JPEG, in order of time."""
    times_s: tuple[float, ...] = ()
    """Time of each picture."""


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows."""

    title: str
    task: str
    columns: tuple[Column, ...]
    differences: tuple[Difference, ...] = ()
    smallest_difference: float | None = None
    """The smallest difference between two runs that this many questions would show."""
    misses: tuple[Miss, ...] = ()
    n_misses: int = 0
    """All of them, of which ``misses`` shows the first."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """How the first run was made."""
    notes: tuple[str, ...] = ()
    """Sentences that a reader should know before believing the numbers."""
