"""Work in another thread that the caller can give up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import av_llava.media.video as video
from av_llava.errors import MediaError
from av_llava.media import Limits, read_frames
from av_llava.media.limits import Deadline
from av_llava.media.watch import DecoderHangsError, watched_call, watched_items
from av_llava.settings import SamplingSettings


def deadline(**limits: float) -> Deadline:
    return Deadline(Limits(**limits), "film.mp4")  # type: ignore[arg-type]


def test_items_come_in_order_from_another_thread() -> None:
    def numbers() -> Iterator[tuple[int, int]]:
        for i in range(50):
            yield i, threading.get_ident()

    got = list(watched_items(numbers, deadline()))
    assert [i for i, _ in got] == list(range(50))
    assert threading.get_ident() not in {ident for _, ident in got}


def test_errors_reach_the_caller() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise MediaError("damaged")

    items = watched_items(fail, deadline())
    assert next(items) == 1
    with pytest.raises(MediaError, match="damaged"):
        next(items)


def test_a_hang_is_given_up() -> None:
    release = threading.Event()
    start = time.monotonic()
    with pytest.raises(DecoderHangsError, match=r"film\.mp4.*has not moved for 0\.3 s"):
        watched_call(release.wait, deadline(max_stall_s=0.3))
    assert time.monotonic() - start < 10
    release.set()


def test_slow_work_with_signs_of_life_is_no_hang() -> None:
    limit = deadline(max_stall_s=0.6)

    def slow() -> str:
        for _ in range(8):
            time.sleep(0.2)
            limit.check()
        return "done"

    assert watched_call(slow, limit) == "done"


def test_a_slow_caller_is_no_hang_and_no_growth() -> None:
    made = []

    def quick() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    seen = 0
    for item in watched_items(quick, deadline(max_stall_s=0.5)):
        if item == 3:
            time.sleep(1.0)
            assert len(made) <= item + 5
        seen += 1
    assert seen == 20


def test_a_caller_that_stops_ends_the_work() -> None:
    made = []

    def endless() -> Iterator[int]:
        while True:
            made.append(1)
            yield 1

    items = watched_items(endless, deadline())
    next(items)
    items.close()  # type: ignore[attr-defined]
    time.sleep(0.6)
    count = len(made)
    time.sleep(0.3)
    assert len(made) == count


def test_frames_are_resized_in_the_callers_thread(clip: Any) -> None:
    threads = set()

    def resize(picture: np.ndarray) -> np.ndarray:
        threads.add(threading.get_ident())
        return picture[::2, ::2]

    read_frames(clip(), SamplingSettings(4), resize=resize)
    assert threads == {threading.get_ident()}


def test_a_decoder_that_hangs_is_tried_again_with_one_thread(
    clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    real = video.PyAVReader

    class Hanging(real):  # type: ignore[misc, valid-type]
        def frames(self, wanted: list[int]) -> Iterator[tuple[int, float, np.ndarray]]:
            used.append(self.threads)
            if self.threads != 1:
                time.sleep(2)
            yield from super().frames(wanted)

    monkeypatch.setattr(video, "PyAVReader", Hanging)
    batch = read_frames(clip(), SamplingSettings(4), threads=3, limits=Limits(max_stall_s=0.3))
    assert used == [3, 1]
    assert len(batch) == 4
