"""Deltas: LLaVA's arithmetic, streaming, and everything that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_data import golden
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from av_llava.checkpoints import delta as deltas
from av_llava.checkpoints.convert import convert
from av_llava.checkpoints.delta import apply_delta, make_delta, shifted
from av_llava.checkpoints.file_names import DELTA_RECORD
from av_llava.checkpoints.load import load_checkpoint
from av_llava.cli import main as cli
from av_llava.errors import CheckpointError, UsageError

from .converting import assert_same_tensors, fingerprint, leftovers, tensors
from .folders import copy_case, edit_config

torch.set_num_threads(1)


def folder_of(place: Path, state: dict[str, torch.Tensor], **config) -> Path:
    place.mkdir(parents=True)
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (place / "tokenizer.json").write_text("{}")
    return place


@pytest.fixture
def reference(tmp_path):
    """Base, target, and what LLaVA's scripts make of them."""
    case = golden("llava/layout_delta")
    found = load_file(case / "inputs.safetensors") | load_file(case / "outputs.safetensors")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in found.items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = value
    folder_of(tmp_path / "base", parts["base"])
    folder_of(tmp_path / "target", parts["target"], mm_projector_type="linear")
    folder_of(tmp_path / "delta", parts["delta"], mm_projector_type="linear")
    return tmp_path, parts


def test_the_references_deltas_bit_for_bit(reference):
    place, parts = reference
    made = make_delta(place / "base", place / "target", place / "made", verify=True)
    assert_same_tensors(tensors(place / "made"), parts["delta"])
    assert made.difference == 0 and "318" in " ".join(made.notes)
    applied = apply_delta(place / "base", place / "delta", place / "applied", verify=True)
    assert_same_tensors(tensors(place / "applied"), parts["applied"])
    assert applied.difference == 0 and applied.mapped == 6
    assert json.loads((place / "applied" / "config.json").read_text())["mm_projector_type"]
    assert (place / "applied" / "tokenizer.json").exists()


def slow(target: dict[str, torch.Tensor], base: dict[str, torch.Tensor], sign: int):
    """The scripts' rule, one row at a time."""
    out = {}
    for name, value in target.items():
        rows = value.half().clone()
        if name in base:
            for i in range(len(base[name])):
                rows[i] = rows[i] + sign * base[name].half()[i]
        out[name] = rows
    return out


def test_float16_as_in_llavas_scripts(reference):
    place, parts = reference
    for sign, name, run in ((1, "delta", apply_delta), (-1, "target", make_delta)):
        report = run(
            place / "base", place / name, place / f"half{sign}", dtype="float16", verify=True
        )
        assert report.difference == 0
        assert_same_tensors(tensors(place / f"half{sign}"), slow(parts[name], parts["base"], sign))


def test_there_and_back_gives_the_target_within_rounding(reference):
    place, parts = reference
    before = fingerprint(place / "base") | fingerprint(place / "target")
    make_delta(place / "base", place / "target", place / "there", shard_size="50kB")
    assert len(list((place / "there").glob("*.safetensors"))) > 1
    convert("apply-delta", place / "there", place / "back")  # knows its base
    assert not (place / "back" / DELTA_RECORD).exists()
    for name, value in tensors(place / "back").items():
        torch.testing.assert_close(value, parts["target"][name], atol=1e-7, rtol=1e-6)
    assert fingerprint(place / "base") | fingerprint(place / "target") == before


def test_a_whole_model_comes_back_and_answers(tmp_path):
    target = copy_case("v15_flat_batch3_right", tmp_path)
    config = json.loads((target / "config.json").read_text())
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                k: config[k]
                for k in (
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                )
            },
            vocab_size=config["vocab_size"] - 2,
        )
    )
    model.save_pretrained(tmp_path / "llama")
    make_delta(tmp_path / "llama", target, tmp_path / "delta")
    apply_delta(tmp_path / "llama", tmp_path / "delta", tmp_path / "again", verify=True)
    ours = load_checkpoint(tmp_path / "again", device="cpu").model
    theirs = load_checkpoint(target, device="cpu").model
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )


