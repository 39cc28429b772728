"""64 frames of a five-minute film: ours, with resizing, against the bare decoder.

The reference decodes the same packets with PyAV and throws the pictures away: no table of frames,
no conversion to RGB, no resizing. Like ours, it leaves out pictures that no other one refers to;
beside it stands the same without that. "PyAV + Pillow" is what one writes by hand, and decord is
what most LLaVA code calls. All threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image

from av_llava.images import frame_resizer, resize_frames
from av_llava.media import FrameBatch, read_frames, scan_frames
from av_llava.media.pyav_reader import usable_cpus
from av_llava.pixel_spec import PixelSpec
from av_llava.sampling import choose_frames
from av_llava.settings import SamplingSettings
from bench.measure import Contestants, Row, Timing, check, race, rows_of
from bench.video import film

TITLE = "Decoding 64 frames"
RATIO = "× bare decoder"
BARE, BARE_ALL = "PyAV, decode only", "PyAV, decode only, nothing left out"
OURS, BY_HAND = "av_llava, decode + resize", "PyAV + Pillow, decode + resize"
DECORD = "decord, decode only (RGB)"
BOUND = 1.10
SIDE = 384


@dataclass(frozen=True)
class Group:
    """Wanted frames that follow one keyframe."""

    key: int
    """Time stamp of the keyframe."""
    wanted: tuple[int, ...]
    """Time stamps of the wanted frames, increasing."""


def groups_of(path: Path, indices: np.ndarray) -> list[Group]:
    """Group wanted frames by keyframe, so that the bare decoder has nothing to search."""
    table = scan_frames(path)
    keys = np.sort(table.packet_ticks[table.key_positions])
    ticks = table.ticks[indices]
    owner = np.searchsorted(keys, ticks, side="right") - 1
    return [Group(int(keys[k]), tuple(ticks[owner == k].tolist())) for k in np.unique(owner)]


def decoded(path: Path, groups: list[Group], skip: bool) -> Iterator[av.VideoFrame]:
    """Decode the wanted frames and nothing that can be avoided."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        context = stream.codec_context
        context.thread_count = usable_cpus()
        for group in groups:
            container.seek(group.key, stream=stream)
            for packet in container.demux(stream):
                if skip:
                    context.skip_frame = "DEFAULT" if packet.pts in group.wanted else "NONREF"
                yield from (f for f in context.decode(packet) if f.pts in group.wanted)
                if packet.pts == group.wanted[-1]:
                    break
            yield from (f for f in context.decode(None) if f.pts in group.wanted)
            context.flush_buffers()


def bare(path: Path, groups: list[Group], skip: bool) -> int:
    """Decode and drop; returns how many wanted frames came."""
    return sum(1 for _ in decoded(path, groups, skip))


def by_hand(path: Path, groups: list[Group]) -> np.ndarray:
    """Decode, convert, resize with Pillow. uint8 [T, 384, 384, 3]"""
    images = (Image.fromarray(f.to_ndarray(format="rgb24")) for f in decoded(path, groups, False))
    bicubic = Image.Resampling.BICUBIC
    return np.stack([np.asarray(image.resize((SIDE, SIDE), bicubic)) for image in images])


def with_decord(path: Path, indices: np.ndarray) -> np.ndarray:
    """One batch through decord. uint8 [T, H, W, 3]"""
    import decord

    reader = decord.VideoReader(str(path), num_threads=usable_cpus())
    frames: np.ndarray = reader.get_batch(indices.tolist()).asnumpy()
    return frames


def ours(path: Path, n: int) -> FrameBatch:
    """The library's way, as the processor calls it."""
    resize = frame_resizer(PixelSpec((SIDE, SIDE)))
    return read_frames(path, SamplingSettings(frames=n), resize=resize)


def run(quick: bool) -> list[Row]:
    """All rows."""
    path, n = film(quick), 8 if quick else 64
    table = scan_frames(path)
    indices = choose_frames(table.pts_s, SamplingSettings(frames=n))
    groups = groups_of(path, indices)
    contestants: Contestants = {
        BARE: partial(bare, path, groups, True),
        BARE_ALL: partial(bare, path, groups, False),
        OURS: partial(ours, path, n),
        BY_HAND: partial(by_hand, path, groups),
    }
    if _has_decord():
        contestants[DECORD] = partial(with_decord, path, indices)
    _check(contestants, n)
    close = {name: contestants.pop(name) for name in (BARE, OURS)}
    timings = race(close, rounds=2 if quick else 4, seconds=15, warm_up=False)
    timings |= race(contestants, rounds=1, warm_up=False)
    where = f"{n} frames of {table.end_s:.0f} s, 1280×720 H.264"
    work = {name: Timing(t.cpu_s, t.cpu_s, t.cpu_s) for name, t in timings.items()}
    return [
        *rows_of(where, timings, BARE, bounds={OURS: BOUND}),
        *rows_of(f"{where}, processor time", work, BARE, bounds={OURS: BOUND}),
    ]


def _has_decord() -> bool:
    try:
        import decord  # noqa: F401
    except ImportError:  # no wheels for this platform
        return False
    return True


def _check(contestants: Contestants, n: int) -> None:
    """All give the same frames; decord converts colours by its own arithmetic."""
    frames = contestants[OURS]().frames.astype(int)
    check(contestants[BARE]() == len(frames) == n, "number of frames")
    off = np.abs(frames - contestants[BY_HAND]())
    check(off.max() <= 2 and (off > 1).mean() < 1e-5, f"resized frames differ by {off.max()}")
    if DECORD in contestants:
        resized = resize_frames(contestants[DECORD](), PixelSpec((SIDE, SIDE)))
        off = np.abs(frames - resized).mean((1, 2, 3))
        check(off.max() < 2, f"decord's frames differ by {off.max():.1f} levels on average")
