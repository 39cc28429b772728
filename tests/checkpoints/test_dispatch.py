"""Models that accelerate spreads or offloads compute what a whole model computes."""

from __future__ import annotations

import gc
import json

import accelerate
import numpy as np
import pytest
import torch
from packaging.version import Version
from tiny import tiny

from av_llava.audio.configs import BeatsConfig
from av_llava.chat import MediaPart, normalize_messages
from av_llava.checkpoints.load import load_checkpoint
from av_llava.errors import CheckpointError, UsageError
from av_llava.inference import AVLlava
from av_llava.processor import AVLlavaProcessor

from .folders import V15, copy_case, load, read_weights, write_weights

PARTS = (
    "vision_tower",
    "mm_projector",
    "audio_tower",
    "mm_audio_projector",
    "media_tokens",
    "modalities",
)
RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 255, (5, 40, 60, 3), dtype=np.uint8)
SOUND = (RNG.normal(size=40_000) * 0.1).astype(np.float32)


def placement(*on_disk: str) -> dict[str, str]:
    names = [*(f"model.{p}" for p in PARTS), "model.language_model", "lm_head"]
    return {
        n: "disk" if n in on_disk or n.removeprefix("model.") in on_disk else "cpu" for n in names
    }


PLACEMENTS = {
    "auto": "auto",
    "cpu": "cpu",
    # old versions of accelerate do not put everything on disk
    "nearly all on disk": placement(*PARTS[2:], "vision_tower", "language_model", "lm_head"),
    "language model on disk": placement("language_model", "lm_head"),
    "towers on disk": placement("vision_tower", "audio_tower"),
    "projectors and marks on disk": placement("mm_projector", "mm_audio_projector", "media_tokens"),
    "one layer on disk": {
        **{k: v for k, v in placement().items() if k != "model.language_model"},
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": "disk",
        "model.language_model.layers.1": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
    },
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def saved(request, tmp_path_factory):
    """A folder and its processor; Qwen2's head is tied."""
    model, processor = tiny(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, processor


@torch.no_grad()
def outputs(folder, processor, dtype, device_map):
    """Logits of sight with sound, of text alone, and new ids through LLaVA's door."""
    model = load_checkpoint(folder, device="cpu", dtype=dtype, device_map=device_map).model
    talks = [normalize_messages("What?", [MediaPart("video", FRAMES)]), normalize_messages("Hello")]
    logits = []
    for talk in talks:
        sound = {"audio": SOUND} if talk is talks[0] else {}
        prepared = processor.prepare([talk], processor.media_options(**sound))
        embeds = model.prepare_inputs(prepared.media, **prepared.tensors)
        logits.append(model(inputs_embeds=embeds).logits)
    new = model.generate(
        torch.tensor([[5, -200, 6]]), images=[torch.zeros(2, 3, 56, 56)], modalities=["video"],
        max_new_tokens=3, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert logits[0].dtype == getattr(torch, dtype)
    return *logits, new


def skip_for_old_accelerate(folder) -> None:
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    if tied and Version(accelerate.__version__) < Version("1.15"):
        pytest.skip("this accelerate cannot keep tied weights on disk")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_gives_the_same_numbers(saved, dtype, name):
    device_map = PLACEMENTS[name]
    if name in ("nearly all on disk", "language model on disk"):
        skip_for_old_accelerate(saved[0])
    for ours, theirs in zip(
        outputs(*saved, dtype, device_map), outputs(*saved, dtype, None), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_old_versions_of_accelerate_are_not_trusted_with_tied_weights_on_disk(saved, monkeypatch):
    monkeypatch.setattr(accelerate, "__version__", "1.14.0")
    folder, processor = saved
    device_map = PLACEMENTS["language model on disk"]
    if processor.config.tie_word_embeddings:
        with pytest.raises(UsageError, match="accelerate 1.14.0 cannot keep tied"):
            load_checkpoint(folder, device="cpu", device_map=device_map)
    else:
        load_checkpoint(folder, device="cpu", device_map=device_map)
    load_checkpoint(folder, device="cpu", device_map=PLACEMENTS["towers on disk"])


def test_an_offloaded_model_can_be_asked(saved):
    folder, _ = saved
    skip_for_old_accelerate(folder)
    answers = []
    for device_map in (None, PLACEMENTS["nearly all on disk"]):
        loaded = load_checkpoint(folder, device="cpu", dtype="float32", device_map=device_map)
        owner = AVLlava(loaded.model, AVLlavaProcessor(loaded.tokenizer, loaded.model.config))
        assert owner.device == torch.device("cpu")
        session = owner.session([FRAMES, SOUND])
        texts = [
            str(owner.ask([FRAMES, SOUND], "What?", max_new_tokens=4)),
            str(session.ask("Why?", max_new_tokens=4)),
        ]
        answers.append(texts)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("mask_padding", [True, False])
def test_an_offloaded_tower_masks_padding(tmp_path, mask_padding):
    model, processor = tiny("llama")
    model.config.audio = model.config.audio.replace(mask_padding=mask_padding)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved = tmp_path, processor
    assert torch.equal(
        outputs(*saved, "float32", None)[0],
        outputs(*saved, "float32", PLACEMENTS["towers on disk"])[0],
    )


def test_an_offloaded_beats_tower_hears_the_same(tmp_path):
    from av_llava.modeling import AVLlavaForConditionalGeneration

    model, processor = tiny("llama")
    config = model.config
    config.audio_config = BeatsConfig(
        encoder_embed_dim=16, embed_dim=16, encoder_ffn_embed_dim=16, encoder_layers=2,
        encoder_attention_heads=2, conv_pos=16, conv_pos_groups=2,
    )  # fmt: skip
    config.audio = config.audio.replace(kind="beats")
    torch.manual_seed(0)
    AVLlavaForConditionalGeneration(config).eval().save_pretrained(tmp_path)
    processor = AVLlavaProcessor(processor.tokenizer, config)
    processor.save_pretrained(tmp_path)
    saved = tmp_path, processor
    assert torch.equal(
        outputs(*saved, "float32", None)[0],
        outputs(*saved, "float32", PLACEMENTS["towers on disk"])[0],
    )


def test_pickled_weights_are_offloaded_through_a_folder_that_goes_with_the_model(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder = copy_case(V15, tmp_path)
    write_weights(folder, read_weights(folder), "bin", 2)
    device_map = {
        k: v for k, v in placement("language_model", "lm_head").items() if "audio" not in k
    }
    ids = torch.tensor([[1, 5, 6]])
    offloaded = load(folder, device_map=device_map).model
    (kept,) = (tmp_path / "temporary").iterdir()
    assert any(kept.iterdir())
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, load(folder).model(ids).logits)
    del offloaded
    gc.collect()
    assert not kept.exists()


def test_tied_weights_cannot_be_parted(tmp_path):
    model, processor = tiny("qwen2")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="are one matrix: place them together"):
        load_checkpoint(tmp_path, device="cpu", device_map=placement("language_model"))


def test_a_tower_beside_the_checkpoint_is_not_offloaded(tmp_path):
    folder = copy_case(V15, tmp_path)
    device_map = {k: v for k, v in placement("vision_tower").items() if "audio" not in k}
    with pytest.raises(CheckpointError, match="cannot be offloaded") as caught:
        load(folder, device_map=device_map)
    assert str(tmp_path / "vision_tower") in str(caught.value)
    device_map |= {"model.vision_tower": "cpu", "model.language_model": "disk", "lm_head": "disk"}
    assert load(folder, device_map=device_map).model.lm_head.weight.is_meta


def test_a_placement_that_leaves_parts_out_is_refused(saved):
    with pytest.raises(UsageError, match="device_map"):
        load_checkpoint(
            saved[0], device="cpu", device_map={"lm_head": "disk", "model.vision_tower": "cpu"}
        )
