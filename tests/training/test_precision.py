"""The model that a run starts from: what trains is as precise as its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_runs import recipe

import av_llava
from av_llava.training.arguments import training_arguments
from av_llava.training.parts import plain_name
from av_llava.training.prepare import load_model, settle
from av_llava.training.run import train

LORA = {"language_model": {"train": "lora", "lr": 0.0}}
STILL = {"learning_rate": 0.0, "bf16": True, "max_steps": 1}


def started(settings) -> torch.nn.Module:
    """The model of a run, settled."""
    model = load_model(settings, training_arguments(settings, Path(settings.output)))
    settle(settings, model)
    return model.model


def named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters without what PEFT adds to their names."""
    found = {}
    for name, parameter in model.named_parameters():
        name = plain_name(name).replace(".token_adapter.base_layer.", ".")
        found[name.replace(".base_layer.", ".")] = parameter
    return found


@pytest.mark.parametrize(
    ("trainable", "dtype"),
    [
        (LORA, "auto"),
        ({**LORA, "vision_tower": "full", "audio_tower": "full"}, "auto"),
        ({"language_model": "freeze"}, "auto"),
        ({"language_model": "full"}, "bfloat16"),
    ],
)
def test_what_trains_is_not_rounded_and_the_rest_is_small(place, tmp_path, trainable, dtype):
    settings = recipe(
        place / "base", place / "data.jsonl", tmp_path / "out",
        trainable=trainable, training=STILL, model={"dtype": dtype},
    )  # fmt: skip
    own = dict(av_llava.load(place / "base", "cpu", "float32").model.named_parameters())
    model = started(settings)
    table = own["model.language_model.embed_tokens.weight"]
    rounded = 0
    for name, parameter in named(model).items():
        if ".lora_" in name:
            assert parameter.dtype is torch.float32
        elif ".trainable_tokens_" in name:
            assert torch.equal(parameter, table[list(model.config.au_token_ids)])
        elif parameter.requires_grad:
            assert parameter.dtype is torch.float32 and torch.equal(parameter, own[name]), name
        else:
            assert torch.equal(parameter, own[name].to(parameter.dtype)), name
            assert parameter.dtype is torch.bfloat16 or "_tower." in name, name
            rounded += parameter.dtype is torch.bfloat16
    assert rounded


def test_an_adapter_goes_on_from_what_it_holds(place: Path, tmp_path: Path) -> None:
    """Through an adapter folder, and without a step that changes anything."""
    data = {"trainable": {"language_model": "freeze"}, "training": {**STILL, "max_steps": 2}}
    rates = {**data, "training": {**data["training"], "learning_rate": 1e-3}}
    first = train(recipe(place / "base", place / "data.jsonl", tmp_path / "one", **rates))
    again = {**data, "model": {"path": str(first)}}
    second = train(recipe(place / "base", place / "data.jsonl", tmp_path / "two", **again))
    before, after = (
        named(av_llava.load(folder, "cpu", "float32").model) for folder in (first, second)
    )
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert not changed
