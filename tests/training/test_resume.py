"""A run that was killed goes on as if it had not been."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from train_runs import logged, losses, make_base, make_data, recipe, recipe_data, trainer_of
from transformers import AutoTokenizer, TrainerCallback

from av_llava.errors import AVLlavaError, CheckpointError, DataError, UsageError
from av_llava.training import recipe as recipes
from av_llava.training import run as runs
from av_llava.training.dataset import TrainingDataset
from av_llava.training.run import train
from av_llava.training.run_folder import RunFolder

STEPS = 10


def make(place: Path, output: Path, **changes):
    """With dropout, so that random numbers count, over several epochs."""
    own = {
        "trainable": {"language_model": {"train": "lora", "lr": 1e-3}},
        "lora": {"rank": 4, "dropout": 0.2},
        "data": {"modality_dropout": {"sound": 0.5}},
        "training": {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1},
    }
    return recipe_data(place / "base", place / "data.jsonl", output, **{**own, **changes})


def start(file: Path, *words: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "av_llava.cli", "train", str(file), *words]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def steps_logged(output: Path) -> int:
    log = output / "train_log.jsonl"
    return sum('"loss"' in line for line in log.read_text().splitlines()) if log.is_file() else 0


def kill_after(process: subprocess.Popen, output: Path, steps: int, delay_s: float) -> None:
    """End it without warning some time after it logged a step."""
    deadline = time.monotonic() + 240
    while steps_logged(output) < steps and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(6)  # its readers hold the folder's lock until they notice, which takes them 5 s


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_kill_and_resume_gives_the_same_losses_bit_for_bit(place: Path, tmp_path: Path, seed: int):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    workers = {"batch": {"max_samples": 3, "workers": seed}}
    train(
        recipe(
            place / "base", place / "data.jsonl", whole, **_changes(make(place, whole, **workers))
        )
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(make(place, killed, **workers)))
    chance = random.Random(seed)
    first, second = sorted(chance.sample(range(1, STEPS - 1), 2))
    kill_after(start(file), killed, first, chance.random() * 0.1)
    kill_after(start(file, "--resume"), killed, second, chance.random() * 0.1)
    last = start(file, "--resume")
    _, said = last.communicate()
    assert last.returncode == 0, said
    assert losses(killed) == losses(whole) and len(losses(whole)) == STEPS
    for name in ("adapter_model.safetensors", "multimodal.safetensors", "token_rows.safetensors"):
        one, other = load_file(whole / "final" / name), load_file(killed / "final" / name)
        assert one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)
    assert not list(killed.glob(".*partial*"))


def _changes(data: dict) -> dict:
    return {k: v for k, v in data.items() if k not in ("output",)}


# ---------------------------------------------------------------- in this process


def interrupted(place: Path, output: Path, after: int, **changes) -> dict:
    """A run that ended after a step, as its recipe's data."""
    data = make(place, output, **changes)
    settings = recipe(place / "base", place / "data.jsonl", output, **_changes(data))
    RunFolder(output).claim(resume=False)
    RunFolder(output).write("recipe.yaml", recipes.to_yaml(settings))
    trainer, _ = trainer_of(settings)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == after:
                control.should_training_stop = True

    trainer.add_callback(Stop())
    trainer.train()
    return data


def test_media_of_steps_that_were_done_are_not_read_again(place, tmp_path, monkeypatch) -> None:
    output = tmp_path / "out"
    data = interrupted(place, output, 5)
    read = []
    original = TrainingDataset.__getitems__
    monkeypatch.setattr(
        TrainingDataset,
        "__getitems__",
        lambda self, i: (read.append((i.epoch, i.number)), original(self, i))[1],
    )
    train(recipe(place / "base", place / "data.jsonl", output, **_changes(data)), resume=True)
    per_epoch = json.loads((output / "run.json").read_text())["batches_per_epoch"]
    assert read == [divmod(step, per_epoch) for step in range(5, STEPS)]
    assert sorted(losses(output)) == list(range(1, STEPS + 1))


