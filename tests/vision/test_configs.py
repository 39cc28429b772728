"""Configurations of towers by name and file."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import CLIPConfig, SiglipConfig, SiglipVisionConfig

from av_llava.errors import CheckpointError, UsageError
from av_llava.images import PixelSpec
from av_llava.settings import VisionSettings
from av_llava.vision import (
    PUBLISHED_TOWERS,
    as_llava_stores_it,
    build_vision_tower,
    find_published,
    tower_kind,
    vision_config_from,
)

GRIDS = {
    "openai/clip-vit-base-patch32": 7,
    "openai/clip-vit-base-patch16": 14,
    "openai/clip-vit-large-patch14": 16,
    "openai/clip-vit-large-patch14-336": 24,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 16,
    "google/siglip-so400m-patch14-224": 16,
    "google/siglip-so400m-patch14-384": 27,
    "google/siglip-base-patch16-224": 14,
    "google/siglip-base-patch16-512": 32,
}


def build(name: str, **settings):
    config = vision_config_from(PUBLISHED_TOWERS[name]["vision_config"])
    with torch.device("meta"):
        return build_vision_tower(config, VisionSettings(kind=tower_kind(config), **settings))


@pytest.mark.parametrize("name", PUBLISHED_TOWERS)
def test_published_towers_build_and_match_their_processing(name):
    tower = build(name)
    spec = PixelSpec.from_preprocessor_config(find_published(name)["preprocessor_config"])
    assert spec.output_size == (tower.input_size, tower.input_size)
    assert tower.num_patches_per_side == GRIDS.get(name, tower.num_patches_per_side)
    json.dumps(PUBLISHED_TOWERS[name])  # plain data


@pytest.mark.parametrize(
    ("name", "n_parameters"),
    [  # counts of the published models, without projection and text model
        ("openai/clip-vit-large-patch14-336", 303_507_456),
        ("openai/clip-vit-base-patch32", 87_456_000),
        ("google/siglip-so400m-patch14-384", 428_225_600),
        ("google/siglip-base-patch16-224", 92_884_224),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 630_766_080),
    ],
)
def test_published_towers_have_the_published_size(name, n_parameters):
    assert sum(p.numel() for p in build(name).parameters()) == n_parameters


@pytest.mark.parametrize(
    "name",
    [
        "google/siglip-so400m-patch14-384",
        "/data/models/siglip-so400m-patch14-384",
        "./siglip-so400m-patch14-384/",
        r"C:\models\siglip-so400m-patch14-384",
    ],
)
def test_towers_are_found_by_name_and_by_the_end_of_a_path(name):
    assert find_published(name) is PUBLISHED_TOWERS["google/siglip-so400m-patch14-384"]


@pytest.mark.parametrize("name", ["", "vision_tower", "siglip-so400m-patch14-384-mine"])
def test_other_names_are_not_found(name):
    assert find_published(name) is None


def test_a_vision_config_is_found_inside_a_whole_models():
    clip = CLIPConfig(vision_config={"hidden_size": 24, "num_attention_heads": 2})
    found = vision_config_from(clip.to_dict())
    assert (found.model_type, found.hidden_size) == ("clip_vision_model", 24)
    siglip = SiglipConfig(vision_config={"hidden_size": 24, "num_attention_heads": 2})
    found = vision_config_from(siglip.to_dict())
    assert (found.model_type, found.hidden_size) == ("siglip_vision_model", 24)
    assert vision_config_from(found.to_dict()).hidden_size == 24


@pytest.mark.parametrize("data", [{}, {"model_type": "bert"}])
def test_other_models_are_no_towers(data):
    with pytest.raises(UsageError, match="Unknown vision tower model_type"):
        vision_config_from(data)


def test_kind_follows_the_model_type():
    siglip = SiglipVisionConfig()
    assert tower_kind(siglip) == "siglip"
    clip = vision_config_from({"model_type": "clip_vision_model"})
    assert (tower_kind(clip), tower_kind(clip, s2=True)) == ("clip", "clip_s2")


@pytest.mark.parametrize(("n_layers", "select"), [(None, -1), (26, -1), (27, -2)])
def test_llavas_siglip_is_the_last_state_but_one_of_the_complete_tower(n_layers, select):
    name = "google/siglip-so400m-patch14-384"
    config = vision_config_from(PUBLISHED_TOWERS[name]["vision_config"])
    settings = VisionSettings(kind="siglip", select_layer=-2, tower=name)
    stored, chosen = as_llava_stores_it(config, settings, n_layers)
    assert stored.num_hidden_layers == (n_layers or 26)
    assert chosen == settings.replace(select_layer=select)
    assert config.num_hidden_layers == 27  # the argument is left alone
    with torch.device("meta"):
        tower = build_vision_tower(stored, chosen)
    assert tower.selection.states == (26,)
    assert not hasattr(tower.vision_tower, "head")


def test_llavas_siglip_ignores_the_selection_and_says_so(caplog):
    config = SiglipVisionConfig(num_hidden_layers=4)
    settings = VisionSettings(kind="siglip", select_layer=-1, select_feature="slicefour_patch")
    with caplog.at_level(logging.WARNING):
        stored, chosen = as_llava_stores_it(config, settings)
    assert "ignores select_layer -1" in caplog.text
    assert (stored.num_hidden_layers, chosen.select_layer, chosen.select_feature) == (
        3,
        -1,
        "patch",
    )


@pytest.mark.parametrize("n_layers", [0, 2, 5])
def test_a_wrong_number_of_layers_is_an_error(n_layers):
    config = SiglipVisionConfig(num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=f"holds {n_layers} layers"):
        as_llava_stores_it(config, VisionSettings(kind="siglip"), n_layers)


def test_clip_is_stored_complete():
    config = vision_config_from({"model_type": "clip_vision_model"})
    settings = VisionSettings()
    assert as_llava_stores_it(config, settings) == (config, settings)
