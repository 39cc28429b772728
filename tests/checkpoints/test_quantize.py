"""Loading in 4 and 8 bits: what is quantised, how well it computes, saves, trains, and is refused."""

from __future__ import annotations

import gc
import json
import logging
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from golden_data import golden
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny
from torch import nn
from transformers import WhisperConfig

import av_llava
from av_llava.checkpoints.load import load_checkpoint
from av_llava.checkpoints.partial import load_partial
from av_llava.checkpoints.quantize import (
    KEPT,
    SCHEMES,
    check_placement,
    quantized_layers,
    stored_bytes,
    stored_scheme,
)
from av_llava.checkpoints.source import open_source
from av_llava.errors import AVLlavaError, CheckpointError, MissingExtraError, UsageError
from av_llava.inference import describe
from checkpoints.folders import copy_case, edit_config, edit_weights, read_weights, write_weights
from checkpoints.stock_llava import stock_folder, stock_model

torch.set_num_threads(1)

EVERY = tuple(SCHEMES)
# How far the logits of a random model may move, as a part of their norm. NF4 rounds a normal weight
# by a tenth of its size, 8 bits by a hundredth, and errors of several layers add up.
LOST = {"4bit": 0.25, "8bit": 0.03, "int8": 0.02}
# The same against a model with the rounded weights. LLM.int8() rounds what goes in, too.
APART = {"4bit": 1e-4, "8bit": 3e-2, "int8": 1e-4}
TARGETS = r".*language_model.*\.(q_proj|o_proj|down_proj)"
IDS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def save(model, processor, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with every part; untied."""
    return save(*tiny("qwen2", text={"tie_word_embeddings": False}), tmp_path_factory.mktemp("q"))


def load(folder, scheme=None, **options):
    options = {"device": "cpu", "dtype": "float32", **options}
    return load_checkpoint(folder, quantize=scheme, **options).model


@torch.no_grad()
def logits(model, **inputs):
    return model(**(inputs or {"input_ids": IDS})).logits.float()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def plain_weight(layer: nn.Linear) -> torch.Tensor:
    """The weight that a quantised layer stands for, in float32. [out, in]"""
    kind, weight = type(layer.weight).__name__, layer.weight
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    if kind == "Int8Params":
        scale = layer.state_dict()["SCB"]
        return weight.data.float() * scale[:, None] / 127
    return weight.dequantize().float()


def twin(folder, quantized, **options):
    """The model in full precision with the weights that the quantised one stands for."""
    model = load(folder, **options)
    with torch.no_grad():
        for name, layer in quantized_layers(quantized).items():
            model.get_submodule(name).weight.copy_(plain_weight(layer))
    return model


# ---------------------------------------------------------------- which layers, how exactly


@pytest.mark.parametrize("scheme", EVERY)
@pytest.mark.parametrize("kind", ["llama", "gemma"])  # the second has a tied head
def test_exactly_the_language_models_linear_layers_are_quantised(kind, scheme, tmp_path):
    full, processor = tiny(kind)
    save(full, processor, tmp_path)
    model = load(tmp_path, scheme, dtype="auto")
    inside = {
        name
        for name, module in full.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.language_model.")
    }
    assert set(quantized_layers(model)) == inside and len(inside) == 14
    others = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in inside}
    assert {p.dtype for p in others.values()} == {torch.bfloat16}
    assert kind == "gemma" or "lm_head.weight" in others
    linear = [n for n, m in full.named_modules() if isinstance(m, nn.Linear) and n not in inside]
    assert {n.split(".")[1] for n in linear if "." in n} == {
        "vision_tower",
        "mm_projector",
        "audio_tower",
        "mm_audio_projector",
    }


def test_everything_but_the_language_model_is_kept():
    model, _ = tiny()
    parts = {f"model.{name}" for name, _ in model.model.named_children()} | {"lm_head"}
    unused = {"model.modalities"} - parts
    assert set(KEPT) == (parts | unused) - {"model.language_model"}


@pytest.mark.parametrize("scheme", EVERY)
def test_logits_stay_close_to_full_precision(folder, scheme):
    full = logits(load(folder))
    for dtype in ("auto", "float32"):
        model = load(folder, scheme, dtype=dtype)
        assert model.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
        assert 1e-4 < apart(logits(model), full) < LOST[scheme]


@pytest.mark.parametrize("scheme", EVERY)
def test_logits_are_those_of_the_rounded_weights(folder, scheme):
    model = load(folder, scheme)
    assert apart(logits(model), logits(twin(folder, model))) < APART[scheme]


@pytest.mark.parametrize("scheme", EVERY)
def test_what_is_seen_is_not_changed(folder, scheme):
    pixels = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        one = load(folder, scheme, dtype="bfloat16").model.encode_images(pixels)
        other = load(folder, dtype="bfloat16").model.encode_images(pixels)
    assert torch.equal(one, other)


def nearest_normal_float(weight: torch.Tensor) -> torch.Tensor:
    """NF4 as the paper defines it, slowly: 16 quantiles of the normal in blocks of 64 weights."""
    quantile = torch.special.ndtri
    edge = 0.9677083  # half way between the last quantile of 32 and of 30
    above = quantile(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -quantile(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    code = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    code = code / code.max()
    rows = []
    for block in weight.double().flatten().split(64):
        size = block.abs().max()
        rows.append(code[(block[:, None] / size - code).abs().argmin(1)] * size)
    return torch.cat(rows).view_as(weight)


def test_4_bits_are_normal_float_4(folder):
    full, model = load(folder), load(folder, "4bit")
    for name, layer in quantized_layers(model).items():
        wanted = nearest_normal_float(full.get_submodule(name).weight.detach())
        size = wanted.flatten().abs().max()
        # The blocks' sizes are rounded once more (double quantisation).
        torch.testing.assert_close(plain_weight(layer).double(), wanted, atol=0.01 * size, rtol=0)
        assert layer.weight.quant_state.nested and layer.weight.quant_state.quant_type == "nf4"


@pytest.mark.parametrize("scheme", ["8bit", "int8"])
def test_8_bits_are_a_255th_of_each_rows_range(folder, scheme):
    full, model = load(folder), load(folder, scheme)
    for name, layer in quantized_layers(model).items():
        weight = full.get_submodule(name).weight.detach()
        step = weight.abs().amax(1, keepdim=True) / 127
        rounded = plain_weight(layer)
        # bitsandbytes rounds to float16 first: 127 steps have an error of 127 / 2**11.
        most = 0.5 + (0.07 if scheme == "8bit" else 0.001)
        assert bool(((rounded - weight).abs() <= most * step).all())
        assert all(len(row.unique()) <= 255 for row in rounded)


@pytest.mark.parametrize("scheme", EVERY)
def test_awkward_widths_compute_right(scheme, tmp_path):
    """24 channels: no multiple of a block, of 32 rows, or of a vector register."""
    full = stock_model("llava")
    folder = stock_folder(full, tmp_path)
    model = load(folder, scheme)
    ids = IDS % 60
    alike = logits(twin(folder, model), input_ids=ids)
    assert apart(logits(model, input_ids=ids), alike) < APART[scheme]
    assert apart(logits(model, input_ids=ids), logits(load(folder), input_ids=ids)) < LOST[scheme]


@pytest.mark.parametrize("scheme", EVERY)
def test_llavas_own_layout_with_a_picture(scheme):
    case = golden("llava/v15_flat_batch3_right")
    inputs, outputs = (load_file(case / f"{x}.safetensors") for x in ("inputs", "outputs"))
    model = load(case / "checkpoint", scheme)
    images = inputs["images_tensor"].float()
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    found = logits(model, **given, images=images)
    alike = logits(twin(case / "checkpoint", model), **given, images=images)
    assert apart(found, alike) < APART[scheme]
    assert apart(found, outputs["logits"]) < LOST[scheme]


# ---------------------------------------------------------------- memory


def live_bytes() -> int:
    """Bytes of the storage of all tensors alive."""
    gc.collect()
    seen = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            try:
                storage = thing.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
            except RuntimeError:  # a wrapper around others, without storage of its own
                continue
    return sum(seen.values())


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Wide enough that constant costs of a layer do not count."""
    text = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 420}
    return save(*tiny("llama", text=text), tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize(("scheme", "width"), [("4bit", 0.56), ("8bit", 1.05), ("int8", 1.05)])
def test_memory_is_really_smaller(wide, scheme, width):
    used = []
    for quantize in (None, scheme):
        before = live_bytes()
        model = load(wide, quantize, dtype="bfloat16")
        logits(model)
        used.append(live_bytes() - before)
        part = model.model.language_model
        if quantize is None:
            weights = sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear))
            assert stored_bytes(part) == sum(p.nbytes for p in part.state_dict().values())
            plain = stored_bytes(part)
        else:
            saved = plain - stored_bytes(part)
            assert saved >= (2 - width) * weights
        del model, part
    assert used[0] - used[1] >= (2 - width) * weights


