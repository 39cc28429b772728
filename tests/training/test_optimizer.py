"""Each part has its own learning rate and weight decay."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny
from transformers import get_scheduler

from av_llava.errors import UsageError
from av_llava.training.arguments import training_arguments
from av_llava.training.optimizer import build_optimizer, parameter_groups
from av_llava.training.parts import apply_trainable
from av_llava.training.recipe import settings_from
from av_llava.training.settings import PartSettings, TrainableSettings


def test_every_trained_parameter_is_in_one_group_with_its_rate() -> None:
    model, _ = tiny("llama")
    trainable = TrainableSettings(
        mm_projector=PartSettings("full", lr=0.5, weight_decay=0.25),
        language_model=PartSettings("full"),
    )
    table = apply_trainable(model, trainable, learning_rate=0.125, weight_decay=0.01)
    groups = parameter_groups(model, table)
    members = [id(p) for g in groups for p in g["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {id(p) for p in model.parameters() if p.requires_grad}
    by_name = {g["name"]: g for g in groups}
    assert by_name["mm_projector"]["lr"] == 0.5
    assert by_name["mm_projector"]["weight_decay"] == 0.25
    assert by_name["language_model"]["lr"] == 0.125
    assert by_name["language_model"]["weight_decay"] == 0.01
    for group in groups:
        flat = [p for p in group["params"] if p.ndim < 2]
        assert not flat or group["weight_decay"] == 0.0


def test_token_rows_never_decay() -> None:
    model, _ = tiny("llama")
    table = apply_trainable(model, TrainableSettings(), weight_decay=0.5)
    rows = [g for g in parameter_groups(model, table) if "audio_token_rows" in g["name"]]
    assert [g["weight_decay"] for g in rows] == [0.0]
    assert rows[0]["params"][0].ndim == 2


def test_the_last_rate_of_a_schedule_is_that_of_the_fastest_part(tmp_path: Path) -> None:
    model, _ = tiny("llama")
    trainable = TrainableSettings(
        mm_projector=PartSettings("full", lr=1e-3), language_model=PartSettings("full", lr=2e-4)
    )
    table = apply_trainable(model, trainable)
    settings = settings_from(
        {
            "training": {
                "use_cpu": True,
                "report_to": [],
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-4},
            }
        }
    )
    args = training_arguments(settings, tmp_path)
    optimizer = build_optimizer(model, table, args)
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, 0, 10, scheduler_specific_kwargs=args.lr_scheduler_kwargs
    )
    for _ in range(10):
        optimizer.step()
        schedule.step()
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert rates["mm_projector"] == pytest.approx(1e-4)
    assert rates["language_model"] == pytest.approx(2e-5)


@pytest.mark.parametrize(("optim", "name"), [("adamw_torch", "AdamW"), ("adafactor", "Adafactor")])
def test_the_optimiser_is_that_of_the_arguments(tmp_path: Path, optim: str, name: str) -> None:
    model, _ = tiny("llama")
    table = apply_trainable(model, TrainableSettings())
    settings = settings_from(
        {"training": {"use_cpu": True, "report_to": [], "optim": optim, "adam_beta2": 0.9}}
    )
    optimizer = build_optimizer(model, table, training_arguments(settings, tmp_path))
    assert type(optimizer).__name__ == name
    assert {g["lr"] for g in optimizer.param_groups} == {1e-3}
    if name == "AdamW":
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"optim": "grokadamw"},
            r"training\.optim=grokadamw cannot be made: .*pip install grokadamw",
        ),
        ({"optim": "galore_adamw"}, r"training\.optim=galore_adamw cannot be made: .*galore_torch"),
        ({"optim_args": "junk"}, r"with training\.optim_args='junk' cannot be made"),
    ],
)
def test_an_optimiser_that_cannot_be_made_is_named(tmp_path: Path, given, said) -> None:
    model, _ = tiny("llama")
    table = apply_trainable(model, TrainableSettings())
    settings = settings_from({"training": {"use_cpu": True, "report_to": [], **given}})
    with pytest.raises(UsageError, match=said):
        build_optimizer(model, table, training_arguments(settings, tmp_path))
