"""Real media files for tests, made with PyAV: H.264 + AAC in mp4 unless asked otherwise.

Every frame carries its own number as black and white blocks, so that a test can prove which
frame it got (`read_counter`), whatever the backend, size or codec. The default sound is a quiet
440 Hz tone with a 50 ms burst of 1 kHz at each whole second from 1 s on, so that a test can
prove where on the time line the sound lies (`first_burst_s`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

COUNTER_ROWS, COUNTER_COLUMNS = 2, 8  # 16 bits, most significant first
TICK = Fraction(1, 90_000)  # video time base: exact for 10, 15, 24, 25, 30 fps
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
VIDEO_CODECS = {".webm": "libvpx-vp9", ".gif": "gif"}
AUDIO_CODECS = {
    ".webm": "libopus",
    ".wav": "pcm_s16le",
    ".flac": "flac",
    ".mp3": "libmp3lame",
    ".ogg": "libopus",
}
BURST_S, BURST_HZ, TONE_HZ = 0.05, 1000.0, 440.0


def make_clip(
    path: str | Path,
    *,
    seconds: float = 4.0,
    fps: float = 10.0,
    size: tuple[int, int] = (160, 120),
    frame_times: Sequence[float] | None = None,
    video: bool = True,
    video_start_s: float = 0.0,
    preroll_s: float = 0.0,
    codec: str | None = None,
    gop: int = 10,
    bframes: int = 0,
    open_gop: bool = False,
    encoder_params: str = "",
    pix_fmt: str | None = None,
    rotation: int = 0,
    cover_art: bool = False,
    draw: Callable[[int, float], np.ndarray] | None = None,
    audio: str | np.ndarray | None = "tone",
    audio_rate: int = 44_100,
    channels: int = 2,
    gains: Sequence[float] | None = None,
    audio_seconds: float | None = None,
    audio_start_s: float = 0.0,
    audio_codec: str | None = None,
    faststart: bool = True,
) -> Path:
    """Write one media file and return its path; the suffix chooses the container.

    Args:
        path: file to write (.mp4, .mkv, .mov, .ts, .webm, .gif, .m4a, .wav, .mp3, ...).
        seconds: length of the picture and, unless `audio_seconds` is given, of the sound.
        fps: frames per second; `round(seconds * fps)` frames, at least one.
        size: (width, height) as stored; odd sizes are stored without chroma subsampling.
        frame_times: presentation times in seconds instead of `fps` (variable frame rate).
        video: False leaves the picture out.
        video_start_s: the first frame's time: a picture that starts late.
        preroll_s: seconds before the first shown frame that the file holds but an edit list
            hides (what cutting without re-encoding leaves behind). Frame counters go on
            counting from the hidden frames.
        codec: video encoder; libx264 by default. libx265, libvpx-vp9, libsvtav1, mpeg4, ...
        gop: frames from one keyframe to the next.
        bframes: consecutive B-frames.
        open_gop: let B-frames cross keyframes (leading pictures).
        encoder_params: more parameters for x264 or x265, "name=value:name=value".
        pix_fmt: pixel format; chosen from the size by default.
        rotation: counter-clockwise degrees that a player must turn the picture by.
        cover_art: put a still picture beside the film, as music files have.
        draw: (frame number, time in seconds) -> uint8 [height, width, 3] instead of the counter.
        audio: "tone", "silent", "antiphase" (second channel is minus the first), samples as
            float [S] or [S, channels], or None for no sound track.
        audio_rate: samples per second.
        channels: 1, 2, 6 (5.1) or 8 (7.1).
        gains: factor of each channel; 1 by default.
        audio_seconds: length of the sound.
        audio_start_s: the first sample's time: sound that starts late.
        audio_codec: audio encoder; aac in mp4, mkv, mov, ts.
        faststart: put the header before the data (mp4).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    options = {"movflags": "faststart"} if faststart and suffix in (".mp4", ".mov", ".m4a") else {}
    times = _frame_times(seconds, fps, frame_times, video_start_s, preroll_s)
    draw = draw or (lambda number, time_s: counter_frame(number, size))
    with av.open(str(path), "w", options=options) as out:
        packets: list[av.Packet] = []
        if video and suffix not in (".m4a", ".wav", ".mp3", ".flac", ".ogg"):
            stream = _video_stream(
                out, codec or VIDEO_CODECS.get(suffix, "libx264"), size, fps, gop, bframes,
                open_gop, encoder_params, pix_fmt,
            )  # fmt: skip
            if rotation:
                stream.set_display_rotation(rotation)
        else:
            stream = None
        sound = None
        if audio is not None and suffix != ".gif":
            samples = audio_samples(
                audio, seconds if audio_seconds is None else audio_seconds, audio_rate, channels,
                gains,
            )  # fmt: skip
            encoder = audio_codec or AUDIO_CODECS.get(suffix, "aac")
            sound = _audio_stream(out, encoder, audio_rate, channels)
        cover = _cover_stream(out) if cover_art else None
        if stream is not None:
            packets += _encode_video(stream, times, draw)
        if sound is not None:
            packets += _encode_audio(sound, samples, audio_rate, audio_start_s)
        if cover is not None:
            packets += _encode_cover(cover)
        # Interleave by time, as files from cameras are.
        packets.sort(key=lambda p: (p.dts or 0) * p.time_base)
        for packet in packets:
            out.mux(packet)
    return path


