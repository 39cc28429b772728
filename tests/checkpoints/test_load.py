"""Full checkpoints: layouts, keys of old files, language models, marks; and each fault by name."""

from __future__ import annotations

import inspect
import json
import logging
import shutil

import pytest
import torch
from golden_data import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, GenerationConfig

from av_llava import config as config_module
from av_llava.checkpoints.configuration import read_config
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.load import load_checkpoint, locate
from av_llava.errors import AVLlavaError, CheckpointError, MissingExtraError, UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration

from .folders import (
    ABSENT,
    LV,
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
    write_sentencepiece,
    write_weights,
)

__all__ = ["public_path"]


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", [V15, OV])
def test_every_layout_gives_the_same_weights(tmp_path, case, kind, shards):
    folder = copy_case(case, tmp_path)
    plain = load(folder).model
    write_weights(folder, read_weights(folder), kind, shards)
    assert same_weights(load(folder).model, plain)


def test_the_references_sharded_bin_gives_the_references_logits():
    case = golden("llava/layout_sharded_bin")
    model = load(case / "checkpoint").model
    inputs, wanted = (load_file(case / f"{n}.safetensors") for n in ("inputs", "outputs"))
    with torch.no_grad():
        logits = model(inputs["input_ids"], images=inputs["images_tensor"].float()).logits
    torch.testing.assert_close(logits, wanted["logits"], atol=1e-4, rtol=1e-4)


def test_stored_values_reach_the_model_unchanged(tmp_path):
    folder = copy_case(V16, tmp_path)
    model, stored = load(folder).model, read_weights(folder)
    own = model.state_dict()
    assert torch.equal(own["model.language_model.norm.weight"], stored["model.norm.weight"])
    assert torch.equal(own["model.media_tokens.image_newline"], stored["model.image_newline"])
    assert torch.equal(own["lm_head.weight"], stored["lm_head.weight"])
    assert len(own) == len(stored)


def test_keys_that_hold_nothing_are_passed_over_and_logged(tmp_path, caplog):
    folder = copy_case(OV, tmp_path)
    plain = load(folder).model
    tower = "model.vision_tower.vision_tower.vision_model."
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        f"{tower}embeddings.position_ids": torch.arange(25)[None],
        f"{tower}head.probe": torch.ones(1, 1, 32),
        "model.vision_resampler.perceiver.latents": torch.ones(3, 4),
    }
    edit_weights(folder, **extra)
    with caplog.at_level(logging.INFO, "av_llava"):
        loaded = load(folder).model
    assert same_weights(loaded, plain)
    assert "4 tensors hold nothing that is used" in caplog.text
    assert all(key.rsplit(".", 1)[-1] in caplog.text for key in extra)


# ---------------------------------------------------------------- the language model


@pytest.mark.parametrize(
    ("case", "architecture", "model_type", "wanted"),
    [
        (V15, "LlavaLlamaForCausalLM", "llava", "llama"),
        (V15, "LlavaLlamaForCausalLM", "llava_qwen", "llama"),  # the architecture decides
        (V15, None, "llava", "llama"),
        (V15, None, "llava_llama", "llama"),
        (V15, "LlavaMistralForCausalLM", "llava", "mistral"),
        (V15, "LlavaMistralForCausalLM", "llava_mistral", "mistral"),
        (V15, None, "llava_mistral", "mistral"),
        (V15, "MobileLlamaForCausalLM", "mobilevlm", "llama"),
        (V15, "SomethingElse", "llava_llama", "llama"),  # unknown, so model_type decides
        (OV, "LlavaQwenForCausalLM", "llava", "qwen2"),
        (OV, "LlavaQwenForCausalLM", "llava_qwen", "qwen2"),
        (OV, None, "llava_qwen", "qwen2"),
        (OV, None, "llava_qwen2", "qwen2"),
    ],
)
def test_the_language_model_is_known(tmp_path, case, architecture, model_type, wanted):
    folder = copy_case(case, tmp_path)
    edit_config(folder, architectures=architecture and [architecture], model_type=model_type)
    assert load(folder).model.config.text_config.model_type == wanted


@pytest.mark.parametrize(
    "name", ["Llama", "Qwen", "Qwen3", "QwenMoe", "Mistral", "Mixtral", "Gemma", "Gemma2", "Phi3"]
)
def test_architectures_of_the_family_name_a_model_of_transformers(name):
    kinds = {"Qwen": "qwen2", "QwenMoe": "qwen2_moe"}
    found = config_module.language_model_type({"architectures": [f"Llava{name}ForCausalLM"]})
    assert found == kinds.get(name, name.lower()) and found in CONFIG_MAPPING


