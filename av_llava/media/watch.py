"""Running FFmpeg where it cannot hang the caller.

Contract: the work runs in a thread of its own while the caller waits, so that Ctrl-C works and a
deadline holds even when a decoder never returns (FFmpeg 8.1 deadlocks on some damaged HEVC when
decoding with several threads). A thread that hangs is given up: it stays, idle, until the
process ends. What must really be stopped belongs into `media.worker`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from av_llava.media.limits import Deadline, TookTooLongError

T = TypeVar("T")

_LOOK_S = 0.2
# Finished items that may wait for the caller: enough to overlap decoding with resizing.
_AHEAD = 2


class DecoderHangsError(TookTooLongError):
    """The decoder has not returned for longer than ``max_stall_s``."""


def watched_call(function: Callable[[], T], deadline: Deadline) -> T:
    """Return ``function()``, or raise MediaError when it makes no progress any more.

    The function shows progress by calling ``deadline.check()``.
    """
    return next(watched_items(lambda: iter((function(),)), deadline))


def watched_items(make: Callable[[], Iterator[T]], deadline: Deadline) -> Iterator[T]:
    """Yield the items of ``make()``, which runs ahead in another thread.

    Raises:
        DecoderHangsError: no progress for ``max_stall_s``.
        Exception: what the iterator raises.
    """
    runner = _Runner(make, deadline)
    try:
        while (found := runner.wait()) is not None:
            kind, item = found
            if kind == "error":
                raise item
            yield item
            deadline.beat()
    finally:
        runner.given_up.set()


class _Runner:
    """The thread that works, and the queue between it and the caller."""

    def __init__(self, make: Callable[[], Iterator[Any]], deadline: Deadline) -> None:
        self.make, self.deadline = make, deadline
        self.given_up = threading.Event()
        self._items: queue.Queue[tuple[str, Any] | None] = queue.Queue(_AHEAD)
        deadline.beat()
        threading.Thread(target=self._work, name=f"media {deadline.name}", daemon=True).start()

    def wait(self) -> tuple[str, Any] | None:
        """Return the next item or error, or None at the end."""
        while True:
            try:
                return self._items.get(timeout=_LOOK_S)
            except queue.Empty:
                if self.deadline.stalled:
                    raise DecoderHangsError(
                        f"{self.deadline.name}: the decoder has not moved for "
                        f"{self.deadline.stall_s:g} s (max_stall_s). The file is damaged."
                    ) from None

    def _work(self) -> None:
        try:
            for item in self.make():
                if not self._put(("item", item)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(("error", error))

    def _put(self, item: tuple[str, Any] | None) -> bool:
        """Hand an item over; return False if the caller has gone."""
        while not self.given_up.is_set():
            try:
                self._items.put(item, timeout=_LOOK_S)
                return True
            except queue.Full:
                self.deadline.beat()  # the caller is busy; that is no hang
        return False
