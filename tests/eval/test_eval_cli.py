"""``av-llava eval`` as users run it: with the built-in tiny model, real clips and real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from clips import make_clip
from golden_data import golden
from tiny import tiny

from av_llava.cli import main as cli
from av_llava.cli.eval_run import progress_line
from av_llava.inference import AVLlava
from av_llava_eval.records import RunFolder
from av_llava_eval.runner import Progress

ROOT = Path(__file__).parents[2]
OWN_TASK = '''
"""A benchmark of our own."""

from av_llava_eval.annotations import read_rows
from av_llava_eval.sample import Sample
from av_llava_eval.task import Task, register


@register
class Own(Task):
    name = "own"
    title = "Our own"
    needs = ("rows.json", "<video>.mp4")
    groupings = ("kind",)

    def docs(self, root, split):
        return read_rows(root / "rows.json")

    def sample(self, doc, index, root):
        return Sample(
            id=doc["id"],
            group=doc["video"],
            question=doc["question"],
            options=tuple(doc["options"]),
            answer=doc["answer"],
            video=root / f"{doc['video']}.mp4",
            meta={"kind": doc["kind"]},
        )
'''
VIDEOS = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for i, video in enumerate(VIDEOS):
        make_clip(folder / f"{video}.mp4", seconds=1 + i / 2, size=(64, 48))
    rows = [
        {
            "id": f"{video}{i}",
            "video": video,
            "question": f"What moves at {i}?",
            "options": ["a ball", "a bell"],
            "answer": "AB"[i % 2],
            "kind": "long" if video > "b" else "short",
        }
        for video in VIDEOS
        for i in range(2)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "own.py").write_text(OWN_TASK)
    return folder


@pytest.fixture
def eval_(capsys, monkeypatch):
    for name in ("AV_LLAVA_MODEL", "AV_LLAVA_DEBUG", "COLUMNS", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(*words):
        capsys.readouterr()
        code = cli.run(["eval", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def words(bench, out, *more):
    own = ["--task", bench / "own.py", "--data", bench, "--out", out]
    fast = ["--frames", "2", "--max-tokens", "2", "--device", "cpu"]
    return ["run", *map(str, [*own, *fast, *more])]


@pytest.mark.slow
def test_an_experiment_from_the_shell(bench, eval_, tmp_path, monkeypatch):
    monkeypatch.setattr("av_llava.demo_model.SHIPPED", tmp_path / "left out")
    out = tmp_path / "run"
    code, said, noted = eval_(
        *words(bench, out, "--audio", "on,off,swap", "--text-only", "--report")
    )
    assert code == 0, noted
    assert "report.html" in noted
    assert "Our own: the model that comes with av-llava" in (out / "report.md").read_text()
    assert "Our own (test): accuracy" in said
    for arm in ("audio on", "audio off", "audio swap", "text only"):
        assert f"  {arm}" in said
    assert "audio off - audio on" in said and "McNemar" in said
    assert "this model is random" in noted and "32 of 32 answers" in noted
    kept = json.loads((out / "scores.json").read_text())
    assert kept["complete"] and len(kept["comparisons"]) == 3

    again = eval_(*words(bench, out, "--audio", "on,off,swap", "--text-only", "--json"))
    assert again[0] == 0 and json.loads(again[1])["arms"] == kept["arms"]
    assert "random" not in again[2]  # nothing was left to ask, so no model was loaded
    code, said, noted = eval_(*words(bench, out, "--audio", "on"))
    assert code == 7 and "holds another run" in noted
    assert 'arms was ["audio on", "audio off", "audio swap", "text only"], now ["main"]' in noted

    code, said, _ = eval_("score", out, "--compat", "lmms")
    assert code == 0 and "audio on" in said
    code, said, _ = eval_("compare", out)
    assert code == 0 and said.count("common questions") == 3 and "kind long" in said
    code, said, _ = eval_("compare", out, out, "--arms", "audio on,audio swap", "--json")
    (pair,) = json.loads(said)["comparisons"]
    assert code == 0 and pair["names"] == ["audio on", "audio swap"] and pair["n"] == 8
    code, said, _ = eval_("report", out, "--misses", "2")
    assert code == 0
    text, page = (Path(line) for line in said.split())
    assert "Our own" in text.read_text() and page.read_text().startswith("<!")


def test_failures_are_told_and_make_the_exit_code(bench, eval_, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for file in bench.iterdir():
        if file.is_file() and file.name not in ("b.mp4", "c.mp4"):
            (data / file.name).write_bytes(file.read_bytes())
    (data / "c.mp4").write_bytes(b"no film at all")
    code, said, noted = eval_(*words(data, tmp_path / "run"))
    assert code == 7
    assert "4 failed (missing 2, decode 2; of those answered" in said
    assert "4 of 8 answers failed and count as wrong" in noted and "failed (" in noted
    assert eval_(*words(data, tmp_path / "run", "--max-failures", "0.5"))[0] == 0
    (data / "b.mp4").write_bytes((bench / "b.mp4").read_bytes())
    (data / "c.mp4").write_bytes((bench / "c.mp4").read_bytes())
    code, said, _ = eval_(*words(data, tmp_path / "run"))
    assert code == 0 and ", 0 failed" in said


def test_list_and_check(bench, eval_, tmp_path):
    code, said, _ = eval_("list")
    assert code == 0 and "videomme" in said and "Video-MME" in said
    rows = json.loads(eval_("list", "--json")[1])["tasks"]
    assert all(row["needs"] and row["title"] for row in rows) and len(rows) > 20
    code, said, _ = eval_("check", bench / "own.py", "--data", bench)
    assert code == 0 and "Our own: 8 questions, nothing is missing." in said
    (tmp_path / "rows.json").write_bytes((bench / "rows.json").read_bytes())
    code, said, noted = eval_("check", bench / "own.py", "--data", tmp_path)
    assert code == 7 and "4 of 4 media files are missing" in said and "rows.json" in noted
    code, said, _ = eval_("check", "videomme", "--data", tmp_path, "--json")
    assert code == 7 and json.loads(said)["missing"]


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--audio", "loud"], 2, "Unknown audio 'loud'"),
        (["--audio", "on,"], 2, "--audio has an empty value"),
        (["--audio", "on,on"], 2, "names something twice"),
        (["--aggregator", "nonsense"], 2, "nonsense"),
        (["--max-visual-tokens", "many"], 2, "takes whole numbers"),
        (["--aggregator", "own", "--max-visual-tokens", "9"], 2, "not both"),
        (["--style", "x"], 2, "no prompt style 'x'"),
        (["--split", "x"], 2, "Unknown split"),
        (["--compat", "x"], 2, "Unknown compat"),
        (["--device", "tpu"], 2, "Unknown device"),
        (["--backend", "x"], 2, "backend"),
        (["--data", "nowhere"], 7, "nowhere"),
        (["--model", "./nowhere"], 4, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_without_a_model(
    bench, eval_, tmp_path, monkeypatch, more, code, said
):
    monkeypatch.setattr("av_llava.cli.engine.load", lambda loading: pytest.fail("a model loaded"))
    found, _, noted = eval_(*words(bench, tmp_path / "run", *more))
    assert (found, said in noted) == (code, True), noted
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_progress_says_rate_failures_and_time_left():
    progress = Progress(1000, kept=100, started=time.monotonic() - 50)
    assert progress_line(progress) == "100 of 1,000 answers"
    progress.done, progress.failures = 100, Counter(missing=2, oom=1)
    said = progress_line(progress)
    assert said == "200 of 1,000 answers · 2/s · 3 failed (missing 2, oom 1) · 7 min left"
    progress.done = 900
    assert progress_line(progress).startswith("1,000 of 1,000 answers · 18/s")
    assert "left" not in progress_line(progress)


def test_a_deaf_model_is_not_asked_with_sound(bench, eval_, tmp_path, monkeypatch):
    deaf = AVLlava(*tiny(audio=False))
    monkeypatch.setattr("av_llava.cli.engine.load", lambda loading: deaf)
    code, _, noted = eval_(*words(bench, tmp_path / "run", "--audio", "on,off"))
    assert code == 2 and "has no audio tower" in noted and "--audio off" in noted
    code, said, _ = eval_(*words(bench, tmp_path / "run", "--audio", "auto"))
    assert code == 0 and "answered without sound (the model has no audio tower: 8)" in said


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (["check", "videomme"], 2, "Name a task and its folder"),
        (["check", "videome", "--data", "."], 2, "Did you mean 'videomme'"),
        (["score"], 2, "Name the folder of a run"),
        (["score", "."], 7, "is no folder of a run"),
        (["score", ".", "--judge-model", "x"], 2, "go with --judge URL"),
        (["score", ".", "--judge", "http://h/v1"], 2, "needs --judge-model"),
        (["score", ".", "--judge", "x", "--judge-model", "m", "--judge-key-env", "NO"], 2, "'NO'"),
        (["compare"], 2, "Name one run or two"),
        (["report"], 2, "Name one run or several"),
        (["verify"], 2, "Name a folder"),
        (["verify", "."], 7, "no file that is named like a task"),
    ],
)
def test_wrong_words(eval_, tmp_path, monkeypatch, asked, code, said):
    monkeypatch.chdir(tmp_path)
    found, _, noted = eval_(*asked)
    assert (found, said in noted) == (code, True), noted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_such_here\n", "ModuleNotFoundError: No module named 'nothing_such_here'"),
        ("def x(:\n", "SyntaxError"),
        ("x = y\n", "NameError: name 'y' is not defined"),
        ("x = 1\n", "registers 0 tasks"),
    ],
)
def test_a_task_file_with_a_mistake(eval_, tmp_path, text, said):
    (tmp_path / "mine.py").write_text(text)
    code, _, noted = eval_("check", tmp_path / "mine.py", "--data", tmp_path)
    assert code == 2 and said in noted and "mine.py" in noted


def test_numbers_where_texts_should_be_are_bad_rows(bench, eval_, tmp_path):
    rows = json.loads((bench / "rows.json").read_text())
    rows[0]["question"], rows[1]["id"], rows[2]["video"] = 12, 5, 7
    rows[3]["options"] = ["a ball", 3]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code, said, _ = eval_("check", bench / "own.py", "--data", tmp_path, "--json")
    (report, *_) = json.loads(said)["missing"]
    assert code == 7 and "4 of 8 annotation rows" in report
    assert "row 0: its question is 12, not a text" in report
    assert "row 1: its id is 5" in report and "row 2: its group is 7" in report


def test_a_run_of_torchrun_with_a_bad_environment(bench, eval_, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, noted = eval_(*words(bench, tmp_path / "run"))
    assert code == 2 and "RANK is 2" in noted


def test_verify_agrees_and_names_what_differs(eval_, tmp_path):
    lines = golden("eval/videomme.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    (tmp_path / "videomme.jsonl").write_text("\n".join(lines))
    code, said, _ = eval_("verify", tmp_path)
    assert code == 0 and "videomme: 30 of 30 records, 30 of 30 prompts agree" in said
    row = json.loads(lines[0])
    row["score"] = 1.0 - row["score"]
    (tmp_path / "videomme.jsonl").write_text(json.dumps(row) + "\n" + "\n".join(lines[1:]))
    code, said, _ = eval_("verify", tmp_path)
    assert code == 7 and "29 of 30 records" in said and "score is" in said
    (tmp_path / "videomme.jsonl").write_text('{"doc": {}}')
    code, _, noted = eval_("verify", tmp_path)
    assert code == 7 and "line 1: a record has doc and prediction" in noted


# -------------------------------------------------------------------- processes


def start(bench, out, rank=0, world=1, *more):
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    command = [sys.executable, "-m", "av_llava.cli", "eval", *words(bench, out, *more)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def raw(folder):
    return {key: row["raw"] for key, row in RunFolder(folder).answers().items()}


@pytest.mark.slow
def test_two_processes_and_two_kills_give_what_one_gives(bench, eval_, tmp_path):
    """With the tiny model itself: killed twice, then finished by two processes."""
    assert eval_(*words(bench, tmp_path / "one", "--audio", "on,off"))[0] == 0
    out = tmp_path / "run"
    for goal in (2, 6):
        process = start(bench, out, 0, 1, "--audio", "on,off")
        file, give_up = out / "answers.0of1.jsonl", time.monotonic() + 120
        while time.monotonic() < give_up and process.poll() is None:
            if file.exists() and file.read_bytes().count(b"\n") >= goal:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 2 <= len(raw(out)) <= 16
    both = [start(bench, out, rank, 2, "--audio", "on,off") for rank in (0, 1)]
    ended = [p.communicate(timeout=240) for p in both]
    assert [p.returncode for p in both] == [0, 0], ended
    assert raw(out) == raw(tmp_path / "one")
    scores = [json.loads((f / "scores.json").read_text()) for f in (out, tmp_path / "one")]
    for found in scores:
        for arm in found["arms"].values():
            arm.pop("seconds")
    assert scores[0] == scores[1]


CHEAP = """
import json, sys
from av_llava.cli.main import run
codes = [run(words) for words in json.loads(sys.argv[1])]
heavy = [m for m in ("torch", "transformers", "matplotlib", "pyarrow") if m in sys.modules]
print(json.dumps([codes, heavy]), file=sys.stderr)
"""


def test_commands_without_a_model_import_nothing_heavy(bench, tmp_path):
    out, lost = str(tmp_path / "run"), str(tmp_path / "nowhere")
    asked = [
        ["eval", "--help"],
        ["eval", "list"],
        ["eval", "check", "videomme", "--data", lost],
        ["eval", *words(bench, out, "--audio", "loud")],
        ["eval", *words(bench, out, "--data", lost)],
        ["eval", "score", lost],
        ["eval", "compare", lost],
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    done = subprocess.run(
        [sys.executable, "-c", CHEAP, json.dumps(asked)], env=env, capture_output=True, text=True
    )
    assert json.loads(done.stderr.splitlines()[-1]) == [[0, 0, 7, 2, 7, 7, 7], []], done.stderr
