"""The sound of a medium on its time line: decoded, mixed to one channel, at its own rate.

Contract: numpy only; resampling is done above. Sample 0 lies at the start of the window, on the
same clock as the frames: a track that starts late begins with silence, gaps are silent, and
what lies before the window is cut off. What can be decoded of a damaged track is kept and
reported. No track is not an error unless `strict`.
"""

from __future__ import annotations

from collections.abc import Iterator

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

from av_llava.errors import MediaError
from av_llava.media.container import (
    audio_stream,
    clock,
    container_duration_s,
    is_indexed,
    only,
    open_container,
    packets,
    start_ticks,
    stream_duration_s,
    stream_start_s,
)
from av_llava.media.downmix import to_mono
from av_llava.media.image import looks_like_image
from av_llava.media.limits import DEFAULT_LIMITS, Deadline, Limits
from av_llava.media.source import LocalFile, Source, is_remote, local_file
from av_llava.media.track import Track
from av_llava.media.types import AudioClip, AudioStatus
from av_llava.media.watch import watched_call
from av_llava.media.worker import run_in_worker
from av_llava.sampling import check_window
from av_llava.settings import check_range

NO_TRACK_RATE_HZ = 16_000
# Decoders with memory (AAC, MP3, Opus) are right again after this much sound.
_PREROLL_S = 1.0
_SEEK_FROM_S = 20.0
_SILENT_PEAK = 2.0**-16
_TOO_MANY_PLANES = 8
_RATES_HZ = (1000, 1_000_000)
# Containers whose header states the length of the sound exactly.
_EXACT_HEADERS = frozenset({"mov", "mp4", "wav", "flac"})
_WORKER_GRACE_S = 15.0


def read_audio(
    source: Source,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    max_seconds: float | None = None,
    strict: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    isolate: bool | None = None,
) -> AudioClip:
    """Read the sound of a video or audio file.

    Args:
        source: path, ``file://`` or HTTP(S) address, bytes, or binary file object.
        start_s: beginning of the window on the media time line, in seconds.
        end_s: end of the window (excluded).
        max_seconds: longest sound to return; the rest is left out with a warning.
        strict: raise if there is no sound track.
        limits: what an untrusted file may cost.
        isolate: decode in a process that can be killed; by default only for addresses.

    Returns:
        Mono float32 samples at the file's rate. Without sound (in the window) they are empty
        and the status is "none".

    Raises:
        MediaError: the source cannot be used, nothing of its sound can be decoded, or there is
            no track and ``strict`` is set.
        UsageError: the window is empty.
    """
    check_window(start_s, end_s)
    check_range("max_seconds", max_seconds, 1e-3)
    with local_file(source, limits) as file:
        if file.path.is_dir() or looks_like_image(file.path):
            clip = _no_sound(file, 0, NO_TRACK_RATE_HZ, start_s or 0.0, "pictures have no sound")
        elif isolate if isolate is not None else is_remote(source):
            clip = run_in_worker(
                read_local_audio,
                file,
                start_s,
                end_s,
                max_seconds,
                limits,
                timeout_s=limits.max_decode_s + _WORKER_GRACE_S,
                memory_bytes=limits.max_worker_bytes,
                what=file.name,
            )
        else:
            deadline = Deadline(limits, file.name)
            clip = watched_call(
                lambda: read_local_audio(file, start_s, end_s, max_seconds, limits, deadline),
                deadline,
            )
    if strict and clip.channels == 0:
        raise MediaError(
            f"{clip.source!r} has no sound track. Give the sound as a separate file, or do "
            f"without it."
        )
    return clip