@pytest.mark.parametrize(("case", "value"), [(V15, True), (OV, True), (OV, False)])
def test_the_head_may_be_tied(tmp_path, case, value):
    folder = copy_case(case, tmp_path)
    edit_config(folder, tie_word_embeddings=value)
    if value:
        edit_weights(folder, **{"lm_head.weight": ABSENT})
    model = load(folder).model
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is value
    assert model.config.tie_word_embeddings is value


@pytest.mark.parametrize("stored", [True, False])
def test_a_config_silent_about_tying_is_decided_by_the_keys(tmp_path, stored):
    folder = copy_case(OV, tmp_path)
    edit_config(folder, tie_word_embeddings=ABSENT)
    if not stored:
        edit_weights(folder, **{"lm_head.weight": ABSENT})
    assert load(folder).model.config.tie_word_embeddings is not stored


def test_an_untied_head_must_be_there(tmp_path):
    folder = copy_case(OV, tmp_path)
    edit_config(folder, tie_word_embeddings=False)
    edit_weights(folder, **{"lm_head.weight": ABSENT})
    assert "Missing (1): lm_head.weight." in refusal(folder)


# ---------------------------------------------------------------- marks


def test_marks_are_owned_because_the_file_holds_them(tmp_path):
    folder = copy_case(LV, tmp_path)
    assert "model.faster_token" in read_weights(folder)
    edit_config(folder, add_faster_video=ABSENT, mm_patch_merge_type="flat")
    model = load(folder).model
    assert model.config.owned_marks == ("newline", "frame_end")
    assert not model.config.aggregator.frame_end  # held, but not asked for
    model.save_pretrained(tmp_path / "again")
    load(folder).tokenizer.save_pretrained(tmp_path / "again")
    assert same_weights(load(tmp_path / "again").model, model)


@pytest.mark.parametrize(
    ("case", "key"), [(V16, "model.image_newline"), (LV, "model.faster_token")]
)
def test_a_mark_that_is_asked_for_must_be_there(tmp_path, case, key):
    folder = copy_case(case, tmp_path)
    edit_weights(folder, **{key: ABSENT})
    assert f"Missing (1): {key}." in refusal(folder)


# ---------------------------------------------------------------- saving again


@pytest.mark.parametrize("case", [V15, V16, OV, LV])
def test_saved_folders_are_complete(tmp_path, case):
    from av_llava.processor import AVLlavaProcessor

    folder = copy_case(case, tmp_path)
    loaded = load(folder)
    out = tmp_path / "elsewhere" / "saved"
    loaded.model.save_pretrained(out)
    AVLlavaProcessor(loaded.tokenizer, loaded.model.config).save_pretrained(out)
    for part in ("checkpoint", "vision_tower", "vision_tower_siglip"):
        shutil.rmtree(tmp_path / part, ignore_errors=True)
    again = load(out)
    assert same_weights(again.model, loaded.model) and again.vision_tower is None
    for name in config_module.PARTS:
        assert getattr(again.model.config, name) == getattr(loaded.model.config, name)
    assert json.loads((out / "config.json").read_text())["model_type"] == "av_llava"
    names = set(read_weights(out))
    assert {"model.norm.weight", "model.mm_projector.0.weight"} <= names


# ---------------------------------------------------------------- generation


def test_generation_never_takes_the_config_for_its_settings(tmp_path):
    folder = copy_case(V15, tmp_path)
    assert edit_config(folder)["max_length"] == 20
    generation = load(folder).model.generation_config
    assert (generation.max_length, generation.eos_token_id, generation.bos_token_id) == (None, 2, 1)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": False}])
def test_published_temperatures_without_sampling_do_not_prevent_saving(tmp_path, sampling):
    folder = copy_case(V15, tmp_path)
    data = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, **sampling}
    (folder / "generation_config.json").write_text(json.dumps(data))
    model = load(folder).model
    assert model.generation_config.max_length == 4096
    assert model.generation_config.eos_token_id == 2, "generation would never stop"
    model.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == 2


def test_sampling_that_is_asked_for_stays(tmp_path):
    folder = copy_case(V15, tmp_path)
    data = {"temperature": 0.9, "do_sample": True, "eos_token_id": [2, 7]}
    (folder / "generation_config.json").write_text(json.dumps(data))
    generation = load(folder).model.generation_config
    assert (generation.temperature, generation.eos_token_id) == (0.9, [2, 7])


