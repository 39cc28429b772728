"""Settings say what trains at which rate, and what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from transformers import TrainingArguments

from av_llava.errors import UsageError
from av_llava.training.arguments import DEFAULTS
from av_llava.training.recipe import settings_from
from av_llava.training.reserved import FIXED, OURS, UNSUPPORTED
from av_llava.training.settings import (
    LORA_LR,
    PARTS,
    PartSettings,
    TrainableSettings,
    TrainSettings,
)


def test_importing_settings_and_recipes_costs_no_torch() -> None:
    code = "import sys, av_llava.training.recipe as r; r.settings_from({}); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("part", "default", "rate"),
    [
        (PartSettings("full", 5e-4), 1e-6, 5e-4),
        (PartSettings("full"), 1e-6, 1e-6),
        (PartSettings("full"), None, 1e-5),
        (PartSettings("lora"), None, LORA_LR),
        (PartSettings("lora", 3e-4), None, 3e-4),
    ],
)
def test_learning_rates(part: PartSettings, default: float | None, rate: float) -> None:
    assert TrainableSettings(language_model=part).learning_rate("language_model", default) == rate


def test_every_part_is_a_field_with_a_rate() -> None:
    assert [f.name for f in dataclasses.fields(TrainableSettings)] == list(PARTS)
    for name in PARTS:
        assert TrainableSettings().learning_rate(name, None) > 0


@pytest.mark.parametrize(
    ("mode", "save", "whole"),
    [
        ("full", "auto", True),
        ("lora", "auto", False),
        ("last:1", "auto", False),
        ("freeze", "full", True),
        ("full", "adapter", False),
    ],
)
def test_what_is_saved(mode: str, save: str, whole: bool) -> None:
    settings = settings_from({"trainable": {"language_model": mode}, "save": save})
    assert settings.saves_whole is whole


def test_a_lora_cannot_be_saved_as_a_whole() -> None:
    with pytest.raises(UsageError, match="merge-lora"):
        settings_from({"trainable": {"language_model": "lora"}, "save": "full"})


def test_names_of_training_arguments_exist_in_this_version() -> None:
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert {*DEFAULTS, *FIXED, *UNSUPPORTED} <= known
    # Those that newer or older versions call differently are guarded, too.
    assert set(OURS) - known <= {"activation_checkpointing"}


def test_defaults_are_a_recipe() -> None:
    assert settings_from({}) == TrainSettings()


def test_the_seed_is_within_numpys_range() -> None:
    assert settings_from({"seed": 2**32 - 1}).seed == 4294967295
    with pytest.raises(UsageError, match=r"seed must be between 0 and 4294967295, not 9{20}"):
        settings_from({"seed": 99999999999999999999})
