"""Running a function in a process that can be killed: for decoders that hang or crash.

Contract: the function and its arguments are picklable and importable; numpy arrays come back
without being pickled byte by byte. A worker is kept for the next call, killed when a call takes
too long, and ends by itself when this process ends. It imports nothing of the caller's main
script, so starting one costs a fraction of a second, not an import of torch. Safe with threads
(each call has its own worker) and after a fork (a child starts its own).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from av_llava.errors import AVLlavaError, MediaError, UsageError
from av_llava.media.limits import TookTooLongError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_IDLE = 4
_SIZES = "/proc/self/statm"
_COUNT, _LENGTH = struct.Struct("<I"), struct.Struct("<Q")
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from av_llava.media.worker import serve; serve()"
)
_inside = False
_pipes: tuple[IO[bytes], IO[bytes]]


def run_in_worker(
    fn: Callable[..., T],
    *args: Any,
    timeout_s: float,
    memory_bytes: int | None = None,
    what: str | None = None,
    **kwargs: Any,
) -> T:
    """Call ``fn(*args, **kwargs)`` in a worker process and return its result.

    Args:
        fn: function of an importable module.
        args: a function of one argument that cannot or should not run in the worker is wrapped
            in `CallHere`: the worker calls it, it runs here.
        timeout_s: seconds after which the worker is killed.
        memory_bytes: that the call may take beyond what the worker holds when idle (not on
            Windows).
        what: the file's name for error messages; the first argument by default.

    Raises:
        TookTooLongError: the time ran out.
        MediaError: the memory ran out or the worker crashed.
        UsageError: the call cannot be sent to another process.
        Exception: what ``fn`` raised; errors of this package keep their type.
    """
    name = what if what is not None else str(args[0]) if args else str(fn)
    functions: list[Callable[[Any], Any]] = []
    args = tuple(_remote(value, functions) for value in args)
    kwargs = {key: _remote(value, functions) for key, value in kwargs.items()}
    if not can_be_sent((fn, args, kwargs)):
        raise UsageError(
            f"{name}: {fn!r} or an argument of it cannot be sent to a worker process. Define "
            f"functions in a module that can be imported, not in the main script or in a lambda."
        )
    worker = _take()
    done = False
    try:
        answer = worker.call((fn, args, kwargs, memory_bytes), functions, timeout_s, name)
        done = True
    finally:
        _give_back(worker) if done else worker.kill()
    kind, *content = answer
    if kind == "ok":
        return content[0]
    raise _rebuilt(name, *content)


def in_worker() -> bool:
    """Return whether this process is such a worker."""
    return _inside


def can_be_sent(thing: Any) -> bool:
    """Return whether another process can unpickle ``thing``."""
    try:
        data = pickle.dumps(thing, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return b"__main__" not in data


@dataclass(frozen=True)
class CallHere:
    """A function of one argument that stays in this process when passed to `run_in_worker`."""

    function: Callable[[Any], Any]


@dataclass(frozen=True)
class _Remote:
    """The worker's end of a `CallHere`."""

    index: int

    def __call__(self, value: Any) -> Any:
        calls, answers = _pipes
        _send(answers, ("ask", self.index, value))
        return _receive(calls)


def _remote(value: Any, functions: list[Callable[[Any], Any]]) -> Any:
    """Replace a function that stays here by the worker's end of it."""
    if not isinstance(value, CallHere):
        return value
    functions.append(value.function)
    return _Remote(len(functions) - 1)


