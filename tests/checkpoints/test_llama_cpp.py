"""llama.cpp itself reads exported files, and computes from them what this package computes.

It runs as a program of its own (llama_client.py), with the Python that has llama-cpp-python: this
one, that of AV_LLAVA_LLAMA_PYTHON, or that of .venv-llama in the repository, which `make llama-test`
makes (about three minutes on two free cores).
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from av_llava.checkpoints.gguf import export_gguf
from av_llava.checkpoints.load import load_checkpoint
from av_llava.processor import AVLlavaProcessor

from .gguf_models import OV, TEXTS, TILES, V15, byte_level, checkpoint, model_folder, sentencepiece

pytest.importorskip("gguf")
pytestmark = pytest.mark.slow
torch.set_num_threads(1)

CLIENT = Path(__file__).with_name("llama_client.py")
REPOSITORY = Path(__file__).parents[2]
PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"
N_NEW = 12
# Root mean squares of differences, relative to that of ours. llama.cpp looks GELU up in float16
# tables and approximates it by tanh, so that tower and projector agree to three digits in any type;
# the language model to all digits of float32. q8_0 rounds weights and inputs of a product to a
# 127th of the largest of 32, which costs 0.7 % of its result; nine products follow one another.
LANGUAGE = {"f32": 2e-6, "f16": 2e-3, "q8_0": 4e-2}
WHOLE = {"f32": 2e-3, "f16": 3e-3, "q8_0": 5e-2}


@functools.cache
def interpreter():
    """A Python that has llama_cpp; None if there is none."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return sys.executable
    named = os.environ.get("AV_LLAVA_LLAMA_PYTHON")
    for python in (named, REPOSITORY / ".venv-llama" / "bin" / "python"):
        if python is not None and Path(python).exists():
            return str(python)
    return None


@pytest.fixture(autouse=True)
def _client():
    if interpreter() is None:
        pytest.skip("llama-cpp-python is not installed: make llama-test")


def run(tmp_path, **job):
    """Ask llama.cpp; see llama_client.py."""
    out = tmp_path / "answer.npz"
    job = {"mmproj": None, "images": None, "prompt": None, "texts": [], "n_new": N_NEW} | job
    (tmp_path / "job.json").write_text(json.dumps(job | {"out": str(out)}))
    done = subprocess.run(
        [interpreter(), str(CLIENT), str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out))


def export(source, to, **options):
    """Paths of the two files."""
    report = export_gguf(source, to, **options)
    paths = {name.startswith("mmproj-"): str(to / name) for name in report.files}
    return {"model": paths[False], "mmproj": paths.get(True)}


def picture(width, height, seed=0):
    """A smooth picture; noise would make every resizing another picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), 3))


class Asked:
    """A checkpoint asked by llama.cpp and by this package."""

    def __init__(self, source, tmp_path, image=None, prompt=PROMPT, **options):
        paths = export(source, tmp_path / "gguf", **options)
        images = None
        if image is not None:
            images = str(tmp_path / "images.npz")
            np.savez(images, image)
        self.answer = run(tmp_path, **paths, images=images, prompt=prompt)
        loaded = load_checkpoint(source, device="cpu", dtype="float32")
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.processor = AVLlavaProcessor(self.tokenizer, self.model.config)
        self.image, self.prompt = image, prompt
        keys = sorted((k for k in self.answer if k.startswith("chunk.")), key=lambda k: int(k[6:]))
        self.chunks = [self.answer[k] for k in keys]
        self.views = [torch.from_numpy(c) for c in self.chunks if c.ndim == 2]

    @torch.no_grad()
    def features(self):
        """Ours, one view after the other. [views, tokens, width]"""
        batch = self.processor(self.prompt, images=[Image.fromarray(self.image)])
        pixels = batch["pixel_values"].flatten(0, -4)
        return self.model.model.mm_projector(self.model.model.vision_tower(pixels))

    @torch.no_grad()
    def rows(self, features=None):
        """Input rows of the prompt, with llama.cpp's features or others for the views."""
        left = iter(self.views if features is None else features)
        embed = self.model.get_input_embeddings()
        chunks = (c if c.ndim == 2 else torch.from_numpy(c).long() for c in self.chunks)
        return torch.cat([next(left) if isinstance(c, np.ndarray) else embed(c) for c in chunks])

    @torch.no_grad()
    def own_rows(self):
        """Input rows as this package's processor makes them from the prompt and the picture."""
        batch = self.processor(self.prompt, images=[Image.fromarray(self.image)])
        return self.model.prepare_inputs(batch["media"], pixel_values=batch["pixel_values"])[0]

    @torch.no_grad()
    def assert_answers_agree(self, rows, tolerance):
        """Compare logits after the prompt and after each token that llama.cpp chose."""
        theirs = torch.from_numpy(self.answer["logits"])
        new = torch.from_numpy(self.answer["new"]).long()
        embedded = self.model.get_input_embeddings()(new[:-1])
        logits = self.model(inputs_embeds=torch.cat([rows, embedded])[None]).logits[0]
        ours = logits[len(rows) - 1 :]
        assert_close(ours, theirs, tolerance)
        best = ours.topk(2).values
        clear = best[:, 0] - best[:, 1] > 8 * tolerance * rms(ours)
        assert torch.equal(ours.argmax(1)[clear], new[clear])
        assert clear.any() or tolerance > 1e-2


