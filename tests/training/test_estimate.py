"""Memory is counted where it can be, and a run that does not fit says what would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny
from train_runs import CPU, make_base, make_data, recipe_data

from av_llava.errors import is_out_of_memory
from av_llava.training.arguments import training_arguments
from av_llava.training.checking import check_run
from av_llava.training.estimate import advice, estimate
from av_llava.training.parts import apply_trainable
from av_llava.training.prepare import Hooks
from av_llava.training.recipe import settings_from


def estimated(tmp_path: Path, tokens: int | None = None, **changes):
    training = {**CPU, **changes.pop("training", {})}
    settings = settings_from({**changes, "training": training})
    model, _ = tiny("llama")
    table = apply_trainable(model, settings.trainable, settings.lora)
    args = training_arguments(settings, tmp_path)
    return estimate(model, table, settings, args, tokens=tokens), model, table


def test_weights_gradients_and_optimiser_are_counted(tmp_path: Path) -> None:
    found, model, table = estimated(tmp_path)
    assert found.weights == sum(p.numel() * 4 for p in model.parameters())
    assert found.gradients == 4 * table.n_trained
    assert found.optimizer == 8 * table.n_trained
    state = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for parameter in state.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    state.step()
    held = sum(v.nbytes for s in state.state.values() for k, v in s.items() if k != "step")
    assert held == found.optimizer


def test_what_makes_it_smaller(tmp_path: Path) -> None:
    plain, *_ = estimated(tmp_path, 4000)
    half, *_ = estimated(tmp_path, 2000)
    again, *_ = estimated(tmp_path, 4000, gradient_checkpointing=True)
    low, *_ = estimated(tmp_path, 4000, training={"bf16": True})
    sgd, *_ = estimated(tmp_path, 4000, training={"optim": "sgd"})
    assert half.activations < plain.activations and half.weights == plain.weights
    assert again.activations < plain.activations
    assert low.activations < plain.activations and low.logits < plain.logits
    assert sgd.optimizer == 0
    assert plain.together > sum((plain.weights, plain.gradients, plain.optimizer))
    assert len(plain.lines()) == 6


def test_activations_are_of_the_right_size(tmp_path: Path) -> None:
    """Against what autograd really keeps for one forward pass of the language model."""
    tokens = 512
    found, model, _ = estimated(
        tmp_path, tokens, trainable={"language_model": "full"}, batch={"max_tokens": tokens}
    )
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    embeds = torch.randn(1, tokens, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.train().model.language_model(inputs_embeds=embeds, use_cache=False)
    measured = sum(n for place, n in kept.items() if place not in own)
    vision = estimated(tmp_path, 1, trainable={"language_model": "full"})[0].activations
    assert 0.5 < (found.activations - vision) / measured < 2


# ---------------------------------------------------------------- when it does not fit


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


@pytest.mark.parametrize(
    ("changes", "padded", "longest", "wanted", "unwanted"),
    [
        ({}, 8000, 1000, ["batch.max_tokens=4000", "gradient_checkpointing=true"], ["lora"]),
        ({}, 8000, 6000, ["batch.max_tokens=6000"], ["4000"]),
        ({}, 6000, 8192, ["gradient_checkpointing=true"], ["batch.max_tokens"]),
        ({"gradient_checkpointing": True}, 8000, 9, [], ["gradient_checkpointing"]),
        ({"trainable": {"language_model": "full"}}, 100, 9, ["language_model=lora"], ["4bit"]),
        ({"data": {"frames": 64}}, 100, 9, ["data.frames=32"], []),
        ({}, None, 9, ["model.quantize=4bit"], ["batch"]),
    ],
)
def test_the_advice_names_settings_that_would_fit(changes, padded, longest, wanted, unwanted):
    said = advice(MemoryError("no"), settings_from(changes), padded, longest)
    assert all(w in said for w in wanted) and not any(u in said for u in unwanted), said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder)
    make_data(folder, 5)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory that is heeded")
def test_a_run_that_does_not_fit_says_so(place: Path, tmp_path: Path) -> None:
    """A real allocation that the system refuses, in the first step."""
    code = (
        "import resource, sys\n"
        "from transformers import TrainerCallback\n"
        "from av_llava.training import callbacks\n"
        "from av_llava.cli.main import run\n"
        "class Limit(callbacks.Progress):\n"
        "    def on_step_begin(self, args, state, control, model=None, **_):\n"
        "        import torch\n"
        "        def ask(*_): torch.empty(2**46, dtype=torch.uint8)\n"
        "        model.lm_head.register_forward_pre_hook(ask)\n"
        "import av_llava.training.run as own\n"
        "own.Progress = Limit\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    data = recipe_data(place / "base", place / "data.jsonl", tmp_path / "out")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(tmp_path / "r.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "does not fit into memory in a batch of" in done.stderr
    assert "gradient_checkpointing=true" in done.stderr


def test_checking_runs_one_step_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    data = recipe_data(
        place / "base", place / "data.jsonl", tmp_path / "out",
        training={"gradient_accumulation_steps": 2},
    )  # fmt: skip
    said: list[str] = []
    figures = check_run(settings_from(data), Hooks(say=said.append))
    assert figures["samples"] == 5 and figures["unusable"] == 0
    assert figures["largest_batch_tokens"] <= 600
    assert figures["estimated_bytes"] > figures["estimate"]["weights"] > 0
    assert figures["measured_bytes"] > 0 and figures["step_seconds"] > 0
    assert not (tmp_path / "out").exists()
    text = "\n".join(said)
    assert "optimiser" in text and "One step on the largest batch took" in text and "⟦" in text
