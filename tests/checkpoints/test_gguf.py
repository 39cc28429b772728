"""Files for llama.cpp: what stands in them, checked with gguf's own reader, and what is refused.

That llama.cpp computes the same from them is shown in test_llama_cpp.py.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny

from av_llava.checkpoints import gguf_file, staging, stored
from av_llava.checkpoints.convert import ConvertOptions, convert
from av_llava.checkpoints.gguf import export_gguf
from av_llava.checkpoints.gguf_text import interleave_heads
from av_llava.errors import CheckpointError, MissingExtraError, UsageError
from av_llava.settings import ImageSettings, SequenceSettings, VisionSettings

from .converting import fingerprint, leftovers, tensors
from .folders import ABSENT, copy_case, edit_config, edit_weights, write_weights
from .gguf_models import (
    OV,
    TILES,
    V15,
    V16,
    byte_level,
    checkpoint,
    files,
    model_folder,
    sentencepiece,
)
from .stock_llava import stock_folder, stock_model

pytest.importorskip("gguf")
torch.set_num_threads(1)

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOWER_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
}


def export(source, to, **options):
    report = export_gguf(source, to, **options)
    return report, *files(to)


def turned_neighbours(weight, heads):
    """Rows of a projection in llama.cpp's order, one after the other."""
    size = len(weight) // heads
    rows = []
    for head in range(heads):
        for i in range(size // 2):
            rows += [weight[head * size + i], weight[head * size + i + size // 2]]
    return torch.stack(rows)


# ---------------------------------------------------------------- what stands in the files


def test_llava_15_becomes_a_language_model_and_a_projector(tmp_path):
    report, text, eyes = export(checkpoint(V15), tmp_path / "out", dtype="f32")
    assert set(report.files) == {p.name for p in (tmp_path / "out").iterdir()}
    assert set(report.files) == {"checkpoint-F32.gguf", "mmproj-checkpoint-F32.gguf"}
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": 0,
        "llama.vocab_size": 320,
        "llama.context_length": 2048,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {k: text.metadata[k] for k in wanted} == wanted
    wanted = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        "clip.vision.image_size": 56,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 64,
        "clip.vision.projection_dim": 64,
        "clip.vision.block_count": 2,  # of three: hidden state -2
        "clip.vision.feature_layer": [2],
        "clip.vision.attention.head_count": 4,
        "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "clip.vision.image_mean": pytest.approx([0.48145466, 0.4578275, 0.40821073]),
        "clip.vision.image_std": pytest.approx([0.26862954, 0.26130258, 0.27577711]),
    }
    assert {k: eyes.metadata[k] for k in wanted} == wanted
    assert "clip.vision.image_grid_pinpoints" not in eyes.metadata


def test_every_tensor_of_the_language_model_is_in_its_place(tmp_path):
    source = tensors(checkpoint(V15))
    _, text, _ = export(checkpoint(V15), tmp_path / "out", dtype="f32")
    wanted = {
        "token_embd.weight": source["model.embed_tokens.weight"],
        "output_norm.weight": source["model.norm.weight"],
        "output.weight": source["lm_head.weight"],
    }
    for i in range(2):
        for theirs, ours in LAYER.items():
            value = source[f"model.layers.{i}.{theirs}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(ours)
            value = turned_neighbours(value, heads) if heads else value
            wanted[f"blk.{i}.{ours}.weight"] = value
    assert text.values.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(text.values[name], value), name


def test_every_tensor_of_tower_and_projector_is_in_its_place(tmp_path):
    case = checkpoint(V15)
    tower, source = tensors(case.parent / "vision_tower"), tensors(case)
    _, _, eyes = export(case, tmp_path / "out", dtype="f32")
    start = "vision_model."
    wanted = {
        "v.class_embd": tower[f"{start}embeddings.class_embedding"],
        "v.patch_embd.weight": tower[f"{start}embeddings.patch_embedding.weight"],
        "v.position_embd.weight": tower[f"{start}embeddings.position_embedding.weight"],
        "v.pre_ln.weight": tower[f"{start}pre_layrnorm.weight"],
        "v.pre_ln.bias": tower[f"{start}pre_layrnorm.bias"],
    }
    for kind in ("weight", "bias"):
        for i in (0, 2):
            wanted[f"mm.{i}.{kind}"] = source[f"model.mm_projector.{i}.{kind}"]
        for i in range(2):  # the third layer is not used, nor the normalisation after it
            for theirs, ours in TOWER_LAYER.items():
                value = tower[f"{start}encoder.layers.{i}.{theirs}.{kind}"]
                wanted[f"v.blk.{i}.{ours}.{kind}"] = value
    assert eyes.values.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(eyes.values[name], value), name


@pytest.mark.parametrize(("dtype", "number"), [("f16", 1), ("q8_0", 7)])
def test_matrices_have_the_type_and_vectors_stay_exact(tmp_path, dtype, number):
    case = checkpoint(V16)
    report, *exported = export(
        case, tmp_path / "out", dtype=dtype, options=ConvertOptions(verify=True)
    )
    _, *exact = export(case, tmp_path / "exact", dtype="f32")
    largest = 0.0
    for file, other in zip(exported, exact, strict=True):
        assert file.metadata["general.file_type"] == number
        for name, value in file.values.items():
            difference = (value - other.values[name]).abs()
            largest = max(largest, float(difference.max()))
            if value.ndim == 1 or name == "v.position_embd.weight":
                assert file.types[name] == "f32" and not difference.any(), name
            elif dtype == "f16" or value.ndim == 4:
                assert file.types[name] == "f16"
                assert torch.equal(value, other.values[name].half().float()), name
            else:  # a step is a 127th of the largest of 32 neighbours, itself rounded to float16
                assert file.types[name] == "q8_0"
                step = other.values[name].reshape(-1, 32).abs().amax(1, keepdim=True) / 127
                assert (difference.reshape(-1, 32) <= (0.5 + 127 / 2**11) * step).all(), name
    assert report.difference == 0
    assert f"{largest:.3g}" in report.notes[-1]


def test_rows_that_are_no_whole_blocks_become_float16(tmp_path):
    folder = model_folder(tmp_path / "m", vision={"hidden_size": 40, "intermediate_size": 64})
    report, text, eyes = export(folder, tmp_path / "out", dtype="q8_0")
    assert eyes.types["mm.0.weight"] == "f16" and eyes.types["mm.2.weight"] == "q8_0"
    assert text.types["blk.0.attn_q.weight"] == "q8_0"
    sizes = {"f32": 4, "f16": 2, "q8_0": 34 / 32}
    assert report.n_bytes == sum(
        v.numel() * sizes[f.types[n]] for f in (text, eyes) for n, v in f.values.items()
    )


def test_turning_neighbours_is_turning_halves():
    """Scores of turned queries and keys are the same in both conventions."""
    generator = torch.Generator().manual_seed(0)
    head_dim, heads = 8, 3
    weight = torch.randn(heads * head_dim, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    angles = torch.arange(4.0)[:, None] * 10000 ** -(torch.arange(0, head_dim, 2) / head_dim)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]

    def scores(weight, first, second):
        rows = (x @ weight.T).unflatten(1, (heads, head_dim))
        turned = torch.complex(rows[..., first], rows[..., second]) * turn
        return torch.einsum("ihd,jhd->hij", turned, turned.conj()).real

    half = head_dim // 2
    ours = scores(weight, slice(0, half), slice(half, None))
    theirs = scores(interleave_heads(weight, head_dim), slice(0, None, 2), slice(1, None, 2))
    torch.testing.assert_close(ours, theirs)
    bias = torch.arange(float(heads * head_dim))
    assert torch.equal(interleave_heads(bias, head_dim), turned_neighbours(bias, heads))


def test_the_class_token_can_be_last(tmp_path):
    _, _, first = export(checkpoint(V15), tmp_path / "first", dtype="f32")
    report, _, last = export(
        checkpoint(V15), tmp_path / "last", dtype="f32", class_token="last", parts="all"
    )
    rows = first.values.pop("v.position_embd.weight")
    assert torch.equal(last.values.pop("v.position_embd.weight"), torch.cat([rows[1:], rows[:1]]))
    assert all(torch.equal(v, last.values[n]) for n, v in first.values.items())
    assert any("25814" in note for note in report.notes)
    siglip = model_folder(tmp_path / "m")
    plain, _, one = export(siglip, tmp_path / "one")
    _, _, other = export(siglip, tmp_path / "other", class_token="last")
    assert all(torch.equal(v, other.values[n]) for n, v in one.values.items())
    assert not any("25814" in note for note in plain.notes)


def test_llava_16_carries_its_canvases_and_newline(tmp_path):
    report, _, eyes = export(checkpoint(V16), tmp_path / "out", dtype="f32")
    points = json.loads((checkpoint(V16) / "config.json").read_text())["image_grid_pinpoints"]
    assert eyes.metadata["clip.vision.image_grid_pinpoints"] == [n for p in points for n in p]
    assert eyes.metadata["clip.vision.mm_patch_merge_type"] == "spatial_unpad"
    newline = tensors(checkpoint(V16))["model.image_newline"]
    assert torch.equal(eyes.values["v.image_newline"], newline)
    assert any("newline" in note and "not inserted" in note for note in report.notes)


def test_onevision_shows_single_views_and_says_so(tmp_path):
    report, text, eyes = export(checkpoint(OV), tmp_path / "out", dtype="f32")
    assert text.metadata["general.architecture"] == "qwen2"
    assert text.metadata["tokenizer.ggml.add_bos_token"] is False
    assert eyes.metadata["clip.use_gelu"] is True
    assert "v.class_embd" not in eyes.values and "v.patch_embd.bias" in eyes.values
    assert "clip.vision.image_grid_pinpoints" not in eyes.metadata
    said = " ".join(report.notes)
    assert "anyres_max_9" in said and "slow and fast" in said and "newline" in said
    assert "blk.0.attn_q.bias" in text.values
    # qwen2 turns halves, as transformers does
    source = tensors(checkpoint(OV))["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(text.values["blk.0.attn_q.weight"], source)


def test_a_tied_head_is_not_written_twice(tmp_path):
    folder = model_folder(tmp_path / "m", "qwen2")
    _, text, _ = export(folder, tmp_path / "out")
    assert "output.weight" not in text.values and "token_embd.weight" in text.values


@pytest.mark.parametrize("projector", ["ldpnet", "ldpnetv2"])
def test_mobilevlm_projectors_have_the_shapes_that_the_loader_computes_with(tmp_path, projector):
    vision = {"layer_norm_eps": 1e-5}
    folder = model_folder(tmp_path / "m", projector=projector, side=336, patch=14, vision=vision)
    report, _, eyes = export(folder, tmp_path / "out", dtype="f32")
    source = tensors(folder)
    start = "model.mm_projector."
    if projector == "ldpnet":
        names = {
            n.removeprefix(f"{start}model."): v for n, v in source.items() if n.startswith(start)
        }
    else:
        names = {
            n.removeprefix(start).replace("mlp.mlp", "mlp").replace("peg.peg", "peg"): v
            for n, v in source.items()
            if n.startswith(start)
        }
    found = {n.removeprefix("mm.model."): n for n in eyes.values if n.startswith("mm.")}
    assert found.keys() == names.keys()
    for short, value in names.items():
        name = found[short]
        assert eyes.shapes[name] == tuple(n for n in value.shape if n != 1)
        if len(eyes.shapes[name]) == 3:  # llama.cpp computes depthwise convolutions from float16
            assert eyes.types[name] == "f16"
            value = value.half().float()
        assert torch.equal(eyes.values[name], value.squeeze()), name
    assert any(line.startswith(start) for line in report.reshaped)
    assert "v.image_newline" not in eyes.values
    assert any("model.image_newline" in names for names in report.dropped.values())


def test_scaled_rotary_embeddings(tmp_path):
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    folder = model_folder(tmp_path / "linear", text={"rope_parameters": linear})
    _, text, _ = export(folder, tmp_path / "out1")
    assert text.metadata["llama.rope.scaling.type"] == "linear"
    assert text.metadata["llama.rope.scaling.factor"] == 4.0
    assert text.metadata["llama.rope.freq_base"] == 5000.0
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "rope_theta": 500000.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = model_folder(tmp_path / "llama3", text={"rope_parameters": llama3})
    _, text, _ = export(folder, tmp_path / "out2", dtype="q8_0")
    factors = text.values["rope_freqs.weight"]
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    from av_llava.checkpoints.load import load_checkpoint

    model = load_checkpoint(folder, device="cpu", dtype="float32").model
    scaled = model.model.language_model.rotary_emb.inv_freq
    torch.testing.assert_close(plain / factors, scaled, atol=0, rtol=1e-5)
    assert factors[0] == 1 and factors[-1] == 8


# ---------------------------------------------------------------- layouts


def test_the_layout_of_the_folder_does_not_matter(tmp_path):
    """Shards, .bin files, and a tower inside instead of beside give the same bytes."""
    case = copy_case(V15, tmp_path / "plain")
    state = tensors(case)
    inside = {
        f"model.vision_tower.vision_tower.{name}": value
        for name, value in tensors(case.parent / "vision_tower").items()
    }
    variants = {"shards": ("safetensors", 3, {}), "bin": ("bin", 2, {}), "in": ("bin", 1, inside)}
    wanted = None
    for name, (kind, n, more) in {"plain": ("safetensors", 1, {}), **variants}.items():
        folder = copy_case(V15, tmp_path / f"{name}_") if name != "plain" else case
        write_weights(folder, {**state, **more}, kind, n)
        out = tmp_path / f"out_{name}"
        export(folder, out)
        found = [(f.metadata, f.types, f.values) for f in files(out)]
        wanted = wanted or found
        for (meta, types, values), (meta0, types0, values0) in zip(found, wanted, strict=True):
            assert meta == meta0 and types == types0
            assert all(torch.equal(v, values0[k]) for k, v in values.items())


def test_a_saved_model_exports_as_its_original(tmp_path):
    from av_llava.checkpoints.load import load_checkpoint
    from av_llava.processor import AVLlavaProcessor

    case = checkpoint(V16)
    loaded = load_checkpoint(case, device="cpu", dtype="float32")
    loaded.model.save_pretrained(tmp_path / "checkpoint")
    AVLlavaProcessor(loaded.tokenizer, loaded.model.config).save_pretrained(tmp_path / "checkpoint")
    export(case, tmp_path / "a")
    export(tmp_path / "checkpoint", tmp_path / "b")
    for one, other in zip(files(tmp_path / "a"), files(tmp_path / "b"), strict=True):
        for found in (one, other):
            found.metadata.pop("tokenizer.chat_template", None)
        assert one.metadata == other.metadata
        assert one.values.keys() == other.values.keys()
        assert all(torch.equal(v, other.values[n]) for n, v in one.values.items())


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_folders_of_transformers_classes(tmp_path, kind):
    model = stock_model(kind, text="mistral")
    folder = stock_folder(model, tmp_path / "hf")
    edit_config(
        folder,
        text_config={
            **json.loads((folder / "config.json").read_text())["text_config"],
            "vocab_size": 64,
        },
    )
    report, text, eyes = export(folder, tmp_path / "out", dtype="f32")
    state = model.state_dict()
    assert torch.equal(
        eyes.values["mm.2.weight"], state["model.multi_modal_projector.linear_2.weight"]
    )
    assert torch.equal(text.values["output.weight"], state["lm_head.weight"])
    assert len(text.metadata["tokenizer.ggml.tokens"]) == 64
    assert any("beyond the 64 rows" in note for note in report.notes)
    if kind == "llava_next":  # sizes are (height, width) in these files
        found = eyes.metadata["clip.vision.image_grid_pinpoints"]
        points = model.config.image_grid_pinpoints
        assert found == [side for height, width in points for side in (width, height)]


def test_the_language_model_alone_needs_no_tower(tmp_path):
    case = copy_case(V15, tmp_path)
    shutil.rmtree(case.parent / "vision_tower")
    with pytest.raises(CheckpointError, match="tower"):
        export_gguf(case, tmp_path / "all")
    report = export_gguf(case, tmp_path / "text", parts="text")
    assert report.files == ("checkpoint-F16.gguf",)
    assert not (tmp_path / "all").exists()


def test_only_the_projector(tmp_path):
    report = export_gguf(checkpoint(V15), tmp_path / "out", parts="mmproj")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mmproj-checkpoint-F16.gguf"]
    assert report.mapped == 41
    assert any("model.norm.weight" in names for names in report.dropped.values())


# ---------------------------------------------------------------- how it is done


def test_the_original_is_not_touched_and_the_same_bytes_come_twice(tmp_path):
    case = copy_case(V16, tmp_path)
    before = fingerprint(tmp_path)
    export_gguf(case, tmp_path / "one", options=ConvertOptions(verify=True))
    export_gguf(case, tmp_path / "two")
    one, two = fingerprint(tmp_path / "one"), fingerprint(tmp_path / "two")
    assert one == two and len(one) == 2
    after = fingerprint(tmp_path)
    assert {k: v for k, v in after.items() if not k.startswith(("one/", "two/"))} == before


def test_a_dry_run_counts_what_the_real_one_writes(tmp_path):
    dry = export_gguf(checkpoint(V16), tmp_path / "out", options=ConvertOptions(dry_run=True))
    assert not (tmp_path / "out").exists() and dry.dry_run
    real = export_gguf(checkpoint(V16), tmp_path / "out")
    for field in ("mapped", "reshaped", "dropped", "files", "n_bytes", "notes"):
        assert getattr(dry, field) == getattr(real, field), field
    size = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert real.n_bytes < size < real.n_bytes + 60_000


def test_a_dry_run_reports_what_does_not_fit(tmp_path):
    case = copy_case(V15, tmp_path)
    edit_weights(case, **{"model.norm.weight": ABSENT})
    report = export_gguf(case, tmp_path / "out", options=ConvertOptions(dry_run=True))
    assert report.missing == ("model.norm.weight",)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        export_gguf(case, tmp_path / "out")


def test_progress_ends_at_the_whole(tmp_path):
    told = []
    options = ConvertOptions(progress=lambda done, total: told.append((done, total)))
    report = export_gguf(checkpoint(V15), tmp_path / "out", options=options)
    done = [d for d, _ in told]
    assert done == sorted(done) and done[-1] == report.n_bytes
    assert {total for _, total in told} == {report.n_bytes}
    assert len(done) == report.mapped


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    alive, most = [], [0]
    read = stored.TensorReader.read

    def watched(self, stored):
        tensor = read(self, stored)
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(stored.TensorReader, "read", watched)
    export_gguf(checkpoint(V15), tmp_path / "out", options=ConvertOptions(verify=True))
    assert len(alive) > 100
    assert most[0] == 1


def test_large_tensors_are_converted_a_few_rows_at_a_time(tmp_path, monkeypatch):
    export_gguf(checkpoint(V15), tmp_path / "whole", dtype="q8_0")
    monkeypatch.setattr(gguf_file, "_BLOCK_ITEMS", 100)
    options = ConvertOptions(verify=True)
    export_gguf(checkpoint(V15), tmp_path / "rows", dtype="q8_0", options=options)
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "rows")


def test_the_converter_by_name(tmp_path):
    report = convert("gguf", checkpoint(V15), tmp_path / "a", type="q8_0", parts="text")
    assert report.converter == "gguf" and report.files == ("checkpoint-Q8_0.gguf",)
    report = convert("gguf", checkpoint(V15), tmp_path / "b", dtype="float32", verify=True)
    assert report.files[0] == "checkpoint-F32.gguf" and report.difference == 0
    with pytest.raises(UsageError, match="bfloat16"):
        convert("gguf", checkpoint(V15), tmp_path / "c", dtype="bfloat16")
    for wrong in ({"type": "q4_k"}, {"parts": "audio"}, {"class_token": "middle"}):
        with pytest.raises(UsageError, match="Known"):
            convert("gguf", checkpoint(V15), tmp_path / "c", **wrong)


# ---------------------------------------------------------------- what is refused or said


def refused(tmp_path, words, kind="llama", **changes):
    folder = model_folder(tmp_path / "m", kind, **changes)
    with pytest.raises(CheckpointError, match=words):
        export_gguf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (VisionSettings(kind="clip_s2", s2_scales=(28, 56)), "clip_s2"),
        (VisionSettings(select_feature="cls_patch"), "cls_patch"),
        (VisionSettings(select_feature="slicefour_patch", select_layer=-1), "slicefour_patch"),
        (VisionSettings(select_layer=0), "before its first layer"),
    ],
)
def test_features_that_llama_cpp_does_not_take(tmp_path, settings, words):
    layers = {"num_hidden_layers": 8}
    folder = refused(tmp_path, words, tower=settings.kind, settings=settings, vision=layers)
    report = export_gguf(folder, tmp_path / "text", parts="text")  # as the message says
    assert report.files == ("m-F16.gguf",)


@pytest.mark.parametrize("projector", ["linear", "mlp3x_gelu", "mlp2x_res1x_gelu", "pooler"])
def test_projectors_that_llama_cpp_does_not_have(tmp_path, projector):
    refused(tmp_path, projector, projector=projector)


def test_mobilevlm_projectors_need_llama_cpps_grid(tmp_path):
    refused(tmp_path, "24x24", projector="ldpnet")


def test_llama_cpp_takes_the_towers_epsilon_for_ldp(tmp_path):
    refused(tmp_path, "layer_norm_eps", projector="ldpnet", side=336, patch=14)


def test_activations_that_llama_cpp_does_not_have(tmp_path):
    refused(tmp_path, "'relu'", vision={"hidden_act": "relu"})


def test_language_models_that_have_no_architecture_here(tmp_path):
    folder = refused(tmp_path, "'gemma'.*llama, mistral", kind="gemma")
    with pytest.raises(CheckpointError, match="gemma"):
        export_gguf(folder, tmp_path / "out", parts="text")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"hidden_act": "gelu"}, "'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
    ],
)
def test_language_models_that_llama_cpp_computes_otherwise(tmp_path, text, words):
    refused(tmp_path, words, text=text)


