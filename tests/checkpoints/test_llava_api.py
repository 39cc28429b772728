"""``load_pretrained_model`` as LLaVA's users call it, from a prompt and a picture to an answer."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

import av_llava
from av_llava.chat import tokenizer_image_token
from av_llava.errors import CheckpointError, UsageError
from av_llava.settings import IMAGE_TOKEN_INDEX

from .folders import LV, OV, V15, V16, copy_case, edit_config, load, same_weights

PROMPT = "A chat. USER: <image>\nWhat is in this picture? ASSISTANT:"
PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8), "RGB"
)


def open_model(folder, **options):
    return av_llava.load_pretrained_model(
        str(folder), None, "llava", **{"device": "cpu", "dtype": "float32", **options}
    )


def oracle(model, ids, n_new, **media):
    """Greedy decoding by LLaVA's own door, without a cache."""
    out = []
    for _ in range(n_new):
        prompt = torch.cat([ids, torch.tensor([out], dtype=torch.long)], dim=1)
        _, _, _, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            prompt, None, None, None, None, **media
        )
        out.append(int(model(inputs_embeds=embeds).logits[0, -1].argmax()))
    return torch.tensor([out])


def test_the_signature_is_llavas():
    names = list(inspect.signature(av_llava.load_pretrained_model).parameters)
    assert names == [
        "model_path", "model_base", "model_name", "load_8bit", "load_4bit", "device_map",
        "device", "dtype", "attn_implementation", "overwrite_config",
    ]  # fmt: skip


@pytest.mark.parametrize("case", [V15, V16, OV])
@torch.no_grad()
def test_a_picture_and_a_prompt_give_an_answer(tmp_path, case):
    tokenizer, model, processor, context = open_model(copy_case(case, tmp_path))
    assert context == model.config.text_config.max_position_embeddings == 2048
    pixels = processor.preprocess(PICTURE, return_tensors="pt")["pixel_values"]
    side = model.config.vision_config.image_size
    assert pixels.shape == (1, 3, side, side) and pixels.dtype == torch.float32
    ids = tokenizer_image_token(PROMPT, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    media = {"images": [pixels[0]], "image_sizes": [PICTURE.size]}
    new = model.generate(ids, **media, do_sample=False, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(new, oracle(model, ids, 5, **media))
    assert isinstance(tokenizer.batch_decode(new, skip_special_tokens=True)[0], str)


@torch.no_grad()
def test_frames_of_a_video_give_an_answer(tmp_path):
    tokenizer, model, processor, _ = open_model(copy_case(LV, tmp_path))
    frames = [PICTURE.rotate(90 * i) for i in range(4)]
    pixels = processor.preprocess(frames, return_tensors="pt")["pixel_values"]
    assert len(pixels) == 4
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    media = {"images": [pixels], "modalities": ["video"]}
    new = model.generate(ids, **media, do_sample=False, max_new_tokens=4, eos_token_id=None)
    assert torch.equal(new, oracle(model, ids, 4, **media))


def test_a_float16_checkpoint_answers_on_a_cpu_with_the_processors_pixels(tmp_path):
    folder = copy_case(V15, tmp_path)
    edit_config(folder, torch_dtype="float16")
    tokenizer, model, processor, _ = open_model(folder, dtype=None)
    assert model.dtype == torch.bfloat16
    pixels = processor.preprocess(PICTURE, return_tensors="pt")["pixel_values"]
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    answers = [
        model.generate(ids, images=[p], do_sample=False, max_new_tokens=3)
        for p in (pixels, pixels.half(), pixels.bfloat16())
    ]
    assert torch.equal(answers[0], answers[2]) and answers[1].shape[0] == 1


@pytest.mark.parametrize(
    ("options", "kind", "stride", "newline"),
    [
        ({}, "average", 2, "row"),
        ({"mm_spatial_pool_mode": "max"}, "max", 2, "row"),
        ({"mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": 3}, "bilinear", 3, "row"),
        ({"mm_newline_position": "frame"}, "average", 2, "frame"),
        ({"mm_newline_position": "no_token"}, "average", 2, "none"),
    ],
)
def test_pooling_can_be_overwritten_as_in_llavas_evaluation(
    tmp_path, options, kind, stride, newline
):
    _, model, _, _ = open_model(copy_case(LV, tmp_path), overwrite_config=options)
    chosen = model.config.aggregator
    assert (chosen.slow.pool.kind, chosen.slow.pool.stride, chosen.newline) == (
        kind,
        stride,
        newline,
    )
    assert model.model.planner.video(6).n_tokens > 0


def test_what_is_overwritten_changes_the_answer(tmp_path):
    folder = copy_case(LV, tmp_path)
    frames = torch.rand(3, 3, 70, 70)
    ids = torch.tensor([[5, -200, 6]])

    def embeds(**options):
        model = open_model(folder, overwrite_config=options)[1]
        return model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, [frames], ["video"]
        )[4]

    assert embeds().shape != embeds(mm_spatial_pool_stride=1).shape
    assert not torch.allclose(embeds(), embeds(mm_spatial_pool_mode="max"))
    assert torch.equal(embeds(), embeds(mm_spatial_pool_mode="average"))


def test_a_wrong_overwrite_is_refused(tmp_path):
    folder = copy_case(LV, tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'mm_spatial_pool_mode'"):
        open_model(folder, overwrite_config={"mm_spatial_pol_mode": "max"})
    with pytest.raises(CheckpointError, match="with overwrite_config of mm_spatial_pool_mode"):
        open_model(folder, overwrite_config={"mm_spatial_pool_mode": "median"})


def test_our_own_folders_take_our_own_names(tmp_path):
    folder = copy_case(LV, tmp_path)
    loaded = load(folder)
    own = tmp_path / "own"
    loaded.model.save_pretrained(own)
    loaded.tokenizer.save_pretrained(own)
    with pytest.raises(UsageError, match="'aggregator' holds it"):
        open_model(own, overwrite_config={"mm_spatial_pool_mode": "max"})
    change = {"slow": {"pool": {"kind": "max"}}}
    _, model, _, _ = open_model(own, overwrite_config={"aggregator": change})
    assert model.config.aggregator.slow.pool.kind == "max"
    theirs = open_model(folder, overwrite_config={"mm_spatial_pool_mode": "max"})[1]
    fast = {"fast": {"pool": {"kind": "max"}}}
    _, model, _, _ = open_model(own, overwrite_config={"aggregator": change | fast})
    assert model.config.aggregator == theirs.config.aggregator
    assert same_weights(model, theirs)


@pytest.mark.parametrize("device", [None, "auto", "cpu", torch.device("cpu")])
def test_devices_may_be_left_out(tmp_path, device):
    _, model, _, _ = open_model(copy_case(V15, tmp_path), device=device)
    assert next(model.parameters()).device.type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", [None, "anything", "llava-lora-qwen-mpt"])
def test_the_name_says_nothing(tmp_path, name):
    folder = copy_case(V15, tmp_path)
    _, model, _, _ = av_llava.load_pretrained_model(
        folder, model_name=name, device="cpu", dtype="fp32"
    )
    assert same_weights(model, load(folder).model)
