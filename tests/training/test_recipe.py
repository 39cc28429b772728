"""Recipes are read strictly, and overrides and stages lie over them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import UsageError
from av_llava.training.recipe import (
    merged,
    override,
    parse_value,
    read_recipe,
    settings_from,
    stage_settings,
    to_data,
    to_yaml,
)
from av_llava.training.settings import PARTS, PartSettings, TrainSettings
from av_llava.training.stages import runs_of

RECIPE = """
output: runs/x
model: {path: checkpoint}
data: {train: a.jsonl, audio: off}
batch: {max_tokens: 1e3}
trainable:
  vision_tower: full
  mm_projector: {train: full, lr: 1e-3}
  language_model: last:2
training: {learning_rate: 1e-5, bf16: true}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_yaml_is_read_as_people_mean_it(file: Path) -> None:
    settings = read_recipe(file)
    assert settings.data.audio == "off"  # not False
    assert settings.training["learning_rate"] == 1e-5  # not a string
    assert settings.training["bf16"] is True
    assert settings.batch.max_tokens == 1000
    assert settings.trainable.mm_projector == PartSettings("full", 1e-3)
    assert settings.trainable.vision_tower == PartSettings("full")
    assert settings.trainable.language_model.last_layers == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("-2E5", -2e5), (".5", 0.5), ("3", 3), ("on", "on"), ("no", "no"),
     ("true", True), ("null", None), ("[a, 1]", ["a", 1]), ("1.5", 1.5), ("e3", "e3"),
     ("2024-a", "2024-a"), (".inf", float("inf"))],
)  # fmt: skip
def test_values(text: str, value: object) -> None:
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_overrides_lie_over_the_file(file: Path) -> None:
    settings = read_recipe(
        file, ["trainable.vision_tower.lr=3e-6", "batch.max_tokens=64", "lora.rank=4", "seed=7"]
    )
    assert settings.trainable.vision_tower == PartSettings("full", 3e-6)
    assert (settings.batch.max_tokens, settings.lora.rank, settings.seed) == (64, 4, 7)
    assert settings.trainable.mm_projector.lr == 1e-3


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainable.visin_tower=full", "Did you mean 'trainable.vision_tower'"),
        ("lora.rnk=2", "Did you mean 'lora.rank'"),
        ("bach.max_tokens=2", "Did you mean 'batch'"),
        ("batch.workers=many", "batch.workers must be a whole number"),
        ("batch.max_tokens=1.5", "batch.max_tokens must be a whole number"),
        ("batch.shuffle=1", "batch.shuffle must be true or false"),
        ("trainable.mm_projector.lr=fast", "must be a number"),
        ("lora.targets=q_proj", "must be a list"),
        ("trainable.language_model=last:0", "last:N"),
        ("trainable.vision_tower=lora", "Unknown way of training vision_tower"),
        ("data.audio=loud", "data.audio"),
        ("seed=-1", "seed must be"),
        ("output.folder=x", None),
        ("nothing", "section.key=value"),
        ("batch.=2", "section.key=value"),
        ("training.seed=2", "training.seed is set by seed"),
        ("training.per_device_train_batch_size=2", "batch.max_tokens"),
        ("model.quantize=4bit", "trainable.language_model=lora"),
        ("model.quantize=3bit", "model.quantize"),
        ("data.modality_dropout={sound: 0.7, frames: 0.6}", "more than all"),
        ("data.bad_media.policy=ignore", "bad_media.policy"),
        ("model=[1]", "must hold keys and values"),
    ],
)
def test_wrong_keys_and_values_are_named(file: Path, word: str, said: str | None) -> None:
    with pytest.raises(UsageError) as error:
        read_recipe(file, [word])
    if said is not None:
        assert said in str(error.value)


