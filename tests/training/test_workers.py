"""Workers: their errors arrive as they were, and nothing goes on after the end."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, Dataset
from train_runs import recipe, recipe_data, trainer_of
from training_data import sample
from transformers import TrainerCallback

from av_llava.errors import CheckpointError, DataError, MediaError
from av_llava.training.callbacks import RunLog
from av_llava.training.collate import as_is
from av_llava.training.unreadable import UnreadableError
from av_llava.training.workers import batches_of, deaths_named, end_workers, failed, start_worker


class Given(Dataset):
    """Batches that are made, or fail, as told."""

    def __init__(self, make) -> None:
        self.make = make

    def __getitem__(self, index):
        try:
            return self.make(index)
        except (DataError, MediaError) as error:
            return failed(error)


def loader(make, n=4):
    """One worker that outlives a SIGTERM."""
    return DataLoader(
        Given(make), batch_size=None, sampler=range(n), num_workers=1, collate_fn=as_is,
        worker_init_fn=start_worker, persistent_workers=True,
    )  # fmt: skip


def refuse_second(index):
    if index == 1:
        raise DataError("row 1 is wrong.")
    return torch.tensor(index)


def want_more_than_a_message(index):
    raise UnreadableError("f.mp4", "f.mp4 is damaged.", "s", "d.json")


def read_through(batches) -> list:
    iterator = iter(batches)
    try:
        return list(batches_of(iterator))
    finally:
        end_workers(iterator)


def no_worker_is_left() -> bool:
    return not multiprocessing.active_children()


def test_errors_of_workers_arrive_as_they_were() -> None:
    with pytest.raises(DataError) as caught:
        read_through(loader(refuse_second))
    assert str(caught.value) == "row 1 is wrong."
    with pytest.raises(DataError) as caught:
        read_through(loader(want_more_than_a_message))
    assert str(caught.value) == "f.mp4 is damaged."
    assert no_worker_is_left()


def test_without_workers_errors_are_raised_at_once() -> None:
    alone = iter(DataLoader(Given(want_more_than_a_message), batch_size=None, sampler=range(2)))
    with pytest.raises(UnreadableError):
        next(alone)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        EOFError("Ran out of input"),
    ],
)
def test_a_worker_that_was_killed_is_a_sentence(error) -> None:
    """As torch tells it; a worker that is really killed would tell it at any line of this test."""

    def batches():
        yield 1
        raise error

    reading = batches_of(batches())
    assert next(reading) == 1
    with pytest.raises(DataError, match=r"was killed, .*fewer batch\.workers"):
        next(reading)


def test_other_errors_are_left_as_they_are() -> None:
    for error in (RuntimeError("CUDA out of memory"), ConnectionError("the network")):
        with pytest.raises(type(error), match=str(error)), deaths_named():
            raise error


# ---------------------------------------------------------------- in a run


def hollow(film: Path, file: Path) -> Path:
    """A film whose header is whole and whose frames are not."""
    raw = bytearray(film.read_bytes())
    at = raw.index(b"mdat") + 4
    size = int.from_bytes(raw[at - 8 : at - 4], "big")
    raw[at : at - 8 + size] = bytes(size - 8)
    file.write_bytes(raw)
    return file


def test_a_run_ends_with_one_sentence_from_a_worker(place: Path, tmp_path: Path) -> None:
    """It ended with the traceback of the worker, for which it then waited for ever."""
    film = hollow(place / "media" / "film.mp4", tmp_path / "hollow.mp4")
    rows = [
        sample(0, ("video", str(place / "media" / "film.mp4"))),
        sample(1, ("video", str(film))),
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(s.to_row()) + "\n" for s in rows))
    data = recipe_data(
        place / "base", file, tmp_path / "out",
        data={"bad_media": {"policy": "error"}}, batch={"workers": 2},
        trainable={"mm_audio_projector": "freeze"},
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    command = [sys.executable, "-m", "av_llava.cli", "train", str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7
    assert "sample '1' cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_ends_the_run_and_its_workers(place, tmp_path, monkeypatch) -> None:
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out", batch={"workers": 1}
    )  # fmt: skip
    trainer, _ = trainer_of(settings)
    monkeypatch.setattr(RunLog, "on_log", full)
    with pytest.raises(CheckpointError, match=r"out could not be written to: .* --resume"):
        trainer.train()
    assert no_worker_is_left()


def test_workers_of_an_evaluation_end_with_it(place: Path, tmp_path: Path, monkeypatch) -> None:
    settings = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out", batch={"workers": 1},
        data={"eval": str(place / "data.jsonl")}, training={"eval_strategy": "steps"},
    )  # fmt: skip
    trainer, _ = trainer_of(settings)

    def broken(*args, **kwargs):
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(trainer.model, "forward", broken)
    with pytest.raises(RuntimeError, match="the model is broken"):
        trainer.evaluate()
    assert no_worker_is_left()


def test_batches_are_still_made_after_a_first_sigterm(place: Path, tmp_path: Path) -> None:
    settings = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out", batch={"workers": 1}
    )  # fmt: skip
    trainer, _ = trainer_of(settings)

    class Cluster(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 1:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, signal.SIGTERM)

    trainer.add_callback(Cluster())
    trainer.train()
    assert trainer.state.global_step == 4 and no_worker_is_left()
