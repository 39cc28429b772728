"""Opening a container with FFmpeg (PyAV) so that it can reach nothing but itself.

Contract: only known demuxers that read one file (`format_whitelist`: no playlists, no image
patterns, no capture devices) and only the `file` protocol. Streams are picked the way players
do, cover art aside. Times come out in ticks or seconds after the container's own start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition

from av_llava.errors import MediaError
from av_llava.media.limits import Deadline, Limits
from av_llava.media.source import LocalFile

# Demuxers by FFmpeg's names. hls, dash, concat, image2, sdp, lavfi, devices stay out on purpose.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,mpegvideo,asf,ogg,rm,mxf,"
    "nut,ivf,obu,gif,apng,h264,hevc,m4v,mjpeg,dv,yuv4mpegpipe,h263,vc1,av1,evc,vvc,"
    "wav,w64,mp3,flac,aac,aiff,au,caf,amr,amrnb,amrwb,ac3,eac3,dts,ape,wv,tta,opus,voc,loas,latm,"
    "mp2,qoa,tak,sox"
)
# Demuxers whose seeking lands exactly where an index says.
INDEXED = frozenset({"mov", "mp4", "matroska", "webm"})

# Both came and went with PyAV's versions: 17.1 brought one, 19 drops the other.
_CAN_DISCARD = hasattr(av.stream.Stream, "discard")
_TOLERATE_TAGS: dict[str, Any] = (
    {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
)

_ATTACHED = Disposition.attached_pic | Disposition.timed_thumbnails


@contextlib.contextmanager
def open_container(file: LocalFile, deadline: Deadline) -> Iterator[InputContainer]:
    """Open a regular file and close it afterwards.

    Raises:
        MediaError: not media, damaged beyond opening, or a container that is not accepted.
    """
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    try:
        # "file:" keeps a name such as "concat:a|b" or "https:x" from being read as a protocol.
        # container_options, not options: PyAV before 17.1 handed those to streams that it had not
        # counted, and crashed.
        container = av.open(
            f"file:{file.path}",
            mode="r",
            container_options=options,
            timeout=deadline.left_s,
            **_TOLERATE_TAGS,
        )
    except (FFmpegError, OSError, ValueError) as error:
        raise MediaError(_why_not(file, error)) from error
    try:
        yield container
    finally:
        container.close()


def is_indexed(container: InputContainer) -> bool:
    """Return whether a seek in this container lands exactly on a packet of its index."""
    return not INDEXED.isdisjoint(container.format.name.split(","))


def film_streams(container: InputContainer) -> list[av.VideoStream]:
    """Return the picture streams that are no cover art or thumbnails."""
    return [s for s in container.streams.video if not s.disposition & _ATTACHED]


def video_stream(container: InputContainer) -> av.VideoStream | None:
    """Return the picture stream that a player shows, or None if none can be decoded."""
    films = [s for s in film_streams(container) if s.codec_context is not None]
    best = container.streams.best("video")
    for stream in films:
        if stream is best:
            return stream
    return films[0] if films else None


def audio_stream(container: InputContainer) -> av.AudioStream | None:
    """Return the sound stream marked as default, else the first, or None.

    Tracks that FFmpeg cannot decode do not count.
    """
    tracks = [s for s in container.streams.audio if s.codec_context is not None]
    marked = (s for s in tracks if s.disposition & Disposition.default)
    return next(marked, tracks[0] if tracks else None)


def need_video(container: InputContainer, name: str, limits: Limits) -> av.VideoStream:
    """Return the picture stream, guarded against pictures of more than ``max_pixels``.

    Raises:
        MediaError: there is none, it cannot be decoded, or the picture is too large.
    """
    stream = video_stream(container)
    if stream is None and film_streams(container):
        raise MediaError(f"{name!r}: FFmpeg has no decoder for its video stream.")
    if stream is None:
        what = "only sound" if container.streams.audio else "no picture"
        raise MediaError(
            f"{name!r} has no video stream ({what}). Pass a video, or use it as sound."
        )
    context = stream.codec_context
    limits.check(
        "max_pixels", context.width * context.height, repr(name), "the picture's pixel count"
    )
    # The decoder itself refuses larger pictures that come later in the stream.
    context.options = {"max_pixels": str(limits.max_pixels)}
    return stream


def only(stream: av.stream.Stream) -> None:
    """Let the demuxer skip all other streams, so that their bytes need not be read."""
    if not _CAN_DISCARD:
        return
    for other in stream.container.streams:
        other.discard = av.stream.Discard.default if other is stream else av.stream.Discard.all


def packets(container: InputContainer, stream: av.stream.Stream) -> Iterator[av.Packet]:
    """Yield the stream's packets that hold data (empty ones mark the end, or repeat a picture).

    Raises:
        FFmpegError: where a damaged file breaks off.
    """
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except IndexError:
        return  # at the end, PyAV trips over streams that have appeared since the opening


def clock(stream: av.stream.Stream) -> Fraction:
    """Return the length of a tick of the stream's clock in seconds."""
    base = stream.time_base
    if not base:
        return Fraction(1, 90_000)
    return Fraction(base.numerator, base.denominator)


def start_ticks(stream: av.stream.Stream) -> int:
    """Return the container's start in ticks of the stream's clock."""
    assert isinstance(stream.container, InputContainer)
    return round(Fraction(stream.container.start_time or 0, 1_000_000) / clock(stream))


def stream_start_s(stream: av.stream.Stream) -> float:
    """Return when a stream begins, in seconds after the container's start."""
    if stream.start_time is None:
        return 0.0
    return float((stream.start_time - start_ticks(stream)) * clock(stream))


def stream_duration_s(stream: av.stream.Stream) -> float | None:
    """Return a stream's length as its header states it, in seconds."""
    if stream.duration is None or stream.duration < 0:
        return None
    return float(stream.duration * clock(stream))


def container_duration_s(container: InputContainer) -> float | None:
    """Return the length that the header states, or the longest stream's, in seconds."""
    if container.duration is not None and container.duration > 0:
        return container.duration / 1_000_000
    known = [stream_duration_s(s) for s in container.streams]
    return max((d for d in known if d), default=None)


def _why_not(file: LocalFile, error: Exception) -> str:
    """Say in a sentence why a file could not be opened."""
    with file.path.open("rb") as handle:
        head = handle.read(64)
    if head[4:8] == b"ftyp" and not _has_moov(file):
        return (
            f"{file.name!r} has no index (moov box): its recording or copying was cut off, and "
            f"nothing can decode it. Repair it with the recording device's tool, or copy it again."
        )
    if isinstance(error, av.error.ArgumentError):
        return (
            f"{file.name!r} is in a container that is not accepted. Convert it to mp4 or mkv, "
            f"for example: ffmpeg -i INPUT out.mp4"
        )
    if isinstance(error, av.error.InvalidDataError):
        return (
            f"{file.name!r} is not a media file that can be read (no known container, or a "
            f"damaged header). Check that it plays elsewhere."
        )
    return f"{file.name!r} cannot be opened: {error}."


def _has_moov(file: LocalFile) -> bool:
    """Return whether an mp4 holds its index among the top-level boxes."""
    size = file.path.stat().st_size
    with file.path.open("rb") as handle:
        at = 0
        for _ in range(1000):
            handle.seek(at)
            head = handle.read(16)
            if len(head) < 8:
                return False
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if kind == b"moov":
                return at + length <= size
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length < 8:
                return False
            at += length
    return False