def test_a_sliding_window_is_named(tmp_path):
    folder = model_folder(tmp_path / "m", "mistral", text={"sliding_window": 512})
    assert any("512 tokens" in note for note in export_gguf(folder, tmp_path / "out").notes)
    folder = model_folder(tmp_path / "n", "mistral")
    assert not any("window" in note for note in export_gguf(folder, tmp_path / "out2").notes)


def test_sound_is_left_out_with_a_sentence(tmp_path):
    model, processor = tiny("qwen2")
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    report = export_gguf(tmp_path / "m", tmp_path / "out")
    assert any(note.startswith("Sound:") for note in report.notes)
    dropped = [name for names in report.dropped.values() for name in names]
    assert any("audio_tower" in name for name in dropped)
    assert report.mapped + len(dropped) == len(tensors(tmp_path / "m"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": ImageSettings(aspect_ratio="square"), "tower": "clip"}, "cuts off their edges"),
        ({"image": ImageSettings(aspect_ratio="square")}, "stretches"),
        ({"image": ImageSettings(aspect_ratio="pad")}, r"\(127, 127, 127\)"),
        ({"image": TILES}, "overview"),
        (
            {
                "sequence": SequenceSettings(
                    template="vicuna_v1", media_tokens=("newline",), use_image_start_end=True
                )
            },
            "<im_start>",
        ),
    ],
)
def test_differences_are_said(tmp_path, changes, words):
    folder = model_folder(tmp_path / "m", **changes)
    notes = export_gguf(folder, tmp_path / "out", options=ConvertOptions(dry_run=True)).notes
    assert any(re.search(words, note) for note in notes)


