"""The process that can be killed: results, errors, hangs, crashes, forks, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import media_jobs
import numpy as np
import pytest

from av_llava.errors import MediaError, UsageError
from av_llava.media import TookTooLongError
from av_llava.media.worker import CallHere, can_be_sent, close_workers, in_worker, run_in_worker


def test_results_and_reuse() -> None:
    close_workers()
    assert run_in_worker(media_jobs.add, 2, b=3, timeout_s=30) == 5
    first = run_in_worker(media_jobs.pid, timeout_s=30)
    assert first != os.getpid()
    assert run_in_worker(media_jobs.pid, timeout_s=30) == first
    assert not in_worker()
    assert run_in_worker(in_worker, timeout_s=30)


def test_arrays_come_back_writable() -> None:
    array = run_in_worker(media_jobs.big_array, 5_000_000, timeout_s=30)
    np.testing.assert_array_equal(array, np.arange(5_000_000, dtype=np.uint8))
    array[0] = 9
    assert array[0] == 9


def test_a_hang_is_killed_and_named() -> None:
    start = time.monotonic()
    with pytest.raises(TookTooLongError, match=r"film\.mp4: decoding did not finish within 0\.5 s"):
        run_in_worker(media_jobs.sleep, 60, timeout_s=0.5, what="film.mp4")
    assert time.monotonic() - start < 20
    assert run_in_worker(media_jobs.add, 1, timeout_s=30) == 1  # the next call has a new worker


def test_a_crash_is_an_error_not_the_end() -> None:
    with pytest.raises(MediaError, match=r"film\.mp4: the decoder crashed \(SIGSEGV\)"):
        run_in_worker(media_jobs.crash, timeout_s=30, what="film.mp4")
    with pytest.raises(MediaError, match="exit code 7"):
        run_in_worker(media_jobs.leave, 7, timeout_s=30)
    assert run_in_worker(media_jobs.add, 1, timeout_s=30) == 1


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no such limit here")
def test_memory_beyond_the_limit_is_an_error_of_that_call() -> None:
    def read(memory_bytes: int | None) -> np.ndarray:
        return run_in_worker(
            media_jobs.big_array,
            100_000_000,
            timeout_s=30,
            memory_bytes=memory_bytes,
            what="film.mp4",
        )

    with pytest.raises(MediaError, match=r"film\.mp4: decoding ran out of memory"):
        read(50_000_000)
    assert len(read(300_000_000)) == len(read(None)) == 100_000_000  # the limit was the call's


@pytest.mark.parametrize("words", ["no thread", "again"])
def test_a_thread_that_cannot_be_started_is_memory_that_ran_out(words: str) -> None:
    with pytest.raises(MediaError, match=r"film\.mp4: decoding ran out of memory"):
        run_in_worker(media_jobs.run_out, words, timeout_s=30, what="film.mp4")


def test_errors_keep_their_type() -> None:
    with pytest.raises(MediaError, match=r"^a damaged film$"):
        run_in_worker(media_jobs.refuse, "a damaged film", timeout_s=30)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_in_worker(media_jobs.divide, 1, 0, timeout_s=30)


def test_what_cannot_be_sent_is_said() -> None:
    assert not can_be_sent(lambda: 1)
    assert can_be_sent(media_jobs.half)
    with pytest.raises(UsageError, match="cannot be sent to a worker"):
        run_in_worker(lambda: 1, timeout_s=30)  # type: ignore[misc]


def test_a_function_can_stay_here() -> None:
    seen: list[int] = []

    def tenfold(value: int) -> int:
        seen.append(os.getpid())
        return 10 * value

    assert run_in_worker(media_jobs.ask_back, CallHere(tenfold), [1, 2, 3], timeout_s=30) == 60
    assert seen == [os.getpid()] * 3

    def fail(value: int) -> int:
        raise KeyError(value)

    with pytest.raises(KeyError):
        run_in_worker(media_jobs.ask_back, CallHere(fail), [1], timeout_s=30)
    assert run_in_worker(media_jobs.add, 1, timeout_s=30) == 1


def test_printing_does_not_spoil_the_answer(capfd: pytest.CaptureFixture[str]) -> None:
    close_workers()  # a new worker inherits this test's standard error
    assert run_in_worker(media_jobs.chatter, "hello", timeout_s=30) == "hello"
    close_workers()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "hello" in captured.err


def test_the_worker_does_not_import_torch_or_this_script() -> None:
    close_workers()
    loaded = run_in_worker(media_jobs.modules, timeout_s=30)
    assert "torch" not in loaded
    assert "pytest" not in loaded


def test_threads_have_their_own_workers() -> None:
    answers: dict[int, int] = {}

    def ask(k: int) -> None:
        answers[k] = run_in_worker(media_jobs.add, k, 10, timeout_s=60)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {k: k + 10 for k in range(6)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_starts_its_own(tmp_path: Path) -> None:
    code = (
        "import os, sys, media_jobs\n"
        "from av_llava.media.worker import run_in_worker\n"
        "mine = run_in_worker(media_jobs.pid, timeout_s=30)\n"
        "child = os.fork()\n"
        "other = run_in_worker(media_jobs.pid, timeout_s=30)\n"
        "if child == 0: os._exit(0 if other != mine else 3)\n"
        "assert other == mine\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    _run(code)


def test_workers_end_with_their_parent() -> None:
    code = (
        "import os, media_jobs\n"
        "from av_llava.media.worker import run_in_worker\n"
        "print(run_in_worker(media_jobs.pid, timeout_s=30), flush=True)\n"
        "os._exit(0)\n"
    )
    pid = int(_run(code))
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists():
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state == "Z":  # ended; whoever adopted it has not looked yet
                return
        time.sleep(0.1)
    raise AssertionError("the worker outlived its parent")


def _run(code: str) -> str:
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    return done.stdout
