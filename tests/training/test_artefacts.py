"""Checkpoints load alone, hold what was trained, and are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from train_runs import logits_of, make_base, make_data, recipe, recipe_data, trainer_of
from transformers import TrainerCallback

import av_llava
from av_llava.checkpoints.compare import fixed_input
from av_llava.checkpoints.compare import logits_of as computed
from av_llava.errors import CheckpointError
from av_llava.training.artefacts import trained
from av_llava.training.run import train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder)
    make_data(folder, 5)
    return folder


def settings_of(place: Path, output: Path, **changes):
    own = {"training": {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}}
    return recipe(place / "base", place / "data.jsonl", output, **{**own, **changes})


PARTS = {
    "full": {"trainable": {"language_model": "full", "vision_tower": "full"}},
    "lora": {"trainable": {"language_model": "lora"}, "lora": {"rank": 4}},
    "dora": {"trainable": {"language_model": "lora"}, "lora": {"rank": 4, "use_dora": True}},
    "projectors": {"trainable": {"language_model": "freeze"}},
    "last": {"trainable": {"language_model": "last:1"}},
    "tower": {"trainable": {"language_model": "lora", "audio_tower": "full"}, "lora": {"rank": 4}},
    "whole": {"trainable": {"language_model": "freeze"}, "save": "full"},
}


@pytest.mark.parametrize("changes", PARTS.values(), ids=list(PARTS))
def test_what_was_trained_is_what_loads(place: Path, tmp_path: Path, changes: dict) -> None:
    settings = settings_of(place, tmp_path / "out", **changes)
    trainer, prepared = trainer_of(settings)
    trainer.train()
    model = prepared.model.model.eval()
    mine = computed(model, fixed_input(model))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert torch.equal(logits_of(checkpoint), mine)
    assert not torch.equal(mine, logits_of(place / "base"))
    # A checkpoint of every step is complete, not only the last one.
    assert not torch.equal(logits_of(tmp_path / "out" / "checkpoint-1"), mine)


@pytest.mark.parametrize("changes", PARTS.values(), ids=list(PARTS))
def test_resuming_changes_no_bit(place: Path, tmp_path: Path, changes: dict) -> None:
    trainer, _ = trainer_of(settings_of(place, tmp_path / "out", **changes))
    trainer.train()
    fresh, _ = trainer_of(settings_of(place, tmp_path / "other", **changes))
    before = {n: p.detach().clone() for n, p in trained(fresh.model)}
    fresh.artefacts.read(tmp_path / "out" / "checkpoint-2")
    wanted = dict(trained(trainer.model))
    for name, parameter in trained(fresh.model):
        assert torch.equal(parameter, wanted[name]), name
    assert any(not torch.equal(p, before[n]) for n, p in trained(fresh.model))


def test_adapters_hold_nothing_of_the_base(place: Path, tmp_path: Path) -> None:
    final = train(settings_of(place, tmp_path / "out", **PARTS["projectors"]))
    held = set(load_file(final / "multimodal.safetensors"))
    assert held and all("projector" in k or "image_newline" in k for k in held)
    rows = load_file(final / "token_rows.safetensors")
    assert set(rows) == {"input.<au_start>", "input.<au_end>"}


def test_results_in_bfloat16_say_so(place: Path, tmp_path: Path) -> None:
    settings = settings_of(place, tmp_path / "out", save_dtype="bfloat16")
    final = train(settings)
    assert {t.dtype for t in load_file(final / "model.safetensors").values()} == {torch.bfloat16}
    assert av_llava.load(final, device="cpu").dtype is torch.bfloat16
    checkpoint = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    assert {t.dtype for t in checkpoint.values()} == {torch.float32}


def test_the_cache_is_on_in_what_is_saved(place: Path, tmp_path: Path) -> None:
    final = train(settings_of(place, tmp_path / "out"))
    config = json.loads((final / "config.json").read_text())
    assert config.get("use_cache", True) and config["text_config"].get("use_cache", True)


def test_old_checkpoints_go_when_a_limit_is_set(place: Path, tmp_path: Path) -> None:
    limit = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    train(settings_of(place, tmp_path / "out", training=limit))
    kept = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]


# ---------------------------------------------------------------- when writing fails


def test_a_failed_write_leaves_the_checkpoints_before_it(place, tmp_path, monkeypatch) -> None:
    trainer, _ = trainer_of(settings_of(place, tmp_path / "out"))
    real = trainer.artefacts.write

    def write(folder: Path, state=None) -> None:
        real(folder, state)
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer.artefacts, "write", write)
    with pytest.raises(CheckpointError, match=r"(?s)No space left on device.*go on with --resume"):
        trainer.train()
    assert [p.name for p in (tmp_path / "out").glob("*checkpoint-*")] == ["checkpoint-1"]
    assert torch.isfinite(logits_of(tmp_path / "out" / "checkpoint-1")).all()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs limits of POSIX")
def test_a_full_disk_is_an_error_that_says_so(place: Path, tmp_path: Path) -> None:
    """The system refuses files above a size, as a full disk does."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "from av_llava.cli.main import run\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    data = recipe_data(place / "base", place / "data.jsonl", tmp_path / "out",
                       training={"max_steps": 2, "save_strategy": "steps", "save_steps": 1})  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(tmp_path / "r.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "checkpoint-1 could not be written" in done.stderr
    assert not list((tmp_path / "out").glob("*checkpoint-*"))


def test_ctrl_c_leaves_the_last_checkpoint(place: Path, tmp_path: Path) -> None:
    trainer, _ = trainer_of(settings_of(place, tmp_path / "out"))

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1:
                raise KeyboardInterrupt

    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [p.name for p in (tmp_path / "out").glob("*checkpoint-*")] == ["checkpoint-1"]
