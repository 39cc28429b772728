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

from av_llava.chat import MediaPart
from av_llava.chat.parts import AUDIO_MODES
from av_llava.errors import MediaError, UsageError
from av_llava.geometry import tile_grid
from av_llava.images import (
    PixelSpec,
    frame_resizer,
    frames_to_pixels,
    image_tiles,
    resize_frames,
    to_rgb,
)
from av_llava.media import (
    DEFAULT_LIMITS,
    FrameBatch,
    Limits,
    is_remote,
    read_frames,
    read_image,
    read_image_size,
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
from av_llava.sound_inputs import (
    LoadedSound,
    SoundRequest,
    describe_source,
    kept,
    load_sound,
    seconds_needed,
)


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
    limits: Limits = DEFAULT_LIMITS
    """What a file may cost."""
    decoder_threads: int | None = None
    """Threads that decode frames; None is all processors."""
    isolate: bool | None = None
    """Decode in a process that can be killed; None does so for addresses."""

    def for_part(self, part: MediaPart) -> MediaOptions:
        """These options with what one content part says for itself.

        A sound file or mode of the part goes before the request's, except that "off" leaves out
        the sound of every video.
        """
        own = {k: getattr(part, k) for k in ("frames", "fps", "source_fps")}
        changes = {k: v for k, v in own.items() if v is not None}
        window = {k: getattr(part, k) for k in ("start_s", "end_s") if getattr(part, k) is not None}
        audio = self.audio
        if part.audio is not None and not (isinstance(audio, str) and audio == "off"):
            audio = part.audio
        return replace(self, sampling=self.sampling.replace(**changes), audio=audio, **window)


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
    span_s: tuple[float, float] = (0.0, 0.0)
    """The window that was asked for, cut to the file."""
    backend: str | None = None
    sound: LoadedSound | None = None
    no_sound: str | None = None
    """Why there is no sound, or None."""
    warnings: tuple[str, ...] = ()


def load_image(
    part: MediaPart,
    spec: PixelSpec,
    settings: ImageSettings,
    *,
    n_images: int,
    limits: Limits,
    decode: bool,
) -> LoadedImage:
    """Open an image and cut it into tiles, as one of ``n_images`` of its prompt."""
    settings, name = settings.for_count(n_images), describe_source(part.source)
    if not decode and not isinstance(part.source, (Image.Image, np.ndarray, Tensor)):
        size = read_image_size(part.source, limits)
        grid = tile_grid(size, settings, spec.side)
        return LoadedImage(name, size, 1 if grid is None else 1 + grid[0] * grid[1], None, n_images)
    picture = _picture(part.source, limits)
    tiles = torch.from_numpy(image_tiles(picture, spec, settings))
    return LoadedImage(name, picture.size, len(tiles), tiles if decode else None, n_images)


def _picture(source: Any, limits: Limits) -> Image.Image:
    """Open a picture: a Pillow image, uint8 [H, W, 3], or a source."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (np.ndarray, Tensor)):
        return to_rgb(np.asarray(source))
    return read_image(source, limits=limits)


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
    source = kept(part.source, options.limits)
    if isinstance(source, (np.ndarray, Tensor, list, tuple)):
        batch = _array_frames(source, spec, vision, options)
    elif decode:
        batch = read_frames(
            source,
            options.sampling,
            start_s=options.start_s,
            end_s=options.end_s,
            resize=frame_resizer(spec, vision.video_preprocess),
            limits=options.limits,
            isolate=options.isolate,
            threads=options.decoder_threads,
        )
    else:
        batch = _planned_frames(source, options)
    sound, reason = sound_of(source, batch.span_s, options, ears, decode)
    return LoadedVideo(
        source=describe_source(part.source),
        pts_s=tuple(float(t) for t in batch.pts_s),
        duration_s=batch.duration_s,
        n_source_frames=batch.n_source_frames,
        span_s=batch.span_s,
        frames=frames_to_pixels(batch.frames) if decode else None,
        backend=batch.backend,
        sound=sound,
        no_sound=reason,
        warnings=tuple(batch.warnings) + (() if sound is None else sound.warnings),
    )


def _planned_frames(source: Any, options: MediaOptions) -> FrameBatch:
    """The frames that would be read, without their pixels."""
    sampling, start_s, end_s = options.sampling, options.start_s, options.end_s
    table = scan_frames(
        source,
        start_s=start_s,
        end_s=end_s,
        source_fps=sampling.source_fps,
        limits=options.limits,
    )
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


def _array_frames(
    source: Any, spec: PixelSpec, vision: VisionSettings, options: MediaOptions
) -> FrameBatch:
    """Frames that are given as uint8 [T, H, W, 3], ``source_fps`` (1) a second."""
    if len(source) == 0:
        raise MediaError("A video given as frames holds none: at least one frame is needed.")
    frames = np.stack([np.asarray(f) for f in source])
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise MediaError(
            f"A video given as an array must be uint8 [T, H, W, 3], not {frames.dtype} "
            f"{list(frames.shape)}."
        )
    fps = options.sampling.source_fps or 1.0
    pts_s, end_s = np.arange(len(frames)) / fps, len(frames) / fps
    chosen = choose_frames(pts_s, options.sampling, options.start_s, options.end_s, avg_fps=fps)
    return FrameBatch(
        frames=resize_frames(frames[chosen], spec, vision.video_preprocess),
        pts_s=pts_s[chosen],
        duration_s=end_s,
        source=describe_source(source),
        backend="array",
        span_s=(options.start_s or 0.0, min(options.end_s or end_s, end_s)),
        n_source_frames=len(frames),
    )


def sound_of(
    source: Any,
    span_s: tuple[float, float],
    options: MediaOptions,
    ears: AudioSettings | None,
    decode: bool,
) -> tuple[LoadedSound | None, str | None]:
    """The sound that goes with a video, or why there is none."""
    own = isinstance(options.audio, str) and options.audio in AUDIO_MODES
    if own and options.audio == "off":
        return None, "off"
    if ears is None:
        if options.audio != "auto":
            raise UsageError("Sound was asked for (audio), but this model has no audio tower.")
        return None, "the model has no audio tower"
    strict = not own or options.audio == "on"
    if own and isinstance(source, (np.ndarray, Tensor, list, tuple)):
        if strict:
            raise MediaError("audio='on' was asked for, but frames given as an array are mute.")
        return None, "frames without sound"
    request = SoundRequest(
        span_s[0],
        span_s[1],
        max_seconds=seconds_needed(ears),
        strict=strict,
        decode=decode,
        limits=options.limits,
        isolate=options.isolate,
    )
    return load_sound(source if own else options.audio, request)


def check_audio_mode(audio: Any) -> None:
    """Refuse a mode that is neither known nor a file."""
    if not isinstance(audio, str) or audio in AUDIO_MODES or is_remote(audio):
        return
    if not Path(audio).expanduser().exists():
        if "/" in audio or "." in audio:
            raise MediaError(f"The sound file {audio} does not exist.")
        check_choice("audio mode", audio, AUDIO_MODES)