def test_a_model_without_eyes_has_only_a_language_model(tmp_path):
    model, processor = tiny("qwen2", audio=False, vision_config=None)
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="no vision tower"):
        export_gguf(tmp_path / "m", tmp_path / "out")
    assert export_gguf(tmp_path / "m", tmp_path / "out", parts="text").mapped > 10


# ---------------------------------------------------------------- faults


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        export_gguf(checkpoint(V15), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_values_that_float16_cannot_hold(tmp_path):
    case = copy_case(V15, tmp_path)
    weight = tensors(case)["lm_head.weight"]
    weight[3, 5] = -70000.0
    edit_weights(case, **{"lm_head.weight": weight})
    for dtype in ("f16", "q8_0"):
        with pytest.raises(CheckpointError, match=r"output\.weight.*70000.*f32"):
            export_gguf(case, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)
    verified = ConvertOptions(verify=True)
    report, text, _ = export(case, tmp_path / "out", dtype="f32", options=verified)
    assert text.values["output.weight"][3, 5] == -70000.0
    assert "more than 0 from" in report.notes[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(tmp_path, value):
    case = copy_case(V15, tmp_path)
    weight = tensors(case)["lm_head.weight"]
    weight[3, 5] = value
    edit_weights(case, **{"lm_head.weight": weight})
    with pytest.raises(CheckpointError, match=r"output\.weight.*damaged"):
        export_gguf(case, tmp_path / "out", dtype="f32")


def test_a_crash_leaves_nothing(tmp_path, monkeypatch):
    def fails(*unused):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_file, "_encode", fails)
    with pytest.raises(CheckpointError, match="No space"):
        export_gguf(checkpoint(V15), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_room(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="no room"):
        export_gguf(checkpoint(V15), tmp_path / "out")


def test_a_file_that_was_changed_is_noticed(tmp_path, monkeypatch):
    write = gguf_file.write_file

    def damaging(path, plan, read, told):
        write(path, plan, read, told)
        data = np.memmap(path, mode="r+")
        data[-100] ^= 1

    monkeypatch.setattr("av_llava.checkpoints.gguf.write_file", damaging)
    with pytest.raises(CheckpointError, match="not what was written"):
        export_gguf(checkpoint(V15), tmp_path / "out", options=ConvertOptions(verify=True))
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"av-llava\[gguf\]"):
        export_gguf(checkpoint(V15), tmp_path / "out")


def test_an_unknown_chat_template_is_left_out(tmp_path, caplog):
    folder = model_folder(
        tmp_path / "m", "qwen3", sequence=SequenceSettings(media_tokens=("newline",))
    )
    assert "tokenizer.chat_template" in export(folder, tmp_path / "a")[1].metadata
    config = json.loads((folder / "config.json").read_text())
    config["sequence"]["template"] = "nonsense"
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        _, text, _ = export(folder, tmp_path / "b")
    assert "tokenizer.chat_template" not in text.metadata and "nonsense" in caplog.text


@pytest.mark.parametrize("make", [lambda: sentencepiece("always"), lambda: byte_level("qwen2")])
def test_the_tokenizer_is_filled_up_to_the_rows(tmp_path, make):
    tokenizer = make()
    folder = model_folder(tmp_path / "m", tokenizer=tokenizer)
    _, text, _ = export(folder, tmp_path / "out")
    tokens = text.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == len(tokenizer) + 5 == text.shapes["token_embd.weight"][0]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert text.metadata["tokenizer.ggml.token_type"][-5:] == [5] * 5


def test_the_page_about_it_is_true(tmp_path, monkeypatch, capsys):
    """Its Python and its av-llava commands run; the tests that it names exist."""
    from av_llava.cli import main as cli

    page = Path(__file__).parents[2] / "docs" / "gguf.md"
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`(tests/[^`]+)`", text):
        assert (page.parents[1] / name).exists()
    case = copy_case(V15, tmp_path / "checkpoints")
    case.rename(case.with_name("llava-v1.5-7b"))
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, {})
    assert "llava-v1.5-7b-F16.gguf" in capsys.readouterr().out
    shutil.rmtree("out")
    commands = re.findall(r"^av-llava (.+)$", text, re.MULTILINE)
    assert len(commands) == 2
    for line in commands:
        assert cli.run(line.split()) == 0, capsys.readouterr().err
    assert {p.name for p in Path("out/q8").iterdir()} == {
        "llava-v1.5-7b-Q8_0.gguf",
        "mmproj-llava-v1.5-7b-Q8_0.gguf",
    }
