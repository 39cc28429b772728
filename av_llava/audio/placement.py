"""How many tokens a clip becomes, when each sounds, and where they stand among a video's tokens.

Contract: pure Python, no torch; exact before anything is decoded or encoded. An
:class:`AudioPlan` is hashable and survives JSON. Times are seconds on the media time line, the one
of the frames. Rows are numbered from 0 within each medium.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor, inf, isfinite
from typing import NamedTuple, Protocol

from av_llava.errors import BudgetError, MediaError, UsageError
from av_llava.geometry import AudioGeometry, audio_chunks, audio_tokens
from av_llava.settings import AudioSettings, Settings

VIDEO, AUDIO = "video", "audio"


@dataclass(frozen=True)
class AudioPlan(Settings):
    """The tokens of one clip. Made by :func:`plan_audio`."""

    n_samples: int
    """Samples of the clip at 16 kHz, silence up to ``min_samples`` included."""
    chunks: tuple[tuple[int, int], ...]
    """The stretches that are encoded, as (first, stop) sample numbers."""
    chunk_lengths: tuple[int, ...]
    """For each chunk the tower's input frames that hold sound."""
    frames: tuple[int, ...]
    """For each chunk the tower's output frames that hold sound."""
    stride: int
    """Output frames per token."""
    base_stride: int
    """The stride that the settings ask for; ``stride`` is larger under the token cap."""
    frame_s: float
    """Seconds per output frame."""
    start_s: float = 0.0
    """When the clip begins on the media time line."""
    chunk_newline: bool = False
    """Whether a learned newline follows each chunk."""
    bounds: bool = False
    """Whether a learned vector stands before the first and after the last token."""
    sample_rate_hz: int = 16_000
    """Samples per second."""

    @property
    def chunk_tokens(self) -> tuple[int, ...]:
        """Tokens of sound of each chunk, learned marks not counted."""
        return tuple(audio_tokens(n, self.stride) for n in self.frames)

    @property
    def n_tokens(self) -> int:
        """All rows: sound, chunk newlines, and bounds."""
        marks = len(self.frames) * self.chunk_newline + 2 * self.bounds
        return sum(self.chunk_tokens) + marks

    def __len__(self) -> int:
        return self.n_tokens

    @property
    def seconds_per_token(self) -> float:
        """Sound that one token stands for."""
        return self.stride * self.frame_s

    @property
    def used_s(self) -> float:
        """Seconds of sound that are encoded."""
        return sum(stop - first for first, stop in self.chunks) / self.sample_rate_hz

    @property
    def duration_s(self) -> float:
        """Seconds of the whole clip."""
        return self.n_samples / self.sample_rate_hz

    @cached_property
    def centres_s(self) -> tuple[float, ...]:
        """The middle of the sound of each row, in order; a mark has the time of its neighbour."""
        rows: list[float] = []
        for (first, _), n_frames, n_tokens in zip(
            self.chunks, self.frames, self.chunk_tokens, strict=True
        ):
            chunk_s = self.start_s + first / self.sample_rate_hz
            edges = [min(i * self.stride, n_frames) for i in range(n_tokens + 1)]
            middles = [(lo + hi) / 2 for lo, hi in itertools.pairwise(edges)]
            rows += [chunk_s + m * self.frame_s for m in middles]
            rows += rows[-1:] * self.chunk_newline
        return tuple(rows[:1] * self.bounds + rows + rows[-1:] * self.bounds)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what was left out or made coarser; empty when nothing was."""
        notes = []
        if self.duration_s - self.used_s >= 0.1:
            notes.append(
                f"Of {self.duration_s:.1f} s of sound, {self.used_s:.1f} s are used in "
                f"{len(self.chunks)} chunk(s) (settings max_seconds and long_audio)."
            )
        if self.stride > self.base_stride:
            notes.append(
                f"One audio token stands for {self.seconds_per_token:.2f} s instead of "
                f"{self.base_stride * self.frame_s:.2f} s, so that the clip takes "
                f"{self.n_tokens} tokens (setting max_tokens)."
            )
        return tuple(notes)


def plan_audio(
    n_samples: int, settings: AudioSettings, geometry: AudioGeometry, start_s: float = 0.0
) -> AudioPlan:
    """Plan one clip.

    Args:
        n_samples: samples of the clip at 16 kHz.
        settings: pooling, caps, and marks.
        geometry: of the tower, see ``audio.towers.audio_geometry``.
        start_s: when the clip begins on the media time line.

    Raises:
        MediaError: a clip without samples.
        BudgetError: ``max_tokens`` holds not even one token per chunk.
    """
    if n_samples < 1:
        raise MediaError(
            "A clip of sound has no samples; leave it out, or give a longer range of the file."
        )
    total = max(n_samples, settings.min_samples)
    chunks = _chunks(total, settings, geometry)
    lengths = tuple(geometry.input_frames(stop - first) for first, stop in chunks)
    frames = tuple(geometry.frames(n) for n in lengths)
    base = 1 if settings.pool_mode == "none" else settings.pool_stride
    bounds = settings.use_start_end and settings.token_mode == "param"
    marks = len(chunks) * settings.chunk_newline + 2 * bounds
    return AudioPlan(
        n_samples=total,
        chunks=chunks,
        chunk_lengths=lengths,
        frames=frames,
        stride=_stride(frames, base, settings, marks),
        base_stride=base,
        frame_s=1 / geometry.frame_rate_hz,
        start_s=start_s,
        chunk_newline=settings.chunk_newline,
        bounds=bounds,
        sample_rate_hz=geometry.sample_rate_hz,
    )


def _chunks(
    total: int, settings: AudioSettings, geometry: AudioGeometry
) -> tuple[tuple[int, int], ...]:
    """The stretches to encode: all of the clip, its first part, or evenly spaced chunks."""
    size = geometry.chunk_samples
    limit = max(int(settings.max_seconds * geometry.sample_rate_hz), settings.min_samples)
    if total <= limit or settings.long_audio == "keep":
        return audio_chunks(min(total, limit), size, settings.min_samples)
    count, size = max(1, limit // size), min(size, limit)
    slack = total - size
    starts = [i * slack // (count - 1) for i in range(count)] if count > 1 else [slack // 2]
    return tuple((lo, lo + size) for lo in starts)


def _stride(frames: Sequence[int], base: int, settings: AudioSettings, marks: int) -> int:
    """The smallest stride from ``base`` on with which the clip fits ``max_tokens``.

    Stacked frames enter a layer of fixed width, so there the stride grows by whole multiples
    (neighbouring frames are averaged before they are stacked); otherwise one by one.
    """
    room = settings.max_tokens - marks
    if room < len(frames):
        raise BudgetError(
            f"A clip of {len(frames)} chunks needs at least {len(frames) + marks} audio tokens, "
            f"but max_tokens is {settings.max_tokens}; raise max_tokens or lower max_seconds."
        )
    step = base if settings.pool_mode == "stack" else 1
    stride = max(base, -(-(sum(frames) // room) // step) * step)
    while sum(audio_tokens(n, stride) for n in frames) > room:
        stride += step
    return stride


class TimedRows(Protocol):
    """Consecutive rows of a video that belong together in time, e.g. one frame's.

    ``aggregators.plan.Span`` is one.
    """

    @property
    def t_start(self) -> float | None:
        """When they begin, in seconds; only asked of timed rows."""

    @property
    def lo(self) -> int:
        """First row."""

    @property
    def hi(self) -> int:
        """Row after the last."""

    @property
    def timed(self) -> bool:
        """Whether sound may follow them; of two blocks (slow, fast) only the fast one's may."""

    @property
    def stream(self) -> str:
        """``mark`` for a mark of the whole video, which stays with the rows before it."""


