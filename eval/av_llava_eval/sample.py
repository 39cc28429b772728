"""One question of a benchmark, and what was read from one answer: plain data.

Contract: a :class:`Sample` is the same for every benchmark. Options stand without their letters;
the first is A. Paths are absolute or relative to the working folder, and need not exist: a file
that is missing is a failure of that sample, not of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Sample:
    """One question about one video, sound, or set of pictures."""

    id: str
    """Unique in its task and split; stable from run to run."""
    group: str
    """The video's id: samples of one group share media, and are clusters in statistics."""
    question: str
    answer: Any = None
    """The letter of the right option where there are options; otherwise what the task's score
    takes (a text, a number, a span of seconds). None: the labels are not public."""
    options: tuple[str, ...] | None = None
    """Texts of the options without letters; None for open questions."""
    video: Path | None = None
    """A film, or a folder of pictures."""
    audio: Path | None = None
    """A sound file: the video's own sound where there is a video too, else a medium of its own."""
    images: tuple[Path, ...] = ()
    start_s: float | None = None
    """First second of the media that is used; None is the beginning."""
    end_s: float | None = None
    """Last second that is used; None is the end."""
    source_fps: float | None = None
    """Frame rate of a folder of pictures."""
    subtitles: Path | None = None
    duration_s: float | None = None
    """Length of the video as the annotations give it; for reports."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """JSON-ready values, among them one (or a list) for each of the task's groupings."""

    @property
    def letters(self) -> str:
        """The letters of the options, such as ``ABCD``; empty for open questions."""
        return LETTERS[: len(self.options or ())]

    def not_text(self) -> str | None:
        """What should be text and is not: annotations hold numbers in odd places."""
        texts: dict[str, object] = {"id": self.id, "group": self.group, "question": self.question}
        texts |= {f"option {i}": text for i, text in enumerate(self.options or (), 1)}
        wrong = (
            f"its {k} is {v!r}, not a text" for k, v in texts.items() if not isinstance(v, str)
        )
        return next(wrong, None)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file or folder that answering needs."""
        given = (self.video, self.audio, *self.images)
        return tuple(p for p in given if p is not None)


@dataclass(frozen=True)
class Prediction:
    """What was read from the text of an answer."""

    extracted: Any | None
    """A letter, a text, a number, spans …; None where nothing could be read."""
    how: str
    """Name of the rule that matched, such as ``letter`` or ``option text``; for ``extracted`` of
    None the reason: ``empty``, ``unparsed``, or ``random`` (under ``compat`` only: the original
    draws a random letter here)."""

    @property
    def parsed(self) -> bool:
        """Whether something could be read."""
        return self.extracted is not None
