"""A run: what is asked, what is kept, what is refused, and that it can be ended anywhere."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from eval_stand_in import ARMS, StandIn, Toy, toy_rows, write_toy

from av_llava.errors import AVLlavaError, DataError, UsageError
from av_llava_eval.experiment import Arm
from av_llava_eval.locks import RunLock
from av_llava_eval.records import AnswerFile, RunFolder
from av_llava_eval.runner import RunSettings, run
from av_llava_eval.scoring import score_folder
from av_llava_eval.sharding import Place

TOY = Toy()
N = len(toy_rows())
TWO = RunSettings(arms=ARMS, workers=2)


@pytest.fixture
def data(tmp_path):
    return write_toy(tmp_path / "data")


def answers(folder):
    return {k: (r["status"], r.get("raw")) for k, r in RunFolder(folder).answers().items()}


def test_every_arm_asks_everything_and_each_clip_is_opened_once(data, tmp_path):
    answerer = StandIn()
    seen = []
    done = run(TOY, data, tmp_path / "run", lambda: answerer, TWO, on_progress=seen.append)
    assert done.complete and done.failed == 0 and done.answers == 2 * N
    assert len(set(answerer.asked)) == len(answerer.asked) == 2 * N
    assert sorted(answerer.opened) == sorted(
        (f"v{v}", ("audio on", "audio off")) for v in range(12)
    )
    assert seen[-1].done == seen[-1].total == 2 * N and seen[-1].left_s == 0
    kept = RunFolder(tmp_path / "run")
    assert kept.samples() == list(TOY.load(data))
    assert kept.need().identity["samples"] == N


def test_a_finished_run_asks_nothing_and_loads_nothing(data, tmp_path):
    run(TOY, data, tmp_path / "run", StandIn, TWO)
    before = answers(tmp_path / "run")
    done = run(TOY, data, tmp_path / "run", lambda: pytest.fail("the model was loaded"), TWO)
    assert done.complete and done.progress.kept == 2 * N and done.progress.done == 0
    assert answers(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: RunSettings(arms=ARMS[:1]), "arms was"),
        (lambda data: RunSettings(arms=ARMS, max_new_tokens=99), "max_new_tokens was 16, now 99"),
        (lambda data: RunSettings(arms=ARMS, limit=3), "samples was 36, now 3"),
        (lambda data: write_toy(data, toy_rows(seed=1)) and TWO, "questions was"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_with_other_data_or_settings_is_refused(data, tmp_path, change, said, finished):
    folder = tmp_path / "run"
    run(TOY, data, folder, StandIn, TWO)
    if not finished:
        file = next(folder.glob("answers.*"))
        file.write_bytes(b"".join(file.read_bytes().splitlines(True)[:10]))
    before = answers(folder)
    with pytest.raises(DataError, match=f"another run.*{said}"):
        run(TOY, data, folder, StandIn, change(data))
    assert answers(folder) == before


def test_another_model_is_refused(data, tmp_path):
    run(TOY, data, tmp_path / "run", lambda: StandIn(fail={"v0": "oom"}), TWO)
    with pytest.raises(DataError, match=r'model\.weights was "1", now "2"'):
        run(TOY, data, tmp_path / "run", lambda: StandIn(version=2), TWO)


def test_a_moved_data_folder_is_the_same_data(data, tmp_path):
    run(TOY, data, tmp_path / "run", lambda: StandIn(fail={"v0": "oom"}), TWO)
    done = run(TOY, data.rename(tmp_path / "moved"), tmp_path / "run", StandIn, TWO)
    assert done.complete and done.failed == 0


def test_failures_are_kept_by_kind_and_tried_again(data, tmp_path):
    folder = tmp_path / "run"
    kinds = {f"v{i}": kind for i, kind in enumerate(["missing", "no_audio", "timeout", "oom"])}
    done = run(TOY, data, folder, lambda: StandIn(fail=kinds), TWO)
    assert done.complete and done.failed == 4 * 3 * 2
    assert done.progress.failures == {k: 6 for k in kinds.values()}
    assert done.failed_share == pytest.approx(24 / 72)
    row = RunFolder(folder).answers()["audio on", "v0-0"]
    assert row["status"] == "missing" and row["error"] == "There is no file x.mp4."

    idle = run(TOY, data, folder, StandIn, RunSettings(arms=ARMS, retry_failed=False))
    assert idle.progress.done == 0 and idle.failed == 24
    again = StandIn(fail={"v3": "oom"})
    done = run(TOY, data, folder, lambda: again, TWO)
    assert done.failed == 6 and len(again.asked) == 18
    done = run(TOY, data, folder, StandIn, TWO)
    assert done.failed == 0
    assert answers(folder) == undisturbed(data, tmp_path)


def undisturbed(data, tmp_path):
    run(TOY, data, tmp_path / "undisturbed", StandIn, TWO)
    return answers(tmp_path / "undisturbed")


def test_one_bad_question_does_not_take_its_neighbours_along(data, tmp_path):
    prompts = [TOY.prompt(s) for s in TOY.load(data)]
    answerer = StandIn(fail_question={prompts[1]: "context", prompts[4]: "error"})
    done = run(TOY, data, tmp_path / "run", lambda: answerer, TWO)
    assert done.progress.failures == {"context": 2, "error": 2}
    assert answers(tmp_path / "run")["audio on", "v0-2"][0] == "ok"


def test_errors_of_no_known_kind_in_a_row_end_the_run(data, tmp_path):
    answerer = StandIn(fail={f"v{i}": "error" for i in range(12)})
    with pytest.raises(AVLlavaError, match="last 8 videos failed.*a strange shape.*goes on"):
        run(TOY, data, tmp_path / "run", lambda: answerer, TWO)
    done = run(TOY, data, tmp_path / "run", StandIn, TWO)
    assert done.complete and done.failed == 0


def test_a_mistake_of_the_program_is_not_recorded_but_raised(data, tmp_path):
    class Broken(StandIn):
        def open(self, clip, arms, lenders):
            raise AttributeError("no such thing")

    for workers in (0, 2):
        with pytest.raises(AttributeError):
            run(TOY, data, tmp_path / "run", Broken, RunSettings(arms=ARMS, workers=workers))
    assert answers(tmp_path / "run") == {}


# -------------------------------------------------------------------- wrong annotations


def test_bad_rows_are_listed_counted_and_left_out_only_on_demand(tmp_path):
    rows = toy_rows()
    del rows[2]["question"]
    rows[5]["answer"] = "E"
    rows[7]["id"] = rows[6]["id"]
    rows[9]["options"] = 3
    data = write_toy(tmp_path / "data", rows)
    with pytest.raises(DataError) as caught:
        run(TOY, data, tmp_path / "run", StandIn, TWO)
    text = str(caught.value)
    assert "4 of 36 annotation rows of toy cannot be used" in text
    assert "row 2: the field 'question' is missing" in text
    assert "row 5 (v1-2): the answer 'E' is none of 4 options" in text
    assert "row 7: its id 'v2-0' is also that of row 6" in text
    assert "and 1 more" in text and "--skip-bad-rows" in text
    assert not (tmp_path / "run" / "manifest.json").exists()
    done = run(TOY, data, tmp_path / "run", StandIn, RunSettings(skip_bad_rows=True))
    assert done.problems == 4 and done.answers == 32
    assert RunFolder(tmp_path / "run").need().about["bad_rows"] == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [("[]", "hold no rows"), ("{", "is not JSON"), ("[3]", "a row is an object, not a int")],
)
def test_annotations_that_cannot_be_read(tmp_path, text, said):
    data = write_toy(tmp_path / "data")
    (data / "toy.json").write_text(text)
    with pytest.raises(DataError, match=said):
        run(TOY, data, tmp_path / "run", StandIn, TWO)


def test_check_tells_what_is_missing(data):
    assert TOY.check(data) == [
        f"12 of 12 media files are missing, such as {data / 'videos' / 'v0.mp4'}."
    ]
    assert "cannot be read" in TOY.check(data / "nowhere")[0]


def test_names_that_do_not_exist(data, tmp_path):
    with pytest.raises(UsageError, match="Unknown split of toy 'train'"):
        run(TOY, data, tmp_path / "run", StandIn, RunSettings(split="train"))
    with pytest.raises(UsageError, match="no prompt style 'x'"):
        run(TOY, data, tmp_path / "run", StandIn, RunSettings(style="x"))


# -------------------------------------------------------------------- wrong folders


def test_a_torn_last_line_is_ignored_and_taken_out(data, tmp_path):
    folder = tmp_path / "run"
    run(TOY, data, folder, StandIn, TWO)
    whole = answers(folder)
    file = folder / "answers.0of1.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:50]) + lines[50][:30])
    assert len(RunFolder(folder).answers()) == 50
    done = run(TOY, data, folder, StandIn, TWO)
    assert done.complete and answers(folder) == whole
    assert len(file.read_bytes().splitlines()) == 72


def test_a_last_line_that_lacks_only_its_end_counts(data, tmp_path):
    folder = tmp_path / "run"
    run(TOY, data, folder, StandIn, TWO)
    file = folder / "answers.0of1.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:50]).rstrip(b"\n"))
    answerer = StandIn()
    done = run(TOY, data, folder, lambda: answerer, TWO)
    assert done.complete and len(answerer.asked) == 22
    assert len(file.read_bytes().splitlines()) == 72


@pytest.mark.parametrize("line", [b"not json\n", b'{"id": "v0-0"}\n', b"[1]\n"])
def test_a_damaged_line_is_named(data, tmp_path, line):
    folder = tmp_path / "run"
    run(TOY, data, folder, StandIn, TWO)
    file = folder / "answers.0of1.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], line, *lines[3:]]))
    with pytest.raises(DataError, match=r"answers\.0of1\.jsonl, line 4 is no answer"):
        run(TOY, data, folder, StandIn, TWO)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "other/1"}'])
def test_an_unreadable_manifest_is_named(data, tmp_path, text):
    folder = tmp_path / "run"
    run(TOY, data, folder, StandIn, TWO)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        run(TOY, data, folder, StandIn, TWO)


def test_answers_without_a_manifest_are_not_adopted(data, tmp_path):
    folder = tmp_path / "run"
    run(TOY, data, folder, StandIn, TWO)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="holds answers but no manifest"):
        run(TOY, data, folder, StandIn, TWO)


def test_two_runs_in_one_folder_are_refused(data, tmp_path):
    folder = tmp_path / "run"
    with RunLock(folder, Place(0, 2)):
        for place in (Place(0, 2), Place(0, 1), Place(2, 3)):
            with pytest.raises(UsageError, match="Another run is at work"):
                run(TOY, data, folder, StandIn, TWO, place=place)
        with RunLock(folder, Place(1, 2)):
            pass  # the other process of the same run
    assert run(TOY, data, folder, StandIn, TWO).complete


def test_a_full_disk_keeps_what_is_there(data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    real = os.write

    def full(fd, text):
        if b'"v4-0"' in bytes(text):
            real(fd, bytes(text)[:40])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, text)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UsageError, match="No space left on device.*is kept"):
        run(TOY, data, folder, StandIn, TWO)
    monkeypatch.undo()
    assert (folder / "answers.0of1.jsonl").read_bytes().endswith(b"}\n")
    assert len(answers(folder)) == 24
    run(TOY, data, folder, StandIn, TWO)
    assert answers(folder) == undisturbed(data, tmp_path)


def test_a_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        run(TOY, data, tmp_path / "file" / "run", StandIn, TWO)


def test_odd_texts_survive(tmp_path):
    with AnswerFile(tmp_path, Place()) as file:
        texts = ["a\nb\u2028c", "\ud83d", "é\x00", ""]
        head = {"arm": "main", "group": "g", "status": "ok"}
        file.append([{"id": str(i), **head, "raw": t} for i, t in enumerate(texts)])
    found = [r["raw"] for r in RunFolder(tmp_path).lines()]
    assert found[0] == texts[0] and found[2:] == texts[2:] and len(found) == 4


# -------------------------------------------------------------------- processes


def start(data, folder, rank=0, world=1, delay_s=0.0):
    here = Path(__file__).parents[1]
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
    env["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here.parent / "eval")])
    command = [sys.executable, str(here / "eval_stand_in.py"), str(data), str(folder), str(delay_s)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_two_processes_share_the_work(data, tmp_path):
    folder = tmp_path / "run"
    both = [finished(p) for p in [start(data, folder, rank, 2, 0.01) for rank in (0, 1)]]
    assert [b["asked"] for b in both] == [36, 36]  # 12 videos of 3 questions, in two arms
    assert any(b["complete"] for b in both)
    assert answers(folder) == undisturbed(data, tmp_path)


@pytest.mark.slow
def test_torchrun_starts_the_processes(data, tmp_path):
    folder, here = tmp_path / "run", Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", str(here / "eval_stand_in.py"), str(data), str(folder)]
    path = os.pathsep.join([str(here.parent), str(here.parent / "eval")])
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, env={**env, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert {f.name for f in folder.glob("answers.*")} == {f"answers.{r}of2.jsonl" for r in (0, 1)}
    assert answers(folder) == undisturbed(data, tmp_path)


@pytest.mark.slow
def test_killed_twenty_times_at_random_points_it_ends_the_same(tmp_path):
    """SIGKILL, with one, two or three processes in turn; every answer is kept once."""
    rng, folder = random.Random(5), tmp_path / "run"
    data = write_toy(tmp_path / "data", toy_rows(n_videos=60))
    for _ in range(20):
        world = rng.choice([1, 2, 3])
        goal = n_lines(folder) + rng.randrange(12)
        processes = [start(data, folder, rank, world, 0.02) for rank in range(world)]
        give_up = time.monotonic() + 60
        while n_lines(folder) < goal and time.monotonic() < give_up:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        for process in processes:
            process.send_signal(signal.SIGKILL)
        assert [p.wait() for p in processes] == [-signal.SIGKILL] * world  # none had ended
        for process in processes:
            process.communicate()
    assert 0 < n_lines(folder) < 360
    for process in [start(data, folder, rank, 2) for rank in range(2)]:
        finished(process)
    assert answers(folder) == undisturbed(data, tmp_path)
    asked = [(r["arm"], r["id"]) for r in RunFolder(folder).lines()]
    assert len(asked) == len(set(asked))


def n_lines(folder):
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("answers.*.jsonl"))


def test_each_arm_can_be_anything_json_holds(data, tmp_path):
    arms = (Arm("a", aggregator="llava_video"), Arm("b", max_visual_tokens=64))
    run(TOY, data, tmp_path / "run", StandIn, RunSettings(arms=arms))
    assert [Arm(**a) for a in RunFolder(tmp_path / "run").need().arms] == list(arms)


def test_a_style_may_ask_for_the_frames_that_an_arm_sees(data, tmp_path):
    class Timed(Toy):
        styles = ("default", "frames")
        frame_styles = ("frames",)

        def prompt_of_frames(self, sample, style, times_s):
            return f"{self.prompt(sample)} {times_s}"

    answerer, arms = StandIn(), (Arm("main"), Arm("text only", sees=False, sound="off"))
    settings = RunSettings(arms=arms, style="frames")
    assert run(Timed(), data, tmp_path / "run", lambda: answerer, settings).complete
    ends = {(arm, prompt[prompt.rindex("(") :]) for arm, prompt in answerer.asked}
    assert ends == {("main", "(1.0, 5.0)"), ("text only", "()")}
    answerer = StandIn()
    run(Timed(), data, tmp_path / "plain", lambda: answerer, RunSettings(arms=arms))
    assert not any("1.0" in prompt for _, prompt in answerer.asked)


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("manifest.json", None, '{"schema": "av-llava-eval/1"}', "manifest.json is damaged"),
        ("manifest.json", '"split"', '"splt"', "manifest.json is damaged"),
        ("samples.jsonl", None, '{"id": "v0-0"}\n', "samples.jsonl is damaged"),
        ("samples.jsonl", None, "[1]\n", "samples.jsonl is damaged"),
        ("samples.jsonl", '"id": "v0-0"', '"id": 3', "its id is 3, not a text"),
        ("answers.0of1.jsonl", '"status": "ok", "raw": "', '"status": "ok", "row": "', "no answer"),
        ("answers.0of1.jsonl", '"used": {', '"used": "x", "rest": {', "line 1 is no answer"),
    ],
)
def test_damaged_files_of_a_run_are_named(data, tmp_path, name, old, new, said):
    folder = tmp_path / "run"
    run(TOY, data, folder, StandIn, TWO)
    file = folder / name
    text = file.read_text()
    assert old is None or old in text
    file.write_text(new if old is None else text.replace(old, new, 1))
    with pytest.raises(DataError, match=said):
        score_folder(folder, task=TOY)
