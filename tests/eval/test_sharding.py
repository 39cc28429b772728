"""Which process answers what, and reading ahead of the model."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import MediaError, UsageError
from av_llava_eval.decode_ahead import read_ahead
from av_llava_eval.sharding import Place, assign, place_of

GROUPS = st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 40), max_size=60)


@given(GROUPS, st.integers(1, 9))
def test_every_group_has_one_rank_and_the_load_is_even(questions, world):
    ranks = assign(questions, world)
    assert ranks.keys() == questions.keys() and set(ranks.values()) <= set(range(world))
    loads = [sum(n for g, n in questions.items() if ranks[g] == r) for r in range(world)]
    # Whoever has most would not have been given its last group, had another had less.
    assert max(loads) - min(loads) <= max(questions.values(), default=0)
    assert assign(dict(reversed(questions.items())), world) == ranks


def test_the_place_comes_from_what_launchers_set():
    assert place_of({}) == Place(0, 1)
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert place_of(torchrun) == Place(3, 4, 1, 2)
    for wrong in ({"RANK": "1"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}, {"RANK": "-1"}):
        with pytest.raises(UsageError):
            place_of(wrong)


# -------------------------------------------------------------------- ahead


def slow_square(x):
    time.sleep(0.002 * (x % 3))
    return x * x


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("depth", [1, 3])
def test_results_come_in_order(workers, depth):
    found = list(read_ahead(range(20), slow_square, workers=workers, depth=depth))
    assert found == [(x, x * x) for x in range(20)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_handed_over_and_the_others_are_read(workers):
    def read(x):
        if x == 2:
            raise MediaError("damaged")
        return x

    found = dict(read_ahead(range(5), read, workers=workers, depth=3))
    assert isinstance(found.pop(2), MediaError) and found == {x: x for x in (0, 1, 3, 4)}


def test_no_more_waits_than_may():
    taken, started = [], []

    def works():
        for x in range(10):
            taken.append(x)
            yield x

    for work, _ in read_ahead(works(), lambda x: started.append(x) or x, workers=2, depth=3):
        assert len(taken) <= work + 3
    assert sorted(started) == list(range(10))


def test_reading_overlaps_with_work():
    barrier = threading.Barrier(2, timeout=20)

    def read(x):
        barrier.wait()  # passes only while the other thread reads, too
        return x

    assert len(list(read_ahead(range(6), read, workers=2, depth=4))) == 6


def test_whoever_leaves_early_leaves_no_thread_at_work():
    done = []

    def read(x):
        done.append(x)
        return x

    for work, _ in read_ahead(range(1000), read, workers=2, depth=4):
        if work == 3:
            break
    time.sleep(0.1)
    n = len(done)
    time.sleep(0.1)
    assert len(done) == n < 20
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up:
        if not any(t.name.startswith("read ahead") for t in threading.enumerate()):
            return
        time.sleep(0.02)
    pytest.fail("a thread is still there")
