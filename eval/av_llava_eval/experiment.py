"""Several ways of asking the same questions, as one experiment with paired columns.

Contract: an :class:`Arm` is one column. All arms of a run see the same samples and the same frames,
which are decoded once; they differ in what reaches the model and how it is pooled. The first arm is
the one that the others are compared with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from av_llava.errors import UsageError, unknown_name

SOUNDS = ("auto", "on", "off", "swap")
"""auto: a video's sound where there is some; on: a video without is a failure; swap: the sound of
another video."""


@dataclass(frozen=True)
class Arm:
    """One way of asking."""

    name: str
    sees: bool = True
    """Whether pictures and videos reach the model."""
    sound: str = "auto"
    """One of :data:`SOUNDS`."""
    aggregator: str | None = None
    """Spec of another aggregator than the model's own."""
    max_visual_tokens: int | None = None

    @property
    def media(self) -> bool:
        """Whether anything but text reaches the model."""
        return self.sees or self.sound != "off"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self)


def arms_of(
    *,
    audio: Sequence[str] = ("auto",),
    aggregators: Sequence[str] = (),
    max_visual_tokens: Sequence[int] = (),
    text_only: bool = False,
    audio_only: bool = False,
) -> tuple[Arm, ...]:
    """The arms of an experiment: every sound with every way of pooling, then the blind ones.

    Args:
        audio: some of :data:`SOUNDS`.
        aggregators: specs such as ``llava_video``; ``own`` is the model's.
        max_visual_tokens: upper bounds of the visual tokens.
        text_only: also ask without any media.
        audio_only: also ask with sound alone.

    Raises:
        UsageError: unknown or repeated values, or both kinds of pooling.
    """
    for sound in audio:
        if sound not in SOUNDS:
            raise unknown_name("audio", sound, SOUNDS)
    given = {
        "--audio": audio,
        "--aggregator": aggregators,
        "--max-visual-tokens": max_visual_tokens,
    }
    for flag, values in given.items():
        if len(set(values)) != len(values):
            raise UsageError(f"{flag} names something twice: {', '.join(map(str, values))}.")
    if aggregators and max_visual_tokens:
        raise UsageError("Sweep --aggregator or --max-visual-tokens, not both.")
    if any(n < 1 for n in max_visual_tokens):
        raise UsageError(f"--max-visual-tokens must be at least 1, not {min(max_visual_tokens)}.")
    _check_specs(aggregators)
    ways: list[Mapping[str, Any]] = [
        *({"aggregator": None if a == "own" else a} for a in aggregators),
        *({"max_visual_tokens": n} for n in max_visual_tokens),
    ] or [{}]
    labels = list(aggregators) or [f"{n} tokens" for n in max_visual_tokens] or [""]
    out = []
    for sound, (way, label) in product(audio or ("auto",), zip(ways, labels, strict=True)):
        parts = [f"audio {sound}"] if len(audio) > 1 else []
        parts += [label] if len(ways) > 1 else []
        out.append(Arm(", ".join(parts) or "main", True, sound, **way))
    if audio_only:
        out.append(Arm("audio only", sees=False, sound="on"))
    if text_only:
        out.append(Arm("text only", sees=False, sound="off"))
    return tuple(out)


def _check_specs(aggregators: Sequence[str]) -> None:
    """Raise for a spec that no aggregator has, before anything is loaded."""
    if any(a != "own" for a in aggregators):
        from av_llava.aggregators import build

        for spec in aggregators:
            if spec != "own":
                build(spec)


class Donors:
    """Whose sound stands in for whose, for ``swap``.

    Args:
        groups: all groups of the benchmark, on every process the same.

    Raises:
        UsageError: fewer than two groups.
    """

    def __init__(self, groups: Iterable[str]) -> None:
        # By hash, so that videos that belong together are no neighbours.
        self._circle = sorted(set(groups), key=lambda g: hashlib.sha256(g.encode()).digest())
        if len(self._circle) < 2:
            raise UsageError("Sounds are swapped between videos, and there is only one.")
        self._at = {group: i for i, group in enumerate(self._circle)}

    def of(self, group: str) -> Iterator[str]:
        """The other groups in the order in which they are tried: the first that has sound lends."""
        at = self._at[group]
        yield from self._circle[at + 1 :]
        yield from self._circle[:at]
