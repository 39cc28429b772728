"""Folders for transformers' own classes: the same logits, exact ways back, honest refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden_data import golden
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from av_llava.aggregators import build, settings_of
from av_llava.checkpoints import shards
from av_llava.checkpoints.configuration import read_config
from av_llava.checkpoints.convert import convert
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.load import load_checkpoint
from av_llava.checkpoints.source import clean_config
from av_llava.errors import CheckpointError, UsageError
from av_llava.planning import MediaPlanner
from av_llava.processor import AVLlavaProcessor
from av_llava.settings import (
    ImageSettings,
    ProjectorSettings,
    SamplingSettings,
    SequenceSettings,
    VisionSettings,
)

from .converting import assert_same_tensors, fingerprint, tensors
from .folders import LV, OV, V15, V16, copy_case, edit_json
from .stock_llava import CLASSES, CLIP, IMAGE_ID, VIDEO_ID, stock_folder, stock_model

torch.set_num_threads(1)

# What the case is exported as, and its samples whose images the class can take.
REFERENCE = {
    V15: ("llava", [0, 1, 2]),
    V16: ("llava_next", [0, 1, 2]),
    OV: ("llava_onevision", [0]),
    "ov70_single_large_interp": ("llava_onevision", [0]),
    "mistral_anyres_unpad_landscape": ("llava_next", [0]),
    "v16_anyres_unpad_tall": ("llava_next", [0]),
    "v15_cls_patch": ("llava", [0]),
}


def semantics(folder: Path) -> dict:
    """Everything that a folder's configuration says about the model."""
    config = read_config(CheckpointFolder(folder))[0]
    data = {k: v for k, v in config.to_dict().items() if k not in PASSING}
    for name in ("text_config", "vision_config"):
        data[name] = clean_config(getattr(config, name)).to_dict()
    return data


PASSING = ("architectures", "transformers_version", "_name_or_path", "dtype", "image_seq_length")
PASSING += ("video_seq_length",)


