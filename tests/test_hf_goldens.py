"""Every case of transformers' own LLaVA classes, through both doors and under both names on disk.

A case is the folder that transformers saved, with inputs and outputs: spliced embeddings, logits,
loss, greedy ids.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from golden_data import golden_dirs
from safetensors.torch import load_file, save_file

from av_llava.checkpoints.load import load_checkpoint

torch.set_num_threads(1)

CASES = [p for p in golden_dirs("hf/*") if (p / "case.json").is_file()]
MEDIA = ("pixel_values", "image_sizes", "batch_num_images", "pixel_values_videos")
cases = pytest.mark.parametrize("folder", CASES, ids=lambda p: p.name)
# Stock generation needs padding on the left.
GENERATED = [
    p for p in CASES if json.loads((p / "case.json").read_text())["padding_side"] == "left"
]


def load_case(folder):
    return (
        json.loads((folder / "case.json").read_text()),
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "outputs.safetensors"),
    )


def under_llava_names(folder, target):
    """The same checkpoint in LLaVA's names, without transformers' renaming having seen it."""
    case, _, _ = load_case(folder)
    names = {k["memory"]: k["original"] for k in case["key_map"]}
    state = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        memory = key.replace("language_model.lm_head", "lm_head")
        memory = memory.replace("language_model.model.", "model.language_model.")
        memory = memory if memory.startswith(("model.", "lm_head")) else f"model.{memory}"
        state[names[memory]] = tensor
    assert len(state) == len(names)
    save_file(state, target / "model.safetensors")
    load_checkpoint(folder, device="cpu").model.config.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(folder / name, target)
    return target


@pytest.fixture(params=["hf names", "llava names"])
def open_model(request, tmp_path):
    def load(folder):
        where = folder if request.param == "hf names" else under_llava_names(folder, tmp_path)
        return load_checkpoint(where, device="cpu", dtype="float32").model

    return load


def media_of(inputs):
    return {name: inputs[name] for name in MEDIA if name in inputs}


def check_run(model, ids, inputs, outputs):
    """Logits where there is content, and the loss."""
    with torch.no_grad():
        out = model(
            ids,
            attention_mask=inputs["attention_mask"],
            labels=inputs["labels"],
            **media_of(inputs),
        )
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[keep], outputs["logits"][keep], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, outputs["loss"].squeeze(), atol=1e-4, rtol=1e-4)


@cases
def test_expanded_ids_agree(folder, open_model):
    _, inputs, outputs = load_case(folder)
    model = open_model(folder)
    seen = {}
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    check_run(model, inputs["input_ids"], inputs, outputs)
    # Padding, too: it is text there as here.
    torch.testing.assert_close(
        seen["inputs_embeds"], outputs["inputs_embeds"], atol=1e-5, rtol=1e-5
    )
    assert torch.equal(seen["attention_mask"], inputs["attention_mask"])


@cases
def test_negative_media_ids_serve_as_well(folder):
    _, inputs, outputs = load_case(folder)
    model = load_checkpoint(folder, device="cpu", dtype="float32").model
    config, ids = model.config, inputs["input_ids"].clone()
    for name, negative in (("image_token_id", -200), ("video_token_id", -201)):
        ids[ids == getattr(config, name)] = negative
        setattr(config, name, negative)
    assert (ids < 0).any()
    check_run(model, ids, inputs, outputs)


@pytest.mark.parametrize("folder", GENERATED, ids=lambda p: p.name)
def test_generation_from_expanded_ids_agrees(folder, open_model):
    _, inputs, outputs = load_case(folder)
    model, wanted = open_model(folder), outputs["generated_new_ids"]
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=wanted.shape[1],
        do_sample=False,
        **media_of(inputs),
    )
    assert torch.equal(out, torch.cat([inputs["input_ids"], wanted], dim=1))


def door_arguments(case, inputs):
    """LLaVA's slots in reading order: an image or video for each sentinel.

    A sample of these cases holds one kind of medium only.
    """
    images, sizes, modalities = [], [], []
    stills, videos = iter(range(10**6)), iter(inputs.get("pixel_values_videos", ()))
    for sample, ids in enumerate(case["llava_input_ids"]):
        is_video = bool((case["n_video_tokens"] or [0] * 99)[sample])
        for _ in range(ids.count(-200)):
            modalities.append("video" if is_video else "image")
            if is_video:
                images.append(next(videos))
                sizes.append((1, 1))
                continue
            i = next(stills)
            pixels = inputs["pixel_values"][i]
            pixels = pixels[None] if pixels.ndim == 3 else pixels
            height, width = inputs["image_sizes"][i].tolist() if "image_sizes" in inputs else (1, 1)
            images.append(pixels[pixels.flatten(1).abs().sum(1) > 0])  # padding is zero
            sizes.append((width, height))
    return {"images": images, "image_sizes": sizes, "modalities": modalities or ["image"]}


@cases
def test_llavas_door_agrees(folder, open_model):
    case, inputs, outputs = load_case(folder)
    model = open_model(folder)
    rows = case["llava_input_ids"]
    length = max(len(r) for r in rows)
    ids = torch.tensor([r + [0] * (length - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows])
    assert model.config.sequence.padding_side == case["padding_side"]
    with torch.no_grad():
        _, _, new_mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            ids, None, mask, None, None, **door_arguments(case, inputs)
        )
        logits = model(inputs_embeds=embeds, attention_mask=new_mask).logits
    assert torch.equal(new_mask, inputs["attention_mask"])
    keep = new_mask.bool()
    wanted = outputs["inputs_embeds"][keep]
    torch.testing.assert_close(embeds[keep], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[keep], outputs["logits"][keep], atol=1e-4, rtol=1e-4)
    if "generated_new_ids" in outputs:
        wanted = outputs["generated_new_ids"]
        new = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=wanted.shape[1],
            do_sample=False,
            **door_arguments(case, inputs),
        )
        assert torch.equal(new, wanted)