def test_the_error_names_the_file(file: Path) -> None:
    with pytest.raises(UsageError, match=str(file)):
        read_recipe(file, ["lora.rnk=2"])


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "\tx: 1"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="r.yaml"):
        read_recipe(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none.yaml cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing would be trained"):
        settings_from({"trainable": dict.fromkeys(PARTS, "freeze")})


def test_resolved_recipes_read_back(file: Path) -> None:
    settings = read_recipe(file, ["model.config={mm_hidden: 3}", "lora.targets=[q_proj]"])
    assert settings_from(parse_value(to_yaml(settings))) == settings
    assert TrainSettings() == settings_from(to_data(TrainSettings()))


@given(
    st.recursive(
        st.dictionaries(st.sampled_from("abc"), st.integers(0, 3), max_size=3),
        lambda inner: st.dictionaries(st.sampled_from("abc"), inner | st.integers(0, 3)),
        max_leaves=8,
    ),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3), max_size=3),
)
def test_merging_keeps_what_lies_above_and_the_rest(below: dict, above: dict) -> None:
    out = merged(below, above)
    assert out.keys() == below.keys() | above.keys()
    for key, value in out.items():
        assert value == (above[key] if key in above else below[key])
    assert merged(out, above) == out


def test_an_override_may_go_below_a_word() -> None:
    data = {"trainable": {"vision_tower": "full"}}
    override(data, "trainable.vision_tower.lr=1e-4")
    assert data == {"trainable": {"vision_tower": {"train": "full", "lr": 1e-4}}}


# ---------------------------------------------------------------- stages

STAGED = {
    "output": "runs/y",
    "model": {"path": "checkpoint", "add_audio": {"tower": "whisper"}},
    "trainable": {"mm_projector": {"train": "full", "lr": 1e-3}},
    "training": {"max_steps": 5},
    "stages": [
        {"name": "align", "trainable": {"language_model": "freeze"}},
        {
            "name": "sft",
            "trainable": {"language_model": "full", "mm_projector": "freeze"},
            "training": {"max_steps": 9},
        },
        {"name": "else", "model": {"path": "other"}},
    ],
}


def test_stages_lie_over_the_recipe() -> None:
    settings = settings_from(STAGED)
    sft = stage_settings(settings, "sft")
    assert sft.trainable.language_model.train == "full"
    assert sft.trainable.mm_projector == PartSettings("freeze", 1e-3)
    assert sft.training["max_steps"] == 9
    assert settings_from(to_data(settings)) == settings


def test_each_stage_starts_from_the_one_before() -> None:
    first, second, third = runs_of(settings_from(STAGED))
    assert (first.model.path, first.output) == ("checkpoint", str(Path("runs/y/align")))
    assert first.model.add_audio == {"tower": "whisper"}
    assert second.model.path == str(Path("runs/y/align/final"))
    assert second.model.add_audio is None  # it has ears by now
    assert third.model.path == "other"


def test_one_stage_can_be_chosen() -> None:
    (only,) = runs_of(settings_from(STAGED), "sft")
    assert only.model.path == str(Path("runs/y/align/final"))
    with pytest.raises(UsageError, match="Did you mean 'sft'"):
        list(runs_of(settings_from(STAGED), "sftt"))
    with pytest.raises(UsageError, match="has no stages"):
        list(runs_of(settings_from({"output": "x"}), "sft"))


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"name": "a"}, {"name": "a"}], "same name"),
        ([{"name": "../a"}], "folder's"),
        ([{"trainable": {}}], "needs a name"),
        ([{"name": "a", "output": "x"}], "no output of its own"),
        ([{"name": "a", "lora": {"rnk": 1}}], "stage a"),
        ("a", "list of mappings"),
    ],
)
def test_wrong_stages(stages: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settings_from({"output": "x", "stages": stages})


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("batch:\n  max_tokens: 3\nbatch:\n  max_samples: 2\n")
    with pytest.raises(UsageError, match=r"'batch' stands twice in .*line 3"):
        read_recipe(file)