def load_hf(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


# ---------------------------------------------------------------- the same answers


@pytest.mark.parametrize("case", REFERENCE)
def test_transformers_class_gives_the_logits_of_the_reference(tmp_path, case):
    kind, samples = REFERENCE[case]
    source = golden(f"llava/{case}")
    report = convert("hf", source / "checkpoint", tmp_path / "hf", verify=True)
    assert report.difference < 1e-4 and report.mapped > 0 and not report.problems
    model = load_hf(tmp_path / "hf")
    assert model.config.model_type == kind
    inputs = load_file(source / "inputs.safetensors")
    outputs = load_file(source / "outputs.safetensors")
    for sample in samples:
        ids = inputs["input_ids"][sample]
        if "attention_mask" in inputs:
            ids = ids[inputs["attention_mask"][sample].bool()]
        n_rows = outputs[f"feat_final.{sample}"].shape[0]
        expanded = []
        for token in ids.tolist():
            expanded += [model.config.image_token_index] * n_rows if token == -200 else [token]
        given = {"input_ids": torch.tensor([expanded])}
        if -200 in ids:
            given |= pixels_of(inputs, sample, kind)
        with torch.no_grad():
            logits = model(**given).logits[0]
        wanted = outputs["logits"][sample, : len(expanded)]
        torch.testing.assert_close(logits[:, : wanted.shape[-1]], wanted, atol=1e-4, rtol=1e-4)


def pixels_of(inputs, sample, kind):
    if "images_tensor" in inputs:
        return {"pixel_values": inputs["images_tensor"][sample : sample + 1].float()}
    tiles = inputs[f"images.{sample}"].float()[None]
    width, height = inputs["image_sizes"][sample].tolist()
    return {"pixel_values": tiles, "image_sizes": torch.tensor([[height, width]])}


def plain(data):
    """A configuration of transformers' class without what says nothing about the model."""
    out = {k: plain(v) if isinstance(v, dict) else v for k, v in data.items() if k not in PASSING}
    if "text_config" in out:  # the class takes the value from the outer configuration
        out["text_config"].pop("tie_word_embeddings", None)
    return out


@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral", "gemma"])
@pytest.mark.parametrize("kind", CLASSES)
def test_from_transformers_and_back_is_exact(tmp_path, kind, text):
    tied = text in ("qwen2", "gemma")
    more = {"vision": CLIP} if kind == "llava_onevision" and text == "llama" else {}
    if more:
        more |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    stock = stock_model(kind, text=text, tie_word_embeddings=tied, **more)
    folder = stock_folder(stock, tmp_path / "stock")
    convert("llava", folder, tmp_path / "llava", verify=True)
    report = convert("hf", tmp_path / "llava", tmp_path / "hf", verify=True)
    assert report.difference < 1e-5 and not report.reshaped
    again = load_hf(tmp_path / "hf")
    assert type(again).__name__ == CLASSES[kind]
    assert_same_tensors(stock.state_dict(), again.state_dict())
    own, made = plain(stock.config.to_dict()), plain(again.config.to_dict())
    assert {k: made[k] for k in own} == own
    assert ("language_model.lm_head.weight" in tensors(tmp_path / "hf")) != tied


@pytest.mark.parametrize("case", [V15, V16, OV, "mistral_anyres_unpad_landscape"])
def test_llava_to_transformers_and_back_is_exact(tmp_path, case):
    source = golden(f"llava/{case}") / "checkpoint"
    convert("llava", source, tmp_path / "direct")
    convert("hf", source, tmp_path / "hf")
    convert("llava", tmp_path / "hf", tmp_path / "back", verify=True)
    assert_same_tensors(tensors(tmp_path / "direct"), tensors(tmp_path / "back"))
    assert semantics(tmp_path / "direct") == semantics(tmp_path / "back")
    assert_same_tokenizers(tmp_path / "direct", tmp_path / "back")


def assert_same_tokenizers(first, second):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        one, two = (json.loads((f / name).read_text()) for f in (first, second))
        assert one == two, name
    assert (first / "chat_template.jinja").exists() == (second / "chat_template.jinja").exists()


# ---------------------------------------------------------------- models of our own


def onevision_like(**parts):
    """A tiny model of ours as LLaVA-OneVision is laid out, whose vocabulary is full."""
    given = {
        "audio": False,
        "image": ImageSettings(
            aspect_ratio="anyres_max_4",
            patch_merge_type="spatial_unpad",
            grid_pinpoints=((56, 56), (112, 56), (56, 112), (112, 112)),
        ),
        "aggregator": settings_of("llava_onevision"),
    }
    return tiny(**{**given, **parts})


def next_video_like(**parts):
    """A tiny model of ours as transformers' LLaVA-NeXT-Video is laid out."""
    given = {
        "kind": "llama",
        "audio": False,
        "image": ImageSettings("anyres", "spatial_unpad", ((112, 56), (56, 112)), several="same"),
        "aggregator": settings_of("llava_next_video"),
    }
    return tiny(**{**given, **parts})


def flat_siglip(**parts):
    """A tiny model of ours as LLaVA 1.5 is laid out, with a SigLIP tower."""
    given = {
        "kind": "llama",
        "audio": False,
        "image": ImageSettings("pad"),
        "aggregator": settings_of("llava_video", {"newline": "none"}),
        "sequence": SequenceSettings(template="vicuna_v1"),
    }
    return tiny(**{**given, **parts})


def saved(pair, folder):
    model, processor = pair
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_vocabulary_grows_by_the_placeholders_and_shrinks_again(tmp_path, tied):
    source = saved(onevision_like(text={"tie_word_embeddings": tied}), tmp_path / "source")
    before = tensors(source)
    n = before["model.embed_tokens.weight"].shape[0]
    report = convert("hf", source, tmp_path / "hf", verify=True)
    assert report.difference < 1e-5
    names = ["language_model.lm_head.weight"] * (not tied)
    names.insert(0, "language_model.model.embed_tokens.weight")
    assert sorted(report.reshaped) == sorted(f"{k} ({n}, 64) to ({n + 2}, 64)" for k in names)
    table = tensors(tmp_path / "hf")["language_model.model.embed_tokens.weight"]
    assert torch.equal(table[:n], before["model.embed_tokens.weight"])
    for row in table[n:]:
        torch.testing.assert_close(row, table[:n].mean(0))
    data = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (data["image_token_index"], data["video_token_index"]) == (n, n + 1)
    assert data["text_config"]["vocab_size"] == n + 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("a<image>b<video>").input_ids.count(n) == 1
    assert tokenizer.padding_side == "left"
    back = convert("llava", tmp_path / "hf", tmp_path / "back", verify=True)
    assert back.difference == 0 and len(back.reshaped) == len(names)
    assert_same_tensors(before, tensors(tmp_path / "back"))
    assert semantics(source) == semantics(tmp_path / "back")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "back")) == n


