"""What an aggregator will make of one video: exact, before any feature exists.

Contract: pure Python, no torch. A :class:`TokenPlan` says how many tokens there will be, in which
order, and where in the video each comes from. It is hashable, pickles, and survives JSON. Frames
are indices into the frames given (0 is the first sampled one), rows are token indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from av_llava.geometry import adaptive_bins, bilinear_bins, window_bins
from av_llava.settings import PoolSettings

STREAM_IDS = {"slow": 0, "fast": 1, "single": 2}
"""Number of each stream in token metadata."""

Box = tuple[int, int, int, int]
"""Half-open patch box in the source grid: y0, y1, x0, x1."""


class Item(NamedTuple):
    """The consecutive rows of one frame, or one group of frames, of one stream."""

    stream: int
    """Index into ``TokenPlan.streams``."""
    number: int
    """Number of the item in its stream."""
    lo: int
    """First row."""
    hi: int
    """Row after the last, newlines and frame end included."""
    n_patches: int
    """Rows that are pooled patches."""


class Span(NamedTuple):
    """Consecutive rows that belong together in time."""

    stream: str
    """slow, fast, single, or mark (the newline at the end of the video)."""
    frame_lo: int
    """First frame shown."""
    frame_hi: int
    """Frame after the last one shown."""
    t_start: float | None
    """Time of the first frame in seconds; None when the plan has no times."""
    t_end: float | None
    """Time in seconds at which the span's last frame gives way to the next one."""
    lo: int
    """First row."""
    hi: int
    """Row after the last."""
    timed: bool
    """Whether sound of this time may follow the span: the spans for which this holds cover the
    video once, in order (of two blocks, only the fast one)."""


