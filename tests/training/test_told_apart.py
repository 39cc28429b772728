"""Losses by modality and gradient norms by part, each against a slow, simple oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny
from torch.nn import functional
from train_runs import logged, recipe, trainer_of
from training_data import dataset_of, make_media, some_samples
from transformers import TrainerCallback

from av_llava.training import told_apart
from av_llava.training.index import modality_name
from av_llava.training.loss import where_learned
from av_llava.training.parts import part_of
from av_llava.training.run import train
from av_llava.training.told_apart import KindLosses, part_norms

CPU = torch.device("cpu")


def oracle(model, data, rows) -> dict[str, float]:
    """Every sample alone."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        batch = data.__getitems__([row])
        name = f"loss/{modality_name(int(data.index.modality[row]))}"
        batch.pop("info")
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        each = functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] += each.sum().item()
        total[1] += (labels != -100).sum().item()
    return {name: loss / n for name, (loss, n) in sums.items()}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("less", [False, True])
def test_losses_by_modality_are_those_of_samples_alone(tmp_path, monkeypatch, packing, less):
    monkeypatch.setattr(told_apart, "_ELEMENTS", 20_000)  # several pieces
    model, processor = tiny("llama")
    samples = some_samples(make_media(tmp_path / "media"), 8)
    plain = dataset_of(samples, processor)
    data = dataset_of(samples, processor, packing=packing)
    found = KindLosses()
    for rows in (range(5), range(5, 8)):
        batch = data.__getitems__(rows)
        info = batch.pop("info")
        given = where_learned(batch) if less else batch
        assert ("logits_to_keep" in given) == less
        with torch.no_grad():
            logits = model(**given, use_cache=False).logits
        found.add(logits, given["labels"], info, given.get("logits_to_keep"))
    wanted = oracle(model, plain, range(8))
    assert len(wanted) >= 4 and "loss/video+audio" in wanted and "loss/text" in wanted
    assert found.take(CPU) == pytest.approx(wanted, rel=1e-4)
    assert found.take(CPU) == {}


def test_losses_of_several_ranks_are_one_mean():
    """One that saw nothing of a kind has nothing to say about it."""
    found = KindLosses()
    found._sums = torch.zeros(16, 2)
    found._sums[2] = torch.tensor([6.0, 3.0])
    other = torch.zeros(16, 2)
    other[2], other[4] = torch.tensor([2.0, 1.0]), torch.tensor([5.0, 1.0])
    taken = found.take(CPU, lambda own: torch.cat([own, other]))
    assert taken == {"loss/video": 2.0, "loss/audio": 5.0}
    assert KindLosses().take(CPU, lambda own: torch.cat([own, other])) == {
        "loss/video": 2.0,
        "loss/audio": 5.0,
    }


@pytest.mark.parametrize("max_norm", [0.0, 0.05, 100.0])
def test_norms_of_parts_are_those_before_clipping(tmp_path, max_norm):
    model, processor = tiny("llama")
    data = dataset_of(some_samples(make_media(tmp_path), 5), processor)
    batch = data.__getitems__(range(5))
    batch.pop("info")
    model.train()
    model(**batch, use_cache=False).loss.backward()
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = part_of(name)
            squares[part] = squares.get(part, 0.0) + parameter.grad.double().square().sum().item()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    found = {k: v.item() for k, v in part_norms(model, total, max_norm).items()}
    assert found == pytest.approx({k: v**0.5 for k, v in squares.items()}, rel=1e-4)
    assert {"language_model", "mm_projector", "vision_tower"} <= found.keys()


def test_a_run_logs_both(place: Path, tmp_path: Path) -> None:
    settings = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out",
        training={"max_steps": 4, "logging_steps": 2},
    )  # fmt: skip
    trainer, _ = trainer_of(settings)
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            rates.append(trainer.optimizer.param_groups[0]["lr"])

    trainer.add_callback(Rates())
    trainer.train()
    rows = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["step"] for r in rows] == [1, 2, 4]
    for row in rows:
        norms = [v for k, v in row.items() if k.startswith("grad_norm/")]
        assert sum(n**2 for n in norms) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-4)
        kinds = [v for k, v in row.items() if k.startswith("loss/")]
        assert kinds and min(kinds) <= row["loss"] * 1.0001
    name = trainer.optimizer.param_groups[0]["name"].removesuffix(" (no decay)")
    # The rate that the step was taken with, not the next one's.
    assert [r[f"lr/{name}"] for r in rows] == [rates[0], rates[1], rates[3]]


def test_modality_dropout_is_told(place: Path, tmp_path: Path) -> None:
    settings = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out",
        data={"modality_dropout": {"sound": 1.0}}, training={"max_steps": 3},
        trainable={"mm_audio_projector": "freeze"},
    )  # fmt: skip
    train(settings)
    kinds = {k for row in logged(tmp_path / "out") for k in row if k.startswith("loss/")}
    assert "loss/video" in kinds and "loss/video+audio" not in kinds


def test_the_log_of_an_epoch_tells_of_its_last_step(place: Path, tmp_path: Path) -> None:
    settings = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out",
        training={"max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch"},
    )  # fmt: skip
    trainer, _ = trainer_of(settings)
    told = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            told.append(dict(trainer._of_step))

    trainer.add_callback(Norms())
    trainer.train()
    rows = [r for r in trainer.state.log_history if "loss" in r]
    steps = trainer.state.max_steps
    assert [r["step"] for r in rows][-2:] == [steps // 2, steps] and len(told) == steps
    for row in rows[-2:]:
        of_step = {k: float(v) for k, v in told[row["step"] - 1].items()}
        assert any(k.startswith("grad_norm/") for k in of_step)
        assert {k: row[k] for k in of_step} == pytest.approx(of_step)