def test_pinpoints_that_are_text_stay_text(tmp_path):
    image = ImageSettings("anyres_max_4", "spatial_unpad", "(1x1),...,(2x2)")
    wide = VisionSettings(kind="siglip", select_layer=-1, resize="exact")
    model, processor = onevision_like(image=image, vision=wide, **side_of(224))
    source = saved((model, processor), tmp_path / "source")
    convert("hf", source, tmp_path / "hf", verify=True)
    data = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [224, 448] in data["image_grid_pinpoints"] and len(data["image_grid_pinpoints"]) == 4
    convert("llava", tmp_path / "hf", tmp_path / "back")
    assert semantics(source) == semantics(tmp_path / "back")


def side_of(pixels):
    """A tower for larger pictures: LLaVA's ranges know certain sides only."""
    config = tiny()[0].config.vision_config
    config.image_size, config.patch_size = pixels, pixels // 4
    return {"vision_config": config}


def test_videos_pooled_before_the_projector_become_next_video(tmp_path):
    source = saved(next_video_like(), tmp_path / "source")
    report = convert("hf", source, tmp_path / "hf", verify=True)
    data = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert data["model_type"] == "llava_next_video" and report.difference < 1e-5
    assert (data["spatial_pool_mode"], data["spatial_pool_stride"]) == ("average", 2)
    convert("llava", tmp_path / "hf", tmp_path / "back")
    assert semantics(source) == semantics(tmp_path / "back")


def test_uneven_pooling_is_exported_with_a_note_on_the_processor(tmp_path):
    aggregator = settings_of("llava_next_video", {"pool": "max", "stride": 3})
    source = saved(next_video_like(aggregator=aggregator), tmp_path / "source")
    report = convert("hf", source, tmp_path / "hf", verify=True)
    assert report.difference < 1e-5
    assert any("writes 16 placeholders a frame, but the model makes 4" in n for n in report.notes)


def test_ears_are_left_out_when_asked(tmp_path):
    source = saved(onevision_like(audio=None), tmp_path / "source")
    with pytest.raises(CheckpointError, match="cannot express the audio tower.*--drop-audio"):
        convert("hf", source, tmp_path / "hf")
    report = convert("hf", source, tmp_path / "hf", drop_audio=True)
    (names,) = report.dropped.values()
    assert all(n.startswith(("model.audio_tower.", "model.mm_audio_projector.")) for n in names)
    assert len(names) + report.mapped == len(tensors(source))
    convert("llava", tmp_path / "hf", tmp_path / "back", verify=True)
    own, back = tensors(source), tensors(tmp_path / "back")
    assert_same_tensors({k: v for k, v in own.items() if k not in names}, back)


# ---------------------------------------------------------------- processors


def picture(width, height):
    rows, columns = torch.arange(height)[:, None, None], torch.arange(width)[None, :, None]
    pixels = 128 + 100 * torch.sin(rows / 9 + torch.arange(3)) * torch.cos(columns / 7)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def exported(case_or_pair, tmp_path):
    """(folder of the original, folder for transformers)"""
    if case_or_pair not in (V15, V16, flat_siglip):
        # transformers' processors for videos are made of it; so are those of these classes.
        pytest.importorskip("torchvision")
    if isinstance(case_or_pair, str):
        source = golden(f"llava/{case_or_pair}") / "checkpoint"
    else:
        source = saved(case_or_pair(), tmp_path / "source")
    convert("hf", source, tmp_path / "hf")
    return source, tmp_path / "hf"


def by_us(source, content):
    loaded = load_checkpoint(source, device="cpu", dtype="float32")
    processor = AVLlavaProcessor(loaded.tokenizer, loaded.model.config)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
    )
    with torch.no_grad():
        return inputs, loaded.model(**inputs).logits[0]


def by_transformers(folder, content):
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    with torch.no_grad():
        return inputs, load_hf(folder)(**inputs).logits[0]


