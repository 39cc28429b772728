"""What an untrusted file may cost: bytes, seconds, pixels, and time to decode.

Contract: checked before and while decoding, in this process; breaking a limit raises
`MediaError` that names the file, the value and the limit. A decoder that hangs inside one
library call cannot be interrupted from here: `media.worker` runs it where it can be killed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from av_llava.errors import MediaError
from av_llava.settings import Settings, check_range

GIB = 2**30


@dataclass(frozen=True)
class Limits(Settings):
    """Upper bounds for one medium."""

    max_bytes: int = 64 * GIB
    """Size of a local file."""
    max_download_bytes: int = 4 * GIB
    """Size of a file fetched over HTTP."""
    max_download_s: float = 300.0
    """Seconds for fetching a file over HTTP."""
    max_duration_s: float = 24 * 3600.0
    """Seconds of picture or sound."""
    max_pixels: int = 64 * 2**20
    """Width times height of one picture (8K video has half of it)."""
    max_frames: int = 8_000_000
    """Frames in the file (24 hours at 90 per second)."""
    max_batch_bytes: int = 8 * GIB
    """Bytes of the frames returned by one read."""
    max_decode_s: float = 600.0
    """Seconds that one read may take."""
    max_stall_s: float = 60.0
    """Seconds that a decoder may spend without giving a sign of life."""
    max_worker_bytes: int = 16 * GIB
    """Memory that reading one medium may take where it runs in a worker process."""

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            check_range(name, value, 1e-3)

    def check(self, field: str, value: float, name: str, what: str) -> None:
        """Raise MediaError if ``value`` (described as ``what``) breaks the limit ``field``."""
        limit = vars(self)[field]
        if value > limit:
            raise MediaError(
                f"{name}: {what} is {value:,.6g}, more than the limit {field} = {limit:,}. "
                f"Raise the limit if you trust the file."
            )


DEFAULT_LIMITS = Limits()


class TookTooLongError(MediaError):
    """Reading did not end within the time that the limits give."""


class Deadline:
    """A point in time after which reading one medium gives up, and a sign of life until then."""

    def __init__(self, limits: Limits, name: str) -> None:
        self.seconds, self.stall_s, self.name = limits.max_decode_s, limits.max_stall_s, name
        self._end = time.monotonic() + self.seconds
        self._alive = time.monotonic()

    @property
    def left_s(self) -> float:
        """Seconds left, at least a small positive number."""
        return max(self._end - time.monotonic(), 1e-3)

    @property
    def stalled(self) -> bool:
        """Whether there has been no sign of life for ``max_stall_s``."""
        return time.monotonic() - self._alive > self.stall_s

    def beat(self) -> None:
        """Give a sign of life."""
        self._alive = time.monotonic()

    def check(self) -> None:
        """Give a sign of life; raise MediaError once the time is up."""
        self._alive = now = time.monotonic()
        if now > self._end:
            raise TookTooLongError(
                f"{self.name}: decoding took longer than {self.seconds:g} s (max_decode_s). "
                f"Choose a shorter window or fewer frames, or raise the limit."
            )