def test_a_broken_generation_config_is_named(tmp_path):
    folder = copy_case(V15, tmp_path)
    (folder / "generation_config.json").write_text("{")
    assert f"{folder / 'generation_config.json'} is not valid JSON" in refusal(folder)


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        (
            V15,
            {"model.mm_projector.0.weight": ABSENT},
            ["Missing (1): model.mm_projector.0.weight."],
        ),
        (V15, {"model.norm.weight": ABSENT}, ["Missing (1): model.norm.weight."]),
        (V15, {"model.extra.weight": torch.ones(2)}, ["Unexpected (1): model.extra.weight."]),
        (
            V15,
            {"model.mm_projector.0.weight": torch.ones(64, 48)},
            [
                "Wrong shape (1): model.mm_projector.0.weight: the file has (64, 48), the model needs (64, 32)."
            ],
        ),
        (
            V16,
            {"model.image_newline": torch.ones(32)},
            ["model.image_newline: the file has (32,), the model needs (64,)"],
        ),
        (
            V16,
            {"model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight": ABSENT},
            ["Missing (1): model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight."],
        ),
        (
            V16,
            {"model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": torch.ones(3)},
            ["vision_model.pre_layrnorm.bias: the file has (3,), the model needs (32,)"],
        ),
        (
            V15,
            {"model.norm.weight": ABSENT, "x": torch.ones(1), "lm_head.weight": torch.ones(2, 2)},
            [
                "Missing (1): model.norm.weight.",
                "Unexpected (1): x.",
                "Wrong shape (1): lm_head.weight",
            ],
        ),
    ],
)
def test_keys_are_named_as_the_file_names_them(tmp_path, case, changes, words):
    folder = copy_case(case, tmp_path)
    edit_weights(folder, **changes)
    message = refusal(folder)
    assert str(folder) in message and all(w in message for w in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, ["Missing (9): model.layers.2."]),
        ({"num_hidden_layers": 1}, ["Unexpected (9): model.layers.1."]),
        ({"hidden_size": 32}, ["Wrong shape (25)", "and 13 more"]),
        (
            {"vocab_size": 321},
            ["model.embed_tokens.weight: the file has (320, 64), the model needs (321, 64)"],
        ),
        (
            {"mm_projector_type": "linear"},
            ["Missing (2)", "Unexpected (4)", "model.mm_projector.2.bias"],
        ),
        ({"mm_patch_merge_type": "spatial_unpad"}, ["Missing (1): model.image_newline."]),
        ({"architectures": ["LlavaQwenForCausalLM"]}, ["Missing (6)", "self_attn.q_proj.bias"]),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path, changes, words):
    folder = copy_case(V15, tmp_path)
    edit_config(folder, **changes)
    message = refusal(folder)
    assert "does not fit its config.json" in message and all(w in message for w in words), message


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["LlavaZorkForCausalLM"], "model_type": "llava"},
            ["'LlavaZorkForCausalLM'", "not known"],
        ),
        ({"architectures": None, "model_type": "llava_zork"}, ["llava_zork"]),
        ({"architectures": "LlavaLlamaForCausalLM"}, ["architectures"]),
        ({"mm_projector_type": "zork"}, ["Unknown projector 'zork'"]),
        ({"image_aspect_ratio": "zork"}, ["Unknown image aspect ratio 'zork'"]),
        ({"mm_patch_merge_type": "zork"}, ["Unknown patch merge type 'zork'"]),
        ({"mm_vision_select_feature": "zork"}, ["zork"]),
        ({"mm_vision_select_layer": -9}, ["-9"]),
        ({"mm_vision_select_layer": "last"}, ["mm_vision_select_layer", "'last'"]),
        ({"mm_spatial_pool_stride": 0}, ["stride"]),
        ({"mm_spatial_pool_stride": 1.5}, ["mm_spatial_pool_stride", "1.5"]),
        ({"mm_spatial_pool_mode": "zork"}, ["Unknown pooling mode 'zork'"]),
        ({"mm_newline_position": "zork", "mm_patch_merge_type": "spatial"}, ["zork"]),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(1,"}, ["'[(1,'"]),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[1, 2, 3]]}, ["pinpoint"]),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[60, 60]]}, ["60"]),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": None}, ["pinpoints"]),
        ({"tokenizer_padding_side": "top"}, ["padding side 'top'"]),
        ({"s2": True, "s2_scales": "56,wide"}, ["s2_scales", "'wide'"]),
        ({"s2": True, "s2_scales": "56,80"}, ["80"]),
        ({"torch_dtype": "float99"}, ["float99"]),
        ({"torch_dtype": "int8"}, ["int8"]),
        ({"hidden_size": "big"}, ["hidden_size", "'big'"]),
        ({"hidden_act": "zork"}, ["zork"]),
        ({"num_attention_heads": 5}, ["attention heads (5)"]),
        ({"rope_scaling": {"rope_type": "zork", "factor": 2.0}}, ["zork"]),
        ({"pad_token_id": 320}, ["Padding_idx"]),
    ],
)
def test_a_wrong_value_is_blamed_on_the_file(tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(AVLlavaForConditionalGeneration, "from_pretrained", None)  # found earlier
    folder = copy_case(V15, tmp_path)
    edit_config(folder, **changes)
    message = refusal(folder, dtype="auto")
    assert str(folder / "config.json") in message and all(w in message for w in words), message


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text("ab1-", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=1), inner, max_size=1)
    ),
    max_leaves=3,
)


