"""Frames through decord, with guards against the cases where it silently gives wrong ones.

Contract: runs in a worker process only (decord may hang, crash, and decode ahead without
bound); one reader per use. The frame table comes from PyAV: decord must count the same frames
at the same times, or the file is refused. Two kinds of file where it gives wrong frames without
any sign (open groups of pictures, MPEG transport streams) are refused as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from av_llava.errors import MediaError, UsageError
from av_llava.media.limits import Deadline
from av_llava.media.source import LocalFile
from av_llava.media.table import FrameTable

# decord retries this often at the end of a stream, holding the interpreter (its default: 10240).
_EOF_RETRIES = "256"
_BATCH_BYTES = 256 * 2**20
_TIME_TOLERANCE_S = 0.002


def decord_frames(
    file: LocalFile,
    table: FrameTable,
    container: str,
    size: tuple[int, int],
    wanted: list[int],
    deadline: Deadline,
    threads: int | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, uint8 [height, width, 3]) of the wanted table indices, increasing.

    Raises:
        MediaError: decord cannot read the file, or cannot be trusted with it.
        UsageError: decord is not installed.
    """
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", _EOF_RETRIES)
    try:
        import decord
    except ImportError as error:
        raise UsageError(
            "The video backend 'decord' is not installed (it has wheels for x86-64 Linux and "
            "Windows only). Use the backend 'pyav' or 'auto'."
        ) from error
    decord.logging.set_level(decord.logging.QUIET)
    if not table.whole or table.counted:
        raise _refusal(file, "its frames have no times of their own")
    if table.has_leading_pictures:
        raise _refusal(file, "it has open groups of pictures, which decord counts wrongly")
    if container == "mpegts":
        raise _refusal(file, "it is an MPEG transport stream, where decord's seeks land wrong")
    try:
        reader = decord.VideoReader(str(file.path), ctx=decord.cpu(0), num_threads=threads or 0)
        _check_times(file, table, reader)
        step = max(1, _BATCH_BYTES // max(1, 3 * size[0] * size[1]))
        for start in range(0, len(wanted), step):
            deadline.check()
            part = wanted[start : start + step]
            pictures = reader.get_batch(part).asnumpy()
            yield from zip(part, pictures, strict=True)
        del reader
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason"
        raise MediaError(f"{file.name!r}: decord cannot decode it ({reason}).") from error


def _check_times(file: LocalFile, table: FrameTable, reader: object) -> None:
    """Refuse a file whose frames decord counts or times differently from the container."""
    count = len(reader)  # type: ignore[arg-type]
    if count != len(table):
        raise _refusal(file, f"it counts {count} frames where the file shows {len(table)}")
    times = reader.get_frame_timestamp(np.arange(count))[:, 0]  # type: ignore[attr-defined]
    if times[0] < 0:
        raise _refusal(file, "it does not apply the file's edit list")
    shift = np.abs((times - times[0]) - (table.pts_s - table.pts_s[0])).max()
    if shift > _TIME_TOLERANCE_S:
        raise _refusal(file, f"its frame times are off by up to {shift:.3f} s")


def _refusal(file: LocalFile, reason: str) -> MediaError:
    return MediaError(
        f"{file.name!r} cannot be read exactly by decord: {reason}. Use the backend 'pyav' or "
        f"'auto'."
    )