def read_local_audio(
    file: LocalFile,
    start_s: float | None,
    end_s: float | None,
    max_seconds: float | None,
    limits: Limits,
    deadline: Deadline | None = None,
) -> AudioClip:
    """Read the sound of a local file in this process; see `read_audio`."""
    deadline = deadline or Deadline(limits, file.name)
    begin_s = start_s or 0.0
    with open_container(file, deadline) as container:
        stream = audio_stream(container)
        if stream is None:
            if container.streams.audio:
                raise MediaError(f"{file.name!r}: FFmpeg has no decoder for its sound.")
            return _no_sound(file, 0, NO_TRACK_RATE_HZ, begin_s, "the file has no sound track")
        stated_s = _stated_end_s(container, stream)
        limits.check(
            "max_duration_s",
            container_duration_s(container) or 0.0,
            repr(file.name),
            "its length in seconds",
        )
        longest_s = min(limits.max_duration_s, max_seconds or limits.max_duration_s)
        stop_s = min(end_s or np.inf, begin_s + longest_s)
        channels = stream.codec_context.channels
        decoder = _Decoder(container, stream, deadline)
        track = Track(begin_s, stop_s, np.inf if end_s is None else end_s)
        for at_s, samples, peak, rate in decoder.frames(begin_s - _PREROLL_S):
            if not _RATES_HZ[0] <= rate <= _RATES_HZ[1]:
                raise MediaError(
                    f"{file.name!r} states {rate} samples of sound per second: a damaged header."
                )
            until_s = (at_s or 0.0) - begin_s + len(samples) / rate
            memory = 4 * min(until_s, longest_s) * rate
            if memory > limits.max_batch_bytes:
                limits.check("max_batch_bytes", memory, repr(file.name), "its sound in bytes")
            track.add(at_s, samples, peak, rate)
            if track.full:
                break
    if not track.rate:
        if decoder.errors:
            raise MediaError(f"{file.name!r}: its sound cannot be decoded ({decoder.last_error}).")
        reason = f"there is no sound from {begin_s:.2f} s on"
        return _no_sound(file, channels, NO_TRACK_RATE_HZ, begin_s, reason)
    return _clip(file, track, decoder, channels, stated_s, max_seconds)


def _clip(
    file: LocalFile,
    track: Track,
    decoder: _Decoder,
    channels: int,
    stated_s: float | None,
    max_seconds: float | None,
) -> AudioClip:
    """Judge what was decoded and put the result together."""
    waveform = track.finished()
    if not len(waveform):
        ends_s = (track.next or 0) / track.rate
        reason = f"the sound ends at {ends_s:.2f} s, before the window"
        if ends_s > track.begin_s:
            reason = "the sound begins after the window"
        return _no_sound(file, channels, track.rate, track.begin_s, reason)
    notes = [*track.notes(), *decoder.notes()]
    ended_s = track.begin_s + len(waveform) / track.rate
    partial = decoder.errors > 0
    if not track.full and stated_s is not None and ended_s < min(0.98 * stated_s, stated_s - 0.25):
        partial = True
        notes.append(f"the header states sound until {stated_s:.2f} s, it ends at {ended_s:.2f} s")
    if track.full and max_seconds is not None and ended_s < min(track.end_s, stated_s or np.inf):
        notes.append(f"only the first {max_seconds:g} s of the sound are used")
    status: AudioStatus = "partial" if partial else "ok"
    if float(np.abs(waveform).max()) <= _SILENT_PEAK:
        status = "silent"
        if track.peak > 100 * _SILENT_PEAK:
            notes.append("the channels cancel each other out: the mix to one channel is silent")
    return AudioClip(
        waveform=waveform,
        sample_rate_hz=track.rate,
        start_s=track.begin_s,
        duration_s=len(waveform) / track.rate,
        source=file.name,
        channels=channels,
        status=status,
        warnings=tuple(notes),
    )


def _no_sound(
    file: LocalFile, channels: int, rate_hz: int, start_s: float, reason: str
) -> AudioClip:
    """Return the empty clip, with the reason as its warning."""
    return AudioClip(
        waveform=np.empty(0, np.float32),
        sample_rate_hz=rate_hz,
        start_s=start_s,
        duration_s=0.0,
        source=file.name,
        channels=channels,
        status="none",
        warnings=(reason,),
    )


def _stated_end_s(container: InputContainer, stream: av.AudioStream) -> float | None:
    """Return when the sound ends by the header, where headers of that kind are exact."""
    if _EXACT_HEADERS.isdisjoint(container.format.name.split(",")):
        return None
    length_s = stream_duration_s(stream)
    return None if length_s is None else stream_start_s(stream) + length_s