def test_scalars_integers_and_half_types():
    whole = torch.arange(4)
    assert torch.equal(
        shifted(whole, torch.ones(2, dtype=torch.long), 1, torch.float16),
        torch.tensor([1, 2, 2, 3]),
    )
    assert shifted(torch.tensor(3.0), torch.tensor(1.0), -1).item() == 2
    value, below = torch.tensor([1.0, 2.0]), torch.tensor([0.5])
    kept = value.clone()
    assert shifted(value, below, 1, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(value, kept)


def edit(folder: Path, **changes) -> None:
    state = {**tensors(folder), **changes}
    save_file(
        {k: v for k, v in state.items() if v is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


NORM, EMBED, LAYER = (
    "model.norm.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
)
FAULTS = {
    "patched": (
        lambda p: edit(p / "base", **{"model.mm_projector.0.weight": torch.zeros(2, 2)}),
        "patched already.*model.mm_projector.0.weight",
    ),
    "swapped": (
        lambda p: (
            (p / "base").rename(p / "x")
            and (p / "delta").rename(p / "base")
            and (p / "x").rename(p / "delta")
        ),
        "patched already",
    ),
    "no projector": (
        lambda p: edit(
            p / "delta", **{"model.mm_projector.weight": None, "model.mm_projector.bias": None}
        ),
        "swapped",
    ),
    "wider base": (
        lambda p: edit(p / "base", **{EMBED: torch.zeros(318, 32)}),
        r"embed_tokens.*\(320, 64\).*\(318, 32\)",
    ),
    "larger vocabulary": (
        lambda p: edit(p / "base", **{EMBED: torch.zeros(400, 64)}),
        r"embed_tokens.*\(320, 64\).*\(400, 64\)",
    ),
    "another layer": (
        lambda p: edit(p / "base", **{LAYER: torch.zeros(32, 64)}),
        r"q_proj.*\(64, 64\).*\(32, 64\)",
    ),
    "longer norm": (
        lambda p: edit(p / "delta", **{NORM: torch.zeros(80)}),
        r"norm.*\(80,\).*\(64,\)",
    ),
    "missing in the base": (
        lambda p: edit(p / "base", **{NORM: None}),
        r"norm.weight \(not in the base\)",
    ),
    "missing in the delta": (
        lambda p: edit(p / "delta", **{NORM: None}),
        r"norm.weight \(of the base\)",
    ),
    "exists": (lambda p: (p / "made").mkdir(), "exists"),
    "damaged": (lambda p: (p / "base" / "model.safetensors").write_bytes(b"1234"), "damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named_and_nothing_is_written(reference, fault):
    place, _ = reference
    change, words = FAULTS[fault]
    change(place)
    with pytest.raises(CheckpointError, match=words):
        apply_delta(place / "base", place / "delta", place / "made")
    assert not leftovers(place)
    assert fault == "exists" or not (place / "made").exists()


def test_another_base_of_the_same_shapes_is_recognised_by_deltas_made_here(reference):
    place, parts = reference
    make_delta(place / "base", place / "target", place / "made")
    shaken = {k: v + 0.1 * torch.randn_like(v) for k, v in parts["base"].items()}
    folder_of(place / "other", shaken)
    with pytest.raises(CheckpointError, match=r"another base.*q_proj|another base.*embed"):
        apply_delta(place / "other", place / "made", place / "no")
    (place / "base").rename(place / "moved")
    with pytest.raises(CheckpointError, match="base"):
        convert("apply-delta", place / "made", place / "no")
    convert("apply-delta", place / "made", place / "yes", base=str(place / "moved"))
    with pytest.raises(UsageError, match="--base"):
        convert("apply-delta", place / "delta", place / "no")
    edit_record = json.loads((place / "made" / DELTA_RECORD).read_text()) | {"format": 7}
    (place / "made" / DELTA_RECORD).write_text(json.dumps(edit_record))
    with pytest.raises(CheckpointError, match="format 7"):
        convert("apply-delta", place / "made", place / "no", base=str(place / "moved"))


def test_verifying_finds_a_wrong_sum(reference, monkeypatch):
    place, _ = reference
    right = deltas.shifted

    def wrong(tensor, base, sign, dtype=None):
        return right(tensor, base * (1.01 if sign > 0 else 1), sign, dtype)

    monkeypatch.setattr(deltas, "shifted", wrong)
    with pytest.raises(CheckpointError, match="differs"):
        apply_delta(place / "base", place / "delta", place / "made", verify=True)
    assert not (place / "made").exists() and not leftovers(place)


def test_a_base_that_ties_its_head_shifts_both(reference):
    place, parts = reference
    tied = {k: v for k, v in parts["base"].items() if k != "lm_head.weight"}
    folder_of(place / "tied", tied, tie_word_embeddings=True)
    make_delta(place / "tied", place / "target", place / "made")
    head = tensors(place / "made")["lm_head.weight"]
    wanted = parts["target"]["lm_head.weight"].clone()
    wanted[:318] -= tied["model.embed_tokens.weight"]
    assert torch.equal(head, wanted)


def test_old_buffers_are_left_out(reference):
    place, _ = reference
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit(place / "base", **buffer)
    edit(place / "delta", **buffer)
    report = apply_delta(place / "base", place / "delta", place / "made")
    assert next(iter(buffer)) in sum(report.dropped.values(), ())
    assert not any("inv_freq" in k for k in tensors(place / "made"))


def test_on_the_command_line(reference, capsys):
    place, parts = reference
    words = ["convert", "apply-delta", str(place / "delta"), str(place / "made")]
    assert cli.run([*words, "--base", str(place / "base"), "--dry-run"]) == 0
    assert "mapped       6" in capsys.readouterr().out
    assert not (place / "made").exists()
    assert cli.run([*words, "--base", str(place / "base"), "--verify"]) == 0
    assert_same_tensors(tensors(place / "made"), parts["applied"])
    assert cli.run([*words[:3], str(place / "no")]) == 2
    words = ["convert", "make-delta", str(place / "target"), str(place / "again")]
    assert cli.run([*words, "--base", str(place / "base")]) == 0


def test_a_config_is_copied_as_it_is(reference):
    place, _ = reference
    edit_config(place / "delta", mm_vision_tower="openai/clip", odd=[1, 2])
    apply_delta(place / "base", place / "delta", place / "made")
    assert (place / "made" / "config.json").read_bytes() == (
        place / "delta" / "config.json"
    ).read_bytes()
