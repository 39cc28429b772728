"""Opens the media of a prompt and makes them ready for the model: pixels, sound, and an account.

Contract: one function a kind of medium, each returning a :class:`Loaded` item whose counts are
those that planning needs. Pixels stay uint8; sound is 16 kHz mono. With ``decode=False`` only
headers are read, which gives the same counts (``--show-plan``, batching by length).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from av_llava.audio.resample import load_audio
from av_llava.chat import MediaPart
from av_llava.errors import MediaError, UsageError
from av_llava.geometry import SAMPLE_RATE_HZ
from av_llava.images import PixelSpec, frame_resizer, frames_to_pixels, image_tiles
from av_llava.media import (
    DEFAULT_LIMITS,
    FrameBatch,
    LocalFile,
    MediaInfo,
    fetch,
    is_remote,
    probe,
    read_frames,
    read_image,
    scan_frames,
)
from av_llava.sampling import choose_frames
from av_llava.settings import (
    AudioSettings,
    ImageSettings,
    SamplingSettings,
    VisionSettings,
    check_choice,
)

AUDIO_MODES = ("auto", "on", "off")


@dataclass(frozen=True)
class MediaOptions:
    """How the media of a request are read."""

    sampling: SamplingSettings
    start_s: float | None = None
    """First second used of every video and sound."""
    end_s: float | None = None
    """Last second used."""
    audio: Any = "auto"
    """The sound of videos: auto (if there is one), on (must be there), off, or a sound file."""
    worker: bool = False
    """Decode in a process that can be killed."""

    def for_part(self, part: MediaPart) -> MediaOptions:
        """These options with what one content part says for itself."""
        changes = {k: getattr(part, k) for k in ("frames", "fps") if getattr(part, k) is not None}
        window = {k: getattr(part, k) for k in ("start_s", "end_s") if getattr(part, k) is not None}
        return replace(self, sampling=self.sampling.replace(**changes), **window)


@dataclass(frozen=True)
class LoadedImage:
    """One still image as tiles."""

    source: str
    size: tuple[int, int]
    n_tiles: int
    tiles: Tensor | None
    """uint8 [n_tiles, 3, H, W]; None when only planned."""
    n_images: int = 1
    """Images in the same prompt."""


@dataclass(frozen=True)
class LoadedSound:
    """Sound at 16 kHz."""

    source: str
    n_samples: int
    start_s: float
    waveform: Tensor | None
    """float32 [S]; None when only planned."""
    duration_s: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedExtra:
    """One item of a registered modality."""

    kind: str
    source: str
    n_tokens: int
    item: Tensor


@dataclass(frozen=True)
class LoadedVideo:
    """Sampled frames, and the video's own sound."""

    source: str
    pts_s: tuple[float, ...]
    duration_s: float
    n_source_frames: int
    frames: Tensor | None
    """uint8 [T, 3, H, W]; None when only planned."""
    backend: str | None = None
    sound: LoadedSound | None = None
    no_sound: str | None = None
    """Why there is no sound, or None."""
    warnings: tuple[str, ...] = ()


def kept(source: Any) -> Any:
    """Addresses, bytes and file objects as files, so that they are fetched only once."""
    remote = isinstance(source, str) and is_remote(source)
    if remote or isinstance(source, (bytes, bytearray)) or hasattr(source, "read"):
        return fetch(source, DEFAULT_LIMITS)
    return source


def describe_source(source: Any) -> str:
    """A short name of a source for messages."""
    if isinstance(source, LocalFile):
        return source.name
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, (bytes, bytearray)):
        return f"<{len(source)} bytes>"
    return f"<{type(source).__name__}>"


def load_image(
    part: MediaPart, spec: PixelSpec, settings: ImageSettings, *, n_images: int, decode: bool
) -> LoadedImage:
    """Open an image and cut it into tiles, as one of ``n_images`` of its prompt."""
    picture = part.source if isinstance(part.source, Image.Image) else read_image(part.source)
    tiles = torch.from_numpy(image_tiles(picture, spec, settings.for_count(n_images)))
    return LoadedImage(
        describe_source(part.source),
        picture.size,
        len(tiles),
        tiles if decode else None,
        n_images,
    )


