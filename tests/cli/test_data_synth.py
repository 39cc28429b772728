"""av-llava data synth: what it makes, what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, program

from av_llava.media import probe


def test_it_makes_a_data_set_and_prints_where(cli_run, tmp_path: Path) -> None:
    out = tmp_path / "world"
    result = cli_run("data", "synth", "--out", str(out), "--n", "6", "--size", "80")
    assert result.code == 0
    assert result.out.strip() == str(out / "train.json") and "6 clips in" in result.err
    rows = json.loads((out / "train.json").read_text())
    assert len(rows) == 6
    sizes = {probe(out / r["video"]).video.width for r in rows if "video" in r}  # type: ignore[union-attr]
    assert sizes == {80}


def test_json_is_all_that_it_prints(cli_run, tmp_path: Path) -> None:
    words = ("--split", "test", "--seed", "3", "--form", "question", "--json")
    result = cli_run("data", "synth", "--out", str(tmp_path / "w"), "--n", "3", *words)
    made = result.json["synth"]
    assert result.code == 0 and not result.err
    assert made["clips"] == 3 and json.loads(Path(made["file"]).read_text())[0]["choices"]
    assert Path(made["file"]).name == "test.json"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--n", "0"], 2, "n is 0, but must be at least 1."),
        (["--n", "many"], 2, "--n"),
        (["--size", "33"], 2, "size is 33 pixels, but must be even"),
        (["--form", "chat"], 2, "Unknown form 'chat'"),
        (["--split", "a/b"], 2, "The split 'a/b' names files"),
        (["--workers", "0"], 2, "workers is 0"),
    ],
)
def test_wrong_words_are_named(
    cli_run, tmp_path: Path, words: list[str], code: int, says: str
) -> None:
    result = cli_run("data", "synth", "--out", str(tmp_path / "w"), *words)
    assert result.code == code and says in result.err and not result.out
    assert not (tmp_path / "w").exists()


def test_a_folder_is_needed(cli_run) -> None:
    result = cli_run("data", "synth", "--n", "3")
    assert result.code == 2 and "--out" in result.err


def test_a_folder_of_other_things_is_left_alone(cli_run, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    result = cli_run("data", "synth", "--out", str(tmp_path), "--n", "3", "--json")
    assert result.code == 7 and result.json["error"]["type"] == "DataError"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_seed_in_the_same_folder_is_refused(cli_run, tmp_path: Path) -> None:
    words = ("data", "synth", "--out", str(tmp_path / "w"), "--n", "2")
    assert cli_run(*words).code == 0
    result = cli_run(*words, "--seed", "1")
    assert result.code == 7 and "seed was 0, now 1" in result.err


@pytest.mark.slow
def test_it_runs_as_a_program_with_workers(tmp_path: Path) -> None:
    out = str(tmp_path / "w")
    result = program("data", "synth", "--out", out, "--n", "70", "--workers", "2")
    assert result.code == 0 and not result.err.startswith("error")
    assert len(list((tmp_path / "w" / "clips").iterdir())) == 70


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_ends_it_in_one_line(tmp_path: Path, workers: str) -> None:
    out = tmp_path / "w"
    words = ["data", "synth", "--out", str(out), "--n", "5000", "--workers", workers]
    process = subprocess.Popen(
        [sys.executable, "-m", "av_llava.cli", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("clips/[!.]*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "error: Interrupted.\n"
    assert not (out / "train.json").exists()
