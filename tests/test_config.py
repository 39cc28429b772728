"""The configuration: published files of every family, round trips, wrong values.

The files are written from what is published about the checkpoints: their shapes, LLaVA's settings
and the token counts that follow from them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config, SiglipVisionConfig, WhisperConfig

from av_llava.budgeting import context_length
from av_llava.checkpoints.overwrite import overwritten
from av_llava.checkpoints.towers import find_tower
from av_llava.config import (
    LLAVA_FIELDS,
    PARTS,
    AVLlavaConfig,
    is_llava_config,
    tower_name,
)
from av_llava.errors import CheckpointError, UsageError
from av_llava.planning import MediaPlanner
from av_llava.settings import (
    AggregatorSettings,
    AudioSettings,
    SamplingSettings,
    SequenceSettings,
    VisionSettings,
)

CLIP = "openai/clip-vit-large-patch14-336"
SIGLIP = "google/siglip-so400m-patch14-384"

VICUNA_7B = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "hidden_act": "silu",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
MISTRAL_7B = VICUNA_7B | {
    "architectures": ["LlavaMistralForCausalLM"],
    "model_type": "llava_mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
YI_34B = VICUNA_7B | {
    "vocab_size": 64000,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "rope_theta": 5000000.0,
    "eos_token_id": 7,
    "torch_dtype": "bfloat16",
}
QWEN2_7B = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN2_05B = QWEN2_7B | {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
MOBILE_LLAMA = VICUNA_7B | {
    "architectures": ["MobileLlamaForCausalLM"],
    "model_type": "mobilevlm",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
}
WITH_CLIP = {
    "mm_vision_tower": CLIP,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_resampler_type": None,
    "use_mm_proj": True,
    "tune_mm_mlp_adapter": False,
    "freeze_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "image_grid_pinpoints": None,
}
V15 = WITH_CLIP | {"image_aspect_ratio": "pad"}
V16 = WITH_CLIP | {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_crop_resolution": 224,
    "image_split_resolution": 224,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_tower_lr": 2e-6,
    "unfreeze_mm_vision_tower": True,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
}
ONEVISION = WITH_CLIP | {
    "mm_vision_tower": SIGLIP,
    "mm_hidden_size": 1152,
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
    "mm_patch_merge_type": "spatial_unpad",
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": None,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "use_pos_skipping": False,
    "pos_skipping_range": 4096,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "vision_tower_pretrained": None,
}
VIDEO = ONEVISION | {
    "mm_newline_position": "grid",
    "mm_spatial_pool_stride": 2,
    "add_faster_video": False,
    "faster_token_stride": 10,
    "add_time_instruction": True,
    "force_sample": True,
}
NEXT_VIDEO = V16 | {"mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2}

# name: (file, model_type of the text part, tower grid, marks, {size: tokens}, tokens of n frames)
FAMILIES = {
    "v1.5": (
        VICUNA_7B | V15,
        "llama",
        24,
        (),
        {(640, 480): 576, (99, 999): 576},
        lambda n: 144 * n,
    ),
    "bakllava": (MISTRAL_7B | V15, "mistral", 24, (), {(640, 480): 576}, lambda n: 144 * n),
    # 640x480 fills 36 of 48 rows of the 672x672 canvas, each with a newline.
    "v1.6-vicuna": (
        VICUNA_7B | V16,
        "llama",
        24,
        ("newline",),
        {(640, 480): 576 + 36 * 49, (672, 672): 576 + 48 * 49, (336, 336): 576 + 24 * 25},
        lambda n: 144 * n + 1,
    ),
    "v1.6-mistral": (
        MISTRAL_7B | V16 | {"tokenizer_padding_side": "left"},
        "mistral",
        24,
        ("newline",),
        {(672, 672): 576 + 48 * 49},
        lambda n: 144 * n + 1,
    ),
    "v1.6-34b": (
        YI_34B | V16,
        "llama",
        24,
        ("newline",),
        {(672, 672): 576 + 48 * 49},
        lambda n: 144 * n + 1,
    ),
    "next-video": (
        VICUNA_7B | NEXT_VIDEO | {"model_type": "llava_llama"},
        "llama",
        24,
        ("newline",),
        {},
        lambda n: 144 * n + 1,
    ),
    # Above nine tiles the grid shrinks: 162 patches a side to 81.
    "onevision-0.5b": (
        QWEN2_05B | ONEVISION,
        "qwen2",
        27,
        ("newline",),
        {(768, 768): 729 + 54 * 55, (2304, 2304): 729 + 81 * 82, (384, 384): 729 + 27 * 28},
        lambda n: 196 * n + 1,
    ),
    "onevision-7b": (
        QWEN2_7B | ONEVISION,
        "qwen2",
        27,
        ("newline",),
        {(768, 768): 729 + 54 * 55},
        lambda n: 196 * n + 1,
    ),
    "video-7b": (
        QWEN2_7B | VIDEO,
        "qwen2",
        27,
        ("newline",),
        {(384, 384): 729 + 27 * 28},
        lambda n: 14 * 15 * n,
    ),
    "video-7b evaluated": (
        QWEN2_7B | VIDEO | {"mm_spatial_pool_mode": "average"},
        "qwen2",
        27,
        ("newline",),
        {},
        lambda n: 13 * 14 * n,
    ),
    "video-72b slow-fast": (
        QWEN2_7B | VIDEO | {"add_faster_video": True},
        "qwen2",
        27,
        ("newline", "frame_end"),
        {},
        # every tenth frame slow (14x15), the others 7x8, a mark after each
        lambda n: -(-n // 10) * 211 + (n - -(-n // 10)) * 57,
    ),
    "mobilevlm": (
        MOBILE_LLAMA | V15 | {"mm_projector_type": "ldpnet", "vision_tower_type": "clip"},
        "llama",
        24,
        (),
        {(640, 480): 144},
        lambda n: 36 * n,
    ),
    "mobilevlm-v2": (
        MOBILE_LLAMA | V15 | {"mm_projector_type": "ldpnetv2", "vision_tower_type": "clip"},
        "llama",
        24,
        (),
        {(640, 480): 144},
        lambda n: 36 * n,
    ),
}


def read(data: dict) -> AVLlavaConfig:
    assert is_llava_config(data)
    tower = find_tower(tower_name(data), Path("/nowhere/checkpoint"), weights=False)
    return AVLlavaConfig.from_llava(data, tower.config)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_files_give_the_published_model(name):
    data, text, side, marks, images, video = FAMILIES[name]
    config = read(data)
    assert config.text_config.model_type == text
    for key in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "eos_token_id",
    ):
        assert getattr(config.text_config, key) == data[key]
    assert config.text_config.rope_parameters["rope_theta"] == data.get("rope_theta", 10000.0)
    assert config.tie_word_embeddings is data["tie_word_embeddings"]
    assert config.dtype == getattr(torch, data["torch_dtype"])
    assert context_length(config) == data["max_position_embeddings"]
    assert config.owned_marks == marks
    assert config.projector.kind == data["mm_projector_type"]
    assert config.image.aspect_ratio == data["image_aspect_ratio"]
    assert config.sequence.padding_side == data.get("tokenizer_padding_side", "right")
    assert config.sequence.max_length == data.get("tokenizer_model_max_length")
    planner = MediaPlanner(config)
    assert planner.tower_grid == (side, side)
    assert {size: planner.image(size).n_tokens for size in images} == images
    for n in (1, 8, 11, 64):
        assert planner.video(n).n_tokens == video(n)


@pytest.mark.parametrize("name", FAMILIES)
def test_llavas_names_do_not_reach_the_language_model(name):
    config = read(FAMILIES[name][0])
    text = config.text_config.to_dict()
    assert not [k for k in text if k in LLAVA_FIELDS or k.startswith(("mm_", "image_", "tune_"))]
    assert text["model_type"] == config.text_config.model_type


def test_siglip_is_read_as_llava_stores_it():
    config = read(FAMILIES["onevision-7b"][0])
    assert (config.vision.kind, config.vision.select_layer) == ("siglip", -1)
    assert config.vision_config.num_hidden_layers == 26
    assert config.vision.resize == "exact" and config.vision.image_mean == (0.5, 0.5, 0.5)
    clip = read(FAMILIES["v1.5"][0])
    assert (clip.vision.kind, clip.vision.select_layer, clip.vision.resize) == (
        "clip",
        -2,
        "shortest_edge",
    )


def test_the_time_instruction_is_read():
    assert read(FAMILIES["video-7b"][0]).sampling.time_instruction
    assert not read(FAMILIES["v1.5"][0]).sampling.time_instruction


class Recorded(dict):
    """Remembers which keys were looked at."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


