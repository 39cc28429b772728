"""Media files of scenes: H.264 and AAC in mp4, or AAC alone in m4a, through PyAV.

Contract: the same scene gives the same bytes with the same libraries (one thread, no time stamp);
a file appears under its name only when it is whole.
"""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np

from av_llava.training.world.parts import Scene
from av_llava.training.world.picture import frames
from av_llava.training.world.sound import RATE_HZ, waveform

# Quality first: at 64 pixels even this takes few bytes. Macroblock trees are left out, since with
# them x264 gives now and then other bytes for the same frames. Colours lose a little to chroma
# subsampling, which is what real videos do, too.
_VIDEO_OPTIONS = {
    "crf": "16",
    "preset": "veryfast",
    "x264-params": "threads=1:sync-lookahead=0:rc-lookahead=0:mbtree=0",
}
_AUDIO_BITS = 48_000
_BLOCK = 1024


def suffix(scene: Scene) -> str:
    """Return the file name's ending that suits a scene."""
    return scene.suffix


def write_clip(scene: Scene, path: str | Path) -> Path:
    """Write a scene as a media file and return its path.

    Args:
        scene: what to write; without sound the file has no sound track, without picture only that.
        path: .mp4 or, for scenes without a picture, .m4a (or .mp4). Its folder must exist.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with av.open(str(part), "w", format="mp4") as out:
            film = _film(out, scene) if scene.has_video else None
            track = _track(out) if scene.has_audio else None
            if film is not None:
                _write_frames(out, film, frames(scene))
            if track is not None:
                _write_sound(out, track, waveform(scene))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _film(out: av.container.OutputContainer, scene: Scene) -> av.VideoStream:
    film = out.add_stream("libx264", rate=scene.fps, options=_VIDEO_OPTIONS)
    film.width = film.height = scene.size
    film.pix_fmt = "yuv420p"
    film.codec_context.thread_count = 1
    return film


def _track(out: av.container.OutputContainer) -> av.AudioStream:
    track = out.add_stream("aac", rate=RATE_HZ, layout="mono", options={"aac_coder": "fast"})
    track.codec_context.bit_rate = _AUDIO_BITS
    return track


def _write_frames(
    out: av.container.OutputContainer, film: av.VideoStream, pictures: np.ndarray
) -> None:
    for number, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = number
        out.mux(film.encode(frame))
    out.mux(film.encode(None))


def _write_sound(
    out: av.container.OutputContainer, track: av.AudioStream, samples: np.ndarray
) -> None:
    for start in range(0, len(samples), _BLOCK):
        block = np.ascontiguousarray(samples[None, start : start + _BLOCK])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE_HZ, start
        out.mux(track.encode(frame))
    out.mux(track.encode(None))
