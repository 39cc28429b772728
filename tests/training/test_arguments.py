"""The training section as TrainingArguments: where it runs, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from train_runs import recipe

from av_llava.errors import UsageError
from av_llava.training import arguments as ours
from av_llava.training.arguments import training_arguments
from av_llava.training.reserved import FIXED, UNSUPPORTED
from av_llava.training.run import train
from av_llava.training.settings import TrainSettings


def arguments(tmp_path, **training):
    settings = TrainSettings(training={"report_to": [], **training})
    return training_arguments(settings, tmp_path)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine without an accelerator")
def test_a_recipe_for_a_gpu_runs_on_a_processor_alone(tmp_path):
    args = arguments(tmp_path, bf16=True)
    assert args.bf16 and args.device.type == "cpu"


def test_names_are_checked_and_what_is_fixed_cannot_be_set(tmp_path):
    with pytest.raises(UsageError, match=r"Did you mean 'training\.learning_rate'"):
        arguments(tmp_path, learning_rat=1e-3)
    for name in FIXED:
        with pytest.raises(UsageError, match=f"training.{name} is always"):
            arguments(tmp_path, **{name: True})
    for name in UNSUPPORTED:
        with pytest.raises(UsageError, match=f"training.{name} cannot be set: .* Leave it out"):
            arguments(tmp_path, **{name: 1})
    with pytest.raises(UsageError, match=r"fsdp_config\.version = 1 .* which takes FSDP2"):
        arguments(tmp_path, fsdp="full_shard", fsdp_config={"version": 1}, use_cpu=True)
    with pytest.raises(UsageError, match=r"training\.fsdp .* start it with torchrun"):
        arguments(tmp_path, fsdp=True, use_cpu=True)
    with pytest.raises(UsageError, match="refuses the section training"):
        arguments(tmp_path, eval_strategy="sometimes")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rate": "fast"}, "training.learning_rate must be a number, not 'fast'"),
        ({"learning_rate": -1}, "training.learning_rate must be at least 0, not -1"),
        ({"learning_rate": float("nan")}, "training.learning_rate must be a number, not nan"),
        ({"num_train_epochs": "x"}, "training.num_train_epochs must be a number"),
        ({"num_train_epochs": 0}, "training.num_train_epochs must be more than 0"),
        ({"bf16": "sure"}, "training.bf16 must be true or false, not 'sure'"),
        ({"max_steps": -5}, "training.max_steps must be a whole number of at least 1, not -5"),
        ({"max_steps": 2.5}, "training.max_steps must be a whole number, not 2.5"),
        ({"save_steps": "soon"}, "training.save_steps must be a number"),
        ({"logging_steps": 0}, "training.logging_steps must be more than 0"),
        ({"save_total_limit": 0}, "training.save_total_limit must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"report_to": "nothere"}, "Unknown service of training.report_to 'nothere'"),
        ({"report_to": ["wanb"]}, "Did you mean 'wandb'"),
    ],
)
def test_values_of_another_type_or_out_of_range(tmp_path, given, said):
    with pytest.raises(UsageError, match=said):
        arguments(tmp_path, **given)


def test_a_service_whose_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "get_available_reporting_integrations", list)
    with pytest.raises(UsageError, match="needs the package of wandb"):
        arguments(tmp_path, report_to=["wandb"])


def test_what_fits_is_taken_as_it_is(tmp_path):
    args = arguments(tmp_path, learning_rate=1, max_steps=-1, save_total_limit=None, tf32=None)
    assert (args.learning_rate, args.max_steps, args.save_total_limit) == (1.0, -1, None)


@pytest.mark.parametrize("name", ["push_to_hub", "hub_model_id", "hub_token"])
def test_nothing_is_uploaded_in_training(name):
    with pytest.raises(UsageError, match=f"training.{name} cannot .* upload the folder final"):
        TrainSettings(training={name: True})


@pytest.mark.parametrize("name", ["do_train", "do_eval", "do_predict"])
def test_what_a_run_does_is_not_switched_there(name):
    with pytest.raises(UsageError, match=f"training.{name} cannot be set"):
        TrainSettings(training={name: True})


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(UsageError, match=r"training\.fp16 needs a GPU.* training\.bf16=true"):
        arguments(tmp_path, fp16=True, use_cpu=True)
    if not torch.accelerator.is_available():
        with pytest.raises(UsageError, match=r"training\.fp16 needs a GPU"):
            arguments(tmp_path, fp16=True)


def test_what_the_trainer_refuses_is_a_sentence(place, tmp_path) -> None:
    best = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out", training={"save_strategy": "best"}
    )
    with pytest.raises(UsageError, match="Trainer refuses the section training: .*metric_for_best"):
        train(best)


def test_held_out_data_that_nothing_asks_for_are_mentioned(place, tmp_path, caplog) -> None:
    settings = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out",
        data={"eval": str(place / "data.jsonl")}, training={"max_steps": 1},
    )  # fmt: skip
    train(settings)
    said = [r.getMessage() for r in caplog.records if "data.eval" in r.getMessage()]
    assert len(said) == 1 and "set training.eval_strategy" in said[0]