@pytest.mark.parametrize("case", [V15, OV])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_no_value_in_a_config_ends_in_another_error(case, data):
    folder = CheckpointFolder(golden(f"llava/{case}") / "checkpoint")
    key = data.draw(st.sampled_from(sorted(folder.config)))
    try:
        config, _ = read_config(folder, {key: data.draw(_JSON)})
    except AVLlavaError:
        return
    assert config.to_dict()


@pytest.mark.parametrize(
    "data", [{}, {"model_type": "bert"}, {"model_type": "llama", "vocab_size": 3}]
)
def test_other_models_are_refused(tmp_path, data):
    folder = copy_case(V15, tmp_path)
    (folder / "config.json").write_text(json.dumps(data))
    message = refusal(folder)
    assert (
        "not a checkpoint of the LLaVA family" in message
        and repr(data.get("model_type")) in message
    )


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            {"sampling": {"framse": 3}},
            "Unknown setting of SamplingSettings 'framse'. Did you mean 'frames'?",
        ),
        ({"aggregator": {"newlin": "row"}}, "Did you mean 'newline'?"),
        ({"aggregator": {"slow": {"poll": {}}}}, "'poll'. Did you mean 'pool'?"),
        ({"sampling": {"frames": "many"}}, "frames must be a number, not 'many'"),
        ({"vision": {"image_mean": 7}}, "config.json"),
        ({"vision": {"kind": "zork"}}, "Unknown vision tower 'zork'"),
        ({"vision_config": {"model_type": "zork"}}, "Unknown model_type 'zork'"),
        ({"text_config": {"model_type": "llama", "hidden_size": "x"}}, "hidden_size"),
        ({"audio": {"kind": "zork"}}, "zork"),
    ],
)
def test_our_own_layout_is_checked_too(tmp_path, own_folder, part, words):
    folder = shutil.copytree(own_folder, tmp_path / "own")
    edit_config(folder, **part)
    message = refusal(folder)
    assert str(folder / "config.json") in message and words in message, message


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    from tiny import tiny

    model, processor = tiny("llama")
    folder = tmp_path_factory.mktemp("own")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- folders


def test_a_file_is_not_a_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    assert f"{file} is a file" in refusal(file)


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path_is_refused(path):
    assert "empty" in refusal(path)


def test_an_absent_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("av_llava.checkpoints.load.fetch", None)
    assert f"{str(tmp_path / 'none')!r} does not exist" in refusal(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("someone/absent-repository", "the hub cannot be reached"),
        ("what ever/x/y", "is not the name of a repository"),
    ],
)
def test_the_hubs_answer_is_told(tmp_path, monkeypatch, name, why):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal(name)
    assert f"{name!r} is not a folder here" in message and why in message


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "x" * 5000])
def test_impossible_paths_are_refused(path):
    assert path in refusal(path)


def test_a_locked_folder_is_named(public_path):
    (public_path / "inner" / "checkpoint").mkdir(parents=True)
    with locked(public_path / "inner"), pytest.raises(CheckpointError, match="Permission denied"):
        locate(public_path / "inner" / "checkpoint")


