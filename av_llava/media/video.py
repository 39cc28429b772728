"""Frames of a video by time: one ordered pass, each frame resized as it comes.

Contract: numpy only. What comes back are the frames asked for with their real times, or an
error, or fewer frames with a warning; never other frames. Memory stays flat: one decoded frame
plus the (resized) output. `auto` decodes with PyAV and, if that yields nothing, with decord.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from av_llava.errors import AVLlavaError, MediaError, UsageError, unknown_name
from av_llava.media.container import need_video, open_container
from av_llava.media.decord_reader import decord_frames
from av_llava.media.folder_reader import (
    DEFAULT_FPS,
    animation_pictures,
    animation_table,
    folder_frames,
    frame_files,
)
from av_llava.media.frame_stack import FrameStack, Resize
from av_llava.media.image import looks_like_image
from av_llava.media.limits import DEFAULT_LIMITS, Deadline, Limits
from av_llava.media.probe import is_animated_webp, probe_file
from av_llava.media.pyav_reader import PyAVReader
from av_llava.media.source import LocalFile, Source, is_remote, local_file
from av_llava.media.table import FrameTable, scan_table
from av_llava.media.types import FrameBatch
from av_llava.media.watch import DecoderHangsError, watched_call, watched_items
from av_llava.media.worker import CallHere, in_worker, run_in_worker
from av_llava.sampling import check_window, choose_frames, shown_at, window_indices
from av_llava.settings import SamplingSettings

# A worker gets this much longer than the deadline that it keeps itself.
_WORKER_GRACE_S = 15.0


@dataclass(frozen=True)
class FrameRequest:
    """Which frames of a video are wanted."""

    settings: SamplingSettings
    start_s: float | None = None
    end_s: float | None = None
    times_s: tuple[float, ...] | None = None
    """Exact times instead of a sampling rule."""

    def choose(self, pts_s: np.ndarray, avg_fps: float) -> np.ndarray:
        """Return int64 indices into a table of presentation times, in the order wanted."""
        if self.times_s is not None:
            return shown_at(pts_s, self.times_s)
        return choose_frames(pts_s, self.settings, self.start_s, self.end_s, avg_fps=avg_fps)


def read_frames(
    source: Source,
    settings: SamplingSettings | None = None,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    resize: Resize | None = None,
    backend: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    isolate: bool | None = None,
    threads: int | None = None,
) -> FrameBatch:
    """Read frames of a video.

    Args:
        source: path, ``file://`` or HTTP(S) address, bytes, binary file object, or a folder of
            frame images (`SamplingSettings.source_fps` gives its rate).
        settings: which frames; 32 spread over the video by default.
        start_s: beginning of the window in seconds.
        end_s: end of the window in seconds (excluded).
        resize: uint8 [height, width, 3] -> uint8 [h, w, 3], called once per frame as it is
            decoded; must give one size. Without it frames keep their size.
        backend: "auto", "pyav" or "decord"; the settings' by default.
        limits: what an untrusted file may cost.
        isolate: decode in a process that can be killed; by default only for addresses.
        threads: decoder threads; all processors (at most 16) by default.

    Returns:
        Frames [T, h, w, 3] with their times; T >= 1.

    Raises:
        MediaError: the source cannot be used, or none of its frames can be decoded.
        UsageError: the window is empty or begins after the last frame.
    """
    check_window(start_s, end_s)
    request = FrameRequest(settings or SamplingSettings(), start_s, end_s)
    return _read_source(source, request, resize, backend, limits, isolate, threads)


def read_frames_at(
    source: Source,
    times_s: Sequence[float] | np.ndarray,
    *,
    settings: SamplingSettings | None = None,
    resize: Resize | None = None,
    backend: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    isolate: bool | None = None,
    threads: int | None = None,
) -> FrameBatch:
    """Read the frames on screen at given times, in the order of ``times_s``.

    A time before the first frame gives the first one, a time after the last one the last one.
    Other arguments as in `read_frames`.
    """
    times = tuple(float(t) for t in times_s)
    if not times:
        raise UsageError("read_frames_at needs at least one time.")
    request = FrameRequest(settings or SamplingSettings(), times_s=times)
    return _read_source(source, request, resize, backend, limits, isolate, threads)


def scan_frames(
    source: Source,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    source_fps: float | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> FrameTable:
    """Return the times of all frames without decoding any, so that counts can be planned.

    With a window, frames outside it may be left out of the table.
    """
    check_window(start_s, end_s)
    with local_file(source, limits) as file:
        deadline = Deadline(limits, file.name)
        pictures = _pictures(file, source_fps, limits, deadline)
        if pictures is not None:
            return pictures.table
        return watched_call(lambda: scan_table(file, limits, deadline, start_s, end_s), deadline)


def read_pyav(
    file: LocalFile,
    request: FrameRequest,
    resize: Resize | None,
    limits: Limits,
    threads: int | None = None,
) -> FrameBatch:
    """Read with PyAV; see `read_frames`."""
    deadline = Deadline(limits, file.name)
    table = watched_call(
        lambda: scan_table(file, limits, deadline, request.start_s, request.end_s), deadline
    )
    stack = FrameStack(request.choose(table.pts_s, table.avg_fps), resize, limits, file.name)
    try:
        reader = _decode(file, table, stack, limits, deadline, threads)
    except DecoderHangsError:  # several decoding threads waiting for each other
        reader = _decode(file, table, stack, limits, deadline, threads=1)
    notes = table.warnings + reader.report.warnings(len(stack.wanted))
    return _batch(file, request, table, stack, "pyav", notes)


def _decode(
    file: LocalFile,
    table: FrameTable,
    stack: FrameStack,
    limits: Limits,
    deadline: Deadline,
    threads: int | None,
) -> PyAVReader:
    """Decode the wanted frames in another thread, while this one resizes them."""
    reader = PyAVReader(file, table, limits, deadline, threads)
    for index, time_s, picture in watched_items(lambda: reader.frames(stack.wanted), deadline):
        stack.add(index, time_s, picture)
    return reader


def read_decord(
    file: LocalFile,
    request: FrameRequest,
    resize: Resize | None,
    limits: Limits,
    threads: int | None = None,
) -> FrameBatch:
    """Read with decord, in a worker process; see `read_frames`."""
    if not in_worker():
        return _in_worker("decord", file, request, resize, limits, threads)
    deadline = Deadline(limits, file.name)
    with open_container(file, deadline) as container:
        stream = need_video(container, file.name, limits)
        kind = container.format.name
        size = (stream.codec_context.width, stream.codec_context.height)
    table = scan_table(file, limits, deadline)
    stack = FrameStack(request.choose(table.pts_s, table.avg_fps), resize, limits, file.name)
    pictures = decord_frames(file, table, kind, size, stack.wanted, deadline, threads)
    for index, picture in pictures:
        stack.add(index, float(table.pts_s[index]), picture)
    return _batch(file, request, table, stack, "decord", table.warnings)


class _NothingDecodedError(MediaError):
    """The container could be read, but none of the wanted frames."""


def read_auto(
    file: LocalFile,
    request: FrameRequest,
    resize: Resize | None,
    limits: Limits,
    threads: int | None = None,
) -> FrameBatch:
    """Read with PyAV, and with decord if PyAV can open the file but decode nothing."""
    try:
        return read_pyav(file, request, resize, limits, threads)
    except _NothingDecodedError as first:
        try:
            return read_decord(file, request, resize, limits, threads)
        except AVLlavaError as second:
            raise MediaError(f"{first} decord was tried as well: {second}") from first


VIDEO_BACKENDS: dict[str, Callable[..., FrameBatch]] = {
    "auto": read_auto,
    "pyav": read_pyav,
    "decord": read_decord,
}


def _read_source(
    source: Source,
    request: FrameRequest,
    resize: Resize | None,
    backend: str | None,
    limits: Limits,
    isolate: bool | None,
    threads: int | None,
) -> FrameBatch:
    name = backend or request.settings.backend
    if name not in VIDEO_BACKENDS:
        raise unknown_name("video backend", name, VIDEO_BACKENDS)
    with local_file(source, limits) as file:
        if isolate if isolate is not None else is_remote(source):
            return _in_worker(name, file, request, resize, limits, threads)
        return read_local(name, file, request, resize, limits, threads)


def read_local(
    backend: str,
    file: LocalFile,
    request: FrameRequest,
    resize: Resize | None,
    limits: Limits,
    threads: int | None,
) -> FrameBatch:
    """Read frames of a local file in this process by the backend of that name."""
    deadline = Deadline(limits, file.name)
    pictures = _pictures(file, request.settings.source_fps, limits, deadline)
    if pictures is None:
        return VIDEO_BACKENDS[backend](file, request, resize, limits, threads)
    table = pictures.table
    stack = FrameStack(request.choose(table.pts_s, table.avg_fps), resize, limits, file.name)
    for index, picture in pictures.read(stack.wanted):
        stack.add(index, float(table.pts_s[index]), picture)
    return _batch(file, request, table, stack, "pillow", table.warnings)


def _in_worker(
    backend: str,
    file: LocalFile,
    request: FrameRequest,
    resize: Resize | None,
    limits: Limits,
    threads: int | None,
) -> FrameBatch:
    """Read in a worker, which hands each frame over for resizing here.

    So the resize function may be anything, the worker never imports what it needs (torch), and
    memory stays flat in both processes.
    """
    return run_in_worker(
        read_local,
        backend,
        file,
        request,
        None if resize is None else CallHere(resize),
        limits,
        threads,
        timeout_s=limits.max_decode_s + _WORKER_GRACE_S,
        memory_bytes=limits.max_worker_bytes,
        what=file.name,
    )


@dataclass(frozen=True)
class _Pictures:
    """A source made of separate pictures: its table, and how to read some of them."""

    table: FrameTable
    read: Callable[[list[int]], Iterator[tuple[int, np.ndarray]]]


def _pictures(
    file: LocalFile, source_fps: float | None, limits: Limits, deadline: Deadline
) -> _Pictures | None:
    """Return how to read a folder of frames or an animated WebP; None for ordinary video."""
    if file.path.is_dir():
        files = frame_files(file)
        fps = source_fps or DEFAULT_FPS
        note = () if source_fps else (f"no frame rate given for the folder; {fps:g} fps assumed",)
        times = np.arange(len(files) + 1) / fps
        return _Pictures(
            FrameTable.of_times(times, note),
            lambda wanted: folder_frames(files, wanted, limits, deadline),
        )
    if is_animated_webp(file, limits):
        return _Pictures(
            FrameTable.of_times(animation_table(file, limits, deadline)),
            lambda wanted: animation_pictures(file, wanted, limits, deadline),
        )
    if looks_like_image(file.path) and probe_file(file, limits).kind == "image":
        raise MediaError(f"{file.name!r} is a still image, not a video. Pass it as an image.")
    return None


def _batch(
    file: LocalFile,
    request: FrameRequest,
    table: FrameTable,
    stack: FrameStack,
    backend: str,
    warnings: tuple[str, ...],
) -> FrameBatch:
    """Put the result together; a read without a single frame is an error."""
    frames, pts_s = stack.result()
    if not len(frames):
        detail = f" ({'; '.join(warnings)})" if warnings else ""
        raise _NothingDecodedError(
            f"{file.name!r}: none of the {len(stack.wanted)} frames could be decoded{detail}."
        )
    first, stop = window_indices(table.pts_s, request.start_s, request.end_s)
    start_s = float(table.pts_s[0]) if request.start_s is None else request.start_s
    end_s = table.end_s if request.end_s is None else min(request.end_s, table.end_s)
    return FrameBatch(
        frames=frames,
        pts_s=pts_s,
        duration_s=table.end_s,
        source=file.name,
        backend=backend,
        span_s=(start_s, end_s),
        n_source_frames=stop - first,
        source_size=stack.source_size,
        avg_fps=table.avg_fps,
        warnings=warnings,
    )