def rms(values):
    return float(values.square().mean().sqrt())


def assert_close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    difference = rms(ours - theirs) / rms(ours)
    assert difference <= tolerance, f"{difference:.3g} > {tolerance:.3g}"
    # A few of thousands of numbers are off by four or five times the mean.
    assert float((ours - theirs).abs().max()) <= 8 * tolerance * rms(ours)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_language_models_agree(tmp_path, kind, dtype):
    folder = model_folder(tmp_path / "m", kind)
    asked = Asked(folder, tmp_path, prompt="What is it? It is", dtype=dtype, parts="text")
    asked.assert_answers_agree(asked.rows(), LANGUAGE[dtype])


@pytest.mark.parametrize(
    "text",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "rope_theta": 500000.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
    ],
    ids=["linear", "llama3", "biases", "head_dim"],
)
def test_variants_of_llama_agree(tmp_path, text):
    folder = model_folder(tmp_path / "m", text=text)
    prompt = "What is it? It is a long text, so that positions matter. " * 3
    asked = Asked(folder, tmp_path, prompt=prompt, dtype="f32", parts="text")
    asked.assert_answers_agree(asked.rows(), LANGUAGE["f32"])


@pytest.mark.parametrize("name", [V15, OV])
def test_tokens_of_the_reference_folders_agree(tmp_path, name):
    texts = [*TEXTS, "a</s>b <|im_end|> c"]
    paths = export(checkpoint(name), tmp_path / "gguf", parts="text")
    answer = run(tmp_path, **paths, texts=texts)
    tokenizer = load_checkpoint(checkpoint(name), device="cpu", dtype="float32").tokenizer
    for i, text in enumerate(texts):
        assert answer[f"text.{i}"].tolist() == tokenizer(text).input_ids, text
    assert str(answer["chat_template"]).startswith("{%")


@pytest.mark.parametrize(
    "make",
    [
        lambda: sentencepiece("each"),
        lambda: sentencepiece("always"),
        lambda: sentencepiece("first"),
        lambda: sentencepiece("never"),
        lambda: byte_level("gpt-2"),
        lambda: byte_level("qwen2"),
        lambda: byte_level("llama-bpe"),
    ],
    ids=["each", "always", "first", "never", "gpt-2", "qwen2", "llama-bpe"],
)
def test_tokens_agree(tmp_path, make):
    tokenizer = make()
    folder = model_folder(tmp_path / "m", tokenizer=tokenizer)
    special = "ab</s>" if tokenizer.unk_token else "ab<|im_end|>x y"
    texts = [*TEXTS, special]
    answer = run(tmp_path, **export(folder, tmp_path / "gguf", parts="text"), texts=texts)
    for i, text in enumerate(texts):
        assert answer[f"text.{i}"].tolist() == tokenizer(text).input_ids, text


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_the_whole_way_agrees_for_a_model_of_llava_15s_kind(tmp_path, dtype):
    """From the picture's pixels and the prompt's text to the answer."""
    folder = model_folder(tmp_path / "m")
    asked = Asked(folder, tmp_path, picture(90, 90), dtype=dtype)
    assert_close(asked.features()[0], asked.views[0], WHOLE[dtype])
    asked.assert_answers_agree(asked.own_rows(), WHOLE[dtype])
    asked.assert_answers_agree(asked.rows(), LANGUAGE[dtype])


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_a_reference_folder_with_siglip_agrees(tmp_path, dtype):
    side = 70
    asked = Asked(checkpoint(OV), tmp_path, picture(side, side), dtype=dtype)
    ours = asked.features()[:1]  # of the overview and its tiles, llama.cpp shows the overview
    assert_close(ours[0], asked.views[0], WHOLE[dtype])
    asked.assert_answers_agree(asked.rows(ours), WHOLE[dtype])


