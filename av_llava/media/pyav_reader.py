"""Exact frames through PyAV: one pass over the file, decoding only what the wanted frames need.

Contract: a frame is accepted by its own time stamp, never by counting. Packets between the
wanted groups of pictures are read and dropped, so that no seek can land wrong; a long gap is
skipped by a seek only if the packet it lands on is the one that the table expects. In H.264,
pictures that no other picture refers to are not decoded unless wanted. Frames that do not come
this way are tried again without these short cuts; what still fails is counted, not replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from av_llava.media.container import is_indexed, need_video, only, open_container, packets
from av_llava.media.limits import Deadline, Limits
from av_llava.media.source import LocalFile
from av_llava.media.table import NO_TIME, FrameTable

# Codecs whose bitstream says which pictures nothing refers to.
_SKIPPABLE = frozenset({"h264"})
# Reading and dropping fewer packets than this is cheaper than a seek.
_SEEK_PACKETS = 2000
_MAX_THREADS = 16
# No codec shows a picture more than this many pictures after its place in the file.
_LONGEST_REORDER = 64


@dataclass
class DecodeReport:
    """What went wrong while decoding, counted."""

    errors: int = 0
    damaged: int = 0
    replaced: int = 0
    missing: list[int] = field(default_factory=list)
    last_error: str = ""

    def warnings(self, wanted: int) -> tuple[str, ...]:
        """Return the counts as sentences."""
        notes = []
        if self.missing:
            reason = f" ({self.last_error})" if self.last_error else ""
            notes.append(f"{len(self.missing)} of {wanted} frames could not be decoded{reason}")
        if self.damaged:
            notes.append(f"{self.damaged} of {wanted} frames are damaged but shown")
        if self.replaced:
            notes.append(
                f"{self.replaced} of {wanted} frames are not stored as pictures; "
                f"the picture on screen then was taken"
            )
        return tuple(notes)


@dataclass(frozen=True)
class Attempt:
    """One way of decoding; later ways are slower and more forgiving."""

    short_cuts: bool
    """Seek, and leave out pictures that nothing refers to."""
    from_start: bool
    """Decode everything from the file's beginning."""


ATTEMPTS = (Attempt(True, False), Attempt(False, False), Attempt(False, True))


@dataclass(frozen=True)
class Run:
    """Packets ``[first, stop)`` to decode in one go for some wanted frames."""

    first: int
    stop: int
    frames: tuple[int, ...]
    """Indices into the table, increasing."""


def plan_runs(table: FrameTable, wanted: list[int], from_start: bool = False) -> list[Run]:
    """Group wanted frames into runs of packets, each beginning where decoding can begin.

    A frame that is shown before the keyframe it follows in the file (open GOP) needs the
    keyframe before that.
    """
    keys = table.key_positions
    runs: list[Run] = []
    for index in sorted(wanted, key=lambda i: int(table.positions[i])):
        position = int(table.positions[index])
        owner = int(np.searchsorted(keys, position, side="right")) - 1
        while owner > 0 and table.ticks[index] < table.packet_ticks[keys[owner]]:
            owner -= 1
        first = 0 if from_start or table.counted or owner < 0 else int(keys[owner])
        stop = position + 1
        if table.counted:  # without times only the number counts, which reordering delays
            stop = min(stop + _LONGEST_REORDER, len(table.keyframe))
        run = Run(first, stop, (index,))
        while runs and run.first <= runs[-1].stop:
            before = runs.pop()
            frames = tuple(sorted(before.frames + run.frames))
            run = Run(min(before.first, run.first), max(before.stop, run.stop), frames)
        runs.append(run)
    return runs


