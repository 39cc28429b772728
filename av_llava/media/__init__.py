"""Reading media: what a file is, its frames, its sound, still images.

Everything here is numpy and PyAV (decord, Pillow); nothing imports torch.
"""

from av_llava.media.audio import read_audio
from av_llava.media.image import read_image, read_image_size
from av_llava.media.limits import DEFAULT_LIMITS, Limits, TookTooLongError
from av_llava.media.probe import probe
from av_llava.media.source import LocalFile, Source, fetch, is_remote, local_file
from av_llava.media.table import FrameTable
from av_llava.media.types import (
    AudioClip,
    AudioStreamInfo,
    FrameBatch,
    MediaInfo,
    VideoStreamInfo,
)
from av_llava.media.video import (
    VIDEO_BACKENDS,
    Resize,
    read_frames,
    read_frames_at,
    scan_frames,
)
from av_llava.media.worker import run_in_worker

__all__ = [
    "AudioClip",
    "AudioStreamInfo",
    "DEFAULT_LIMITS",
    "FrameBatch",
    "FrameTable",
    "Limits",
    "LocalFile",
    "MediaInfo",
    "Resize",
    "Source",
    "TookTooLongError",
    "VIDEO_BACKENDS",
    "VideoStreamInfo",
    "fetch",
    "is_remote",
    "local_file",
    "probe",
    "read_audio",
    "read_frames",
    "read_frames_at",
    "read_image",
    "read_image_size",
    "run_in_worker",
    "scan_frames",
]