# ---------------------------------------------------------------- use


@pytest.mark.parametrize("scheme", EVERY)
def test_asking_streaming_and_sessions(folder, scheme):
    m = av_llava.load(folder, device="cpu", quantize=scheme)
    picture = Image.new("RGB", (64, 40), "red")
    answer = m.ask(picture, "What is it?", max_new_tokens=4)
    assert answer.usage.image_tokens > 0 and answer.dtype == "bfloat16"
    stream = m.stream(picture, "What is it?", max_new_tokens=4)
    "".join(stream)
    assert stream.answer.text == answer.text
    assert m.session(picture).ask("What is it?", max_new_tokens=4).text == answer.text


@pytest.mark.parametrize("bits", [4, 8])
def test_llavas_flags(folder, bits):
    _, model, _, context = av_llava.load_pretrained_model(
        folder, device="cpu", **{f"load_{bits}bit": True}
    )
    wanted = load(folder, f"{bits}bit", dtype="auto")
    assert torch.equal(logits(model), logits(wanted)) and context == 4096


@pytest.mark.parametrize("scheme", EVERY)
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_placements(folder, scheme, device_map):
    model = load(folder, scheme, device_map=device_map)
    assert torch.equal(logits(model), logits(load(folder, scheme)))


def test_8_bits_say_nothing_in_every_layer(folder, caplog):
    model = load(folder, "8bit", dtype="bfloat16")
    with caplog.at_level(logging.INFO):
        logits(model)
    assert not caplog.records