def load_video(
    part: MediaPart,
    spec: PixelSpec,
    vision: VisionSettings,
    options: MediaOptions,
    *,
    ears: AudioSettings | None,
    decode: bool,
) -> LoadedVideo:
    """Sample the frames of a video and, if asked for, read its sound over the same span.

    Args:
        part: the video.
        spec: pixel size and filter.
        vision: how frames are resized.
        options: sampling, window, sound.
        ears: the audio settings of a model that has ears.
        decode: whether pixels and samples are read, or only headers.
    """
    options = options.for_part(part)
    part = replace(part, source=kept(part.source))
    if isinstance(part.source, (np.ndarray, Tensor, list, tuple)):
        return _array_video(part, spec, vision, options, ears)
    start_s, end_s = options.start_s, options.end_s
    if decode:
        resize = frame_resizer(spec, vision.video_preprocess)
        batch = read_frames(
            part.source, options.sampling, start_s=start_s, end_s=end_s, resize=resize
        )
    else:
        batch = _planned_frames(part.source, options.sampling, start_s, end_s)
    sound, reason = _sound_of(part, batch.span_s, options, ears, decode)
    return LoadedVideo(
        source=describe_source(part.source),
        pts_s=tuple(float(t) for t in batch.pts_s),
        duration_s=batch.duration_s,
        n_source_frames=batch.n_source_frames,
        frames=frames_to_pixels(batch.frames) if decode else None,
        backend=batch.backend,
        sound=sound,
        no_sound=reason,
        warnings=tuple(batch.warnings) + (() if sound is None else sound.warnings),
    )


def _planned_frames(
    source: Any, sampling: SamplingSettings, start_s: float | None, end_s: float | None
) -> FrameBatch:
    """The frames that would be read, without their pixels."""
    table = scan_frames(source, start_s=start_s, end_s=end_s, source_fps=sampling.source_fps)
    chosen = choose_frames(table.pts_s, sampling, start_s, end_s, avg_fps=table.avg_fps)
    return FrameBatch(
        frames=np.empty((0, 0, 0, 3), np.uint8),
        pts_s=table.pts_s[chosen],
        duration_s=table.end_s,
        source=describe_source(source),
        backend="none",
        span_s=(start_s or 0.0, min(end_s or table.end_s, table.end_s)),
        n_source_frames=len(table),
        warnings=table.warnings,
    )


def _array_video(
    part: MediaPart,
    spec: PixelSpec,
    vision: VisionSettings,
    options: MediaOptions,
    ears: AudioSettings | None,
) -> LoadedVideo:
    """Frames that are given as uint8 [T, H, W, 3]; one a second unless ``fps`` says otherwise."""
    frames = np.stack([np.asarray(f) for f in part.source])
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise MediaError(
            f"A video given as an array must be uint8 [T, H, W, 3], not {frames.dtype} "
            f"{list(frames.shape)}."
        )
    resize = frame_resizer(spec, vision.video_preprocess)
    fps = options.sampling.source_fps or 1.0
    keep = np.arange(len(frames))
    if options.sampling.frames is not None and len(frames) > options.sampling.frames:
        keep = np.linspace(0, len(frames) - 1, options.sampling.frames).round().astype(int)
    resized = np.stack([resize(frames[i]) for i in keep])
    sound: LoadedSound | None = None
    reason: str | None = "frames without sound"
    if not isinstance(options.audio, str) or options.audio not in ("auto", "off"):
        sound, reason = _sound_of(part, (0.0, len(frames) / fps), options, ears, True)
    return LoadedVideo(
        source=describe_source(part.source),
        pts_s=tuple(float(i / fps) for i in keep),
        duration_s=len(frames) / fps,
        n_source_frames=len(frames),
        frames=torch.from_numpy(resized).permute(0, 3, 1, 2),
        sound=sound,
        no_sound=reason,
    )


