"""Every case of the LLaVA reference: spliced embeddings, logits, loss and greedy ids.

The reference's faults are not reproduced (docs/architecture.md lists them); those cases assert
what stands instead.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from golden_data import golden_dirs
from safetensors.torch import load_file

from av_llava.checkpoints.load import load_checkpoint
from av_llava.errors import BudgetError, UsageError

torch.set_num_threads(1)

CASES = [
    p
    for p in golden_dirs("llava/*")
    if (p / "checkpoint").is_dir() and (p / "inputs.safetensors").exists()
]
RAISES = {
    "v15_extra_image_ignored": (UsageError, "image slots"),
    "v15_image_reuse_when_missing": (UsageError, "image slots"),
    "v15_truncation_mid_image": (BudgetError, "cut image"),
}
# Shown elsewhere in this file, with the right answer instead of the reference's.
OTHER = {"v15_quirk_modalities_zip_drops_samples", "lv_odd_grid_stride4_ignored"}
OTHER |= {c.name for c in CASES if "BUG" in c.name}


def load_case(folder):
    meta = json.loads((folder / "meta.json").read_text())
    model = load_checkpoint(folder / "checkpoint", device="cpu", dtype="float32").model
    return (
        meta,
        model,
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "outputs.safetensors"),
    )


def door_arguments(meta, inputs):
    images = inputs.get("images_tensor")
    if images is None:
        numbers = sorted(int(k.split(".")[1]) for k in inputs if k.startswith("images."))
        images = [inputs[f"images.{i}"].float() for i in numbers]
    else:
        images = images.float()
    sizes = inputs.get("image_sizes")
    return {
        "images": images,
        "modalities": meta["modalities"],
        "image_sizes": None if sizes is None else [tuple(s) for s in sizes.tolist()],
    }


def run_door(model, meta, inputs):
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    return model.prepare_inputs_labels_for_multimodal(
        ids, positions, mask, None, inputs.get("labels"), **door_arguments(meta, inputs)
    )


def comparable(folder):
    return (
        folder.name not in RAISES
        and folder.name not in OTHER
        and not folder.name.startswith("layout_")
        and "helpers" not in folder.name
    )


@pytest.mark.parametrize("folder", [c for c in CASES if comparable(c)], ids=lambda p: p.name)
def test_case_agrees_with_the_reference(folder):
    meta, model, inputs, outputs = load_case(folder)
    if meta["training_mode"]:
        model.train()
        random.seed(meta["python_random_seed"])
    with torch.no_grad():
        ids, positions, mask, past, embeds, labels = run_door(model, meta, inputs)
    assert ids is None and past is None
    torch.testing.assert_close(embeds, outputs["inputs_embeds"], atol=1e-5, rtol=1e-5)
    if "attention_mask" in outputs:
        assert torch.equal(mask.bool(), outputs["attention_mask"].bool())
    assert torch.equal(positions, outputs["position_ids"].to(positions.dtype))
    if "labels" in outputs:
        assert torch.equal(labels, outputs["labels"])
    model.eval()
    with torch.no_grad():
        out = model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, labels=labels
        )
    if "logits" in outputs:
        keep = outputs["attention_mask"].bool() if "attention_mask" in outputs else slice(None)
        torch.testing.assert_close(out.logits[keep], outputs["logits"][keep], atol=1e-4, rtol=1e-4)
    if "loss" in outputs:
        torch.testing.assert_close(out.loss, outputs["loss"].squeeze(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "folder",
    [c for c in CASES if comparable(c) and (c / "outputs.safetensors").exists()],
    ids=lambda p: p.name,
)
def test_generation_agrees_with_the_reference(folder):
    outputs = load_file(folder / "outputs.safetensors")
    if "generated_ids" not in outputs:
        pytest.skip("the case generates nothing")
    meta, model, inputs, _ = load_case(folder)
    new = model.generate(
        inputs["input_ids"],
        attention_mask=inputs.get("attention_mask"),
        max_new_tokens=meta["generate"]["max_new_tokens"],
        do_sample=False,
        **door_arguments(meta, inputs),
    )
    wanted = outputs["generated_ids"]
    assert torch.equal(new, wanted[:, : new.shape[1]]) and new.shape == wanted.shape


@pytest.mark.parametrize("name", sorted(RAISES))
def test_what_the_reference_passes_over_is_an_error_here(name):
    folder = next((c for c in CASES if c.name == name), None)
    if folder is None:
        pytest.skip(f"golden {name} is not in this clone")
    meta, model, inputs, _ = load_case(folder)
    error, words = RAISES[name]
    with pytest.raises(error, match=words):
        run_door(model, meta, inputs)


def case(name):
    folder = next((c for c in CASES if c.name == name), None)
    if folder is None:
        pytest.skip(f"golden {name} is not in this clone")
    return load_case(folder)


def test_no_sample_is_dropped_when_modalities_are_broadcast():
    meta, model, inputs, outputs = case("v15_quirk_modalities_zip_drops_samples")
    with torch.no_grad():
        *_, embeds, _ = run_door(model, meta, inputs)
    kept = outputs["inputs_embeds"]  # the reference returns only the first sample
    assert len(embeds) == len(inputs["input_ids"]) > len(kept)
    n = int(outputs["attention_mask"][0].sum()) if "attention_mask" in outputs else kept.shape[1]
    torch.testing.assert_close(embeds[0, :n], kept[0, :n], atol=1e-5, rtol=1e-5)


def test_the_configured_stride_is_honoured():
    meta, model, inputs, outputs = case("lv_odd_grid_stride4_ignored")
    with torch.no_grad():
        *_, embeds, _ = run_door(model, meta, inputs)
    features = outputs["feat_projector"]  # [T, 25, D]: 5x5, stride 4 gives one patch and a newline
    rows = features.unflatten(1, (5, 5))[:, :4, :4].mean((1, 2))
    newline = model.model.media_tokens()["newline"].detach()
    expected = torch.stack([rows, newline.expand_as(rows)], dim=1).flatten(0, 1)
    ids = inputs["input_ids"][0]
    at = int((ids == -200).nonzero()[0])
    torch.testing.assert_close(embeds[0, at : at + len(expected)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["even", "odd"])
def test_each_video_of_a_batch_is_pooled_as_if_alone(family):
    name = f"sf_{family}_two_videos_BUG_stride_doubling"
    meta, model, inputs, _ = case(name)
    with torch.no_grad():
        *_, embeds, _ = run_door(model, meta, inputs)
    for sample in (0, 2):
        folder = next(
            (c for c in CASES if c.name == f"sf_{family}_two_videos_sample{sample}_alone"), None
        )
        if folder is None:
            continue
        alone = load_file(folder / "outputs.safetensors")["inputs_embeds"][0]
        torch.testing.assert_close(embeds[sample, : len(alone)], alone, atol=1e-5, rtol=1e-5)
