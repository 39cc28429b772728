"""The section ``lora`` of a recipe beside a LoRA that is there already."""

from __future__ import annotations

import pytest
from tiny import tiny

from av_llava.errors import UsageError
from av_llava.training.parts import apply_trainable
from av_llava.training.settings import LoraSettings, PartSettings, TrainableSettings

SPEC = TrainableSettings(
    language_model=PartSettings("lora"), audio_token_rows=PartSettings("freeze")
)


@pytest.fixture(scope="module")
def carrying():
    """A model with a LoRA."""
    model, _ = tiny("llama")
    apply_trainable(model, SPEC, LoraSettings(rank=4, targets=("q_proj", "v_proj")))
    return model


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 8}, r"lora\.rank = 8 .* \(4\).* leave lora out .* or set model\.merge=true"),
        ({"rank": 4, "alpha": 3.0}, r"lora\.alpha = 3\.0 .* \(8\)"),
        ({"dropout": 0.1}, r"lora\.dropout = 0\.1 .* \(0\.0\)"),
        ({"targets": ("k_proj", "q_proj")}, r"lora\.targets = k_proj, q_proj .* \(q_proj, v_proj"),
        ({"use_rslora": True}, r"lora\.use_rslora = True"),
        ({"use_dora": True}, r"lora\.use_dora = True"),
    ],
)
def test_other_settings_than_those_it_has_are_refused(carrying, changes, said) -> None:
    with pytest.raises(UsageError, match=said):
        apply_trainable(carrying, SPEC, LoraSettings(**changes))


@pytest.mark.parametrize(
    "changes", [{}, {"rank": 4, "alpha": 8.0}, {"targets": ("v_proj", "q_proj")}]
)
def test_no_settings_or_the_same_train_it_further(carrying, changes) -> None:
    table = apply_trainable(carrying, SPEC, LoraSettings(**changes))
    assert table.of("language_model").n_trained


def test_a_dropout_that_drops_all_is_refused() -> None:
    with pytest.raises(UsageError, match=r"lora\.dropout must be below 1, not 1\.0"):
        LoraSettings(dropout=1.0)