def _sound_of(
    part: MediaPart,
    span_s: tuple[float, float],
    options: MediaOptions,
    ears: AudioSettings | None,
    decode: bool,
) -> tuple[LoadedSound | None, str | None]:
    """The sound that goes with a video, or why there is none."""
    mode = options.audio if isinstance(options.audio, str) else "a sound"
    if mode == "off":
        return None, "off"
    if ears is None:
        if mode != "auto":
            raise UsageError(f"audio={mode!r} was asked for, but this model has no audio tower.")
        return None, "the model has no audio tower"
    if mode in AUDIO_MODES:
        sound = load_sound(
            part.source,
            start_s=span_s[0],
            end_s=span_s[1],
            max_seconds=seconds_needed(ears),
            strict=mode == "on",
            decode=decode,
        )
    else:
        sound = load_sound(options.audio, max_seconds=seconds_needed(ears), decode=decode)
    return (sound, None) if sound is not None else (None, "no sound track")


def seconds_needed(ears: AudioSettings) -> float | None:
    """How much of a long sound is ever used, counted from its start; None when all may be."""
    return ears.max_seconds if ears.long_audio == "keep" else None


def load_sound(
    source: Any,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    max_seconds: float | None = None,
    strict: bool = True,
    decode: bool = True,
) -> LoadedSound | None:
    """Read sound at 16 kHz; None when the file has none and ``strict`` is false."""
    if isinstance(source, (np.ndarray, Tensor)):
        return _array_sound(source, start_s, end_s)
    source = kept(source)
    if not decode:
        return _planned_sound(probe(source), source, start_s, end_s, strict)
    # The sound ends where the header says, so that plans made from headers are exact; codecs pad
    # their last frame beyond it.
    info = probe(source)
    if info.audio is None and not strict:
        return None
    end_s = min((t for t in (end_s, _sound_end(info)) if t is not None), default=None)
    clip = load_audio(source, start_s=start_s, end_s=end_s, max_seconds=max_seconds, strict=strict)
    if clip.status == "none":
        return None
    waveform = torch.from_numpy(clip.waveform)
    return LoadedSound(
        describe_source(source),
        len(waveform),
        clip.start_s,
        waveform,
        clip.duration_s,
        tuple(clip.warnings),
    )


def _array_sound(
    samples: np.ndarray | Tensor, start_s: float | None, end_s: float | None
) -> LoadedSound:
    """Mono samples at 16 kHz that are given as an array."""
    waveform = torch.as_tensor(samples)
    if waveform.ndim != 1 or not waveform.is_floating_point() or len(waveform) == 0:
        raise MediaError(
            f"Sound given as an array must be float samples [S] at 16 kHz, mono, not "
            f"{waveform.dtype} {list(waveform.shape)}."
        )
    first = round((start_s or 0.0) * SAMPLE_RATE_HZ)
    stop = None if end_s is None else round(end_s * SAMPLE_RATE_HZ)
    waveform = waveform[first:stop].float()
    seconds = len(waveform) / SAMPLE_RATE_HZ
    return LoadedSound(describe_source(samples), len(waveform), start_s or 0.0, waveform, seconds)


def _planned_sound(
    info: MediaInfo, source: Any, start_s: float | None, end_s: float | None, strict: bool
) -> LoadedSound | None:
    """Samples as the headers promise them."""
    if info.audio is None:
        if strict:
            raise MediaError(f"{describe_source(source)} has no sound track.")
        return None
    begin = start_s or 0.0
    end = min(t for t in (end_s, _sound_end(info)) if t is not None)
    seconds = max(0.0, end - begin)
    if seconds == 0 and not strict:
        return None
    n_samples = round(seconds * SAMPLE_RATE_HZ)
    return LoadedSound(describe_source(source), n_samples, begin, None, seconds)


def _sound_end(info: MediaInfo) -> float | None:
    """When the sound track ends on the media time line, by its header."""
    if info.audio is None:
        return None
    if info.audio.duration_s is None:
        return info.duration_s
    return (info.audio.start_s or 0.0) + info.audio.duration_s


def check_audio_mode(audio: Any) -> None:
    """Refuse a mode that is neither known nor a file."""
    if not isinstance(audio, str) or audio in AUDIO_MODES or is_remote(audio):
        return
    if not Path(audio).expanduser().exists():
        if "/" in audio or "." in audio:
            raise MediaError(f"The sound file {audio} does not exist.")
        check_choice("audio mode", audio, AUDIO_MODES)