class PyAVReader:
    """Reads wanted frames of one file; `report` tells what could not be had."""

    def __init__(
        self,
        file: LocalFile,
        table: FrameTable,
        limits: Limits,
        deadline: Deadline,
        threads: int | None = None,
    ) -> None:
        self.file, self.table, self.limits, self.deadline = file, table, limits, deadline
        self.threads = threads or min(usable_cpus(), _MAX_THREADS)
        self.report = DecodeReport()
        self._reformatter = VideoReformatter()
        self._lost: set[int] = set()

    def frames(self, wanted: list[int]) -> Iterator[tuple[int, float, np.ndarray]]:
        """Yield (index, time in seconds, uint8 [height, width, 3]) of wanted table indices.

        Increasing, but frames that needed a second try come last. An index that cannot be
        decoded is left out and noted in ``report``.
        """
        left = set(wanted)
        for attempt in ATTEMPTS:
            # decoding from the start cannot mend what a decoding error lost
            retry = left - self._lost if attempt.from_start else left
            if not retry:
                continue
            for index, time_s, picture in self._attempt(attempt, sorted(retry)):
                left.discard(index)
                yield index, time_s, picture
        self.report.missing = sorted(left)

    def _attempt(
        self, attempt: Attempt, wanted: list[int]
    ) -> Iterator[tuple[int, float, np.ndarray]]:
        """Decode the wanted frames in one pass over the file."""
        runs = plan_runs(self.table, wanted, attempt.from_start)
        if attempt.from_start and runs == plan_runs(self.table, wanted):
            return  # the attempt before has already begun at the start
        with open_container(self.file, self.deadline) as container:
            stream = need_video(container, self.file.name, self.limits)
            only(stream)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = self.threads
            source = _Packets(container, stream, self.table, self.deadline, attempt.short_cuts)
            for run in runs:
                for index, frame in self._decode_run(run, stream, source, attempt):
                    yield index, self._time_s(index, frame), self._picture(frame)
            if source.error:
                self.report.last_error = source.error

    def _decode_run(
        self, run: Run, stream: av.VideoStream, source: _Packets, attempt: Attempt
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decode one run and yield its wanted frames as they come."""
        context = stream.codec_context
        skip = attempt.short_cuts and context.name in _SKIPPABLE and not self.table.counted
        ticks = {int(self.table.ticks[i]) for i in run.frames}
        picker = _Picker(self.table, run, attempt, self.report)
        for packet in source.between(run.first, run.stop):
            if skip:
                context.skip_frame = "DEFAULT" if packet.pts in ticks else "NONREF"
            yield from picker.pick(self._decode(context, packet, picker))
        yield from picker.pick(self._decode(context, None, picker))
        yield from picker.rest()
        if picker.broken:
            self._lost.update(run.frames)
        context.flush_buffers()

    def _decode(
        self, context: av.VideoCodecContext, packet: av.Packet | None, picker: _Picker
    ) -> list[av.VideoFrame]:
        """Decode one packet (None: what the decoder still holds); a damaged one gives none."""
        try:
            return context.decode(packet)
        except FFmpegError as error:
            self.report.errors += 1
            self.report.last_error = str(error.strerror or error)
            picker.broken = True
            return []

    def _time_s(self, index: int, frame: av.VideoFrame) -> float:
        """Return when a frame appears: the table's time unless another picture was taken."""
        if self.table.counted or frame.pts == self.table.ticks[index]:
            return float(self.table.pts_s[index])
        shift = (frame.pts or 0) - int(self.table.ticks[index])
        return float(self.table.pts_s[index]) + shift * float(self.table.time_base)

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        """Return uint8 [height, width, 3], RGB by the frame's own colour space, upright."""
        picture = self._reformatter.reformat(frame, format="rgb24").to_ndarray()
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


class _Picker:
    """Finds the wanted frames of one run among those that the decoder gives back."""

    def __init__(self, table: FrameTable, run: Run, attempt: Attempt, report: DecodeReport) -> None:
        self.attempt, self.report = attempt, report
        self.counted = table.counted
        self.from_keyframe = run.first > 0
        self.broken = False
        """A packet of this run could not be decoded."""
        self._waiting = {int(table.ticks[i]): i for i in run.frames}
        self._later = sorted(self._waiting)
        self._seen = 0
        self._before: av.VideoFrame | None = None
        self._on_screen: dict[int, av.VideoFrame] = {}

    def pick(self, frames: list[av.VideoFrame]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (table index, frame) for every wanted frame among ``frames``."""
        for frame in frames:
            tick = self._seen if self.counted else frame.pts
            self._seen += 1
            if tick is None:
                continue
            while self._later and self._later[0] < tick:
                passed = self._later.pop(0)
                if passed in self._waiting and self._before is not None:
                    self._on_screen[passed] = self._before
            if tick in self._waiting and self._acceptable(frame):
                yield self._waiting.pop(tick), frame
            self._before = frame

    def rest(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Settle the frames that never came: old codecs store invisible helper pictures.

        The picture on screen at that time is taken, but not after a decoding error: then the
        picture is simply lost, and nothing takes its place.
        """
        if self.attempt.short_cuts or self.broken:
            return
        for tick, index in self._waiting.items():
            frame = self._on_screen.get(tick, self._before)
            if frame is not None and frame.pts is not None and frame.pts <= tick:
                self.report.replaced += 1
                yield index, frame

    def _acceptable(self, frame: av.VideoFrame) -> bool:
        """Return whether to take a frame; a damaged one only when nothing better can come."""
        if not frame.is_corrupt:
            return True
        if self.attempt.short_cuts or (self.from_keyframe and not self.broken):
            return False
        self.report.damaged += 1
        return True


class _Packets:
    """The packets of one stream with their positions in the table."""

    def __init__(
        self,
        container: InputContainer,
        stream: av.VideoStream,
        table: FrameTable,
        deadline: Deadline,
        may_seek: bool,
    ) -> None:
        self.container, self.stream, self.table = container, stream, table
        self.deadline = deadline
        self.error = ""
        self.next = 0  # position of the packet that comes next
        self._held: av.Packet | None = None
        timed = len(table.packet_dts) > 0 and bool((table.packet_dts > NO_TIME).all())
        self._may_seek = (
            may_seek
            and timed
            and is_indexed(container)
            and bool((np.diff(table.packet_dts) > 0).all())
        )
        if table.seek_ticks is not None:
            container.seek(table.seek_ticks, stream=stream)
        self._source = packets(container, stream)

    def between(self, first: int, stop: int) -> Iterator[av.Packet]:
        """Yield the packets at positions ``first .. stop - 1``; fewer if the file breaks off."""
        if self._may_seek and first - self.next > _SEEK_PACKETS and not self._jump(first):
            return
        while self.next < stop:
            packet = self._read()
            if packet is None:
                return
            position, self.next = self.next, self.next + 1
            if position >= first:
                expected = int(self.table.packet_ticks[position])
                if (NO_TIME if packet.pts is None else packet.pts) != expected:
                    self.error = "the file changed while it was read"
                    return
                yield packet

    def _read(self) -> av.Packet | None:
        """Return the next packet, or None at the end or where the file breaks off."""
        if self._held is not None:
            packet, self._held = self._held, None
            return packet
        try:
            for packet in self._source:
                self.deadline.check()
                return packet
        except FFmpegError as error:
            self.error = str(error.strerror or error)
        return None

    def _jump(self, first: int) -> bool:
        """Seek to a packet and return whether the reader now stands at or before it."""
        dts = self.table.packet_dts
        self.container.seek(int(dts[first]), stream=self.stream)
        packet = self._read()
        if packet is None or packet.dts is None:
            return False
        landed = int(np.searchsorted(dts, packet.dts))
        if landed > first or dts[landed] != packet.dts:
            return False
        self._held, self.next = packet, landed
        return True


def usable_cpus() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