@pytest.mark.parametrize(
    ("case", "size", "resized"),
    [
        (V15, (56, 56), False),
        (V15, (80, 44), True),
        (V16, (112, 56), True),  # the base view
        (V16, (90, 50), True),
        (OV, (70, 70), False),
        (OV, (100, 60), True),
        (onevision_like, (56, 56), False),
        (flat_siglip, (56, 56), False),
        (flat_siglip, (70, 40), True),
        (next_video_like, (56, 112), True),
    ],
)
def test_autoprocessor_prepares_what_our_processor_prepares(tmp_path, case, size, resized):
    source, folder = exported(case, tmp_path)
    content = [
        {"type": "image", "image": picture(*size)},
        {"type": "text", "text": "What is it?"},
    ]
    ours, wanted = by_us(source, content)
    theirs, logits = by_transformers(folder, content)
    rows = (
        theirs["input_ids"] == json.loads((folder / "config.json").read_text())["image_token_index"]
    )
    assert torch.equal(rows, ours["input_ids"] == -200)
    assert torch.equal(theirs["input_ids"][~rows], ours["input_ids"][~rows])
    if not resized:
        torch.testing.assert_close(logits[:, : wanted.shape[-1]], wanted, atol=1e-4, rtol=1e-4)
    config = read_config(CheckpointFolder(source))[0]
    tiles = ours["pixel_values"]
    levels = theirs["pixel_values"].reshape(tiles.shape)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (config.vision.image_mean, config.vision.image_std)
    )
    # Pillow and torchvision resize to within a level or two of 255.
    torch.testing.assert_close((levels * std + mean) * 255, tiles.float(), atol=2.5, rtol=0)


def test_several_images_in_one_prompt_of_onevision(tmp_path):
    source, folder = exported(onevision_like, tmp_path)
    images = [{"type": "image", "image": picture(*s)} for s in ((56, 56), (56, 56))]
    content = [*images, {"type": "text", "text": "Same?"}]
    ours, wanted = by_us(source, content)
    theirs, logits = by_transformers(folder, content)
    assert theirs["input_ids"].shape == ours["input_ids"].shape
    torch.testing.assert_close(logits[:, : wanted.shape[-1]], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [onevision_like, next_video_like])
def test_videos_through_autoprocessor(tmp_path, make):
    source, folder = exported(make, tmp_path)
    frames = torch.stack([torch.full((3, 56, 56), 40 * i, dtype=torch.uint8) for i in range(4)])
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text="<video>\nWhat?", videos=[frames], return_tensors="pt")
    config = read_config(CheckpointFolder(source))[0]
    video_id = json.loads((folder / "config.json").read_text())["video_token_index"]
    assert (inputs["input_ids"] == video_id).sum() == MediaPlanner(config).video(4).n_tokens
    with torch.no_grad():
        logits = load_hf(folder)(**inputs).logits
    assert logits.isfinite().all()


