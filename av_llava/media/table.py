"""The table of all frames of a film: presentation times and where each packet lies.

Contract: made by demuxing only, nothing is decoded. Packets that an edit list hides are left
out of the frames but kept as packets, since later frames may need them. Streams without time
stamps (raw H.264) get them from the frame rate. Times count from the container's start.
"""

from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

from av_llava.errors import MediaError
from av_llava.media.container import (
    clock,
    container_duration_s,
    is_indexed,
    need_video,
    only,
    open_container,
    packets,
    start_ticks,
    stream_duration_s,
)
from av_llava.media.limits import Deadline, Limits
from av_llava.media.source import LocalFile

NO_TIME = np.iinfo(np.int64).min
# A window that starts later than this is reached by a seek instead of by reading all before it.
_SEEK_FROM_S = 20.0
_SEEK_MARGIN_S = 2.0


@dataclass(frozen=True, eq=False)
class FrameTable:
    """Frames in display order (n) and packets in file order (P)."""

    pts_s: np.ndarray
    """float64 [n], seconds after the container's start."""
    ticks: np.ndarray
    """int64 [n], the same in ticks of the stream's clock, as decoded frames carry them."""
    positions: np.ndarray
    """int64 [n], index of each frame's packet."""
    packet_ticks: np.ndarray
    """int64 [P], presentation time of each packet; NO_TIME where the file has none."""
    packet_dts: np.ndarray
    """int64 [P], decoding time of each packet; NO_TIME where the file has none."""
    keyframe: np.ndarray
    """bool [P], whether decoding can start at the packet."""
    time_base: Fraction
    avg_fps: float
    """Average frame rate: the container's, or the table's where the header is absurd."""
    end_s: float
    """When the last frame ends."""
    counted: bool = False
    """The stream has no time stamps: frames are known by their number only."""
    seek_ticks: int | None = None
    """Packet 0 is not the file's first one but the one that a seek to this time lands on."""
    whole: bool = True
    """The table covers the whole file, not a window only."""
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ticks)

    def __repr__(self) -> str:
        return (
            f"FrameTable({len(self.ticks)} frames, {self.pts_s[0]:.3f}–{self.end_s:.3f} s, "
            f"{self.avg_fps:.3f} fps, {int(self.keyframe.sum())} keyframes)"
        )

    @classmethod
    def of_times(cls, times_s: np.ndarray, warnings: tuple[str, ...] = ()) -> FrameTable:
        """Make the table of separate pictures from n start times and the end, float64 [n + 1]."""
        count = len(times_s) - 1
        numbers = np.arange(count)
        return cls(
            pts_s=times_s[:-1],
            ticks=numbers,
            positions=numbers,
            packet_ticks=numbers,
            packet_dts=numbers,
            keyframe=np.ones(count, bool),
            time_base=Fraction(1, 1),
            avg_fps=count / float(times_s[-1]),
            end_s=float(times_s[-1]),
            warnings=warnings,
        )

    @functools.cached_property
    def key_positions(self) -> np.ndarray:
        """int64 [K], packets at which decoding can start."""
        return np.flatnonzero(self.keyframe)

    @functools.cached_property
    def has_leading_pictures(self) -> bool:
        """Whether frames shown before a later keyframe are stored after it (open GOP)."""
        keys = self.key_positions
        owner = np.searchsorted(keys, self.positions, side="right") - 1
        later = owner > 0
        return bool((self.ticks[later] < self.packet_ticks[keys[owner[later]]]).any())


def scan_table(
    file: LocalFile,
    limits: Limits,
    deadline: Deadline,
    start_s: float | None = None,
    end_s: float | None = None,
) -> FrameTable:
    """Read the table of a file, or only the part that a window needs.

    Raises:
        MediaError: no video stream, no frames, or too many or too long for the limits.
    """
    with open_container(file, deadline) as container:
        stream = need_video(container, file.name, limits)
        far = start_s is not None and start_s > _SEEK_FROM_S and is_indexed(container)
        table = _scan(
            container, stream, file.name, limits, deadline, start_s if far else None, end_s
        )
    if table is None:  # the seek did not land on a keyframe before the window
        return scan_table(file, limits, deadline, None, end_s)
    return table


def _scan(
    container: InputContainer,
    stream: av.VideoStream,
    name: str,
    limits: Limits,
    deadline: Deadline,
    start_s: float | None,
    end_s: float | None,
) -> FrameTable | None:
    """Read the table of an open container; None if seeking to ``start_s`` fails."""
    tick, origin = clock(stream), start_ticks(stream)
    only(stream)
    duration_s = container_duration_s(container)
    if duration_s is not None:
        limits.check("max_duration_s", duration_s, repr(name), "its length in seconds")
    found = _Packets(name, limits, deadline)
    seek_ticks = None
    if start_s is not None:
        seek_ticks = int((start_s - _SEEK_MARGIN_S) / tick) + origin
        container.seek(seek_ticks, stream=stream)
    found.read(container, stream, None if end_s is None else end_s / tick + origin)
    if seek_ticks is not None and not found.begin_before(seek_ticks):
        return None
    return found.table(stream, origin, duration_s, seek_ticks)


