"""``av-llava train``: words in, exit codes and streams out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from train_runs import losses, make_base, make_data, recipe_data

from av_llava.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder)
    make_data(folder, 5)
    return folder


@pytest.fixture
def file(place: Path, tmp_path: Path) -> Path:
    data = recipe_data(
        place / "base", place / "data.jsonl", tmp_path / "out", training={"max_steps": 2}
    )
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def program(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "av_llava.cli", "train", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_train_prints_the_folder_and_talks_on_stderr(file: Path, tmp_path: Path) -> None:
    done = program(file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out" / "final")
    assert "step 2/2  loss" in done.stderr and "mm_projector" in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert "shards" not in done.stderr  # no bars where nobody watches
    assert sorted(losses(tmp_path / "out")) == [1, 2]
    again = program(file)
    assert again.returncode == 2 and "--resume" in again.stderr
    finished = program(file, "--resume", "--json", "--quiet")
    assert finished.returncode == 0
    assert json.loads(finished.stdout)["folder"] == str(tmp_path / "out" / "final")


def test_check_prints_figures_and_makes_nothing(file: Path, tmp_path: Path) -> None:
    done = program(file, "--check", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["samples"] == 5 and figures["estimate"]["optimizer"] > 0
    assert "activations (estimate)" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "Name a recipe"),
        (["none.yaml"], 2, "none.yaml cannot be read"),
        (["{file}", "lora.rnk=3"], 2, "Did you mean 'lora.rank'"),
        (["{file}", "--check", "--resume"], 2, "nothing to resume"),
        (["{file}", "--stage", "a"], 2, "has no stages"),
        (["{file}", "--frobnicate"], 2, "No such option"),
    ],
)
def test_mistakes_are_told_before_torch_is_imported(file, cli_run, words, code, said) -> None:
    result = cli_run("train", *(w.format(file=file) for w in words))
    assert result.code == code and said in result.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["training.lerning_rate=1"], 2, "Did you mean 'training.learning_rate'"),
        (["training.optim=adm"], 2, "transformers refuses the section training"),
        (["training.disable_tqdm=false"], 2, "is always True"),
        (["training.eval_strategy=steps"], 2, "data.eval is not given"),
        (["model.path=nowhere"], 4, "nowhere"),
        (["data.train=nowhere.json"], 7, "nowhere.json"),
        (["batch.max_tokens=20"], 7, "longer than max_tokens"),
        (["output=null"], 2, "names no output"),
    ],
)
@pytest.mark.slow
def test_mistakes_that_need_the_libraries(file: Path, words: list[str], code: int, said: str):
    done = program(file, *words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs signals of POSIX")
def test_ctrl_c_ends_quietly_and_leaves_a_checkpoint(file: Path, tmp_path: Path) -> None:
    words = [str(file), "training.max_steps=5000", "training.save_strategy=steps",
             "training.save_steps=2", "batch.workers=1"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "av_llava.cli", "train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    log, deadline = tmp_path / "out" / "train_log.jsonl", time.monotonic() + 240
    while not log.is_file() or len(losses(tmp_path / "out")) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to its workers, too
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert RunFolder(tmp_path / "out").last_checkpoint() is not None
    assert not list((tmp_path / "out").glob(".*partial*"))
