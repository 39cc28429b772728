"""Folders of transformers' LLaVA classes: their configurations, their names, and live agreement."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from av_llava.aggregators.image_layout import merge_tiles
from av_llava.checkpoints.hf_format import (
    HF_MODEL_TYPES,
    config_from_hf,
    is_hf_llava_config,
    memory_name,
)
from av_llava.checkpoints.load import load_checkpoint
from av_llava.errors import CheckpointError
from av_llava.inspection import describe
from av_llava.planning import MediaPlanner
from checkpoints.stock_llava import (
    CLIP,
    IMAGE_ID,
    PAD_ID,
    PINPOINTS,
    SIGLIP,
    VIDEO_ID,
    random_ids,
    stock_config,
    stock_folder,
    stock_model,
)

torch.set_num_threads(1)
SIDE = 12


def data_of(kind, **changes):
    """The config.json that transformers writes."""
    return stock_config(kind, **changes).to_dict()


# ---------------------------------------------------------------- live agreement


def pair(tmp_path, kind, **changes):
    stock = stock_model(kind, **changes)
    ours = load_checkpoint(stock_folder(stock, tmp_path), device="cpu", dtype="float32").model
    return stock, ours


class Prompts:
    """Rows of text and media, whose counts our planner says and the stock class checks."""

    def __init__(self, ours, seed=0):
        self.planner = MediaPlanner(ours.config)
        self.generator = torch.Generator().manual_seed(seed)
        self.rows, self.tiles, self.sizes, self.videos, self.together = [], [], [], [], []

    def add(self, *media):
        """A row; an image is (height, width), a video a number of frames."""
        n_images = sum(isinstance(m, tuple) for m in media)
        self.together += [n_images] if n_images else []
        row = random_ids(3, self.generator)
        for medium in media:
            if isinstance(medium, tuple):
                plan = self.planner.image(medium[::-1], n_images=n_images)
                row += [IMAGE_ID] * plan.n_tokens
                self.sizes.append(medium)
                self.tiles.append(self._pixels(plan.n_tiles))
            else:
                row += [VIDEO_ID] * self.planner.video(medium).n_tokens
                self.videos.append(self._pixels(medium))
            row += random_ids(2, self.generator)
        self.rows.append(row)
        return self

    def _pixels(self, n):
        return torch.randn((n, 3, SIDE, SIDE), generator=self.generator)

    def inputs(self, left=True, stacked=False):
        length = max(map(len, self.rows))
        pads = [[PAD_ID] * (length - len(r)) for r in self.rows]
        zeros = [[0] * len(p) for p in pads]
        ones = [[1] * len(r) for r in self.rows]
        join = (lambda pad, row: pad + row) if left else (lambda pad, row: row + pad)
        ids = torch.tensor([join(p, r) for p, r in zip(pads, self.rows, strict=True)])
        mask = torch.tensor([join(z, o) for z, o in zip(zeros, ones, strict=True)])
        out = {"input_ids": ids, "attention_mask": mask}
        if self.tiles and stacked:
            out["pixel_values"] = torch.cat(self.tiles)
        elif self.tiles:
            most = max(map(len, self.tiles))
            out["pixel_values"] = torch.stack(
                [torch.cat([t, t.new_zeros((most - len(t), *t.shape[1:]))]) for t in self.tiles]
            )
        if self.tiles:
            out["image_sizes"] = torch.tensor(self.sizes)
        if self.videos:
            out["pixel_values_videos"] = torch.stack(self.videos)
        return out


def check(stock, ours, inputs):
    labels = torch.where(
        (inputs["attention_mask"] == 0) | (inputs["input_ids"] >= IMAGE_ID),
        -100,
        inputs["input_ids"],
    )
    seen = []
    for model in (stock, ours):
        model.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
    with torch.no_grad():
        wanted = stock(**inputs, labels=labels)
        got = ours(**inputs, labels=labels)
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=1e-5)
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(got.logits[keep], wanted.logits[keep], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.loss, wanted.loss, atol=1e-4, rtol=1e-4)


def check_generation(stock, ours, inputs):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(**inputs, **options), stock.generate(**inputs, **options))


@pytest.mark.parametrize("left", [True, False])
def test_onevision_batch_of_everything(tmp_path, left):
    stock, ours = pair(tmp_path, "llava_onevision", text="qwen2")
    prompts = Prompts(ours).add(4).add((50, 20), (20, 50)).add((20, 50)).add().add((90, 90))
    inputs = prompts.inputs(left)
    inputs["batch_num_images"] = torch.tensor(prompts.together)
    assert inputs["pixel_values"].shape[1] == 10  # one image in three rows of tiles, padded others
    check(stock, ours, inputs)
    if left:
        check_generation(stock, ours, inputs)


def test_onevision_shrinks_large_images(tmp_path):
    stock, ours = pair(tmp_path, "llava_onevision", vision_aspect_ratio="anyres_max_2")
    plan = MediaPlanner(ours.config).image((36, 36))
    assert plan.resized is not None
    prompts = Prompts(ours).add((36, 36))
    check(stock, ours, prompts.inputs())


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(("mode", "stride"), [("average", 2), ("max", 2), ("average", 3)])
def test_next_video_pools_before_the_projector(tmp_path, left, mode, stride):
    stock, ours = pair(
        tmp_path, "llava_next_video", spatial_pool_mode=mode, spatial_pool_stride=stride
    )
    prompts = Prompts(ours).add(3).add((50, 20), (20, 50)).add(3).add()
    inputs = prompts.inputs(left)
    check(stock, ours, inputs)
    if left:
        check_generation(stock, ours, inputs)


@pytest.mark.parametrize("stacked", [False, True])
def test_next_tiles_each_of_several_images(tmp_path, stacked):
    stock, ours = pair(tmp_path, "llava_next", text="mistral")
    inputs = Prompts(ours).add((50, 20), (20, 50)).add((33, 31)).inputs(stacked=stacked)
    check(stock, ours, inputs)
    check_generation(stock, ours, inputs)


@pytest.mark.parametrize(
    ("vision", "strategy", "layer"),
    [
        (CLIP, "default", -2),
        (CLIP, "default", 2),
        (CLIP, "default", [-1]),
        (CLIP, "full", -2),
        (SIGLIP, "full", -1),
        (CLIP | {"num_hidden_layers": 12}, "default", [-2, -5, -8, -11, 6]),
    ],
)
def test_llava_with_every_kind_of_feature(tmp_path, vision, strategy, layer):
    stock, ours = pair(
        tmp_path,
        "llava",
        vision=vision,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
    )
    inputs = Prompts(ours).add((12, 12), (12, 12)).add().add((12, 12)).inputs(stacked=True)
    inputs.pop("image_sizes")
    check(stock, ours, inputs)
    check_generation(stock, ours, inputs)


@pytest.mark.parametrize("kind", HF_MODEL_TYPES)
def test_tied_heads(tmp_path, kind):
    stock, ours = pair(tmp_path, kind, text="qwen2", tie_word_embeddings=True)
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    prompts = Prompts(ours).add((12, 12))
    inputs = prompts.inputs()
    if kind == "llava":
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].flatten(0, 1)}
        inputs.pop("image_sizes")
    check(stock, ours, inputs)


STOCK = {}


def stock_merger(kind):
    """A stock model whose widths do not matter, to merge given features."""
    if kind not in STOCK:
        STOCK[kind] = stock_model(kind)
    return STOCK[kind]


@pytest.mark.parametrize("kind", ["llava_next", "llava_next_video", "llava_onevision"])
@example(height=94, width=141, max_tiles=9)
@given(height=st.integers(1, 700), width=st.integers(1, 700), max_tiles=st.integers(1, 9))
def test_images_of_any_size_merge_as_in_the_stock_class(kind, height, width, max_tiles):
    # Transformers cannot shrink a side below one token.
    assume(max(height, width) <= 20 * min(height, width))
    stock = stock_merger(kind)
    aspect = f"anyres_max_{max_tiles}"
    changes = {"vision_aspect_ratio": aspect} if kind == "llava_onevision" else {}
    plan = MediaPlanner(config_from_hf(data_of(kind, **changes))).image((width, height))
    features = torch.randn(plan.n_tiles, 9, 24, generator=torch.Generator().manual_seed(0))
    newline = torch.full((24,), 7.0)
    arguments = {"image_newline": newline}
    if kind == "llava_onevision":
        arguments["vision_aspect_ratio"] = aspect
    else:
        arguments["vision_feature_select_strategy"] = "default"
    wanted, _ = stock.model.pack_image_features(
        [features], torch.tensor([[height, width]]), **arguments
    )
    torch.testing.assert_close(merge_tiles(features, plan, newline), wanted[0], atol=1e-6, rtol=0)


def test_unpadding_rounds_as_transformers_does():
    # 94 * (9 / 141) falls just under 6 in floating point.
    config = config_from_hf(data_of("llava_next"))
    ours = MediaPlanner(config).image((141, 94)).n_tokens
    config.image = config.image.replace(unpad_rounding="llava")
    assert MediaPlanner(config).image((141, 94)).n_tokens != ours


# ---------------------------------------------------------------- configurations


def test_pinpoints_turn_round_and_keep_their_order():
    config = config_from_hf(data_of("llava_next"))
    assert config.image.grid_pinpoints == tuple((w, h) for h, w in PINPOINTS)


def test_media_ids_are_the_vocabulary_ids_of_the_file():
    config = config_from_hf(data_of("llava_onevision"))
    assert (config.image_token_id, config.video_token_id) == (IMAGE_ID, VIDEO_ID)
    assert config_from_hf(data_of("llava")).video_token_id == -201


def test_a_file_may_leave_out_what_is_the_class_default():
    config = config_from_hf(
        {
            "model_type": "llava_onevision",
            "text_config": {"model_type": "qwen2", "hidden_size": 64},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "image_size": 384,
                "patch_size": 14,
            },
        }
    )
    assert config.image_token_id == 151646 and config.image.aspect_ratio == "anyres_max_9"
    assert config.vision.select_layer == -1 and config.vision.image_mean == (0.5, 0.5, 0.5)
    assert len(config.image.grid_pinpoints) == 36 and config.image.several == "pad"


def test_layouts_of_llavas_own_configurations_are_left_alone():
    assert not is_hf_llava_config({"model_type": "llava", "mm_vision_tower": "clip"})
    assert not is_hf_llava_config({"model_type": "video_llava", "text_config": {}})
    assert all(is_hf_llava_config(data_of(kind)) for kind in HF_MODEL_TYPES)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llava", {"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ("llava", {"multimodal_projector_bias": False}, "multimodal_projector_bias False"),
        ("llava", {"vision_feature_layer": [-1, -2]}, r"vision_feature_layer \[-1, -2\]"),
        ("llava", {"vision_feature_layer": -9}, "vision_feature_layer -9.* 3 layers"),
        ("llava", {"vision_feature_select_strategy": "some"}, "vision_feature_select_strategy"),
        ("llava", {"text_config": {"model_type": "no_such"}}, "text_config.model_type 'no_such'"),
        ("llava", {"vision_config": {"model_type": "vit"}}, "vision_config.model_type 'vit'"),
        (
            "llava_onevision",
            {"vision_feature_select_strategy": "default"},
            "vision_feature_select_strategy 'default'.*first patch",
        ),
        ("llava_onevision", {"vision_aspect_ratio": "square"}, "vision_aspect_ratio 'square'"),
        ("llava_next", {"image_grid_pinpoints": [[13, 12]]}, "image_grid_pinpoints.*multiples"),
        ("llava_next", {"image_grid_pinpoints": [[24]]}, "image_grid_pinpoints"),
        ("llava_next_video", {"spatial_pool_mode": "conv"}, "spatial_pool_mode 'conv'"),
        ("vipllava", {}, "vipllava"),
    ],
)
def test_what_cannot_be_expressed_is_named(kind, changes, words):
    data = {**data_of(kind if kind in HF_MODEL_TYPES else "llava"), "model_type": kind, **changes}
    with pytest.raises(CheckpointError, match=words):
        config_from_hf(data)


def test_processor_files_give_pixels_and_padding(tmp_path):
    folder = stock_folder(stock_model("llava"), tmp_path)
    own = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    pixels = {**own, "do_center_crop": True, "image_mean": [0.1, 0.2, 0.3], "do_pad": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "padding_side": "left"}))
    config = load_checkpoint(folder, device="cpu").model.config
    assert config.vision.image_mean == (0.1, 0.2, 0.3) and config.vision.resize == "shortest_edge"
    assert config.image.aspect_ratio == "pad" and config.sequence.padding_side == "left"


def test_another_video_processing_is_reported(tmp_path, caplog):
    folder = stock_folder(stock_model("llava_onevision"), tmp_path)
    size = {"size": {"height": SIDE, "width": SIDE}}
    data = {
        "image_processor": {**size, "image_mean": [0.5, 0.5, 0.5]},
        "video_processor": {**size, "image_mean": [0.4, 0.4, 0.4]},
    }
    (folder / "processor_config.json").write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING):
        config = load_checkpoint(folder, device="cpu").model.config
    assert "another image_mean ([0.4, 0.4, 0.4] instead of [0.5, 0.5, 0.5])" in caplog.text
    assert "another size" not in caplog.text and config.vision.resize == "exact"


def test_a_processor_of_another_size_is_an_error(tmp_path):
    folder = stock_folder(stock_model("llava_onevision"), tmp_path)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 8, "width": 8}})
    )
    with pytest.raises(CheckpointError, match="12 pixels a side.*makes 8"):
        load_checkpoint(folder, device="cpu")


# ---------------------------------------------------------------- names


def renamed(folder, rename):
    """Write a folder's weights under other names."""
    state = load_file(folder / "model.safetensors")
    save_file({rename(k): v for k, v in state.items()}, folder / "model.safetensors")
    return folder


