"""Opens sound and brings it to 16 kHz mono, over a window of the media time line.

Contract: ``load_sound`` says why there is no sound instead of failing, unless sound was asked for.
Sound ends where the file's header says, so that plans made from headers are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from av_llava.audio.resample import load_audio
from av_llava.errors import MediaError
from av_llava.geometry import SAMPLE_RATE_HZ
from av_llava.media import DEFAULT_LIMITS, Limits, LocalFile, MediaInfo, fetch, is_remote, probe
from av_llava.settings import AudioSettings

NO_TRACK = "no sound track"
NOT_THEN = "no sound in this window"


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


class SoundRequest(NamedTuple):
    """Which part of a file's sound is wanted, and how badly."""

    start_s: float | None = None
    end_s: float | None = None
    max_seconds: float | None = None
    """Read no more than this, from the start of the window."""
    strict: bool = True
    """No sound is an error."""
    decode: bool = True
    """False reads only headers."""
    limits: Limits = DEFAULT_LIMITS
    isolate: bool | None = None
    """Decode in a process that can be killed; None does so for addresses."""


def seconds_needed(ears: AudioSettings) -> float | None:
    """How much of a long sound is ever used, counted from its start; None when all may be."""
    return ears.max_seconds if ears.long_audio == "keep" else None


def kept(source: Any, limits: Limits = DEFAULT_LIMITS) -> Any:
    """Addresses, bytes and file objects as files, so that they are fetched only once."""
    remote = isinstance(source, str) and is_remote(source)
    if remote or isinstance(source, (bytes, bytearray)) or hasattr(source, "read"):
        return fetch(source, limits)
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


def load_sound(source: Any, request: SoundRequest) -> tuple[LoadedSound | None, str | None]:
    """Read sound.

    Args:
        source: a file of any kind, or float samples [S] at 16 kHz.
        request: what is wanted.

    Returns:
        The sound and None, or None and why there is none.

    Raises:
        MediaError: it cannot be read; or there is none and the request is strict.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        return _array_sound(source, request), None
    source = kept(source, request.limits)
    info = probe(source, request.limits)
    end_s = _end(info, request.end_s)
    reason = NO_TRACK if info.audio is None else None
    if end_s is not None and end_s <= (request.start_s or 0.0):
        reason = reason or NOT_THEN
    if reason is not None:
        if request.strict:
            raise MediaError(f"Sound was asked for, but {describe_source(source)!r} has {reason}.")
        return None, reason
    if not request.decode:
        return _planned(source, request.start_s or 0.0, end_s), None
    clip = load_audio(
        source,
        start_s=request.start_s,
        end_s=end_s,
        max_seconds=request.max_seconds,
        strict=request.strict,
        limits=request.limits,
        isolate=request.isolate,
    )
    if clip.status == "none":
        return None, NOT_THEN
    silent = ("the sound track is silent",) if clip.status == "silent" else ()
    waveform = torch.from_numpy(clip.waveform)
    sound = LoadedSound(
        describe_source(source),
        len(waveform),
        clip.start_s,
        waveform,
        clip.duration_s,
        (*clip.warnings, *silent),
    )
    return sound, None


def _planned(source: Any, start_s: float, end_s: float | None) -> LoadedSound:
    """Samples as the headers promise them."""
    seconds = (end_s or 0.0) - start_s
    n_samples = round(seconds * SAMPLE_RATE_HZ)
    return LoadedSound(describe_source(source), n_samples, start_s, None, seconds)


def _end(info: MediaInfo, wanted_s: float | None) -> float | None:
    """When the sound ends on the media time line: by the header, or earlier if asked for."""
    if info.audio is None:
        return None
    end_s = info.duration_s
    if info.audio.duration_s is not None:
        end_s = (info.audio.start_s or 0.0) + info.audio.duration_s
    return min((t for t in (end_s, wanted_s) if t is not None), default=None)


def _array_sound(samples: np.ndarray | Tensor, request: SoundRequest) -> LoadedSound:
    """Mono samples at 16 kHz that are given as an array."""
    waveform = torch.as_tensor(samples)
    if waveform.ndim != 1 or not waveform.is_floating_point() or len(waveform) == 0:
        raise MediaError(
            f"Sound given as an array must be float samples [S] at 16 kHz, mono, not "
            f"{waveform.dtype} {list(waveform.shape)}."
        )
    start_s = request.start_s or 0.0
    stop = None if request.end_s is None else round(request.end_s * SAMPLE_RATE_HZ)
    waveform = waveform[round(start_s * SAMPLE_RATE_HZ) : stop].float()
    if len(waveform) == 0:
        raise MediaError(f"The sound ends before the window starts ({start_s:g} s).")
    broken = int((~waveform.isfinite()).sum())
    warnings = (f"{broken} samples of the sound are not numbers: silence was used.",)
    return LoadedSound(
        describe_source(samples),
        len(waveform),
        start_s,
        waveform.nan_to_num(0.0, 0.0, 0.0) if broken else waveform,
        len(waveform) / SAMPLE_RATE_HZ,
        warnings if broken else (),
    )