class _Decoder:
    """Decodes one track from somewhere before the window on."""

    def __init__(
        self, container: InputContainer, stream: av.AudioStream, deadline: Deadline
    ) -> None:
        self.container, self.stream, self.deadline = container, stream, deadline
        self.time_base = clock(stream)
        self.origin = start_ticks(stream)
        only(stream)
        self._source = packets(container, stream)
        self.errors = 0
        self.last_error = ""
        self.rates: set[int] = set()
        self._resampler: av.AudioResampler | None = None
        self._resampler_input: tuple[int, str, str] | None = None

    def frames(self, from_s: float) -> Iterator[tuple[float | None, np.ndarray, float, int]]:
        """Yield (time in seconds, float32 [S], peak of any channel, rate in Hz), mixed.

        Packets before ``from_s`` are dropped undecoded. A time of None means: right after what
        came before.
        """
        rate = 0
        for packet in self._packets(from_s):
            for frame in self._decode(packet):
                rate = rate or frame.sample_rate
                self.rates.add(frame.sample_rate)
                at_s = self._time_s(frame)
                for part in self._readable(frame, rate):
                    samples, peak = to_mono(part)
                    yield at_s, samples, peak, rate
                    at_s = None

    def notes(self) -> list[str]:
        """Return what went wrong as sentences."""
        notes = []
        if self.errors:
            notes.append(f"{self.errors} pieces of sound could not be decoded ({self.last_error})")
        if len(self.rates) > 1:
            notes.append(f"the sample rate changes within the track: {sorted(self.rates)} Hz")
        return notes

    def _packets(self, from_s: float) -> Iterator[av.Packet | None]:
        """Yield the packets from a time on, then None, which empties the decoder."""
        first = int(from_s / self.time_base) + self.origin
        packet = None
        if from_s > _SEEK_FROM_S and is_indexed(self.container):
            self.container.seek(first, stream=self.stream)
            packet = self._next()
            if packet is None or packet.pts is None or packet.pts > first:
                self.container.seek(self.container.start_time or 0)  # it overshot: read all
                packet = None
        packet = packet or self._next()
        while packet is not None:
            if from_s <= 0 or packet.pts is None or packet.pts >= first:
                yield packet
            packet = self._next()
        yield None

    def _next(self) -> av.Packet | None:
        """Return the next packet, or None at the end or where the file breaks off."""
        try:
            for packet in self._source:
                self.deadline.check()
                return packet
        except FFmpegError as error:
            self._note(error)
        return None

    def _decode(self, packet: av.Packet | None) -> list[av.AudioFrame]:
        try:
            return self.stream.codec_context.decode(packet)
        except FFmpegError as error:
            self._note(error)
            return []

    def _note(self, error: FFmpegError) -> None:
        self.errors += 1
        self.last_error = str(error.strerror or error)

    def _time_s(self, frame: av.AudioFrame) -> float | None:
        if frame.pts is None:
            return None
        tick = self.time_base  # decoded frames keep their packet's clock
        return (frame.pts - self.origin) * tick.numerator / tick.denominator

    def _readable(self, frame: av.AudioFrame, rate: int) -> list[av.AudioFrame]:
        """Bring a frame to the track's first rate (broadcasts change it), and into one plane.

        From 8 planes on, PyAV (18.1) reads past the end of FFmpeg's list of planes and crashes.
        """
        many = frame.format.is_planar and frame.layout.nb_channels >= _TOO_MANY_PLANES
        if frame.sample_rate == rate and not many:
            return [frame]
        kind = (frame.sample_rate, frame.layout.name, frame.format.name)
        if self._resampler is None or self._resampler_input != kind:
            self._resampler = av.AudioResampler(format="flt", layout=frame.layout, rate=rate)
            self._resampler_input = kind
        try:
            return self._resampler.resample(frame)
        except FFmpegError as error:
            self._note(error)
            return []
