"""The real lmms-eval, found by entry point, on a tiny local task; ``make test-lmms`` runs this.

lmms-eval wants other versions than this package is tested with, so it has an environment of its
own; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clips import make_clip

import av_llava
from av_llava.demo_model import tiny_random

pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.slow

TASK = Path(__file__).parent / "tiny_task"
N_VIDEOS = 30
QUESTIONS = ("What is seen?", "What is heard?", "How long is it?")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, videos (one of them broken), questions in mixed order, the task."""
    folder = tmp_path_factory.mktemp("lmms")
    tiny_random(folder / "model")
    kinds = [make_clip(folder / f"kind{i}.mp4", seconds=1 + i) for i in range(3)]
    videos = [folder / f"{i}.mp4" for i in range(N_VIDEOS)]
    for i, video in enumerate(videos):
        shutil.copy(kinds[i % 3], video)
    broken = folder / "broken.mp4"
    broken.write_bytes(videos[0].read_bytes()[:2000])
    rows = [
        {"video": str(v), "question": q, "answer": "-"}
        for q in QUESTIONS
        for v in (*videos, broken)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    task = folder / "task"
    task.mkdir()
    for file in TASK.iterdir():
        if file.is_file():
            text = file.read_text().replace("ROWS", str(folder / "rows.json"))
            (task / file.name).write_text(text)
    return folder, rows


def command(folder: Path, name: str, *extra: str) -> list[str]:
    """The command line of one run."""
    words = f"pretrained={folder / 'model'},device=cpu,frames=4"
    out = ["--output_path", str(folder / name), "--log_samples", "--verbosity", "INFO"]
    task = ["--tasks", "av_llava_tiny", "--include_path", str(folder / "task")]
    model = ["--model", "av_llava", "--model_args", words]
    return [sys.executable, "-m", "lmms_eval", *model, *task, *out, *extra]


def environment(folder: Path) -> dict[str, str]:
    """No network, one thread, caches inside the folder."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **offline, "HF_HOME": str(folder / "hf")}


def samples(folder: Path, name: str) -> dict[int, str]:
    """Answers by document, from lmms-eval's own log."""
    (log,) = (folder / name).rglob("*_samples_av_llava_tiny.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return {r["doc_id"]: r["filtered_resps"] for r in rows}


def test_every_question_is_answered_as_the_model_answers_it_alone(world):
    folder, rows = world
    done = subprocess.run(
        command(folder, "plain"), env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = samples(folder, "plain")
    model = av_llava.load(folder / "model", "cpu")
    assert len(said) == len(rows)
    for i, row in enumerate(rows):
        if "broken" in row["video"]:
            assert said[i] == ""
        else:
            alone = model.ask(row["video"], row["question"], frames=4, max_new_tokens=4)
            assert said[i] == alone.text
    assert f"3 of {len(rows)} answers are empty" in done.stdout + done.stderr


def test_a_killed_run_continues_with_what_it_has(world):
    folder, rows = world
    cache = ["--use_cache", str(folder / "cache")]
    env = environment(folder)
    words = command(folder, "killed", *cache)
    quiet = subprocess.DEVNULL
    first = subprocess.Popen(words, env=env, stdout=quiet, stderr=quiet)
    stored = 0
    deadline = time.monotonic() + 300
    while stored < 2 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
        stored = lines(folder / "cache")
    first.send_signal(signal.SIGKILL)
    first.wait()
    stored = lines(folder / "cache")
    assert 2 <= stored < len(rows), "the run was not killed in its middle"
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert samples(folder, "killed") == samples(folder, "plain")
    assert "cache hits" in done.stdout + done.stderr


def lines(cache: Path) -> int:
    """Answers that lmms-eval's cache has stored."""
    return sum(len(f.read_text().splitlines()) for f in cache.rglob("rank_*.audit.jsonl"))
