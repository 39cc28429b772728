"""What all converters share: names, options, reports, dry runs, comparison that can fail."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_data import golden
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny
from transformers import GenerationConfig

from av_llava.checkpoints import compare
from av_llava.checkpoints.convert import (
    CONVERTERS,
    Converter,
    ConvertOptions,
    Option,
    Report,
    convert,
    listed,
    parse_size,
)
from av_llava.checkpoints.load import load_checkpoint
from av_llava.errors import CheckpointError, UsageError

from .converting import fingerprint
from .folders import OV, V15, V16, copy_case, read_weights, write_weights

torch.set_num_threads(1)

OWN = ("llava", "hf", "text-only", "surgery", "upgrade", "consolidate")


def test_names_and_sizes_cost_no_torch():
    code = (
        "import sys; from av_llava.checkpoints import convert, staging; "
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", CONVERTERS)
def test_every_converter_is_there(name):
    converter = CONVERTERS[name]
    module, function = converter.where.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert converter.summary and not converter.summary.endswith(".")
    assert all(option.help.endswith(".") for option in converter.options.values())


@pytest.mark.parametrize("name", OWN)
def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(tmp_path, name):
    source = copy_case(V16, tmp_path / "case")
    before = fingerprint(tmp_path)
    told = convert(name, source, tmp_path / "out", dry_run=True)
    assert fingerprint(tmp_path) == before and not (tmp_path / "out").exists()
    done = convert(name, source, tmp_path / "out")
    assert told.dry_run and not done.dry_run and told.files == () and done.files
    for field in ("mapped", "missing", "unexpected", "mismatched", "reshaped", "dropped", "notes"):
        assert getattr(told, field) == getattr(done, field), field
    assert told.n_bytes == done.n_bytes > 0 and told.converter == name
    assert {k: v for k, v in fingerprint(tmp_path).items() if not k.startswith("out/")} == before


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_exists_is_left_alone(tmp_path, name, dry_run):
    source = copy_case(V16, tmp_path / "case")
    (tmp_path / "out").mkdir()
    before = fingerprint(tmp_path)
    for destination in (tmp_path / "out", source / "inside"):
        with pytest.raises(CheckpointError, match="exists|lies in the folder"):
            convert(name, source, destination, dry_run=dry_run)
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("name", OWN)
def test_progress_reaches_the_end(tmp_path, name):
    seen: list[tuple[int, int]] = []
    source = golden(f"llava/{V16}") / "checkpoint"
    report = convert(name, source, tmp_path / "out", progress=lambda *n: seen.append(n))
    assert seen == sorted(seen) and seen[-1] == (report.n_bytes, report.n_bytes)
    assert len(seen) == report.mapped


@pytest.mark.parametrize("name", ["llava", "hf", "text-only"])
def test_settings_of_generation_that_transformers_would_not_save(tmp_path, name):
    # As published: temperatures without sampling.
    source = copy_case(V15, tmp_path / "case")
    published = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0}
    published |= {"temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0"}
    (source / "generation_config.json").write_text(json.dumps(published))
    convert(name, source, tmp_path / "out", verify=True)
    made = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (made.eos_token_id, made.pad_token_id, made.max_length) == (2, 0, 4096)
    assert not made.do_sample and made.temperature in (None, 1.0)


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("was_here"),))


@pytest.mark.parametrize("name", OWN)
def test_broken_sources_are_named(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = copy_case(V16, tmp_path / "case")
    state = read_weights(source)
    write_weights(source, state, shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 1 file\(s\) that do not exist"):
        convert(name, source, tmp_path / "out")
    write_weights(source, state)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        convert(name, source, tmp_path / "out")
    file.unlink()
    with (source / "pytorch_model.bin").open("wb") as handle:
        pickle.dump({"a": Hostile()}, handle)
    with pytest.raises(CheckpointError, match="pytorch_model.bin cannot be read as tensors"):
        convert(name, source, tmp_path / "out")
    assert not (tmp_path / "was_here").exists() and not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(name, tmp_path / "nowhere", tmp_path / "out")


# ---------------------------------------------------------------- names and options


def test_unknown_names_come_with_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match="Unknown converter 'text_only'.*Did you mean 'text-only'"):
        convert("text_only", "a", "b")
    with pytest.raises(UsageError, match="Unknown option of hf 'modelclass'.*model_class"):
        convert("hf", "a", "b", modelclass="llava")
    with pytest.raises(UsageError, match="The converter hf needs a destination"):
        convert("hf", "a")
    source = golden(f"llava/{V15}") / "checkpoint"
    with pytest.raises(UsageError, match="Unknown dtype 'int7'"):
        convert("llava", source, tmp_path / "out", dtype="int7")


def test_a_converter_of_ones_own(monkeypatch, tmp_path):
    module = tmp_path / "my_converter.py"
    module.write_text(
        "from av_llava.checkpoints.convert import Report\n"
        "def run(source, destination, options):\n"
        "    note = f'{options.extra} {options.shard_bytes}'\n"
        "    return Report('', str(source), str(destination), notes=(note,))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = Converter("mine", "my_converter:run", {"depth": Option(int, 3, "How deep.")})
    monkeypatch.setitem(CONVERTERS, "mine", mine)
    report = convert("mine", "a", "b", shard_size="2kB")
    assert report.converter == "mine" and report.notes == ("{'depth': 3} 2000",)
    assert convert("mine", "a", "b", depth=4).notes[0].startswith("{'depth': 4}")


@given(st.integers(1, 10**15))
def test_plain_sizes(n):
    assert parse_size(n) == parse_size(str(n)) == parse_size(f"{n}B") == n


@pytest.mark.parametrize(
    ("text", "n"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1.5k", 1500), ("1TiB", 2**40)],
)
def test_sizes_with_units(text, n):
    assert parse_size(text) == n


@pytest.mark.parametrize("text", ["", "0", "-1", "5 XB", "GB", "1.2.3GB", "0.1", "5GBs", "inf"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


# ---------------------------------------------------------------- reports


def test_a_report_with_a_problem_raises():
    fine = Report("llava", "a", "b", mapped=3)
    assert fine.check() is fine and fine.problems == ()
    broken = Report("llava", "a", "b", missing=("x", "y"), unexpected=("z",))
    with pytest.raises(
        CheckpointError,
        match=r"a cannot be converted \(llava\): 2 missing: x, y. 1 unexpected: z\.",
    ):
        broken.check()
    assert broken.to_dict()["missing"] == ("x", "y")


def test_long_lists_are_cut():
    names = tuple(str(i) for i in range(20))
    assert listed(names).endswith("11 and 8 more") and listed(names[:3]) == "0, 1, 2"


def test_options_have_the_documented_defaults():
    options = ConvertOptions()
    assert not options.verify and not options.dry_run and options.shard_bytes == 5 * 10**9
    assert options.tolerance == 1e-4 and options.dtype is None


# ---------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    "part",
    [
        "vision_tower",
        "mm_projector",
        "media_tokens",
        "audio_tower",
        "mm_audio_projector",
        "lm_head",
        "language_model.layers.1",
        "language_model.embed_tokens",
    ],
)
def test_the_fixed_input_reaches_every_part(part):
    model, _ = tiny("llama")
    inputs = compare.fixed_input(model)
    before = compare.logits_of(model, inputs)
    assert compare.largest_difference(before, compare.logits_of(model, inputs)) == 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.mul_(1.5).add_(0.1)
    assert compare.largest_difference(before, compare.logits_of(model, inputs)) > 1e-4


def test_the_fixed_input_is_always_the_same():
    model, _ = tiny("llama")
    one, two = compare.fixed_input(model), compare.fixed_input(model)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    avoided = compare.fixed_input(model, avoid=range(300))["input_ids"]
    assert set(avoided[avoided >= 0].tolist()) <= set(range(300, 400))


@pytest.mark.parametrize("case", [V15, V16, OV])
def test_cut_pictures_are_compared_where_models_cut(case):
    model = load_checkpoint(golden(f"llava/{case}") / "checkpoint", device="cpu").model
    inputs = compare.fixed_input(model)
    assert (inputs["pixel_values"].shape[1] > 1) == (case != V15)
    assert inputs["pixel_values_videos"].shape[:2] == (1, 3)


def test_what_is_no_number_is_no_agreement():
    from av_llava.checkpoints.destination import check_difference

    one = torch.zeros(1, 2, 3)
    other = torch.full((1, 2, 3), float("nan"))
    with pytest.raises(CheckpointError, match="differs"):
        check_difference(compare.largest_difference(one, other), 1e9, "a")
    with pytest.raises(CheckpointError, match="shapes"):
        compare.largest_difference(one, torch.zeros(1, 3, 3))
    check_difference(0.0, 0.0, "a")


def test_a_tolerance_of_ones_own(tmp_path):
    source = golden(f"llava/{V15}") / "checkpoint"
    assert convert("llava", source, tmp_path / "out", verify=True, tolerance=0).difference == 0