def test_what_is_left_in_full_precision_is_said(tmp_path, caplog):
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model, processor = tiny("mixtral", text=moe)
    save(model, processor, tmp_path)
    with caplog.at_level(logging.WARNING, logger="av_llava"):
        quantized = load(tmp_path, "4bit")
    assert any("experts" in r.getMessage() for r in caplog.records)
    assert apart(logits(quantized), logits(load(tmp_path))) < LOST["4bit"]


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("scheme", EVERY)
def test_what_is_saved_loads_to_the_same_numbers(folder, scheme, dtype, tmp_path):
    m = av_llava.load(folder, device="cpu", quantize=scheme, dtype=dtype)
    before = logits(m.model)
    m.save_pretrained(tmp_path)
    assert torch.equal(logits(m.model), before)
    again = load(tmp_path, dtype="auto")
    assert torch.equal(logits(again), before)
    assert stored_scheme(av_llava.checkpoints.load.locate(tmp_path)) == scheme
    assert torch.equal(logits(load(tmp_path, scheme, dtype="auto")), before)
    names = set(read_weights(tmp_path))
    assert {"model.embed_tokens.weight", "model.image_newline", "lm_head.weight"} <= names
    assert any(n.startswith("model.layers.0.self_attn.q_proj.") for n in names)
    assert not any("language_model" in n for n in names)
    told = describe(tmp_path)
    assert told["missing"] == told["unexpected"] == [] and told["quantization"] == scheme
    again.save_pretrained(tmp_path / "again")
    first, second = read_weights(tmp_path), read_weights(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("scheme", EVERY)
def test_ears_for_a_quantised_model(scheme, tmp_path):
    save(*tiny(audio=False), tmp_path / "eyes")
    m = av_llava.load(tmp_path / "eyes", device="cpu", quantize=scheme)
    before = logits(m.model)
    tower = WhisperConfig(
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=80,
        max_source_positions=100,
    )
    av_llava.add_audio(m, tower)
    assert torch.equal(logits(m.model), before)
    assert m.model.model.audio_tower.dtype == torch.bfloat16
    m.save_pretrained(tmp_path / "ears")
    again = load(tmp_path / "ears", dtype="auto")
    assert torch.equal(logits(again), before)
    assert len(quantized_layers(again)) == len(quantized_layers(m.model))
    one, other = (x.model.audio_tower.state_dict() for x in (m.model, again))
    assert all(torch.equal(v, other[k]) for k, v in one.items())


def test_a_stored_scheme_stays_what_it_is(folder, tmp_path):
    av_llava.load(folder, device="cpu", quantize="4bit").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"stored in 4bit.*quantize='8bit'"):
        load(tmp_path, "8bit", dtype="auto")
    with pytest.raises(UsageError, match=r"computing in bfloat16.*as float32"):
        load(tmp_path, dtype="float32")