@dataclass(frozen=True)
class StreamPlan:
    """One token stream of a plan."""

    name: str
    """slow, fast or single."""
    frames: tuple[int, ...]
    """The frames shown, in order."""
    groups: tuple[tuple[int, int], ...] | None
    """Half-open ranges into ``frames`` that are averaged; None: each frame on its own."""
    pool: PoolSettings
    """Pooling inside each frame."""
    rows: int
    """Rows of patches per item."""
    cols: int
    """Patches per row."""
    kept: tuple[int, ...] | None = None
    """Of unpooled streams: the only patches kept, as increasing indices into the patches of all
    ``frames`` in raster and time order; None keeps all."""

    @property
    def n_items(self) -> int:
        """Frames, or groups of frames."""
        return len(self.frames) if self.groups is None else len(self.groups)

    @property
    def patches(self) -> tuple[int, ...]:
        """Patches of every item."""
        cells = self.rows * self.cols
        if self.kept is None:
            return (cells,) * self.n_items
        counts = [0] * self.n_items
        for index in self.kept:
            counts[index // cells] += 1
        return tuple(counts)

    def frame_range(self, item: int) -> tuple[int, int]:
        """First and last frame of an item."""
        if self.groups is None:
            return self.frames[item], self.frames[item]
        lo, hi = self.groups[item]
        return self.frames[lo], self.frames[hi - 1]

    def group_size(self, item: int) -> int:
        """Frames that are averaged into an item."""
        return 1 if self.groups is None else self.groups[item][1] - self.groups[item][0]

    def boxes(self, height: int, width: int) -> list[tuple[Box, int]]:
        """The patch box of each pooled patch in raster order, and the patches it merges."""
        if self.pool.kind.startswith("raster"):
            return [_raster_pair(i, height, width) for i in range(self.cols)]
        ys, xs = pool_bins(self.pool, height, width, self.rows, self.cols)
        return [((*y, *x), (y[1] - y[0]) * (x[1] - x[0])) for y in ys for x in xs]


def pool_bins(
    pool: PoolSettings, height: int, width: int, rows: int, cols: int
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Source ranges of the pooled rows and of the pooled columns."""
    if pool.kind == "adaptive":
        return adaptive_bins(height, rows), adaptive_bins(width, cols)
    if pool.kind == "bilinear":
        return bilinear_bins(height, rows), bilinear_bins(width, cols)
    if pool.kind == "identity":
        return window_bins(height, 1, rows), window_bins(width, 1, cols)
    if pool.kind.startswith("pair"):
        return window_bins(height, 1, rows), window_bins(width, 2, cols)
    return window_bins(height, pool.stride, rows), window_bins(width, pool.stride, cols)


def _raster_pair(index: int, height: int, width: int) -> tuple[Box, int]:
    """The box around patches ``2 index`` and ``2 index + 1`` of the flattened grid."""
    first, last = 2 * index, min(2 * index + 1, height * width - 1)
    y, x = divmod(first, width)
    if last // width == y:
        return (y, y + 1, x, x + 1 + last - first), 1 + last - first
    return (y, y + 2, 0, width), 2


def item_tokens(rows: int, cols: int, newline: str, frame_end: bool) -> int:
    """Tokens of one frame of ``rows`` x ``cols`` pooled patches, marks included."""
    return rows * (cols + (newline == "row")) + (newline == "frame") + frame_end


@dataclass(frozen=True)
class TokenPlan:
    """The tokens of one video. Made by :meth:`Aggregator.plan`."""

    frames: int
    """Frames given."""
    height: int
    """Rows of patches of each frame, where pooling stands."""
    width: int
    """Columns of patches."""
    streams: tuple[StreamPlan, ...]
    """The streams, slow before fast."""
    layout: str
    """See ``AggregatorSettings.layout``."""
    newline: str
    """See ``AggregatorSettings.newline``."""
    frame_end: bool
    """Whether every frame ends in a mark."""
    times: tuple[float, ...] | None = None
    """Time of each frame given, in seconds."""
    note: str = ""
    """What the aggregator has to say about its choice."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the video: patches, newlines and frame ends."""
        total = int(self.newline == "video")
        for stream in self.streams:
            marks = item_tokens(stream.rows, 0, self.newline, self.frame_end)
            total += sum(stream.patches) + stream.n_items * marks
        return total

    def __len__(self) -> int:
        return self.n_tokens

    @property
    def marks_needed(self) -> tuple[str, ...]:
        """Names of the learned vectors that the plan inserts."""
        return ("newline",) * (self.newline != "none") + ("frame_end",) * self.frame_end

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """All items in output order, with their rows."""
        out, row = [], 0
        patches = [stream.patches for stream in self.streams]
        for number, index in self._order():
            n = patches[number][index]
            marks = item_tokens(self.streams[number].rows, 0, self.newline, self.frame_end)
            out.append(Item(number, index, row, row + n + marks, n))
            row += n + marks
        return tuple(out)

    def _order(self) -> list[tuple[int, int]]:
        """(stream, item) pairs in output order."""
        pairs = [(s, i) for s, stream in enumerate(self.streams) for i in range(stream.n_items)]
        if self.layout == "fast_then_slow":
            pairs.sort(key=lambda pair: -pair[0])
        elif self.layout in ("by_frame", "by_time"):
            pairs.sort(key=lambda pair: (self.streams[pair[0]].frame_range(pair[1])[0], *pair))
        return pairs

    def starts(self, stream: int) -> tuple[int, ...]:
        """First row of every item of a stream."""
        return tuple(item.lo for item in self.items if item.stream == stream)

    def frame_time(self, frame: int) -> tuple[float, float] | None:
        """When a frame begins and gives way to the next, in seconds; None without times.

        The last frame is taken to last as long as the one before it.
        """
        if self.times is None:
            return None
        start = self.times[frame]
        if frame + 1 < self.frames:
            return start, self.times[frame + 1]
        return start, start + (start - self.times[frame - 1] if frame else 0.0)

    def spans(self) -> list[Span]:
        """The rows of every frame or group in output order; together they cover all rows."""
        two_blocks = self.layout in ("slow_then_fast", "fast_then_slow", "by_time")
        out = []
        for item in self.items:
            stream = self.streams[item.stream]
            first, last = stream.frame_range(item.number)
            start, end = self.frame_time(first), self.frame_time(last)
            out.append(
                Span(
                    stream=stream.name,
                    frame_lo=first,
                    frame_hi=last + 1,
                    t_start=None if start is None else start[0],
                    t_end=None if end is None else end[1],
                    lo=item.lo,
                    hi=item.hi,
                    timed=not (two_blocks and stream.name == "slow"),
                )
            )
        if self.newline == "video":
            start, end = self.frame_time(0), self.frame_time(self.frames - 1)
            times = (None if start is None else start[0], None if end is None else end[1])
            n = self.n_tokens
            out.append(Span("mark", 0, self.frames, *times, n - 1, n, timed=False))
        return out

    def time_spans(self) -> list[Span]:
        """The timed spans, each stretched in time to the start of the next one.

        Sound between ``t_start`` and ``t_end`` belongs after row ``hi - 1``, also where the
        aggregator left frames out.
        """
        timed = [span for span in self.spans() if span.timed]
        following = [span.t_start for span in timed[1:]]
        return [
            *(span._replace(t_end=t) for span, t in zip(timed, following, strict=False)),
            *timed[-1:],
        ]

    def describe(self) -> str:
        """Return a few lines for a person to read."""
        lines = [
            f"{self.frames} {_plural('frame', self.frames)} of {self.height}×{self.width} patches "
            f"→ {self.n_tokens} tokens ({self.layout.replace('_', ' ')})"
        ]
        for stream in self.streams:
            lines.append("  " + "".join(self._describe_stream(stream)))
        if self.newline == "video":
            lines.append("  1 newline at the end of the video")
        if self.note:
            lines.append(f"  {self.note}")
        return "\n".join(lines)

    def _describe_stream(self, stream: StreamPlan) -> Iterator[str]:
        yield f"{stream.name}: {stream.n_items} "
        yield _plural("frame" if stream.groups is None else "group", stream.n_items)
        if stream.groups is not None:
            yield f" of {len(stream.frames)} {_plural('frame', len(stream.frames))}"
        if stream.kept is not None:
            total = stream.n_items * stream.rows * stream.cols
            yield f", {len(stream.kept)} patches kept of {total}"
        elif stream.pool.kind.startswith("raster"):
            yield f" × {stream.cols} patches"
        else:
            yield f" × {stream.rows}×{stream.cols} patches"
        yield f" ({stream.pool.kind.replace('_', ' ')} pooling)"
        if self.newline == "row":
            yield f" + {stream.rows} {_plural('newline', stream.rows)} each"
        elif self.newline == "frame":
            yield " + 1 newline each"
        if self.frame_end:
            yield " + 1 frame end each"
        marks = item_tokens(stream.rows, 0, self.newline, self.frame_end)
        yield f" = {sum(stream.patches) + stream.n_items * marks} tokens"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data that :meth:`from_dict` accepts."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["streams"] = [
            {
                **{f.name: getattr(stream, f.name) for f in dataclasses.fields(stream)},
                "frames": list(stream.frames),
                "groups": None if stream.groups is None else [list(g) for g in stream.groups],
                "pool": stream.pool.to_dict(),
                "kept": None if stream.kept is None else list(stream.kept),
            }
            for stream in self.streams
        ]
        data["times"] = None if self.times is None else list(self.times)
        return {**data, "n_tokens": self.n_tokens}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenPlan:
        """Build from what :meth:`to_dict` returned."""
        fields = {key: value for key, value in data.items() if key != "n_tokens"}
        times = fields.pop("times")
        streams = tuple(_stream_from_dict(stream) for stream in fields.pop("streams"))
        return cls(streams=streams, times=None if times is None else tuple(times), **fields)


def _stream_from_dict(data: Mapping[str, Any]) -> StreamPlan:
    groups, kept = data["groups"], data["kept"]
    return StreamPlan(
        name=data["name"],
        frames=tuple(data["frames"]),
        groups=None if groups is None else tuple((lo, hi) for lo, hi in groups),
        pool=PoolSettings.from_dict(data["pool"]),
        rows=data["rows"],
        cols=data["cols"],
        kept=None if kept is None else tuple(kept),
    )


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"
