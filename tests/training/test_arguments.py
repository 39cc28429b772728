"""The training section as TrainingArguments: where it runs, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from av_llava.errors import UsageError
from av_llava.training.arguments import training_arguments
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
    with pytest.raises(UsageError, match="set by av_llava"):
        arguments(tmp_path, remove_unused_columns=True)
    with pytest.raises(UsageError, match="refuses the section training"):
        arguments(tmp_path, eval_strategy="sometimes")
