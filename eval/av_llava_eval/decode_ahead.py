"""Reads the media of the next videos while the model works on this one.

Contract: results come in the order of the work. What a reader raises is handed over with its work,
not raised here, so that one bad file does not end the others. At most ``depth`` results wait in
memory. The threads here only wait and resize: decoders run in processes of ``media.worker``, which
are killed when they take too long and cannot take more memory than they may.
"""

from __future__ import annotations

import collections
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from av_llava_eval.failures import CATCHABLE

W = TypeVar("W")
R = TypeVar("R")


class _Job(Generic[W, R]):
    """One piece of work and, later, its result."""

    def __init__(self, work: W) -> None:
        self.work = work
        self.done = threading.Event()
        self.result: R | BaseException | None = None


def read_ahead(
    works: Iterable[W], read: Callable[[W], R], *, workers: int, depth: int
) -> Iterator[tuple[W, R | BaseException]]:
    """Yield each work with what ``read`` returned, or with the error that it raised.

    Args:
        works: in the order in which they are wanted.
        read: called in other threads; in this one with 0 workers.
        workers: threads.
        depth: results that may be ready or in the making, at least 1.
    """
    if workers < 1:
        for work in works:
            yield work, _attempt(read, work)
        return
    todo: queue.SimpleQueue[_Job[W, R] | None] = queue.SimpleQueue()
    for number in range(workers):
        # Daemons: a file that hangs must not keep the program from ending.
        threading.Thread(
            target=_serve, args=(todo, read), name=f"read ahead {number}", daemon=True
        ).start()
    waiting: collections.deque[_Job[W, R]] = collections.deque()
    source = iter(works)
    try:
        while True:
            while len(waiting) < max(depth, 1):
                more = list(itertools.islice(source, 1))
                if not more:
                    break
                waiting.append(_Job(more[0]))
                todo.put(waiting[-1])
            if not waiting:
                return
            yield _result(waiting.popleft())
    finally:
        for job in waiting:
            job.done.set()  # nobody wants them any more
        for _ in range(workers):
            todo.put(None)


def _result(job: _Job[Any, Any]) -> tuple[Any, Any]:
    # In pieces: waiting without end cannot be interrupted on every system.
    while not job.done.wait(timeout=0.5):
        pass
    found = job.result
    assert found is not None
    if isinstance(found, BaseException) and not isinstance(found, CATCHABLE):
        raise found  # a mistake of the program
    return job.work, found


def _serve(todo: queue.SimpleQueue[_Job[W, R] | None], read: Callable[[W], R]) -> None:
    while (job := todo.get()) is not None:
        if not job.done.is_set():
            try:
                job.result = _attempt(read, job.work)
            except BaseException as error:  # raised where the result is awaited
                job.result = error
            job.done.set()
        del job  # its result must not outlive its use


def _attempt(read: Callable[[W], R], work: W) -> R | BaseException:
    try:
        return read(work)
    except CATCHABLE as error:
        return error
