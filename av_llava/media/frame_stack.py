"""Collecting decoded pictures into one array, each resized as it comes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from av_llava.errors import MediaError, UsageError
from av_llava.media.limits import Limits

Resize = Callable[[np.ndarray], np.ndarray]


class FrameStack:
    """Collects pictures into one array, in the wanted order, resizing each as it comes."""

    def __init__(
        self, chosen: np.ndarray, resize: Resize | None, limits: Limits, name: str
    ) -> None:
        self.resize, self.limits, self.name = resize, limits, name
        self.source_size = (0, 0)
        self._slots: dict[int, list[int]] = {}
        for slot, index in enumerate(chosen.tolist()):
            self._slots.setdefault(index, []).append(slot)
        self._filled = np.zeros(len(chosen), bool)
        self._pts_s = np.zeros(len(chosen))
        self._frames: np.ndarray | None = None

    @property
    def wanted(self) -> list[int]:
        """Table indices that are wanted, each once, increasing."""
        return sorted(self._slots)

    def add(self, index: int, time_s: float, picture: np.ndarray) -> None:
        """Put one decoded picture, uint8 [height, width, 3], where it is wanted."""
        if not self.source_size[0]:
            self.source_size = (picture.shape[1], picture.shape[0])
        small = picture if self.resize is None else self.resize(picture)
        if self._frames is None:
            self._frames = self._room_for(small)
        if small.shape != self._frames.shape[1:]:
            raise MediaError(
                f"{self.name!r}: the picture changes from {self._frames.shape[1:]} to "
                f"{small.shape} at {time_s:.2f} s. Give a resize function with one output size."
            )
        for slot in self._slots[index]:
            self._frames[slot] = small
            self._pts_s[slot], self._filled[slot] = time_s, True

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return frames [T, h, w, 3] and times [T] of what came; T may be 0."""
        if self._frames is None:
            return np.empty((0, 0, 0, 3), np.uint8), np.empty(0)
        if self._filled.all():
            return self._frames, self._pts_s
        return self._frames[self._filled], self._pts_s[self._filled]

    def _room_for(self, picture: np.ndarray) -> np.ndarray:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise UsageError(
                f"The resize function must return uint8 [height, width, 3], "
                f"not {picture.dtype} {list(picture.shape)}."
            )
        count = len(self._filled)
        what = f"the memory for {count} frames of {picture.shape[1]}x{picture.shape[0]} in bytes"
        self.limits.check("max_batch_bytes", count * picture.nbytes, repr(self.name), what)
        return np.empty((count, *picture.shape), np.uint8)