class _Packets:
    """Time stamps and flags of packets in file order, a few bytes each."""

    def __init__(self, name: str, limits: Limits, deadline: Deadline) -> None:
        self.name, self.limits, self.deadline = name, limits, deadline
        self.pts, self.dts, self.duration = array("q"), array("q"), array("q")
        self.keyframe, self.hidden = bytearray(), bytearray()
        self.whole = True
        self.error: str | None = None

    def read(
        self, container: InputContainer, stream: av.VideoStream, last_ticks: float | None
    ) -> None:
        """Collect packets until the file, or the window, ends; a damaged tail is noted."""
        try:
            for packet in packets(container, stream):
                self.deadline.check()
                self._add(packet)
                # later packets are shown after their decoding time
                if last_ticks is not None and packet.dts is not None and packet.dts > last_ticks:
                    self.whole = False
                    break
        except FFmpegError as error:
            self.error = str(error.strerror or error)

    def _add(self, packet: av.Packet) -> None:
        self.pts.append(NO_TIME if packet.pts is None else packet.pts)
        self.dts.append(NO_TIME if packet.dts is None else packet.dts)
        self.duration.append(packet.duration or 0)
        self.keyframe.append(packet.is_keyframe)
        self.hidden.append(packet.is_discard)
        if len(self.pts) > self.limits.max_frames:
            self.limits.check("max_frames", len(self.pts), repr(self.name), "the number of frames")

    def begin_before(self, ticks: int) -> bool:
        """Return whether the first packet is a keyframe shown no later than ``ticks``."""
        return bool(self.pts) and bool(self.keyframe[0]) and NO_TIME < self.pts[0] <= ticks

    def table(
        self,
        stream: av.VideoStream,
        origin: int,
        duration_s: float | None,
        seek_ticks: int | None,
    ) -> FrameTable:
        """Sort the packets into a table of frames."""
        base = clock(stream)
        pts = np.frombuffer(self.pts, np.int64) if len(self.pts) else np.empty(0, np.int64)
        hidden = np.frombuffer(self.hidden, np.uint8).astype(bool)
        shown = np.flatnonzero((pts != NO_TIME) & ~hidden)
        counted = _has_no_order(stream) or (bool(len(pts)) and bool((pts == NO_TIME).all()))
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if counted:
            rate = rate or 25.0
            positions = ticks = np.arange(len(pts), dtype=np.int64)
            timed = bool((pts != NO_TIME).all())
            pts_s = (np.sort(pts) - origin) * float(base) if timed else ticks / rate
            gap_s = 1 / rate
        else:
            ticks, order = np.unique(pts[shown], return_index=True)
            positions = shown[order]
            pts_s = (ticks - origin) * base.numerator / base.denominator
            gap_s = self._last_gap(ticks, positions) * float(base)
        if not len(ticks):
            raise MediaError(
                f"{self.name!r} has a video stream but no frames in it"
                + (f" ({self.error})." if self.error else ".")
            )
        mean = (len(pts_s) - 1) / (pts_s[-1] - pts_s[0]) if pts_s[-1] > pts_s[0] else rate
        if not rate or not 0.2 < rate / max(mean, 1e-9) < 5:
            rate = float(mean) or 1.0
        whole = self.whole and seek_ticks is None
        end_s = float(pts_s[-1]) + float(gap_s)
        if not self.whole and duration_s is not None:
            end_s = max(end_s, duration_s)
        self.limits.check("max_duration_s", end_s, repr(self.name), "its length in seconds")
        return FrameTable(
            pts_s=pts_s,
            ticks=ticks,
            positions=positions,
            packet_ticks=pts,
            packet_dts=np.frombuffer(self.dts, np.int64),
            keyframe=np.frombuffer(self.keyframe, np.uint8).astype(bool),
            time_base=base,
            avg_fps=rate,
            end_s=end_s,
            counted=counted,
            seek_ticks=seek_ticks,
            whole=whole,
            warnings=self._warnings(
                end_s - float(pts_s[0]), stream_duration_s(stream), whole and not counted
            ),
        )

    def _last_gap(self, ticks: np.ndarray, positions: np.ndarray) -> float:
        """Return how long the last frame stays, in ticks."""
        stated = self.duration[int(positions[-1])] if len(positions) else 0
        if stated > 0:
            return stated
        return float(np.median(np.diff(ticks))) if len(ticks) > 1 else 0.0

    def _warnings(self, span_s: float, stated_s: float | None, whole: bool) -> tuple[str, ...]:
        """Note a file that ends before its header says."""
        if self.error:
            return (f"the file breaks off after {span_s:.2f} s of picture ({self.error})",)
        if whole and stated_s is not None and span_s < 0.95 * stated_s - 0.5:
            return (f"the header states {stated_s:.2f} s of picture, the file has {span_s:.2f} s",)
        return ()


def _has_no_order(stream: av.VideoStream) -> bool:
    """Return whether time stamps do not tell the order of display: AVI has none for B-frames."""
    return stream.container.format.name == "avi" and stream.codec_context.has_b_frames
