"""Functions that tests run in a worker process: they must live in an importable module."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

from av_llava.errors import MediaError


def add(a: int, b: int = 0) -> int:
    return a + b


def pid() -> int:
    return os.getpid()


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(code: int) -> None:
    os._exit(code)


def refuse(message: str) -> None:
    raise MediaError(message)


def divide(a: int, b: int) -> float:
    return a / b


def chatter(words: str) -> str:
    print(words, flush=True)
    os.write(1, b"raw bytes on standard output\n")
    return words


def big_array(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint8)


def modules() -> list[str]:
    return sorted(sys.modules)


def half(picture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(picture[::2, ::2])
