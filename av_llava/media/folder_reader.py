"""Frames that are pictures already: a folder of frame images, or an animated WebP.

Contract: files are taken in natural order (frame_2 before frame_10); their times are
``i / fps``. Each picture is opened, resized and closed before the next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from av_llava.errors import MediaError
from av_llava.media.image import (
    SUFFIXES,
    animation_frames,
    load_picture,
    open_picture,
    show,
    to_rgb,
)
from av_llava.media.limits import Deadline, Limits
from av_llava.media.source import LocalFile, checked

DEFAULT_FPS = 1.0
_DIGITS = re.compile(r"(\d+)")


def frame_files(folder: LocalFile) -> list[Path]:
    """Return the frame images of a folder in natural order.

    Raises:
        MediaError: the folder holds no images.
    """
    found = [
        p
        for p in folder.path.iterdir()
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    ]
    if not found:
        raise MediaError(
            f"{folder.name!r} is a folder without frame images ({', '.join(SUFFIXES)}). "
            f"Pass a media file, or a folder of frames."
        )
    return sorted(found, key=natural_key)


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Return a sort key that orders numbers inside names by value."""
    parts = _DIGITS.split(path.name)
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]


def folder_frames(
    files: list[Path], wanted: list[int], limits: Limits, deadline: Deadline
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, uint8 [height, width, 3]) of the wanted files."""
    for index in wanted:
        deadline.check()
        file = checked(LocalFile(files[index], str(files[index])), limits)
        yield index, np.asarray(load_picture(file, limits))


def animation_table(file: LocalFile, limits: Limits, deadline: Deadline) -> np.ndarray:
    """Return when each frame of an animated WebP appears, and the end: float64 [n + 1]."""
    with open_picture(file, limits) as picture:
        times_ms = [0.0]
        for index in range(animation_frames(file, picture)):
            deadline.check()
            show(file, picture, index)
            times_ms.append(times_ms[-1] + float(picture.info.get("duration", 100) or 100))
    return np.asarray(times_ms) / 1000


def animation_pictures(
    file: LocalFile, wanted: list[int], limits: Limits, deadline: Deadline
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, uint8 [height, width, 3]) of the wanted frames of an animation."""
    with open_picture(file, limits) as picture:
        for index in wanted:
            deadline.check()
            show(file, picture, index)
            yield index, np.asarray(to_rgb(picture))