def test_bad_media_are_counted_on(place: Path, tmp_path: Path) -> None:
    gone = {"id": "gone", "video": "gone.mp4", "conversations": [
        {"from": "human", "value": "<video>\nWhy?"}, {"from": "gpt", "value": "So."}]}  # fmt: skip
    file = tmp_path / "data.jsonl"
    file.write_text((place / "data.jsonl").read_text() + json.dumps(gone) + "\n")

    def run(out: str, resume: bool = False):
        own = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
        return train(recipe(place / "base", file, tmp_path / out, training=own), resume=resume)

    def counted(out: str) -> list[int]:
        return [row["bad_media"] for row in logged(tmp_path / out)]

    run("one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("final", "checkpoint-8"):
        shutil.rmtree(tmp_path / "two" / name)
    run("two", resume=True)
    assert counted("one") == counted("two") and counted("one")[-1] > counted("one")[3] > 0
    states = [
        json.loads((tmp_path / out / "checkpoint-8" / "batches.json").read_text())
        for out in ("one", "two")
    ]
    assert states[0] == states[1] and states[0]["replaced"] == counted("one")[-1]
    assert states[0]["samples"] > 8


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_checkpoint() is None
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-11", ".checkpoint-12.partial-0000"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-11":  # its state is not there: nothing we wrote
            (tmp_path / name / "trainer_state.json").write_text("{}")
    assert folder.last_checkpoint() == tmp_path / "checkpoint-10"


def test_what_a_crash_left_is_removed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")
    left = tmp_path / ".checkpoint-3.partial-0000"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    folder = RunFolder(tmp_path)
    folder.claim(resume=True)
    assert not left.exists()
    folder.release()


def test_two_runs_cannot_write_into_one_folder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "out")
    first.claim(resume=False)
    code = (
        "import sys; from av_llava.training.run_folder import RunFolder\n"
        f"RunFolder({str(tmp_path / 'out')!r}).claim(resume=False)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode == 1
    assert f"Another run writes into {tmp_path / 'out'} (process {os.getpid()})" in other.stderr
    first.release()
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_used_folder_is_refused_unless_resumed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    settings = recipe(place / "base", place / "data.jsonl", tmp_path)
    with pytest.raises(UsageError, match="is not empty"):
        train(settings)
    with pytest.raises(UsageError, match="holds no run"):
        train(settings, resume=True)
    with pytest.raises(UsageError, match="is a file"):
        train(settings.replace(output=str(tmp_path / "notes.txt")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 7}, "was begun with seed = 42, not 7"),
        ({"lora": {"rank": 8}}, "lora.rank = 4, not 8"),
        ({"training": {"max_steps": STEPS + 1}}, "training.max_steps"),
    ],
)
def test_another_recipe_cannot_resume(place, tmp_path, changes, said) -> None:
    output = tmp_path / "out"
    data = interrupted(place, output, 2)
    settings = recipe(place / "base", place / "data.jsonl", output, **_changes(data))
    with pytest.raises(UsageError, match=said):
        train(recipe(place / "base", place / "data.jsonl", output,
                     **{**_changes(data), **{k: {**data[k], **v} if isinstance(v, dict) else v
                                             for k, v in changes.items()}}), resume=True)  # fmt: skip
    assert settings.output == str(output)