def test_start_and_end_tokens_are_in_the_prompt_format(tmp_path):
    source = copy_case(V15, tmp_path / "case")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.save_pretrained(source)
    edit_json(source / "config.json", mm_use_im_start_end=True)
    convert("hf", source, tmp_path / "hf", verify=True)
    content = [{"type": "image", "image": picture(56, 56)}, {"type": "text", "text": "What?"}]
    theirs, logits = by_transformers(tmp_path / "hf", content)
    ours, wanted = by_us(source, content)
    assert theirs["input_ids"].shape == ours["input_ids"].shape
    assert tokenizer.convert_tokens_to_ids("<im_start>") in theirs["input_ids"]
    torch.testing.assert_close(logits[:, : wanted.shape[-1]], wanted, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- what is remembered


def test_changes_made_in_transformers_win(tmp_path):
    source = saved(
        onevision_like(sampling=SamplingSettings(frames=5)),
        tmp_path / "source",
    )
    convert("hf", source, tmp_path / "hf")
    model = load_hf(tmp_path / "hf")
    model.config.vision_aspect_ratio = "anyres_max_3"
    model.config.image_grid_pinpoints = [[56, 56], [112, 112]]
    with torch.no_grad():
        model.model.image_newline.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    for file in (tmp_path / "hf").glob("*token*"):
        shutil.copy(file, tmp_path / "tuned")
    shutil.copy(tmp_path / "hf" / "processor_config.json", tmp_path / "tuned")
    report = convert("llava", tmp_path / "tuned", tmp_path / "back")
    config = read_config(CheckpointFolder(tmp_path / "back"))[0]
    assert config.sampling.frames == 5 and config.image_token_id == -200
    assert config.image.aspect_ratio == "anyres_max_3"
    assert config.image.grid_pinpoints == ((56, 56), (112, 112))
    own, back = tensors(source), tensors(tmp_path / "back")
    torch.testing.assert_close(back["model.image_newline"], own["model.image_newline"] + 1)
    assert own.keys() == back.keys()
    assert not report.problems


def test_a_value_that_changed_meanwhile_is_reported(tmp_path):
    source = saved(onevision_like(), tmp_path / "source")
    convert("hf", source, tmp_path / "hf")
    data = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert data["av_llava"]["settings"]["image.unpad_rounding"] == ["llava", "hf"]
    data["av_llava"]["settings"]["image.unpad_rounding"] = ["llava", "other"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(data))
    report = convert("llava", tmp_path / "hf", tmp_path / "back")
    assert any("now says another image.unpad_rounding" in note for note in report.notes)
    assert read_config(CheckpointFolder(tmp_path / "back"))[0].image.unpad_rounding == "hf"


@pytest.mark.parametrize(
    "record", [{}, {"settings": []}, {"settings": {"a": 1}, "added_tokens": []}]
)
def test_a_broken_record_is_an_error(tmp_path, record):
    source = saved(onevision_like(), tmp_path / "source")
    convert("hf", source, tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", av_llava=record)
    with pytest.raises(CheckpointError, match="'av_llava' is broken"):
        convert("llava", tmp_path / "hf", tmp_path / "back")


def test_loading_the_folder_directly_heeds_none_of_it(tmp_path):
    source = saved(onevision_like(), tmp_path / "source")
    convert("hf", source, tmp_path / "hf")
    config = load_checkpoint(tmp_path / "hf", device="cpu").model.config
    assert config.image.unpad_rounding == "hf" and config.image_token_id > 0


# ---------------------------------------------------------------- refusals


AGGREGATORS = {
    "llava_video": "a newline after each row",
    "frame_newline": "a newline after each frame",
    "llava_video_slowfast": r"slow and fast streams \(layout by_frame\)",
    "sf_llava": r"slow and fast streams \(layout slow_then_fast\)",
    "budget:64": "the aggregator 'budget'",
    "pllava": "frames that are selected or averaged over time",
    "llava_next_video:stage=post": "average pooling by 2 after the projector",
    "llava_onevision:stride=3": "bilinear pooling by 3",
}


@pytest.mark.parametrize("spec", AGGREGATORS)
def test_video_layouts_that_no_class_has_are_named(tmp_path, spec):
    aggregator = build(spec).settings
    marks = SequenceSettings(media_tokens=("frame_end", "newline"))
    for make in (onevision_like, next_video_like):
        source = saved(make(aggregator=aggregator, sequence=marks), tmp_path / make.__name__)
        if make is next_video_like and spec == "llava_onevision:stride=3":
            continue
        for dry_run in (True, False):
            with pytest.raises(
                CheckpointError, match=f"cannot express videos with {AGGREGATORS[spec]}"
            ):
                convert("hf", source, tmp_path / "hf", dry_run=dry_run)
        assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("case", [LV, "lv_odd_grid_average", "clip_video_grid_average"])
def test_reference_folders_with_other_videos_are_refused(tmp_path, case):
    with pytest.raises(CheckpointError, match="cannot express videos with"):
        convert("hf", golden(f"llava/{case}") / "checkpoint", tmp_path / "hf")


def test_still_images_of_a_video_model_can_be_asked_for(tmp_path):
    source = saved(next_video_like(aggregator=settings_of("llava_video")), tmp_path / "source")
    report = convert("hf", source, tmp_path / "hf", model_class="llava_next", verify=True)
    assert report.difference < 1e-5 and "takes still images" in report.notes[0]
    convert("llava", tmp_path / "hf", tmp_path / "back")
    assert semantics(source) == semantics(tmp_path / "back")


IMAGES = {
    "merge type": (
        ImageSettings("anyres", "spatial", ((112, 56),)),
        "image_aspect_ratio 'anyres' and mm_patch_merge_type 'spatial'",
    ),
    "max pooling": (
        ImageSettings("anyres", "spatial_maxpool2x2_unpad", ((112, 56),)),
        "'spatial_maxpool2x2_unpad'",
    ),
    "no base": (ImageSettings("anyres", "spatial_unpad_nobase", ((112, 56),)), "nobase"),
    "flat tiles": (ImageSettings("anyres", "flat", ((112, 56),)), "'anyres' and .* 'flat'"),
    "highres": (ImageSettings("highres", "flat", "56,112"), "'highres'"),
    "padded with a newline": (ImageSettings("pad", "spatial_unpad"), "'pad' and .*'spatial_unpad'"),
    "several": (
        ImageSettings("anyres_max_4", "spatial_unpad", ((112, 56),), several="square"),
        "cutting several images of one prompt by the rule 'square'",
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_layouts_that_no_class_has_are_named(tmp_path, name):
    image, words = IMAGES[name]
    source = saved(onevision_like(image=image), tmp_path / "source")
    with pytest.raises(CheckpointError, match=f"cannot express .*{words}"):
        convert("hf", source, tmp_path / "hf")


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("qwen2", {"projector": ProjectorSettings("mlp3x_gelu")}, "projector 'mlp3x_gelu'"),
        ("qwen2", {"projector": ProjectorSettings("ldpnetv2")}, "projector 'ldpnetv2'"),
        ("gemma2", {}, r"squashed logits \(final_logit_softcapping 30.0\)"),
    ],
)
def test_parts_that_no_class_has_are_named(tmp_path, kind, changes, words):
    more = {"head_dim": 16} if kind == "gemma2" else {}
    source = saved(onevision_like(kind=kind, text=more, **changes), tmp_path / "source")
    with pytest.raises(CheckpointError, match=f"cannot express .*{words}"):
        convert("hf", source, tmp_path / "hf")


def test_images_on_several_scales_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"several scales \(S2, \(56, 112, 168\)\)"):
        convert("hf", golden("llava/s2_single") / "checkpoint", tmp_path / "hf")


def test_another_class_than_fits_is_refused(tmp_path):
    source = golden(f"llava/{V15}") / "checkpoint"
    with pytest.raises(CheckpointError, match="cannot express"):
        convert("hf", source, tmp_path / "hf", model_class="llava_onevision")
    with pytest.raises(UsageError, match="Unknown model class 'lava'.*Did you mean 'llava'"):
        convert("hf", source, tmp_path / "hf", model_class="lava")


def test_a_difference_is_found_and_leaves_nothing(tmp_path, monkeypatch):
    source = golden(f"llava/{V15}") / "checkpoint"
    pieces = shards.Transfer.pieces

    def wrong(self, tensor):
        bend = "linear_1.weight" in self.name
        return [t * 1.1 if bend else t for t in pieces(self, tensor)]

    monkeypatch.setattr(shards.Transfer, "pieces", wrong)
    with pytest.raises(CheckpointError, match="differs from .* by .*, where at most 0.0001"):
        convert("hf", source, tmp_path / "hf", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_the_original_stays_as_it_was(tmp_path):
    source = copy_case(V16, tmp_path / "case")
    before = fingerprint(tmp_path / "case")
    convert("hf", source, tmp_path / "hf", verify=True)
    assert fingerprint(tmp_path / "case") == before


def test_another_type_of_weights(tmp_path):
    source = golden(f"llava/{V15}") / "checkpoint"
    report = convert("hf", source, tmp_path / "hf", dtype="bfloat16", verify=True)
    assert report.difference < 1e-4
    assert {t.dtype for t in tensors(tmp_path / "hf").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_ids_of_the_vocabulary_are_kept(tmp_path):
    folder = stock_folder(stock_model("llava_onevision"), tmp_path / "stock")
    convert("hf", folder, tmp_path / "hf")
    data = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (data["image_token_index"], data["video_token_index"]) == (IMAGE_ID, VIDEO_ID)
    assert data["av_llava"]["added_tokens"] == []


def test_names_of_both_versions_of_transformers_are_read(tmp_path):
    # Files of transformers 5 lack "vision_model."; ours have it, as those of 4.
    folder = stock_folder(stock_model("llava_next"), tmp_path / "stock")
    convert("hf", folder, tmp_path / "hf")
    made = tensors(tmp_path / "hf")
    assert any(k.startswith("vision_tower.vision_model.") for k in made)
    short = {k.replace(".vision_model.", "."): v for k, v in made.items()}
    assert_same_tensors(short, tensors(folder))
    save_file(short, tmp_path / "hf" / "model.safetensors")
    assert convert("llava", tmp_path / "hf", tmp_path / "back", verify=True).difference == 0


def test_the_class_of_every_kind_exists():
    assert all(CONFIG_MAPPING[kind] is not None for kind in CLASSES)