def of_version_4(key):
    return key.replace("vision_tower.", "vision_tower.vision_model.")


def as_in_memory(key):
    if key.startswith("language_model.lm_head"):
        return key.removeprefix("language_model.")
    return "model." + key.replace("language_model.model.", "language_model.")


@pytest.mark.parametrize("rename", [str, of_version_4, as_in_memory])
@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_every_spelling_of_the_names_loads(tmp_path, kind, rename):
    stock = stock_model(kind)
    folder = renamed(stock_folder(stock, tmp_path), rename)
    report = describe(folder)
    assert report["missing"] == report["unexpected"] == []
    assert report["vision_tower"]["weights"] == "inside the checkpoint"
    assert report["layout"] == kind and report["architecture"] == type(stock).__name__
    ours = load_checkpoint(folder, device="cpu").model.state_dict()
    for key, value in stock.state_dict().items():
        assert torch.equal(ours[memory_name(key)], value), key


def test_saving_writes_llavas_names_and_loads_back_equal(tmp_path):
    folder = stock_folder(stock_model("llava_onevision"), tmp_path / "hf")
    loaded = load_checkpoint(folder, device="cpu")
    loaded.model.save_pretrained(tmp_path / "ours")
    loaded.tokenizer.save_pretrained(tmp_path / "ours")
    names = set(load_file(tmp_path / "ours" / "model.safetensors"))
    assert {
        "model.image_newline",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.weight",
    } <= names
    assert not any("language_model" in n or "multi_modal" in n for n in names)
    again = load_checkpoint(tmp_path / "ours", device="cpu").model
    assert again.config.to_dict()["image"] == loaded.model.config.to_dict()["image"]
    assert (again.config.image_token_id, again.config.video_token_id) == (IMAGE_ID, VIDEO_ID)
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("image_newline"), r"Missing \(1\): model.media_tokens.image_newline"),
        (lambda s: s.update({"language_model.extra": torch.zeros(1)}), r"Unexpected \(1\).*extra"),
        (
            lambda s: s.update({"multi_modal_projector.linear_1.bias": torch.zeros(5)}),
            r"Wrong shape \(1\): model.mm_projector.0.bias: the file has \(5,\)",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, change, words):
    folder = stock_folder(stock_model("llava_next"), tmp_path)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(folder, device="cpu")


def test_keys_that_hold_nothing_are_left_out(tmp_path):
    folder = stock_folder(stock_model("llava"), tmp_path)
    state = load_file(folder / "model.safetensors")
    state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(state, folder / "model.safetensors")
    load_checkpoint(folder, device="cpu")
    report = describe(folder)
    assert report["missing"] == report["unexpected"] == []
