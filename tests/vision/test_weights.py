"""Names in stand-alone tower files."""

from __future__ import annotations

import pytest
import torch

from av_llava.vision import as_llava_stores_it, build_vision_tower, tower_weights

from .tiny import tiny_clip, tiny_siglip


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_clip_files_load_whole(prefix):
    tower = tiny_clip()
    own = tower.vision_tower.state_dict()
    file = {prefix + name: tensor for name, tensor in own.items()}
    extra = [f"{prefix}embeddings.position_ids", "logit_scale", "text_projection.weight"]
    extra += ["visual_projection.weight", "text_model.encoder.layers.0.mlp.fc1.bias"]
    kept, left_out = tower_weights(file | {name: torch.zeros(1) for name in extra}, tower)
    assert kept.keys() == own.keys()
    assert sorted(left_out) == sorted(extra)
    tower.vision_tower.load_state_dict(kept)


def test_siglip_leaves_out_what_llava_deletes():
    complete = tiny_siglip()
    tower = build_vision_tower(*as_llava_stores_it(complete.config, complete.settings))
    file = {f"vision_model.{k}": v for k, v in complete.vision_tower.state_dict().items()}
    kept, left_out = tower_weights(file, tower)
    tower.vision_tower.load_state_dict(kept)
    assert {name.split(".")[1] for name in left_out} == {"encoder", "head"}
    assert all("layers.3." in name for name in left_out if "encoder" in name)


def test_a_complete_siglip_keeps_its_head():
    tower = tiny_siglip()
    own = tower.vision_tower.state_dict()
    kept, left_out = tower_weights({f"vision_model.{k}": v for k, v in own.items()}, tower)
    assert kept.keys() == own.keys() and not left_out


def test_an_unknown_name_is_kept_for_the_strict_load_to_refuse():
    tower = tiny_clip()
    kept, _ = tower_weights({"embeddings.strange": torch.zeros(1)}, tower)
    assert list(kept) == ["embeddings.strange"]