class Piece(NamedTuple):
    """Rows ``[lo, hi)`` of a medium."""

    kind: str
    """video or audio."""
    lo: int
    hi: int


def place(spans: Sequence[TimedRows], audio: AudioPlan, settings: AudioSettings) -> list[Piece]:
    """Order a video's rows and its own sound as ``settings.placement`` says.

    Start and end tokens are not among the pieces: one pair goes around all audio pieces.
    """
    if settings.placement == "interleave":
        return interleave(spans, audio, settings)
    n_rows = spans[-1].hi if spans else 0
    return _merged([Piece(VIDEO, 0, n_rows), Piece(AUDIO, 0, audio.n_tokens)])


def interleave(
    spans: Sequence[TimedRows], audio: AudioPlan, settings: AudioSettings
) -> list[Piece]:
    """Put each frame's sound after the frame.

    A token belongs to the last timed span that begins before the token's middle. What sounds
    before the first of them stands before it, what sounds after the last one stands behind it.
    With ``settings.group_seconds`` the time line is cut into groups: all frames of a group come
    first, then its sound.

    Args:
        spans: the video's rows in output order, without gaps, timed ones in order of time
            (``TokenPlan.spans()``).
        audio: the plan of the sound, on the same time line.
        settings: for ``group_seconds``.

    Returns:
        Pieces that hold every row of both media once, each medium in its own order.

    Raises:
        UsageError: spans with gaps, without times, or with times that go back.
    """
    _check(spans)
    timed = [i for i, span in enumerate(spans) if span.timed]
    if not timed:
        return _merged([*map(_video, spans), Piece(AUDIO, 0, audio.n_tokens)])
    times = [_time(spans[i]) for i in timed]
    limits = _limits(times, settings.group_seconds)
    pieces: list[Piece] = []
    video_row = audio_row = 0
    for n, limit in enumerate(limits):
        stop = spans[timed[n]].lo if n == 0 else _end(spans, timed[n - 1])
        pieces.append(Piece(VIDEO, video_row, stop))
        next_row = bisect_left(audio.centres_s, limit, lo=audio_row)
        pieces.append(Piece(AUDIO, audio_row, next_row))
        video_row, audio_row = stop, next_row
    return _merged([*pieces, Piece(VIDEO, video_row, spans[-1].hi)])


