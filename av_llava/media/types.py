"""What the media readers give back: stream facts, frames, sound.

Contract: numpy only. All times are seconds on the media time line, whose zero is the container's
own start (the earliest stream), so that frames and sound of one file share one clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

MediaKind = Literal["video", "audio", "image", "frames"]
AudioStatus = Literal["ok", "partial", "silent", "none"]


@dataclass(frozen=True)
class VideoStreamInfo:
    """A picture stream, as its header describes it."""

    codec: str
    width: int
    """Pixels across, as shown (after rotation)."""
    height: int
    """Pixels down, as shown (after rotation)."""
    rotation: int
    """Counter-clockwise degrees by which the stored picture is turned: 0, 90, 180, 270."""
    avg_fps: float | None
    duration_s: float | None
    n_frames: int | None
    """What the header claims; the true number needs a scan (`media.scan_frames`)."""
    start_s: float


@dataclass(frozen=True)
class AudioStreamInfo:
    """A sound stream, as its header describes it."""

    codec: str
    rate_hz: int
    channels: int
    layout: str
    duration_s: float | None
    start_s: float


@dataclass(frozen=True)
class MediaInfo:
    """One medium, as its container's header describes it; nothing but a first frame is decoded."""

    path: str
    kind: MediaKind
    container: str
    duration_s: float | None
    size_bytes: int
    video: VideoStreamInfo | None = None
    audio: AudioStreamInfo | None = None


@dataclass(frozen=True, repr=False)
class FrameBatch:
    """Frames of one video, in display order."""

    frames: np.ndarray
    """uint8 [T, height, width, 3], RGB, upright; resized if a resize function was given."""
    pts_s: np.ndarray
    """float64 [T], the time at which each frame really appears."""
    duration_s: float
    """When the last frame of the file (or of the window, if only that was read) ends."""
    source: str
    backend: str
    span_s: tuple[float, float]
    """The window that was asked for, cut to the file."""
    n_source_frames: int
    """Frames that were there to choose from: the file's, or the window's if only that was read."""
    source_size: tuple[int, int] = (0, 0)
    """(width, height) of the upright picture before resizing."""
    avg_fps: float = 0.0
    """The container's average frame rate."""
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        times = ", ".join(f"{t:.2f}" for t in self.pts_s[:3])
        more = f", … {self.pts_s[-1]:.2f}" if len(self.pts_s) > 3 else ""
        noted = f", warnings={len(self.warnings)}" if self.warnings else ""
        return (
            f"FrameBatch(frames=u8{list(self.frames.shape)}, pts_s=[{times}{more}], "
            f"duration_s={self.duration_s:.2f}, backend={self.backend!r}, "
            f"source={Path(self.source).name!r}{noted})"
        )


@dataclass(frozen=True, repr=False)
class AudioClip:
    """Mono sound on the media time line."""

    waveform: np.ndarray
    """float32 [S], mono, at the file's own rate; sample 0 lies at ``start_s``."""
    sample_rate_hz: int
    start_s: float
    duration_s: float
    """Length of the waveform in seconds."""
    source: str
    channels: int
    """Channels of the track before mixing; 0 without a track."""
    status: AudioStatus
    """ok; partial: decoding stopped early; silent: all samples (almost) zero; none: no sound
    (no track, or none in the window)."""
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.waveform)

    def __repr__(self) -> str:
        noted = f", warnings={len(self.warnings)}" if self.warnings else ""
        return (
            f"AudioClip(waveform=f32[{len(self.waveform)}], {self.sample_rate_hz} Hz, "
            f"start_s={self.start_s:.2f}, duration_s={self.duration_s:.2f}, "
            f"channels={self.channels}, status={self.status!r}, "
            f"source={Path(self.source).name!r}{noted})"
        )
