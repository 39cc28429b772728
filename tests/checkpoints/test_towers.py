"""Where towers are looked for, what they may look like, and what is wrong with them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from golden_data import golden
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from av_llava.checkpoints.configuration import read_config
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.towers import candidates, fetch, find_tower
from av_llava.errors import CheckpointError
from av_llava.vision import PUBLISHED_TOWERS

from .folders import (
    ABSENT,
    OV,
    V15,
    V16,
    copy_case,
    edit_config,
    edit_json,
    edit_weights,
    load,
    locked,
    public_path,
    read_weights,
    refusal,
    same_weights,
)

__all__ = ["public_path"]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub; nothing is reachable beyond it (HF_HUB_OFFLINE)."""
    cache = tmp_path / "hub-cache"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def put_on_hub(cache: Path, name: str, source: Path) -> Path:
    """Lay a folder out as the hub's cache keeps a repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(source, repository / "snapshots" / ("0" * 40)))


def tower_folder(to: Path, mark: float) -> Path:
    """A copy of the reference's CLIP whose first normalisation is full of ``mark``."""
    shutil.copytree(golden(f"llava/{V15}") / "vision_tower", to)
    state = load_file(to / "model.safetensors")
    key = next(k for k in state if k.endswith("pre_layrnorm.weight"))
    save_file({**state, key: torch.full_like(state[key], mark)}, to / "model.safetensors")
    return to


def mark_of(model) -> float:
    return float(model.model.vision_tower.vision_tower.pre_layrnorm.weight.detach().unique())


PLACES = ("inside", "inside by its last part", "beside", "as given", "hub")


@pytest.mark.parametrize("first", range(len(PLACES)))
def test_the_first_place_that_has_the_tower_wins(tmp_path, monkeypatch, hub, caplog, first):
    folder = copy_case(V15, tmp_path / "case")
    shutil.rmtree(folder.parent / "vision_tower")
    edit_config(folder, mm_vision_tower="org/clip")
    monkeypatch.chdir(tmp_path)
    sources = {
        "inside": folder / "org" / "clip",
        "inside by its last part": folder / "clip",
        "beside": folder.parent / "clip",
        "as given": Path("org/clip"),
    }
    for i, place in enumerate(PLACES):
        if i < first:
            continue
        if place == "hub":
            source = put_on_hub(hub, "org/clip", tower_folder(tmp_path / "src", float(i)))
        else:
            source = tower_folder(sources[place], float(i))
        if i == first:
            expected = source
    with caplog.at_level(logging.INFO, "av_llava"):
        loaded = load(folder)
    assert mark_of(loaded.model) == first
    assert str(expected) in caplog.text and "org/clip" in caplog.text


def test_a_folder_inside_wins_over_an_absolute_path_that_exists(tmp_path):
    folder = copy_case(V15, tmp_path / "case")
    given = tower_folder(tmp_path / "elsewhere" / "clip", 7.0)
    edit_config(folder, mm_vision_tower=str(given))
    assert mark_of(load(folder).model) == 7.0
    tower_folder(folder.parent / "clip", 8.0)
    assert mark_of(load(folder).model) == 8.0
    tower_folder(folder / "clip", 9.0)
    assert mark_of(load(folder).model) == 9.0


@pytest.mark.parametrize("name", ["/data/models/clip", r"D:\models\clip", "./clip/", "org/clip"])
def test_names_of_other_machines_are_found_by_their_last_part(name):
    checkpoint = Path("/somewhere/checkpoint")
    places = candidates(name, checkpoint)
    assert checkpoint / "clip" in places and checkpoint.parent / "clip" in places
    assert places.index(checkpoint / "clip") < places.index(checkpoint.parent / "clip")
    assert places[-1] == Path(name)


@pytest.mark.parametrize("name", [".", "..", "/", "~nobody-of-this-name/x"])
def test_names_without_a_last_part_look_nowhere_else(name):
    for place in candidates(name, Path("/a/b"))[:-1]:
        assert place.name not in ("", "b", "a")


def test_a_published_name_with_the_weights_inside_needs_no_network(
    tmp_path, monkeypatch, hub, caplog
):
    monkeypatch.setitem(PUBLISHED_TOWERS, "tiny/clip-56", published_clip())
    folder = copy_case(V16, tmp_path)
    with_folder = load(folder)
    shutil.rmtree(tmp_path / "vision_tower")
    edit_config(folder, mm_vision_tower="tiny/clip-56")
    with caplog.at_level(logging.INFO, "av_llava"):
        loaded = load(folder)
    assert "built-in configuration" in caplog.text
    assert loaded.vision_tower.folder is None
    assert same_weights(loaded.model, with_folder.model)


def published_clip() -> dict:
    tower = golden(f"llava/{V16}") / "vision_tower"
    config = json.loads((tower / "config.json").read_text())
    pixels = json.loads((tower / "preprocessor_config.json").read_text())
    return {"vision_config": config, "preprocessor_config": pixels}