def _limits(times: list[float], group_seconds: float | None) -> list[float]:
    """Up to when sound is placed: before the first timed span, then after each of them."""
    if any(later < earlier for earlier, later in itertools.pairwise(times)):
        raise UsageError(
            "Interleaving sound needs frames in order of time, but the times of the video's "
            "tokens go back; use placement 'block' with this aggregator."
        )
    if group_seconds is None:
        return [*times, inf]
    groups = [floor(t / group_seconds) for t in times]
    limits = [groups[0] * group_seconds]
    for here, following in itertools.pairwise(groups):
        limits.append(-inf if here == following else following * group_seconds)
    return [*limits, inf]


def _check(spans: Sequence[TimedRows]) -> None:
    row = 0
    for span in spans:
        if span.lo != row or span.hi < span.lo:
            raise UsageError(
                f"The rows of a video must follow each other, but rows {span.lo} to {span.hi} "
                f"come where row {row} was expected."
            )
        row = span.hi


def _time(span: TimedRows) -> float:
    if span.t_start is None or not isfinite(span.t_start):
        raise UsageError(
            f"Interleaving sound needs the time of every frame, but rows {span.lo} to {span.hi} "
            f"have {span.t_start!r}; give the frames' times, or use placement 'block'."
        )
    return span.t_start


def _end(spans: Sequence[TimedRows], index: int) -> int:
    """Row after a span and after the marks that stay with it."""
    while index + 1 < len(spans) and spans[index + 1].stream == "mark":
        index += 1
    return spans[index].hi


def _video(span: TimedRows) -> Piece:
    return Piece(VIDEO, span.lo, span.hi)


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Drop empty pieces and join neighbours of one medium."""
    out: list[Piece] = []
    for piece in pieces:
        if piece.lo == piece.hi:
            continue
        if out and out[-1].kind == piece.kind and out[-1].hi == piece.lo:
            out[-1] = Piece(piece.kind, out[-1].lo, piece.hi)
        else:
            out.append(piece)
    return out