def test_the_table_of_llavas_names_is_complete():
    data = Recorded(
        QWEN2_7B
        | VIDEO
        | {
            "s2": True,
            "s2_scales": "336,672",
            "use_pos_skipping": True,
            "add_faster_video": True,
            "mm_vision_tower": None,
            "vision_tower": SIGLIP,
        }
    )
    read(data)
    general = {"architectures", "model_type", "tie_word_embeddings", "torch_dtype", "dtype"}
    assert data.read - general == set(LLAVA_FIELDS)
    assert set(LLAVA_FIELDS.values()) <= set(PARTS)


@settings(max_examples=40, deadline=None)
@given(
    extra=st.dictionaries(
        st.from_regex(r"[a-z]{4}_extra_[a-z]{3}", fullmatch=True),
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=5)
        | st.lists(st.integers(), max_size=3),
        max_size=4,
    )
)
def test_unknown_keys_change_nothing(extra):
    data = FAMILIES["v1.6-vicuna"][0]
    plain, other = read(data), read({**extra, **data})
    for part in PARTS:
        assert getattr(plain, part) == getattr(other, part)
    assert plain.vision_config.to_dict() == other.vision_config.to_dict()
    for key in VICUNA_7B.keys() - {"architectures", "model_type", "torch_dtype", "rope_scaling"}:
        assert getattr(plain.text_config, key) == getattr(other.text_config, key)