@pytest.mark.parametrize("name", ["tiny/clip-56", "/other/machine/clip-56"])
def test_a_published_name_without_weights_is_fetched_under_its_full_name(
    tmp_path, monkeypatch, hub, name
):
    monkeypatch.setitem(PUBLISHED_TOWERS, "tiny/clip-56", published_clip())
    folder = copy_case(V15, tmp_path / "case")
    shutil.rmtree(folder.parent / "vision_tower")
    edit_config(folder, mm_vision_tower=name)
    message = refusal(folder)
    assert f"The tower {name!r} was not found" in message
    for place in (folder / "clip-56", folder.parent / "clip-56", name):
        assert str(place) in message
    assert "on the hub: 'tiny/clip-56' is not in the cache" in message
    put_on_hub(hub, "tiny/clip-56", tower_folder(tmp_path / "src", 3.0))
    assert mark_of(load(folder).model) == 3.0


@pytest.mark.parametrize(
    ("name", "side", "width"),
    [
        ("openai/clip-vit-large-patch14-336", 336, 1024),
        ("/data/siglip-so400m-patch14-384", 384, 1152),
        ("google/siglip-so400m-patch14-384", 384, 1152),
    ],
)
def test_published_towers_are_known_without_any_folder(tmp_path, hub, name, side, width):
    tower = find_tower(name, tmp_path / "checkpoint", weights=False)
    assert (tower.folder, tower.config.image_size, tower.config.hidden_size) == (None, side, width)


def test_an_unknown_name_lists_every_place_and_the_hubs_answer(tmp_path, hub):
    folder = copy_case(V15, tmp_path)
    edit_config(folder, mm_vision_tower="not a repository!")
    message = refusal(folder)
    assert "is not the name of a repository" in message
    assert str(folder / "not a repository!") in message


@pytest.mark.parametrize("case", [V16, OV])
def test_weights_inside_the_checkpoint_win_over_the_folder_beside(tmp_path, case):
    folder = copy_case(case, tmp_path)
    loaded = load(folder)
    beside = load_file(next(tmp_path.glob("vision_tower*")) / "model.safetensors")
    inner = loaded.model.model.vision_tower.vision_tower.state_dict()
    prefix = "model.vision_tower.vision_tower.vision_model."
    stored = {
        k.removeprefix(prefix): v for k, v in read_weights(folder).items() if k.startswith(prefix)
    }
    assert stored and all(torch.equal(inner[k], v) for k, v in stored.items())
    other = {k.removeprefix("vision_model."): v for k, v in beside.items()}
    assert any(not torch.equal(inner[k], v) for k, v in other.items() if k in inner)


def test_a_whole_clip_gives_its_vision_part(tmp_path):
    folder = copy_case(V15, tmp_path)
    own = json.loads((tmp_path / "vision_tower" / "config.json").read_text())
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "vocab_size": 10,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(text_config=small, vision_config=own, projection_dim=8))
    save_whole(whole, tmp_path / "vision_tower")
    loaded = load(folder)
    assert loaded.model.config.vision_config.num_hidden_layers == own["num_hidden_layers"]
    assert_holds(loaded.model, whole.vision_model)


def save_whole(model, folder: Path) -> None:
    pixels = (folder / "preprocessor_config.json").read_text()
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(pixels)
    assert any(k.startswith("text_model.") for k in load_file(folder / "model.safetensors"))


def assert_holds(model, inner) -> None:
    wanted = inner.state_dict()
    for key, value in model.model.vision_tower.vision_tower.state_dict().items():
        assert torch.equal(value, wanted[key.removeprefix("vision_model.")]), key


def test_a_whole_siglip_gives_its_vision_part_without_its_last_layer_and_head(tmp_path):
    folder = copy_case(OV, tmp_path)
    tower = tmp_path / "vision_tower_siglip"
    own = json.loads((tower / "config.json").read_text())
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "vocab_size": 10,
        "projection_size": own["hidden_size"],
    }
    torch.manual_seed(0)
    whole = SiglipModel(SiglipConfig(text_config=small, vision_config=own))
    save_whole(whole, tower)
    without_tower(folder)
    loaded = load(folder)
    assert loaded.model.config.vision_config.num_hidden_layers == own["num_hidden_layers"] - 1
    assert_holds(loaded.model, whole.vision_model)


def without_tower(folder: Path) -> None:
    edit_weights(folder, **{k: ABSENT for k in read_weights(folder) if "vision_tower" in k})


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("shards", [1, 3])
def test_towers_may_be_sharded_and_pickled(tmp_path, kind, shards):
    from .folders import write_weights

    folder = copy_case(V15, tmp_path)
    plain = load(folder)
    tower = tmp_path / "vision_tower"
    write_weights(tower, load_file(tower / "model.safetensors"), kind, shards)
    assert same_weights(load(folder).model, plain.model)


