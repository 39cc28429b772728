"""SIGTERM leaves a checkpoint; processes of one run end together, whoever of them fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from train_runs import losses, recipe, recipe_data
from transformers import TrainerCallback

from av_llava.errors import DataError
from av_llava.training import run as runs
from av_llava.training.bad_media import BadMediaSettings, BadMediaWatch, BadMedium
from av_llava.training.run import train
from av_llava.training.run_folder import RunFolder
from av_llava.training.termination import TerminatedError, Termination

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs signals of POSIX")


class Sends(TrainerCallback):
    """Sends SIGTERM to its own process group's leader in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def send_in(monkeypatch, step: int) -> None:
    made = runs.make_trainer

    def make(*args):
        trainer = made(*args)
        trainer.add_callback(Sends(step))
        return trainer

    monkeypatch.setattr(runs, "make_trainer", make)


def test_a_checkpoint_is_left_and_gone_on_with(place, tmp_path, monkeypatch) -> None:
    whole = recipe(place / "base", place / "data.jsonl", tmp_path / "whole")
    train(whole)
    settings = whole.replace(output=str(tmp_path / "out"))
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        send_in(patch, 2)
        with pytest.raises(TerminatedError, match=r"after step 2, .* Go on with --resume"):
            train(settings)
    assert signal.getsignal(signal.SIGTERM) is before
    folder = RunFolder(settings.output or "")
    assert folder.last_checkpoint() == folder.path / "checkpoint-2"
    assert folder.record()["status"] == "terminated" and not folder.is_finished
    train(settings, resume=True)
    assert losses(folder.path) == losses(tmp_path / "whole")


def test_told_in_the_last_step_a_run_is_finished(place, tmp_path, monkeypatch) -> None:
    settings = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out", training={"max_steps": 2}
    )
    send_in(monkeypatch, 2)
    assert train(settings).is_dir()


def test_in_a_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with Termination().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def wait_for_steps(process: subprocess.Popen, output: Path, n: int) -> None:
    deadline = time.monotonic() + 240
    while not (output / "train_log.jsonl").is_file() or len(losses(output)) < n:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_cluster_tells_all_processes_also_those_that_read(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    data = recipe_data(
        place / "base", place / "data.jsonl", output,
        batch={"workers": 1}, training={"max_steps": 5000},
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    process = subprocess.Popen(
        [sys.executable, "-m", "av_llava.cli", "train", str(tmp_path / "r.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for_steps(process, output, 3)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said and "--resume" in said
    checkpoint = RunFolder(output).last_checkpoint()
    assert checkpoint is not None and not (output / "bad_media.jsonl").exists()
    assert checkpoint.name == f"checkpoint-{max(losses(output))}"


# ---------------------------------------------------------------- two processes, nobody watching


def two(file: Path, *words: str) -> list[subprocess.Popen]:
    """Both processes of a run without torchrun, which would end one when the other fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "av_llava.cli", "train", str(file), *words],
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
            stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    try:
        return [(p.returncode, said) for p in processes for said in [p.communicate(timeout=240)[1]]]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_where_the_first_process_fails_the_others_do_not_wait(place: Path, tmp_path: Path) -> None:
    data = recipe_data(place / "base", tmp_path / "nothing.jsonl", tmp_path / "out")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    (first, said), (other, also) = ends(two(tmp_path / "r.yaml"))
    assert first == 7 and "nothing.jsonl" in said
    assert other == 2 and "The first process of this run failed" in also


@pytest.mark.slow
def test_told_to_one_rank_both_end_with_the_same_step(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    data = recipe_data(place / "base", place / "data.jsonl", output, training={"max_steps": 5000})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    processes = two(tmp_path / "r.yaml")
    wait_for_steps(processes[0], output, 3)
    processes[1].send_signal(signal.SIGTERM)
    (first, said), (other, also) = ends(processes)
    assert (first, other) == (130, 130), said + also
    step = max(losses(output))
    assert f"after step {step}," in said and f"after step {step}," in also
    assert RunFolder(output).last_checkpoint() == output / f"checkpoint-{step}"


# ---------------------------------------------------------------- too many bad media, over all


def bad(index: int) -> BadMedium:
    return BadMedium(f"{index}.mp4", "It is torn.", str(index), "d.jsonl", index, 0, "other")


def test_a_rank_does_not_judge_by_what_it_has_seen_alone() -> None:
    settings = BadMediaSettings(max_fraction=0.2, grace=2)
    watch = BadMediaWatch(settings, alone=False)
    watch.update(4, [bad(i) for i in range(4)])  # all of this rank's
    watch.judge(40, 4)
    with pytest.raises(DataError, match="4 of 4 samples .* It is torn"):
        BadMediaWatch(settings).update(4, [bad(i) for i in range(4)])
    other = BadMediaWatch(settings, alone=False)
    other.update(4, [])
    with pytest.raises(DataError, match=r"9 of 40 samples could not be read \(22.5%"):
        other.judge(40, 9)