@pytest.mark.parametrize("pad", [-1, None])
def test_the_pad_id_of_old_files_means_none(pad):
    assert read(VICUNA_7B | V15 | {"pad_token_id": pad}).text_config.pad_token_id is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mm_vision_select_layer": "last"}, "mm_vision_select_layer must be a whole number"),
        ({"mm_vision_select_layer": True}, "mm_vision_select_layer must be a whole number"),
        ({"mm_spatial_pool_stride": 2.5}, "mm_spatial_pool_stride must be a whole number"),
        ({"mm_spatial_pool_stride": 0}, "stride"),
        ({"faster_token_stride": "x", "add_faster_video": True}, "faster_token_stride"),
        ({"tokenizer_model_max_length": "long"}, "tokenizer_model_max_length"),
        ({"image_grid_pinpoints": [[336]]}, "pinpoint"),
        ({"image_grid_pinpoints": "(1x1"}, "pair"),
        ({"mm_patch_merge_type": "spatial_zork"}, "spatial_zork"),
        ({"architectures": "LlavaQwenForCausalLM"}, "architectures must be a list"),
        ({"architectures": ["Zork"]}, "'Zork'"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_wrong_values_are_named(changes, words):
    with pytest.raises((CheckpointError, UsageError), match=words):
        read(QWEN2_7B | VIDEO | changes)


@pytest.mark.parametrize("value", ["2", 2, 2.0])
def test_whole_numbers_may_be_spelled_otherwise(value):
    config = read(QWEN2_7B | VIDEO | {"mm_spatial_pool_stride": value})
    assert MediaPlanner(config).video(1).n_tokens == 210


# ---------------------------------------------------------------- our own layout


def own_config(**changes) -> AVLlavaConfig:
    parts = {
        "vision": VisionSettings(kind="siglip", select_layer=-1),
        "aggregator": AggregatorSettings(frame_end=True),
        "audio": AudioSettings(tower="whisper", pool_stride=5),
        "sampling": SamplingSettings(frames=7, fps=0.5),
        "sequence": SequenceSettings(media_tokens=("newline", "frame_end"), template="qwen_1_5"),
    }
    return AVLlavaConfig(
        text_config=Qwen2Config(vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
                                num_key_value_heads=1, tie_word_embeddings=True),
        vision_config=SiglipVisionConfig(image_size=56, patch_size=14),
        audio_config=WhisperConfig(d_model=32),
        au_token_ids=[48, 49],
        **{**parts, **changes},
    )  # fmt: skip


def test_a_round_trip_keeps_everything(tmp_path):
    config = own_config()
    data = json.loads(json.dumps(config.to_dict()))
    again = AVLlavaConfig.from_dict(data)
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(PARTS) | {"text_config", "vision_config", "audio_config", "au_token_ids"} <= set(
        saved
    )
    for name, kind in PARTS.items():  # every field is written, so that new defaults change nothing
        assert set(saved[name]) == set(kind().to_dict())
    loaded = AVLlavaConfig.from_pretrained(tmp_path)
    for name in PARTS:
        assert getattr(loaded, name) == getattr(config, name)
    assert loaded.text_config.to_dict() == config.text_config.to_dict()
    assert loaded.au_token_ids == (48, 49) and loaded.tie_word_embeddings


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_read_from_llavas_file_survives_saving(tmp_path, name):
    config = read(FAMILIES[name][0])
    config.save_pretrained(tmp_path)
    loaded = AVLlavaConfig.from_pretrained(tmp_path)
    for part in PARTS:
        assert getattr(loaded, part) == getattr(config, part)
    for network in ("text_config", "vision_config"):
        assert getattr(loaded, network).to_dict() == getattr(config, network).to_dict()
    assert MediaPlanner(loaded).video(8).n_tokens == FAMILIES[name][5](8)


def test_defaults_make_a_model_without_senses():
    config = AVLlavaConfig()
    assert isinstance(config.text_config, LlamaConfig)
    assert config.vision_config is None and config.audio_config is None
    assert config.media_token_ids == {"image": -200, "video": -201, "audio": -202}
    assert config.owned_marks == ()
    AVLlavaConfig.from_dict(config.to_dict())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sampling": {"framse": 3}}, "'framse'. Did you mean 'frames'?"),
        ({"vision": {"selct_layer": 3}}, "Did you mean 'select_layer'?"),
        ({"aggregator": {"slow": {"pool": {"strid": 2}}}}, "Did you mean 'stride'?"),
        ({"sampling": {"frames": "many"}}, "frames must be a number"),
        ({"sampling": {"frames": True}}, "frames must be a number"),
        ({"text_config": {"model_type": "zork"}}, "Unknown model_type 'zork'"),
    ],
)
def test_wrong_own_settings_are_named(data, words):
    with pytest.raises(UsageError, match="Unknown|must be") as caught:
        AVLlavaConfig(**data)
    assert words in str(caught.value)