def test_an_adapter_beside_full_weights_is_not_attached_silently(tmp_path):
    folder = copy_case(V15, tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "adapter_config.json" in refusal(folder)


def test_wrong_arguments_are_the_callers_fault(tmp_path):
    folder = copy_case(V15, tmp_path)
    for options, words in [
        ({"attn_implementation": "zork"}, "attn_implementation='zork'"),
        ({"device_map": "everywhere"}, "device_map is 'everywhere'"),
        ({"dtype": "zork"}, "Unknown dtype 'zork'"),
        ({"device": "gpu"}, "Unknown device 'gpu'"),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            load(folder, **options)
        assert caught.value.exit_code == 2


def test_originals_are_only_read(tmp_path):
    folder = copy_case(V15, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    load(folder)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# ---------------------------------------------------------------- tokenizers


def without_tokenizer(folder):
    for file in [*folder.glob("*token*"), *folder.glob("vocab*")]:
        file.unlink()


def test_a_missing_tokenizer_is_named_before_the_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(AVLlavaForConditionalGeneration, "from_pretrained", None)
    folder = copy_case(V15, tmp_path)
    without_tokenizer(folder)
    message = refusal(folder)
    assert f"{folder} holds no tokenizer" in message and "tokenizer.json" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model": 3}'])
def test_a_broken_tokenizer_is_named(tmp_path, name, text):
    folder = copy_case(V15, tmp_path)
    (folder / name).write_text(text)
    if (name, text) == ("tokenizer_config.json", '{"model": 3}'):
        load(folder)  # an unknown field of the settings
        return
    message = refusal(folder)
    assert str(folder) in message and "tokenizer" in message


def test_settings_alone_are_no_tokenizer(tmp_path):
    folder = copy_case(V15, tmp_path)
    (folder / "tokenizer.json").unlink()
    assert f"The tokenizer in {folder} cannot be read" in refusal(folder)


def test_no_code_of_a_tokenizer_is_run(tmp_path, monkeypatch):
    folder = copy_case(V15, tmp_path)
    proof = tmp_path / "it-ran"
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
    )
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass EvilTokenizer: pass\n")
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a question was asked"))
    try:
        load(folder)
    except CheckpointError as error:
        assert "tokenizer" in str(error)  # noqa: PT017
    assert not proof.exists()


def test_a_sentencepiece_tokenizer_says_what_to_install(tmp_path, monkeypatch):
    folder = copy_case(V15, tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"model")
    for module, package in [("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")]:
        monkeypatch.setattr(
            "av_llava.checkpoints.tokenizers._is_installed", lambda m, gone=module: m != gone
        )
        with pytest.raises(MissingExtraError, match="tokenizer.model") as caught:
            load(folder)
        assert caught.value.package == package and caught.value.exit_code == 6


def test_a_sentencepiece_tokenizer_loads(tmp_path):
    folder = copy_case(V15, tmp_path)
    own = write_sentencepiece(folder)
    tokenizer = load(folder).tokenizer
    for prompt in ("What is in this image?", "USER: héllo\nASSISTANT:"):
        assert tokenizer(prompt).input_ids == [1, *own.encode(prompt)]
    assert tokenizer.pad_token_id == 0


def test_tokens_beyond_the_matrix_are_warned_about_and_refused_in_prompts(tmp_path, caplog):
    import av_llava

    folder = copy_case(V15, tmp_path)
    loaded = load(folder)
    assert len(loaded.tokenizer) < 320
    rows = 16 + len(loaded.tokenizer)
    extra = [f"<extra_{i}>" for i in range(20)]
    loaded.tokenizer.add_tokens(extra)
    loaded.tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.WARNING, "av_llava"):
        model = av_llava.load(folder, device="cpu", dtype="float32")
    assert (
        rows == 320
        and "4 token(s) beyond the 320 rows" in caplog.text
        and "<extra_16>" in caplog.text
    )
    model.ask(None, "a <extra_15> b", max_new_tokens=1)
    with pytest.raises(UsageError, match="token 320, but the embedding matrix has 320 rows"):
        model.ask(None, "a <extra_16> b", max_new_tokens=1)
    import numpy as np

    session = model.session(np.zeros((56, 56, 3), np.uint8), max_new_tokens=1)
    with pytest.raises(UsageError, match="token 323"):
        session.ask("<extra_19>")


def test_a_pad_token_beyond_the_matrix_is_replaced(tmp_path):
    folder = copy_case(V15, tmp_path)
    tokenizer = load(folder).tokenizer
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(20)])
    tokenizer.pad_token = "<extra_19>"
    tokenizer.save_pretrained(folder)
    assert load(folder).tokenizer.pad_token_id == tokenizer.unk_token_id


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path):
    folder = copy_case(V15, tmp_path)
    edit_json(folder / "tokenizer_config.json", pad_token=None, unk_token=None, eos_token=None)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert "no token to pad with" in refusal(folder)


def test_the_signature_is_that_of_the_issue():
    names = list(inspect.signature(load_checkpoint).parameters)
    assert names[0] == "path" and {"device", "dtype", "device_map"} <= set(names)