def test_other_data_cannot_resume(place: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "out", make_data(tmp_path, 8)
    data = make(place, output)
    data["data"]["train"] = str(file)
    settings = recipe(place / "base", file, output, **_changes(data))
    run = RunFolder(output)
    trainer, _ = trainer_of(settings.replace(training={**settings.training, "max_steps": 2}))
    trainer.train()
    run.write("recipe.yaml", recipes.to_yaml(settings))
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(DataError, match="batches would repeat"):
        train(settings, resume=True)


def test_data_of_the_same_lengths_but_other_words_are_noticed(place, tmp_path) -> None:
    output, file = tmp_path / "out", make_data(tmp_path, 4)
    settings = recipe(
        place / "base", file, output,
        training={"max_steps": 2, "save_strategy": "steps", "save_steps": 1},
    )  # fmt: skip
    train(settings)
    (output / "final").rename(tmp_path / "moved")  # as if it had not come to an end
    file.write_text(file.read_text().replace("Answer 1.", "Answer 7."))
    with pytest.raises(DataError, match="are not those that the run"):
        train(settings, resume=True)


def test_settings_that_no_step_depends_on_may_change(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    data = interrupted(place, output, 8)
    data["training"]["save_steps"] = 3
    data["training"]["logging_steps"] = 2
    data["batch"]["prefetch"] = 1
    train(recipe(place / "base", place / "data.jsonl", output, **_changes(data)), resume=True)
    assert (output / "final").is_dir()


def test_a_checkpoint_of_other_parts_is_refused(place: Path, tmp_path: Path) -> None:
    interrupted(place, tmp_path / "one", 1)
    other = make(place, tmp_path / "two", trainable={"language_model": "last:1"})
    settings = recipe(place / "base", place / "data.jsonl", tmp_path / "two", **_changes(other))
    trainer, _ = trainer_of(settings)
    with pytest.raises(CheckpointError, match="trained other parts"):
        trainer.artefacts.read(tmp_path / "one" / "checkpoint-1")


def test_a_finished_run_is_left_alone(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = recipe(place / "base", place / "data.jsonl", output, training={"max_steps": 1})
    final = train(settings)
    before = (final / "model.safetensors").stat().st_mtime_ns
    assert train(settings, resume=True) == final
    assert (final / "model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_is_not_taken_for_another(place: Path, tmp_path: Path) -> None:
    settings = recipe(place / "base", place / "data.jsonl", tmp_path / "out")
    train(settings)
    longer = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out", training={"max_steps": 9}
    )
    with pytest.raises(UsageError, match=r"was begun with training\.max_steps = 4, not 9"):
        train(longer, resume=True)
    assert train(settings, resume=True) == tmp_path / "out" / "final"


def test_a_run_that_never_saved_begins_anew(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = recipe(place / "base", place / "data.jsonl", output, training={"max_steps": 2})
    run = RunFolder(output)
    run.claim(resume=False)
    run.write("recipe.yaml", recipes.to_yaml(settings))
    run.write("train_log.jsonl", '{"step": 1, "loss": 99.0}\n{"step": 2, "lo')
    run.release()
    train(settings, resume=True)
    assert sorted(losses(output)) == [1, 2] and 99.0 not in losses(output).values()


def test_a_model_that_has_changed_is_noticed(place: Path, tmp_path: Path) -> None:
    """A LoRA on other weights would be another model, and nothing else would say so."""
    base = make_base(tmp_path)
    settings = recipe(
        base, place / "data.jsonl", tmp_path / "out",
        trainable={"language_model": {"train": "lora"}},
        training={"max_steps": 2, "save_strategy": "steps", "save_steps": 1},
    )  # fmt: skip
    train(settings)
    (tmp_path / "out" / "final").rename(tmp_path / "moved")
    train(settings, resume=True)  # the same model: it goes on
    (tmp_path / "out" / "final").rename(tmp_path / "moved-too")
    make_base(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="is no longer the one"):
        train(settings, resume=True)


def test_a_tokenizer_of_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<other{i}>" for i in range(3000)])
    tokenizer.save_pretrained(base)
    file = make_data(tmp_path, 4)
    file.write_text(file.read_text().replace("Answer 1.", "Answer <other2999>."))
    with pytest.raises(AVLlavaError, match="okenizer"):
        train(recipe(base, file, tmp_path / "out"))


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_refused_is_corrected_and_started_again(place, tmp_path, resume) -> None:
    wrong = recipe(tmp_path / "nowhere", place / "data.jsonl", tmp_path / "out")
    with pytest.raises(CheckpointError, match="nowhere"):
        train(wrong)
    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert left == [".lock", "recipe.yaml", "run.json"]
    right = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out", training={"max_steps": 1}
    )
    assert train(right, resume=resume).is_dir()


def test_a_recipe_of_ones_own_is_not_written_over(place: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine: true")
    with pytest.raises(UsageError, match="is not empty"):
        RunFolder(tmp_path).claim(resume=False)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"out cannot be written: Not a directory"):
        RunFolder(tmp_path / "file" / "out").claim(resume=False)


def test_the_log_is_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": n} for n in range(1, 6)]
    text = "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 6, "lo'
    (tmp_path / "train_log.jsonl").write_text(text)
    RunFolder(tmp_path).cut_log(3)
    assert losses(tmp_path) == {1: 1, 2: 2, 3: 3}


class Fails(TrainerCallback):
    """Ends a run in a step, as an unforeseen error does."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_pre_optimizer_step(self, args, state, control, **_) -> None:
        if state.global_step + 1 == self.step:
            raise self.error


def fail_in(monkeypatch, step: int, error: BaseException) -> None:
    made = runs.make_trainer

    def make(*args):
        trainer = made(*args)
        trainer.add_callback(Fails(step, error))
        return trainer

    monkeypatch.setattr(runs, "make_trainer", make)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_failed_in_its_first_step_is_started_again(
    place, tmp_path, monkeypatch, resume
) -> None:
    pytest.importorskip("tensorboard")
    output = tmp_path / "out"
    settings = recipe(
        place / "base", place / "data.jsonl", output,
        training={"max_steps": 2, "report_to": ["tensorboard"]},
    )  # fmt: skip
    with monkeypatch.context() as patch:
        fail_in(patch, 1, RuntimeError("unforeseen"))
        with pytest.raises(RuntimeError, match="unforeseen"):
            train(settings)
    assert (output / "runs").is_dir() and RunFolder(output).record()["status"] == "failed"
    (output / "train_log.jsonl").write_text('{"step": 1, "lo')  # torn
    assert train(settings.replace(seed=7), resume=resume).is_dir()
    assert sorted(losses(output)) == [1, 2] and RunFolder(output).record()["status"] == "finished"


def test_a_run_that_took_a_step_is_not_written_over(place, tmp_path, monkeypatch) -> None:
    output = tmp_path / "out"
    settings = recipe(place / "base", place / "data.jsonl", output, training={"max_steps": 3})
    fail_in(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(settings)
    assert RunFolder(output).record()["status"] == "interrupted"
    with pytest.raises(UsageError, match="is not empty"):
        train(settings)