def test_stored_in_4_bits_is_not_converted(folder, tmp_path):
    av_llava.load(folder, device="cpu", quantize="4bit").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="stored in 4bit.*full precision"):
        open_source(tmp_path)


def test_other_softwares_quantised_weights_are_refused(folder, tmp_path):
    av_llava.load(folder, device="cpu", quantize="4bit").save_pretrained(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for other in (
        {"quant_method": "gptq", "bits": 4},
        {**own, "llm_int8_skip_modules": ["lm_head"]},
        {**own, "bnb_4bit_quant_type": "fp4"},
        {**own, "load_in_4bit": False},
    ):
        edit_config(tmp_path, quantization_config=other)
        with pytest.raises(CheckpointError, match=f"{other['quant_method']}.*full-precision"):
            load(tmp_path, dtype="auto")
    edit_config(tmp_path, quantization_config="nf4")
    with pytest.raises(CheckpointError, match=r"config\.json.*object"):
        load(tmp_path, dtype="auto")


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_leftovers_of_training_in_4_bits_are_not_obeyed(scheme, tmp_path):
    """LLaVA writes how the base was loaded into the config of what it saves in full."""
    folder = copy_case("v15_flat_batch3_right", tmp_path)
    left = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    before = logits(load(folder, scheme))
    edit_config(folder, quantization_config=left)
    model = load(folder, scheme)
    assert torch.equal(logits(model), before)
    assert bool(quantized_layers(model)) == (scheme is not None)


# ---------------------------------------------------------------- LoRA


def lora_folder(base: Path, to: Path) -> Path:
    """An adapter with random weights for a base."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    wrapped = get_peft_model(load(base), config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.mul_(0.5)
    wrapped.save_pretrained(to)
    return to


@pytest.mark.parametrize("scheme", EVERY)
def test_a_lora_stays_beside_quantised_weights(folder, scheme, tmp_path):
    adapter = lora_folder(folder, tmp_path)
    options = {"device": "cpu", "dtype": "float32"}
    base, full = load(folder, scheme), load_partial(adapter, folder, merge=True, **options).model
    model = load_partial(adapter, folder, quantize=scheme, **options).model
    assert set(quantized_layers(model.get_submodule("model"))) and logits(model).isfinite().all()
    assert apart(logits(model), logits(full)) < LOST[scheme]
    moved, wanted = logits(model) - logits(base), logits(full) - logits(load(folder))
    assert apart(moved, wanted) < 2 * LOST[scheme] and wanted.norm() > 0.1
    reloaded = quantized_layers(base)
    for name, layer in quantized_layers(model).items():
        plain = reloaded[name]
        assert torch.equal(plain_weight(layer), plain_weight(plain)), name


def test_asking_a_quantised_model_with_a_lora(folder, tmp_path):
    adapter = lora_folder(folder, tmp_path)
    m = av_llava.load(adapter, base=folder, device="cpu", quantize="4bit")
    picture = Image.new("RGB", (64, 40), "red")
    answer = m.ask(picture, "What is it?", max_new_tokens=4)
    assert m.session(picture).ask("What is it?", max_new_tokens=4).text == answer.text


@pytest.mark.parametrize("scheme", EVERY)
def test_an_adapter_on_a_quantised_base_saves_and_loads(folder, scheme, tmp_path):
    adapter = lora_folder(folder, tmp_path / "adapter")
    options = {"device": "cpu", "quantize": scheme}
    m = av_llava.load(adapter, base=folder, **options)
    m.save_pretrained(tmp_path / "saved")
    again = av_llava.load(tmp_path / "saved", **options)
    assert torch.equal(logits(again.model), logits(m.model))
    full = av_llava.load(tmp_path / "saved", device="cpu")
    assert not quantized_layers(full.model)
    assert apart(logits(m.model), logits(full.model)) < LOST[scheme]


def test_an_adapter_on_a_base_that_is_stored_in_4_bits(folder, tmp_path):
    adapter = lora_folder(folder, tmp_path / "adapter")
    av_llava.load(folder, device="cpu", quantize="4bit").save_pretrained(tmp_path / "base")
    stored = load_partial(adapter, tmp_path / "base", device="cpu").model
    fresh = load_partial(adapter, folder, device="cpu", quantize="4bit").model
    assert torch.equal(logits(stored), logits(fresh))


def test_a_lora_is_not_merged_into_quantised_weights(folder, tmp_path):
    adapter = lora_folder(folder, tmp_path)
    with pytest.raises(UsageError, match="4bit.*merge"):
        load_partial(adapter, folder, device="cpu", quantize="4bit", merge=True)


def test_a_projector_on_a_quantised_base():
    case = golden("llava/layout_mm_projector_only")
    inputs, wanted = (load_file(case / f"{x}.safetensors") for x in ("inputs", "outputs"))
    options = {"device": "cpu", "dtype": "float32", "quantize": "8bit"}
    model = load_partial(case / "checkpoint", case / "base", **options).model
    images = inputs["images_tensor"].float()
    found = logits(model, input_ids=inputs["input_ids"], images=images)
    assert apart(found, wanted["logits"]) < LOST["8bit"]


def test_whole_weights_for_quantised_layers_are_refused(folder, tmp_path):
    adapter = lora_folder(folder, tmp_path)
    extra = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)}
    torch.save(extra, adapter / "non_lora_trainables.bin")
    load_partial(adapter, folder, device="cpu")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight.*without quantize"):
        load_partial(adapter, folder, device="cpu", quantize="4bit")


def with_lora(model):
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    return get_peft_model(model, config)


def gradients(model) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("scheme", EVERY)
def test_gradients_of_a_lora_are_those_on_the_rounded_weights(folder, scheme):
    quantized = load(folder, scheme)
    wanted = gradients(with_lora(twin(folder, quantized)))
    logits(quantized)  # as an evaluation before training does
    found = gradients(with_lora(quantized))
    assert found.keys() == wanted.keys() and len(found) == 12
    for name, value in wanted.items():
        assert float(value.norm()) > 0, name
        assert apart(found[name], value) < 3 * APART[scheme], name


@pytest.mark.parametrize("scheme", EVERY)
def test_a_lora_on_a_quantised_base_learns(folder, scheme):
    model = load(folder, scheme, dtype="auto")
    before = {n: plain_weight(layer) for n, layer in quantized_layers(model).items()}
    wrapped = with_lora(model)
    wrapped.train()
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.02)
    losses = []
    for _ in range(8):
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = {n.removeprefix("base_model.model."): x for n, x in quantized_layers(wrapped).items()}
    for name, layer in after.items():
        assert torch.equal(plain_weight(layer), before[name])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("scheme", EVERY)
def test_a_missing_package_is_named_with_the_command(folder, scheme, monkeypatch, tmp_path):
    package = SCHEMES[scheme].package
    av_llava.load(folder, device="cpu", quantize=scheme).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    for path, quantize in ((folder, scheme), (tmp_path, None)):
        with pytest.raises(MissingExtraError) as caught:
            av_llava.load(path, device="cpu", quantize=quantize)
        assert caught.value.package == package and caught.value.exit_code == 6
        assert f'pip install "av-llava[{SCHEMES[scheme].extra}]"' in str(caught.value)


def test_the_extras_exist():
    file = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(file.read_text())["project"]["optional-dependencies"]
    for scheme in SCHEMES.values():
        assert any(line.startswith(scheme.package) for line in extras[scheme.extra])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": "4bits"}, "Unknown quantization '4bits'. Did you mean '4bit'"),
        ({"quantize": "nf4"}, "Known: 4bit, 8bit, int8"),
        ({"quantize": 4}, "Unknown quantization 4"),
        ({"quantize": True}, "Unknown quantization True"),
        ({"quantize": "4bit", "device_map": {"": "disk"}}, "4bit cannot keep parts on disk"),
        (
            {"quantize": "int8", "device_map": {"": "cpu", "model.vision_tower": "disk"}},
            "cannot keep parts on disk",
        ),
        ({"quantize": "8bit", "dtype": "float64"}, "8bit layers compute in one of bfloat16"),
        ({"quantize": "8bit", "dtype": "bf61"}, "Unknown dtype 'bf61'"),
        ({"quantize": "4bit", "device": "cdua"}, "Unknown device"),
    ],
)
def test_what_does_not_go_together(folder, options, said):
    with pytest.raises(UsageError) as caught:
        av_llava.load(folder, **{"device": "cpu", **options})
    assert said in str(caught.value)


def test_parts_on_the_cpu_beside_an_accelerator_are_refused():
    for device_map in ({"": "cuda:0", "lm_head": "cpu"}, {"a": 0, "b": 1, "c": "cpu"}):
        with pytest.raises(UsageError, match="on the CPU while others are on an accelerator"):
            check_placement("4bit", device_map)
    for device_map in (None, "auto", {"": "cpu"}, {"a": 0, "b": "cuda:1"}):
        check_placement("4bit", device_map)


def test_flags_that_exclude_each_other(folder):
    with pytest.raises(UsageError, match="load_8bit and load_4bit"):
        av_llava.load_pretrained_model(folder, load_8bit=True, load_4bit=True)
    with pytest.raises(UsageError, match="quantize goes with a path"):
        av_llava.load(quantize="4bit")


@pytest.mark.parametrize("scheme", EVERY)
def test_a_damaged_layer_is_named(scheme, tmp_path):
    key = "model.layers.0.self_attn.q_proj.weight"
    folder = copy_case("v15_flat_batch3_right", tmp_path)
    whole = read_weights(folder)
    edit_weights(folder, **{key: whole[key][:-2].clone()})
    with pytest.raises(CheckpointError, match=rf"Wrong shape.*{key}: the file has \(62, 64\)"):
        load(folder, scheme)
    write_weights(folder, {k: v for k, v in whole.items() if k != key})
    with pytest.raises(CheckpointError, match=rf"Missing \(1\): {key}"):
        load(folder, scheme)


@pytest.mark.parametrize("scheme", EVERY)
def test_float16_that_overflows_is_said(folder, scheme, tmp_path):
    model, processor = tiny("qwen2", text={"tie_word_embeddings": False})
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(1e5)  # 65504 is the largest float16
    save(model, processor, tmp_path)
    m = av_llava.load(tmp_path, device="cpu", dtype="float16", quantize=scheme)
    with pytest.raises(AVLlavaError, match="float16 overflows"):
        m.ask(None, "Hello", max_new_tokens=2)
    m = av_llava.load(tmp_path, device="cpu", quantize=scheme)
    assert m.ask(None, "Hello", max_new_tokens=2).usage.completion_tokens > 0


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", EVERY)
def test_on_cuda(folder, scheme):
    model = load(folder, scheme, device="cuda", dtype="auto")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    found = logits(model, input_ids=IDS.cuda()).cpu()
    assert apart(found, logits(load(folder))) < LOST[scheme]
