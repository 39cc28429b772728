"""The example of docs/extending.md runs, and what it registers is really used."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from av_llava import modalities
from av_llava.aggregators import PRESETS
from av_llava.chat import MEDIA_IDS, MEDIA_TOKENS, TEMPLATES, MediaPart, normalize_messages
from av_llava.errors import UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.projectors import PROJECTORS
from av_llava.vision import VISION_TOWERS

torch.set_num_threads(1)
PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
REGISTRIES = (
    VISION_TOWERS,
    PROJECTORS,
    PRESETS,
    TEMPLATES,
    modalities.MODALITIES,
    MEDIA_TOKENS,
    MEDIA_IDS,
)


@pytest.fixture
def example():
    before = [dict(r) for r in REGISTRIES]
    names: dict = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
            exec(block, names)
        yield names
    finally:
        for registry, content in zip(REGISTRIES, before, strict=True):
            registry.clear()
            registry.update(content)


def test_the_example_is_short():
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1]
    assert len([line for line in block.splitlines() if line.strip()]) < 70


def test_every_part_is_used(example):
    model, processor = example["model"], example["processor"]
    assert type(model.model.vision_tower).__name__ == "MirrorTower"
    assert type(model.model.mm_projector).__name__ == "GatedProjector"
    assert example["inputs"]["media"].splice.n_tokens("depth") == 5
    assert (example["inputs"]["input_ids"] == MEDIA_IDS["<depth>"]).sum() == 5
    assert example["answer"].shape[1] == example["inputs"]["input_ids"].shape[1] + 4
    frames = np.zeros((8, 56, 56, 3), np.uint8)
    talk = normalize_messages("What?", [MediaPart("video", frames)])
    prepared = processor.prepare([talk])
    assert "ANSWER LOUDLY." in prepared.texts[0]
    (plan,) = prepared.media.videos
    assert sum(s.n_items for s in plan.streams) == 3


def test_a_modality_changes_the_logits_and_gets_gradients(example):
    model, processor = example["model"], example["processor"]
    results = []
    for value in (0.0, 1.0):
        part = MediaPart("depth", [[value] * 16] * 4)
        prepared = processor.prepare([normalize_messages("How far?", [part])])
        results.append(model(media=prepared.media, **prepared.tensors).logits)
    assert not torch.allclose(*results)
    results[1].sum().backward()
    assert model.model.modalities["depth"].weight.grad.abs().sum() > 0


def test_a_model_with_a_modality_saves_and_loads(example, tmp_path):
    model = example["model"]
    model.save_pretrained(tmp_path)
    again = AVLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(
        again.model.modalities["depth"].weight, model.model.modalities["depth"].weight
    )
    modalities.MODALITIES.clear()
    with pytest.raises(UsageError, match="import the module that registers it"):
        AVLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_name_cannot_be_taken_twice():
    class Image(modalities.Modality):
        name = "image"

        def preprocess(self, source):
            return torch.zeros(1)

        def n_tokens(self, item):
            return 1

        def build(self, width):
            return torch.nn.Identity()

    with pytest.raises(UsageError, match="'image' is registered already"):
        modalities.register(Image())