class _Worker:
    """One process that answers one call at a time."""

    def __init__(self) -> None:
        paths = [os.path.abspath(p) for p in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def call(
        self,
        request: Any,
        functions: list[Callable[[Any], Any]],
        timeout_s: float,
        name: str,
    ) -> tuple[Any, ...]:
        """Send one call, serve the functions that stay here, and wait for the answer."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(timeout_s, stop)
        timer.daemon = True
        timer.start()
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            _send(self.process.stdin, request)
            while (answer := _receive(self.process.stdout))[0] == "ask":
                _, index, value = answer
                _send(self.process.stdin, functions[index](value))
        except (EOFError, BrokenPipeError) as error:
            raise self._ending(name, late.is_set(), timeout_s) from error
        finally:
            timer.cancel()
        return answer

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(OSError):
            self.process.kill()
        self.close()

    def close(self) -> None:
        """Close the pipes, upon which an idle worker ends, and wait for it."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.wait()

    def _ending(self, name: str, late: bool, timeout_s: float) -> MediaError:
        if late:
            return TookTooLongError(
                f"{name}: decoding did not finish within {timeout_s:g} s; its worker was stopped. "
                f"The file may be damaged, or the limit too low."
            )
        code = self.process.wait()
        with contextlib.suppress(ValueError):
            if code < 0:
                return MediaError(
                    f"{name}: the decoder crashed ({signal.Signals(-code).name}). "
                    f"The file is damaged; converting it may help."
                )
        return MediaError(f"{name}: the decoding worker ended with exit code {code}.")


_idle: list[_Worker] = []
_lock = threading.Lock()


def _take() -> _Worker:
    with _lock:
        while _idle:
            worker = _idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.close()
    return _Worker()


def _give_back(worker: _Worker) -> None:
    with _lock:
        if len(_idle) < _MAX_IDLE:
            _idle.append(worker)
            return
    worker.close()


def close_workers() -> None:
    """End the idle workers (they also end with this process)."""
    with _lock:
        workers, _idle[:] = list(_idle), []
    for worker in workers:
        worker.close()


def _forget() -> None:
    """Leave the parent's workers alone after a fork."""
    global _idle, _lock
    for worker in _idle:
        worker.process.returncode = 0  # not this process's child: never wait for it
    _idle, _lock = [], threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def serve() -> None:
    """Answer calls from standard input until it closes; run in the worker process."""
    global _inside, _pipes
    _inside = True
    # Both are the parent's to handle; it closes the pipe, or kills.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Libraries may print: keep the pipe for answers and send their words to standard error.
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _pipes = calls, answers
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    while True:
        try:
            fn, args, kwargs, memory_bytes = _receive(calls)
        except EOFError:
            return
        except (ImportError, AttributeError, pickle.UnpicklingError) as error:
            _send(answers, _described(error))
            continue
        try:
            with _at_most(memory_bytes):
                answer: tuple[Any, ...] = ("ok", fn(*args, **kwargs))
        except BaseException as error:
            answer = _described(error)
        _send(answers, answer)


@contextlib.contextmanager
def _at_most(memory_bytes: int | None) -> Iterator[None]:
    """Let this process take so much more memory; a decoder that wants more gets a MemoryError."""
    if memory_bytes is None or resource is None or not os.path.exists(_SIZES):
        yield
        return
    with open(_SIZES) as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = held + memory_bytes
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _ran_out(error: BaseException) -> bool:
    """Whether a call failed for lack of memory, be it that of a new thread's stack."""
    # numpy and FFmpeg have kinds of MemoryError of their own. Where a thread cannot be started,
    # FFmpeg gives EAGAIN, and Python a plain RuntimeError; a library that does not fit, an OSError.
    if isinstance(error, (RuntimeError, OSError)):
        words = ("start new thread", "failed to map segment", "Cannot allocate memory")
        return isinstance(error, BlockingIOError) or any(w in str(error) for w in words)
    return isinstance(error, MemoryError)


def _described(error: BaseException) -> tuple[str, str, str, str, str]:
    kind = MemoryError if _ran_out(error) else type(error)
    return "error", kind.__module__, kind.__qualname__, str(error), traceback.format_exc()


def _rebuilt(name: str, module: str, kind: str, message: str, trace: str) -> Exception:
    """Make this package's error again; another one means a bug or a damaged file."""
    if module.split(".")[0] == "av_llava":
        found = getattr(importlib.import_module(module), kind, None)
        if isinstance(found, type) and issubclass(found, AVLlavaError):
            error = found.__new__(found)
            error.args = (message,)
            return error
    if kind == "MemoryError":
        return MediaError(f"{name}: decoding ran out of memory. Ask for fewer or smaller frames.")
    return RuntimeError(f"{name}: the worker raised {kind}: {message}\n{trace}")


def _send(pipe: IO[bytes], message: Any) -> None:
    """Write one message: pickle protocol 5, large buffers beside it."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts: list[Any] = [head, *(buffer.raw() for buffer in buffers)]
    pipe.write(_COUNT.pack(len(parts)))
    for part in parts:
        pipe.write(_LENGTH.pack(len(part)))
        pipe.write(part)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    """Read one message; raises EOFError when the other end has closed."""
    count = _COUNT.unpack(_read(pipe, _COUNT.size))[0]
    parts = [_read(pipe, _LENGTH.unpack(_read(pipe, _LENGTH.size))[0]) for _ in range(count)]
    return pickle.loads(parts[0], buffers=parts[1:])


def _read(pipe: IO[bytes], size: int) -> bytearray:
    """Read exactly ``size`` bytes into one writable block."""
    block = bytearray(size)
    view, done = memoryview(block), 0
    while done < size:
        got = pipe.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError("the pipe closed")
        done += got
    return block