def test_s2_multiplies_the_width_and_takes_the_largest_scale(tmp_path):
    folder = copy_case(V15, tmp_path)
    edit_config(folder, s2=True, s2_scales="56,112,168")
    assert (
        "model.mm_projector.0.weight: the file has (64, 32), the model needs (64, 96)"
        in refusal(folder)
    )
    torch.manual_seed(0)
    edit_weights(folder, **{"model.mm_projector.0.weight": torch.randn(64, 96)})
    model = load(folder).model
    assert model.config.vision.kind == "clip_s2" and model.config.vision.s2_scales == (56, 112, 168)
    tower = model.model.vision_tower
    assert (tower.input_size, tower.hidden_size, tower.grid) == (168, 96, (4, 4))
    with torch.no_grad():
        assert model.model.encode_images(torch.zeros(1, 3, 168, 168, dtype=torch.uint8)).shape == (
            1,
            16,
            64,
        )


def test_s2_reference_case_loads_with_its_preprocessing():
    folder = golden("llava/s2_single") / "checkpoint"
    config, tower = read_config(CheckpointFolder(folder))
    assert config.vision.s2_scales == (56, 112, 168) and tower.config.image_size == 56


def broken(change):
    """Apply a change to the tower of a fresh case and return the refusal."""

    def run(tmp_path):
        folder = copy_case(V15, tmp_path)
        change(tmp_path / "vision_tower")
        return refusal(folder)

    return run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, ["vision_tower", "embeddings.class_embedding", "(32,)", "(64,)"]),
        ({"image_size": 112}, ["vision_tower", "112 pixels", "makes 56"]),
        ({"num_hidden_layers": 2}, ["vision_tower holds 3 layers", "says 2"]),
        (
            {"num_hidden_layers": 5},
            ["Missing (32)", "encoder.layers.3.layer_norm1.bias", "and 20 more"],
        ),
        ({"model_type": "bert"}, ["vision_tower/config.json", "'bert'", "Known: clip"]),
        ({"model_type": ABSENT}, ["vision_tower/config.json", "None"]),
        ({"hidden_size": "wide"}, ["vision_tower/config.json", "hidden_size", "'wide'"]),
        ({"patch_size": 0}, ["config.json"]),
    ],
)
def test_a_tower_that_contradicts_its_config_is_refused(tmp_path, changes, words):
    message = broken(lambda tower: edit_json(tower / "config.json", **changes))(tmp_path)
    assert all(w in message for w in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": "big"}, "size 'big' is not understood"),
        ({"size": {"height": 56, "width": 28}, "do_center_crop": False}, "square"),
        ({"do_resize": False}, "do_resize"),
        ({"image_mean": [0.5]}, "three numbers"),
        ({"image_mean": 7}, "preprocessor_config.json"),
    ],
)
def test_a_wrong_preprocessor_file_is_named(tmp_path, changes, words):
    message = broken(lambda tower: edit_json(tower / "preprocessor_config.json", **changes))(
        tmp_path
    )
    assert "preprocessor_config.json" in message and words in message
    assert str(tmp_path / "vision_tower") in message


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_broken_json_of_a_tower_is_named(tmp_path, name):
    message = broken(lambda tower: (tower / name).write_text("{"))(tmp_path)
    assert f"{tmp_path / 'vision_tower' / name} is not valid JSON" in message


def test_a_tower_without_weights_is_refused_before_the_model_is_read(tmp_path, monkeypatch):
    folder = copy_case(V15, tmp_path)
    (tmp_path / "vision_tower" / "model.safetensors").unlink()
    monkeypatch.setattr("av_llava.modeling.AVLlavaForConditionalGeneration.from_pretrained", None)
    assert f"{tmp_path / 'vision_tower'} holds no weights" in refusal(folder)


def test_foreign_tensors_of_a_tower_are_named(tmp_path):
    message = broken(add_foreign)(tmp_path)
    assert "Unexpected (1): encoder.extra.weight" in message


def add_foreign(tower: Path) -> None:
    state = load_file(tower / "model.safetensors")
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in state) else ""
    save_file(
        {**state, f"{prefix}encoder.extra.weight": torch.ones(1)}, tower / "model.safetensors"
    )


def test_a_folder_that_may_not_be_entered_is_passed_over_and_listed(public_path, hub):
    (public_path / "locked").mkdir()
    checkpoint = public_path / "checkpoint"
    checkpoint.mkdir()
    with locked(public_path / "locked"), pytest.raises(CheckpointError) as caught:
        find_tower(str(public_path / "locked" / "clip"), checkpoint, weights=True)
    assert "locked/clip (Permission denied)" in str(caught.value)
    with locked(public_path / "locked"):
        tower = find_tower(
            str(public_path / "locked" / "clip-vit-large-patch14-336"), checkpoint, weights=False
        )
    assert tower.config.image_size == 336


@pytest.mark.parametrize("name", [3, ["a"], {"x": 1}])
def test_a_name_that_is_no_text_is_refused(tmp_path, name):
    folder = copy_case(V15, tmp_path)
    edit_config(folder, mm_vision_tower=name)
    assert "mm_vision_tower must be a name" in refusal(folder)


@pytest.mark.parametrize(
    "error", [ValueError("not JSON"), OSError("refused"), TimeoutError("slow")]
)
def test_what_the_network_may_do_is_told(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("av_llava.checkpoints.towers.snapshot_download", fail)
    with pytest.raises(CheckpointError, match="the hub cannot be reached") as caught:
        fetch("org/clip")
    assert type(error).__name__ in str(caught.value)