# ---------------------------------------------------------------- overwrite_config


def test_llavas_names_change_llavas_file():
    data = QWEN2_7B | VIDEO
    changed = overwritten(
        data, {"mm_spatial_pool_mode": "average", "mm_newline_position": "no_token"}
    )
    assert MediaPlanner(read(changed)).video(2).n_tokens == 2 * 13 * 13
    assert data["mm_spatial_pool_mode"] == "bilinear"  # the argument is left alone


def test_the_language_models_names_change_it_too():
    changed = overwritten(
        MISTRAL_7B | V16, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    )
    rope = read(changed).text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 1000000.0)


@pytest.mark.parametrize("name", ["mm_spatial_pol_mode", "aggregator", "hiden_size"])
def test_a_name_that_changes_nothing_is_refused(name):
    with pytest.raises(UsageError, match=f"Unknown value of overwrite_config '{name}'"):
        overwritten(QWEN2_7B | VIDEO, {name: 1})


def test_parts_of_our_own_layout_are_merged():
    data = json.loads(own_config().to_json_string(use_diff=False))
    changed = overwritten(
        data,
        {
            "sampling": {"frames": 3},
            "aggregator": {"slow": {"pool": {"kind": "max"}}},
            "text_config": {"max_position_embeddings": 77},
            "au_token_ids": None,
        },
    )
    config = AVLlavaConfig(**{k: v for k, v in changed.items() if k != "model_type"})
    assert (config.sampling.frames, config.sampling.fps) == (3, 0.5)
    assert config.aggregator.slow.pool.kind == "max" and config.aggregator.frame_end
    assert config.text_config.max_position_embeddings == 77 and config.text_config.vocab_size == 50
    assert config.au_token_ids is None
    assert overwritten(data, None) == data


