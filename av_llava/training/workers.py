"""Processes that make batches: what signals do to them, how their errors arrive, how they end.

Contract: Ctrl-C and a cluster's SIGTERM are the business of the process that trains. An error of
ours in a worker arrives there as it was, without the worker's traceback. Whoever iterates a loader
ends its workers with :func:`end_workers`, also after an error: they outlive a SIGTERM, with which
Python would end them at its exit, and then wait for ever.
"""

from __future__ import annotations

import pickle
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import get_worker_info

from av_llava.errors import AVLlavaError, DataError

_KILLED = ("killed by signal", "exited unexpectedly")


@dataclass(frozen=True)
class Failed:
    """What a worker gives in place of a batch that it could not make."""

    error: AVLlavaError


def start_worker(_: int) -> None:
    """Leave Ctrl-C and SIGTERM to the process that trains, which then ends its workers.

    A cluster tells all processes, and batches are still needed; a second signal ends this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    sys.excepthook = _unless_hung_up


def failed(error: AVLlavaError) -> Failed:
    """Send an error to the process that trains; where there are no workers, raise it.

    Raises:
        AVLlavaError: that one.
    """
    if get_worker_info() is None:
        raise error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error whose class wants more than a message
        return Failed(DataError(str(error)))
    return Failed(error)


def batches_of(iterator: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        AVLlavaError: what a worker met, or that it was killed.
    """
    try:
        with deaths_named():
            for batch in iterator:
                if isinstance(batch, Failed):
                    raise batch.error
                yield batch
    except (ConnectionError, EOFError) as error:  # it died while it handed a tensor over
        raise _death(error) from error


@contextmanager
def deaths_named() -> Iterator[None]:
    """Name a worker's death. torch tells of it by a signal, so wherever the program happens to be.

    Raises:
        DataError: a worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _KILLED):
            raise
        raise _death(error) from error


def _death(error: Exception) -> DataError:
    said = str(error).strip() or type(error).__name__
    return DataError(
        f"A process that reads media was killed, mostly for want of memory ({said}). Go on with "
        f"fewer batch.workers or a smaller batch.prefetch (--resume)."
    )


def end_workers(iterator: Any) -> None:
    """End the workers of a loader's iterator, if it has any."""
    end = getattr(iterator, "_shutdown_workers", None)
    if end is not None:
        end()


def _unless_hung_up(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Say nothing when the process that trains has gone while a tensor was handed over."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