@pytest.mark.parametrize("projector", ["ldpnet", "ldpnetv2"])
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_mobilevlm_projectors_agree(tmp_path, projector, dtype):
    folder = model_folder(
        tmp_path / "m",
        projector=projector,
        side=336,
        patch=14,
        vision={"layer_norm_eps": 1e-5},
    )
    asked = Asked(folder, tmp_path, picture(400, 400), dtype=dtype)
    assert asked.views[0].shape[0] == 144
    assert_close(asked.features()[0], asked.views[0], WHOLE[dtype])
    asked.assert_answers_agree(asked.own_rows(), WHOLE[dtype])


def test_tiles_agree_and_the_overview_comes_last(tmp_path):
    folder = model_folder(tmp_path / "m", image=TILES)
    asked = Asked(folder, tmp_path, picture(100, 60), dtype="f32")
    ours = asked.features()
    assert len(ours) == len(asked.views) == 5
    for own, theirs in zip([*ours[1:], ours[0]], asked.views, strict=True):
        assert_close(own, theirs, WHOLE["f32"])
    asked.assert_answers_agree(asked.rows([*ours[1:], ours[0]]), WHOLE["f32"])


@torch.no_grad()
def clip_features(model, pixels, class_first):
    """Features of CLIP where the class token stands first or, as in llama.cpp's issue 25814, last.

    The slow oracle beside the tower: in both, row i has position i and the first row is left out.
    """
    tower = model.model.vision_tower
    inner, layers = tower.vision_tower, max(tower.selection.states)
    patches = inner.embeddings.patch_embedding(tower.normalize(pixels, torch.float32))
    patches = patches.flatten(2).transpose(1, 2)
    token = inner.embeddings.class_embedding[None, None]
    rows = torch.cat([token, patches] if class_first else [patches, token], dim=1)
    hidden = inner.pre_layrnorm(rows + inner.embeddings.position_embedding.weight)
    for layer in inner.encoder.layers[:layers]:
        hidden = layer(hidden, None)
    return model.model.mm_projector(hidden[:, 1:])


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_llava_15_with_clip_agrees_up_to_llama_cpps_place_of_the_class_token(tmp_path, dtype):
    """Exactly where issue 25814 is mended; where not, its fault explains the whole difference."""
    asked = Asked(checkpoint(V15), tmp_path, picture(56, 56), dtype=dtype)
    pixels = torch.from_numpy(asked.image.copy()).permute(2, 0, 1)[None]
    ours = clip_features(asked.model, pixels, class_first=True)
    torch.testing.assert_close(ours, asked.features())
    faulty = clip_features(asked.model, pixels, class_first=False)
    mended = float((ours - asked.views[0]).abs().max()) < float((ours - faulty).abs().max()) / 2
    wanted = ours if mended else faulty
    assert_close(wanted[0], asked.views[0], WHOLE[dtype])
    asked.assert_answers_agree(asked.rows(wanted), WHOLE[dtype])
    asked.assert_answers_agree(asked.rows(), LANGUAGE[dtype])


def test_the_class_token_last_makes_features_right_where_the_issue_is_open(tmp_path):
    asked = Asked(checkpoint(V15), tmp_path, picture(56, 56), dtype="f32", class_token="last")
    ours = asked.features()[0]
    plain = Asked(checkpoint(V15), tmp_path / "x", picture(56, 56), dtype="f32")
    if float((ours - plain.views[0]).abs().max()) < 0.1:
        pytest.skip("this llama.cpp has its issue 25814 mended")
    assert_close(ours[1:], asked.views[0][:-1], WHOLE["f32"])
    assert float((ours[1:] - plain.views[0][:-1]).abs().max()) > 0.1


@pytest.mark.parametrize("handler", ["Llava15ChatHandler", "Llava16ChatHandler"])
def test_the_chat_handlers_answer(tmp_path, handler):
    folder = model_folder(tmp_path / "m")
    paths = export(folder, tmp_path / "gguf", dtype="f32")
    file = io.BytesIO()
    Image.fromarray(picture(28, 28)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is it?"},
    ]
    chat = {"handler": handler, "messages": [{"role": "user", "content": content}]}
    answer = run(tmp_path, **paths, chat=chat)
    loaded = load_checkpoint(folder, device="cpu", dtype="float32")
    processor = AVLlavaProcessor(loaded.tokenizer, loaded.model.config)
    prompt = str(answer["prompt"]).replace(url, "<image>")
    batch = processor(prompt, images=[Image.fromarray(picture(28, 28))])
    made = loaded.model.generate(**batch, max_new_tokens=N_NEW, do_sample=False)
    new = made[0, batch["input_ids"].shape[1] :]
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    # The handler leaves out bytes that make no character; the tokenizer marks them.
    assert str(answer["content"]) == text.replace("\ufffd", "")
