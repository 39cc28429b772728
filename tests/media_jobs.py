"""Functions that tests run in a worker process: they must live in an importable module."""

from __future__ import annotations

import collections
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from av_llava.errors import MediaError
from av_llava.media import Limits, probe, read_audio, read_frames, read_image


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


def run_out(words: str) -> None:
    if words == "again":
        raise av.error.BlockingIOError(11, "Resource temporarily unavailable")
    raise RuntimeError("can't start new thread")


def divide(a: int, b: int) -> float:
    return a / b


def chatter(words: str) -> str:
    print(words, flush=True)
    os.write(1, b"raw bytes on standard output\n")
    return words


def read_damaged(
    data: bytes, name: str, folder: str, seed: int, count: int
) -> collections.Counter[str]:
    """Read ``count`` randomly damaged copies of a file; count what came of each reading."""
    rng = random.Random(seed)
    outcomes: collections.Counter[str] = collections.Counter()
    limits = Limits(max_decode_s=30, max_stall_s=3, max_pixels=2**22)
    for _ in range(count):
        copy = bytearray(data)
        for _ in range(rng.choice([1, 2, 5, 20, 100])):
            at = rng.randrange(rng.choice([len(copy), min(len(copy), 2000)]))
            copy[at] = rng.choice([0, 255, rng.randrange(256), copy[at] ^ 1 << rng.randrange(8)])
        if rng.random() < 0.3:
            del copy[rng.randrange(1, len(copy)) :]
        path = Path(folder) / name
        path.write_bytes(copy)
        for what, read in (
            ("probe", lambda path=path: probe(path, limits)),
            ("frames", lambda path=path: read_frames(path, backend="pyav", limits=limits)),
            ("sound", lambda path=path: read_audio(path, limits=limits)),
            ("image", lambda path=path: read_image(path, limits)),
        ):
            try:
                read()
                outcomes[f"{what} read"] += 1
            except MediaError as error:
                outcomes[f"{what} refused" if name in str(error) else f"unnamed: {error}"] += 1
    return outcomes


def ask_back(function: Callable[[int], int], values: list[int]) -> int:
    return sum(function(value) for value in values)


def big_array(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint8)


def modules() -> list[str]:
    return sorted(sys.modules)


def half(picture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(picture[::2, ::2])