def counter_frame(number: int, size: tuple[int, int]) -> np.ndarray:
    """Draw one frame: the number as 2 x 8 blocks on top, a slowly changing colour below.

    Args:
        number: 0 .. 65535.
        size: (width, height); at least 16 x 8.

    Returns:
        uint8 [height, width, 3].
    """
    width, height = size
    frame = np.empty((height, width, 3), np.uint8)
    frame[...] = (number * 7 % 200 + 28, number * 3 % 180 + 40, 128)
    ramp = np.linspace(0, 60, width, dtype=np.uint8)
    frame[height // 2 :, :, 2] = 90 + ramp
    for bit in range(COUNTER_ROWS * COUNTER_COLUMNS):
        row, column = divmod(bit, COUNTER_COLUMNS)
        top, bottom, left, right = _block(row, column, height, width)
        frame[top:bottom, left:right] = 235 if number >> (15 - bit) & 1 else 20
    return frame


def read_counter(frame: np.ndarray) -> int:
    """Return the number that `counter_frame` drew, from uint8 [height, width, 3] of any size."""
    height, width = frame.shape[:2]
    number = 0
    for bit in range(COUNTER_ROWS * COUNTER_COLUMNS):
        row, column = divmod(bit, COUNTER_COLUMNS)
        top, bottom, left, right = _block(row, column, height, width)
        margin_y, margin_x = (bottom - top) // 4, (right - left) // 4
        block = frame[top + margin_y : bottom - margin_y, left + margin_x : right - margin_x]
        number = number << 1 | int(block.mean() > 127)
    return number


def read_counters(frames: np.ndarray) -> list[int]:
    """Return the numbers of uint8 [frames, height, width, 3]."""
    return [read_counter(frame) for frame in frames]


def audio_samples(
    audio: str | np.ndarray,
    seconds: float,
    rate: int,
    channels: int,
    gains: Sequence[float] | None = None,
) -> np.ndarray:
    """Return float32 [S, channels] of a named signal, or of the caller's samples."""
    if isinstance(audio, str):
        time_s = np.arange(round(seconds * rate)) / rate
        if audio == "silent":
            mono = np.zeros(len(time_s))
        elif audio in ("tone", "antiphase"):
            burst = (time_s >= 1) & (time_s % 1 < BURST_S)
            mono = 0.05 * np.sin(2 * np.pi * TONE_HZ * time_s)
            mono = mono + burst * 0.5 * np.sin(2 * np.pi * BURST_HZ * time_s)
        else:
            raise ValueError(f"audio must be tone, silent, antiphase or samples, not {audio!r}")
        samples = np.repeat(mono[:, None], channels, 1)
        if audio == "antiphase":
            samples[:, 1::2] *= -1
    else:
        samples = np.asarray(audio, np.float32)
        if samples.ndim == 1:
            samples = np.repeat(samples[:, None], channels, 1)
    if gains is not None:
        samples = samples * np.asarray(gains)
    return np.ascontiguousarray(samples, np.float32)


def first_burst_s(waveform: np.ndarray, rate_hz: int, threshold: float = 0.15) -> float:
    """Return the time of the first loud sample of a waveform [S], in seconds from its start."""
    loud = np.flatnonzero(np.abs(waveform) > threshold)
    if not len(loud):
        raise AssertionError("no burst in the waveform")
    return float(loud[0]) / rate_hz


def tone_rms(waveform: np.ndarray, rate_hz: int, start_s: float, end_s: float) -> float:
    """Return the RMS of the 440 Hz component of a waveform [S] between two times."""
    part = waveform[round(start_s * rate_hz) : round(end_s * rate_hz)].astype(np.float64)
    phase = 2j * np.pi * TONE_HZ * np.arange(len(part)) / rate_hz
    return float(abs(np.exp(-phase) @ part) * np.sqrt(2) / len(part))


def _block(row: int, column: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) of one counter block; the counter fills the upper half."""
    top, bottom = (round(height / 2 / COUNTER_ROWS * r) for r in (row, row + 1))
    left, right = (round(width / COUNTER_COLUMNS * c) for c in (column, column + 1))
    return top, bottom, left, right


def _frame_times(
    seconds: float,
    fps: float,
    frame_times: Sequence[float] | None,
    start_s: float,
    preroll_s: float,
) -> list[float]:
    if frame_times is not None:
        return [start_s + t - preroll_s for t in frame_times]
    count = max(1, round((seconds + preroll_s) * fps))
    return [start_s + i / fps - preroll_s for i in range(count)]


def _video_stream(
    out: av.container.OutputContainer,
    codec: str,
    size: tuple[int, int],
    fps: float,
    gop: int,
    bframes: int,
    open_gop: bool,
    encoder_params: str,
    pix_fmt: str | None,
) -> av.VideoStream:
    options = {"g": str(gop)}
    if codec == "libx264":
        # No scene cuts: keyframes then stand exactly every `gop` frames.
        params = f"scenecut=0:keyint={gop}:min-keyint={gop}:open-gop={int(open_gop)}"
        params += f":{encoder_params}" if encoder_params else ""
        options = {"preset": "veryfast", "crf": "23", "x264-params": f"{params}:bframes={bframes}"}
    elif codec == "libx265":
        params = f"scenecut=0:keyint={gop}:min-keyint={gop}:open-gop={int(open_gop)}"
        params += f":bframes={bframes}:log-level=none:pools=1"
        params += f":{encoder_params}" if encoder_params else ""
        options = {"preset": "ultrafast", "x265-params": params}
    elif codec == "libvpx-vp9":
        options |= {"deadline": "realtime", "cpu-used": "8"}
    elif codec == "libsvtav1":
        options |= {"preset": "8", "crf": "8", "svtav1-params": "lp=1"}
    stream = out.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
    assert isinstance(stream, av.VideoStream)
    width, height = size
    stream.width, stream.height = width, height
    odd = width % 2 or height % 2
    default = {"gif": "rgb8", "ffv1": "yuv444p", "mjpeg": "yuvj444p"}.get(
        codec, "yuv444p" if odd else "yuv420p"
    )
    stream.pix_fmt = pix_fmt or default
    if codec not in ("mpeg4", "mpeg2video"):  # those write only a few time bases
        stream.codec_context.time_base = TICK
    with contextlib.suppress(AttributeError, ValueError):
        stream.codec_context.thread_count = 1
    return stream


def _audio_stream(
    out: av.container.OutputContainer, encoder: str, rate: int, channels: int
) -> av.AudioStream:
    options = {"aac_coder": "fast"} if encoder == "aac" else {}
    stream = out.add_stream(encoder, rate=rate, options=options, layout=LAYOUTS[channels])
    assert isinstance(stream, av.AudioStream)
    return stream


def _encode_video(
    stream: av.VideoStream, times: Sequence[float], draw: Callable[[int, float], np.ndarray]
) -> list[av.Packet]:
    packets = []
    tick = stream.codec_context.time_base or TICK
    for number, time_s in enumerate(times):
        frame = av.VideoFrame.from_ndarray(draw(number, time_s), format="rgb24")
        frame.time_base = tick
        frame.pts = round(Fraction(time_s).limit_denominator(90_000) / tick)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def _encode_audio(
    stream: av.AudioStream, samples: np.ndarray, rate: int, start_s: float
) -> list[av.Packet]:
    packets = []
    layout = stream.codec_context.layout.name
    wanted = stream.codec_context.format.name
    resampler = av.AudioResampler(format=wanted, layout=layout, rate=stream.codec_context.rate)
    block = 1024
    for start in range(0, len(samples), block):
        part = samples[start : start + block]
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(part.reshape(1, -1)), format="flt", layout=layout
        )
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = start + round(start_s * rate)
        for converted in resampler.resample(frame):
            packets += stream.encode(converted)
    for converted in resampler.resample(None):
        packets += stream.encode(converted)
    return packets + stream.encode(None)


def _cover_stream(out: av.container.OutputContainer) -> av.VideoStream:
    cover = out.add_stream("mjpeg", rate=1)
    assert isinstance(cover, av.VideoStream)
    cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
    cover.disposition = av.stream.Disposition.attached_pic
    return cover


def _encode_cover(cover: av.VideoStream) -> list[av.Packet]:
    picture = np.full((48, 64, 3), (200, 30, 30), np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    frame.pts, frame.time_base = 0, Fraction(1, 1)
    return cover.encode(frame) + cover.encode(None)
