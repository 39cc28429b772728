"""Small runs of the trainer for tests: a base checkpoint, a data file of real clips, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from training_data import make_media, some_samples

import av_llava
from av_llava.demo_model import tiny_random
from av_llava.training.arguments import training_arguments
from av_llava.training.prepare import Hooks, Prepared, prepare
from av_llava.training.recipe import merged, settings_from
from av_llava.training.run import make_trainer
from av_llava.training.run_folder import RunFolder
from av_llava.training.settings import TrainSettings
from av_llava.training.trainer import AVTrainer

torch.set_num_threads(1)

CPU = {"use_cpu": True, "report_to": [], "logging_steps": 1, "save_strategy": "no"}


def make_base(folder: Path, seed: int = 0) -> Path:
    """The tiny random model as a checkpoint."""
    return tiny_random(folder / "base", seed)


def make_data(folder: Path, n: int = 10, name: str = "data.jsonl") -> Path:
    """Samples of every modality, in the normal form."""
    rows = [s.to_row() for s in some_samples(make_media(folder / "media"), n)]
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def recipe_data(base: Path, file: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A recipe's data: everything trains, on the CPU."""
    own = {
        "output": str(output),
        "model": {"path": str(base)},
        "data": {"train": str(file), "frames": 4},
        "batch": {"max_tokens": 600, "max_samples": 3, "workers": 0},
        "trainable": {"language_model": {"train": "full", "lr": 1e-3}},
        "training": {**CPU, "max_steps": 4},
    }
    return merged(own, changes)


def recipe(base: Path, file: Path, output: Path, **changes: Any) -> TrainSettings:
    """The same as settings."""
    return settings_from(recipe_data(base, file, output, **changes))


def trainer_of(settings: TrainSettings, hooks: Hooks | None = None) -> tuple[AVTrainer, Prepared]:
    """A trainer that is ready to train."""
    folder = RunFolder(settings.output or "")
    folder.path.mkdir(parents=True, exist_ok=True)
    args = training_arguments(settings, folder.path)
    prepared = prepare(settings, args, folder, hooks or Hooks())
    return make_trainer(prepared, folder, hooks or Hooks()), prepared


def logged(output: Path) -> list[dict[str, Any]]:
    """The rows of a run's log that hold a loss."""
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def losses(output: Path) -> dict[int, float]:
    """Loss by step."""
    return {row["step"]: row["loss"] for row in logged(output)}


def logits_of(folder: Path) -> torch.Tensor:
    """Logits of a checkpoint on a fixed input."""
    from av_llava.checkpoints.compare import fixed_input
    from av_llava.checkpoints.compare import logits_of as compute

    model = av_llava.load(folder, device="cpu", dtype="float32").model
    return compute(model, fixed_input(model))