@pytest.mark.parametrize("spec", ["llava_video", "budget:2048", AggregatorSettings(newline="none")])
def test_an_aggregator_may_be_named(spec):
    from av_llava.aggregators import settings_of

    changed = overwritten(own_config().to_dict(), {"aggregator": spec})
    config = AVLlavaConfig(**{k: v for k, v in changed.items() if k != "model_type"})
    assert config.aggregator == settings_of(spec)


def test_rotary_scaling_keeps_the_base():
    config = own_config()
    config.text_config.rope_parameters["rope_theta"] = 5e5
    changed = overwritten(
        config.to_dict(), {"text_config": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}}
    )
    again = AVLlavaConfig(**{k: v for k, v in changed.items() if k != "model_type"})
    rope = again.text_config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (5e5, "linear", 4.0)


@pytest.mark.parametrize("name", LLAVA_FIELDS)
def test_llavas_names_are_refused_in_our_layout_with_the_part_that_holds_them(name):
    with pytest.raises(UsageError, match=f"{LLAVA_FIELDS[name]!r} holds it"):
        overwritten(own_config().to_dict(), {name: 1})


def test_other_names_are_refused_in_our_layout():
    with pytest.raises(UsageError, match="Did you mean 'sampling'"):
        overwritten(own_config().to_dict(), {"samplng": {}})


@pytest.mark.parametrize("network", ["text_config", "vision_config", "audio_config"])
def test_unknown_fields_of_networks_are_refused(network):
    with pytest.raises(UsageError, match=f"field of {network} in overwrite_config 'num_layerz'"):
        overwritten(own_config().to_dict(), {network: {"num_layerz": 1}})


HF = {
    "model_type": "llava_next",
    "vision_feature_layer": -2,
    "text_config": {"model_type": "mistral", "hidden_size": 64, "rope_theta": 1e6},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32},
}


def test_transformers_files_are_changed_field_by_field():
    scaling = {"rope_type": "linear", "factor": 2.0}
    changed = overwritten(
        HF, {"vision_feature_layer": -1, "text_config": {"rope_scaling": scaling}}
    )
    assert changed["vision_feature_layer"] == -1
    assert changed["text_config"] == HF["text_config"] | {"rope_scaling": scaling}
    assert overwritten(HF, {"image_grid_pinpoints": [[1, 1]]})["image_grid_pinpoints"] == [[1, 1]]


@pytest.mark.parametrize(
    "changes", [{"vision_featur_layer": -1}, {"text_config": {"hiden_size": 3}}]
)
def test_names_that_transformers_files_do_not_know_are_refused(changes):
    with pytest.raises(UsageError, match="Did you mean"):
        overwritten(HF, changes)
