"""What a medium is, from its header: kind, streams, sizes, length.

Contract: nothing is decoded but one frame (its rotation is known only then); no torch. Every
way in which a source can be unusable has its own `MediaError`.
"""

from __future__ import annotations

import av
from av.error import FFmpegError

from av_llava.errors import MediaError
from av_llava.media.container import (
    audio_stream,
    container_duration_s,
    need_video,
    open_container,
    stream_duration_s,
    stream_start_s,
    video_stream,
)
from av_llava.media.folder_reader import DEFAULT_FPS, frame_files
from av_llava.media.image import animation_frames, looks_like_image, open_picture
from av_llava.media.limits import DEFAULT_LIMITS, Deadline, Limits
from av_llava.media.source import LocalFile, Source, local_file
from av_llava.media.types import AudioStreamInfo, MediaInfo, MediaKind, VideoStreamInfo
from av_llava.media.watch import watched_call


def probe(source: Source, limits: Limits = DEFAULT_LIMITS) -> MediaInfo:
    """Describe a medium from its container's header.

    Args:
        source: path, ``file://`` or HTTP(S) address, bytes, binary file object, or a folder of
            frame images.
        limits: what an untrusted file may cost.

    Raises:
        MediaError: missing, a folder without images, empty, not media, no index (moov), a
            container that is not accepted, a playlist, or beyond the limits.
    """
    with local_file(source, limits) as file:
        deadline = Deadline(limits, file.name)
        return watched_call(lambda: probe_file(file, limits), deadline)


def probe_file(file: LocalFile, limits: Limits) -> MediaInfo:
    """Describe a local file or folder; see `probe`."""
    if file.path.is_dir():
        return _folder(file, limits)
    if looks_like_image(file.path):
        still = _picture(file, limits)
        if still is not None:
            return still
    with open_container(file, Deadline(limits, file.name)) as container:
        film, sound = video_stream(container), audio_stream(container)
        if film is None and sound is None:
            raise MediaError(f"{file.name!r} holds neither picture nor sound that can be decoded.")
        duration_s = container_duration_s(container)
        if duration_s is not None:
            limits.check("max_duration_s", duration_s, repr(file.name), "its length in seconds")
        # before the first frame is decoded, which reads past the header
        sound_info = _audio_info(container, sound) if sound is not None else None
        film_info = _video_info(container, file, limits) if film is not None else None
        return MediaInfo(
            path=file.name,
            kind="video" if film is not None else "audio",
            container=container.format.name.split(",")[0],
            duration_s=duration_s,
            size_bytes=file.path.stat().st_size,
            video=film_info,
            audio=sound_info,
        )


def media_kind(file: LocalFile, limits: Limits) -> MediaKind:
    """Return what a local source is: video, audio, image, or frames (a folder)."""
    return probe_file(file, limits).kind


def is_animated_webp(file: LocalFile, limits: Limits) -> bool:
    """Return whether the file is an animation that FFmpeg cannot decode but Pillow can."""
    if not looks_like_image(file.path):
        return False
    with open_picture(file, limits) as picture:
        return picture.format == "WEBP" and animation_frames(file, picture) > 1


def _video_info(
    container: av.container.InputContainer, file: LocalFile, limits: Limits
) -> VideoStreamInfo:
    stream = need_video(container, file.name, limits)
    context = stream.codec_context
    # the header's facts first: decoding a frame reads on
    codec, size = context.name.removeprefix("lib"), (context.width, context.height)
    rotation = _rotation(container, stream)
    width, height = size[::-1] if rotation % 180 else size
    return VideoStreamInfo(
        codec=codec,
        width=width,
        height=height,
        rotation=rotation,
        avg_fps=float(stream.average_rate) if stream.average_rate else None,
        duration_s=stream_duration_s(stream),
        n_frames=stream.frames or None,
        start_s=stream_start_s(stream),
    )


def _rotation(container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """Return the picture's rotation in whole quarter turns; 0 if no frame can be decoded."""
    try:
        for frame in container.decode(stream):
            return round(frame.rotation / 90) % 4 * 90
    except FFmpegError:
        return 0  # a damaged picture still has a header worth reporting
    return 0


def _audio_info(container: av.container.InputContainer, stream: av.AudioStream) -> AudioStreamInfo:
    return AudioStreamInfo(
        codec=stream.codec_context.name,
        rate_hz=stream.codec_context.sample_rate,
        channels=stream.codec_context.channels,
        layout=stream.codec_context.layout.name,
        duration_s=stream_duration_s(stream),
        start_s=stream_start_s(stream),
    )


def _picture(file: LocalFile, limits: Limits) -> MediaInfo | None:
    """Describe a still image or an animated WebP; None for animations that FFmpeg reads."""
    with open_picture(file, limits) as picture:
        frames = animation_frames(file, picture)
        if frames > 1 and picture.format != "WEBP":
            return None
        stream = VideoStreamInfo(
            codec=str(picture.format).lower(),
            width=picture.width,
            height=picture.height,
            rotation=0,
            avg_fps=None,
            duration_s=None,
            n_frames=frames,
            start_s=0.0,
        )
        return MediaInfo(
            path=file.name,
            kind="video" if frames > 1 else "image",
            container=str(picture.format).lower(),
            duration_s=None,
            size_bytes=file.path.stat().st_size,
            video=stream,
        )


def _folder(file: LocalFile, limits: Limits) -> MediaInfo:
    files = frame_files(file)
    with open_picture(LocalFile(files[0], str(files[0])), limits) as first:
        size, codec = first.size, str(first.format).lower()
    return MediaInfo(
        path=file.name,
        kind="frames",
        container="folder",
        duration_s=None,
        size_bytes=sum(p.stat().st_size for p in files),
        video=VideoStreamInfo(
            codec=codec,
            width=size[0],
            height=size[1],
            rotation=0,
            avg_fps=DEFAULT_FPS,
            duration_s=None,
            n_frames=len(files),
            start_s=0.0,
        ),
    )
