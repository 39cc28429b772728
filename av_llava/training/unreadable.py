"""Errors of reading one sample: a medium that cannot be read, and all others, which name it.

Contract: what is wrong with a file is an :class:`UnreadableError`, for which another sample may
take the place, or which may be left out; what is wrong with the sample itself is a DataError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from av_llava.errors import AVLlavaError, DataError, MediaError
from av_llava.training.bad_media import BadMedium
from av_llava.training.samples import Sample


class UnreadableError(MediaError):
    """One medium of a sample cannot be read."""

    def __init__(self, file: str, reason: str, sample: str, source: str) -> None:
        super().__init__(reason)
        self.file, self.reason, self.sample, self.source = file, reason, sample, source

    def medium(self, index: int, epoch: int) -> BadMedium:
        """The same as a record."""
        return BadMedium(self.file, self.reason, self.sample, self.source, index, epoch)


@contextmanager
def sample_named(sample: Sample) -> Iterator[None]:
    """Name the sample in errors that are not about reading a medium."""
    try:
        yield
    except UnreadableError:
        raise
    except AVLlavaError as error:
        raise DataError(f"{sample.source}: sample {sample.id!r}: {error}") from error
