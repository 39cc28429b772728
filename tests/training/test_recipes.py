"""The recipes that come with the package run, on the tiny model and real clips."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_runs import logged, logits_of, make_base, make_data, trainer_of
from training_data import make_media, sample

import av_llava
from av_llava.checkpoints.load import locate
from av_llava.checkpoints.parts import is_partial
from av_llava.training.recipe import read_recipe
from av_llava.training.run import train
from av_llava.training.stages import runs_of

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
ALL = sorted(p.name for p in RECIPES.glob("*.yaml"))
# What a test needs of a run: little data on a CPU, a few steps.
SHORT = [
    "training.max_steps=3",
    "training.logging_steps=1",
    "training.save_steps=2",
    "training.use_cpu=true",
    "training.report_to=[]",
    "training.gradient_accumulation_steps=2",
    "data.frames=4",
    "batch.max_tokens=600",
    "batch.workers=0",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    make_base(folder)
    make_data(folder, 10)
    return folder


def test_all_recipes_of_the_issue_are_there() -> None:
    wanted = {"align_vision", "align_audio", "video_sft", "av_sft", "lora", "qlora", "full"}
    assert wanted <= {Path(name).stem for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_each_recipe_opens_with_the_command_that_runs_it(name: str) -> None:
    text = (RECIPES / name).read_text()
    comment = " ".join(" ".join(re.findall(r"^#(.*)$", text, re.MULTILINE)).split())
    comment = comment.replace("\\ ", "")
    match = re.search(r"(?:av-llava|av_llava\.cli) train (\S+) ((?:\S+=\S+ ?)+)", comment)
    assert match is not None and match[1] == f"scripts/recipes/{name}"
    settings = read_recipe(RECIPES / name, shlex.split(match[2]))
    assert settings.output and settings.model.path and settings.data.train


def run(name: str, place: Path, output: Path, *words: str) -> Path:
    own = [
        f"model.path={place / 'base'}",
        f"data.train={place / 'data.jsonl'}",
        f"output={output}",
    ]
    one_process = ["training.fsdp=null", "training.fsdp_config=null"]
    words = (*own, *SHORT, *(one_process if name == "video_sft.yaml" else ()), *words)
    (settings,) = runs_of(read_recipe(RECIPES / name, words))
    return train(settings)


@pytest.mark.parametrize("name", [n for n in ALL if n != "qlora.yaml"])
def test_a_recipe_trains_and_its_result_loads_and_answers(name, place, tmp_path) -> None:
    final = run(name, place, tmp_path / "out")
    rows = logged(tmp_path / "out")
    assert [r["step"] for r in rows] == [1, 2, 3] and rows[-1]["loss"] < 6.2
    whole = name in ("video_sft.yaml", "full.yaml")
    assert is_partial(locate(final)) is not whole
    m = av_llava.load(final, device="cpu")
    answer = m.ask(str(place / "media" / "film.mp4"), "What happens?", max_new_tokens=3)
    assert answer.usage.completion_tokens >= 1
    assert m.processor.config.sampling.frames == 4  # as it was trained
    checkpoint = tmp_path / "out" / "checkpoint-3"
    if whole:  # rounded to bfloat16 only in the result
        assert torch.isfinite(logits_of(checkpoint)).all()
        assert m.dtype is torch.bfloat16
    else:
        assert torch.equal(logits_of(checkpoint), logits_of(final))


def test_qlora_trains_in_four_bits_and_loads_on_the_full_base(place, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    final = run("qlora.yaml", place, tmp_path / "out", "lora.rank=4", "training.max_steps=8")
    rows = logged(tmp_path / "out")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert "language_model" in {k.removeprefix("lr/") for k in rows[0]}
    same = av_llava.load(final, device="cpu", quantize="4bit")
    full = av_llava.load(final, device="cpu", dtype="float32")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one = same.model(input_ids=ids).logits.float()
        other = full.model(input_ids=ids).logits
    # The same adapter; what differs is the rounding of the base to four bits.
    assert (one - other).norm() < 0.3 * other.norm()


def test_lora_changes_what_it_should_and_merges(place, tmp_path) -> None:
    final = run("lora.yaml", place, tmp_path / "out", "lora.rank=4", "training.max_steps=4")
    apart = av_llava.load(final, device="cpu", dtype="float32")
    merged = av_llava.load(final, device="cpu", dtype="float32", merge=True)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = (m.model(input_ids=ids).logits for m in (apart, merged))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_stages_follow_each_other(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "stages.yaml"
    file.write_text(
        f"""
output: {tmp_path / "out"}
model: {{path: {place / "base"}}}
data: {{train: {place / "data.jsonl"}}}
stages:
  - name: align
    trainable: {{mm_projector: {{train: full, lr: 1e-2}}}}
  - name: tune
    trainable: {{language_model: {{train: lora, lr: 1e-3}}}}
    lora: {{rank: 4}}
  - name: all
    trainable: {{language_model: {{train: full, lr: 1e-3}}}}
"""
    )
    folders = [train(s) for s in runs_of(read_recipe(file, SHORT))]
    assert [f.parent.name for f in folders] == ["align", "tune", "all"]
    last = [logged(f.parent)[-1]["loss"] for f in folders]
    assert last == sorted(last, reverse=True)
    # An adapter that stands on the first base holds what the stage before it learned, too.
    records = [json.loads((f.parent / "run.json").read_text()) for f in folders]
    assert records[1]["model"] == str(folders[0])
    assert is_partial(locate(folders[1])) and not is_partial(locate(folders[2]))
    begun = logged(folders[2].parent)[0]["loss"]
    assert begun == pytest.approx(last[1], abs=0.2)


def test_a_lora_can_be_trained_further(place: Path, tmp_path: Path) -> None:
    first = run("lora.yaml", place, tmp_path / "one", "lora.rank=4")
    second = run(
        "lora.yaml", place, tmp_path / "two", f"model.path={first}",
        "trainable.audio_token_rows=freeze", "lora.rank=4",
    )  # fmt: skip
    config = json.loads((second / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == str(place / "base")
    assert not torch.equal(logits_of(first), logits_of(second))


def test_a_model_without_ears_is_given_some(tmp_path: Path) -> None:
    from tiny import tiny
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperModel

    model, processor = tiny("llama", audio=False)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    whisper = WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64, num_mel_bins=80,
        max_source_positions=100, vocab_size=60, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    WhisperModel(whisper).save_pretrained(tmp_path / "whisper")
    media = make_media(tmp_path / "media")
    rows = [sample(i, ("audio", media["sound"])).to_row() for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = f"model.add_audio={{tower: {tmp_path / 'whisper'}, projector: {{projector_hidden_size: 32}}}}"
    final = run("align_audio.yaml", tmp_path, tmp_path / "out", words)
    m = av_llava.load(final, device="cpu")
    assert m.processor.config.audio_config is not None
    assert m.ask(media["film"], "What is heard?", max_new_tokens=2).media[0].audio_tokens > 0


# ---------------------------------------------------------------- several processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(*words: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_port", str(free_port()), "-m", "av_llava.cli", "train", *words,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=560)


@pytest.mark.slow
def test_two_processes_train_together(place: Path, tmp_path: Path) -> None:
    words = [
        str(RECIPES / "lora.yaml"), f"model.path={place / 'base'}",
        f"data.train={place / 'data.jsonl'}", *SHORT, "lora.rank=4", "training.bf16=false",
        "lora.dropout=0", "batch.max_samples=1", "batch.max_tokens=4000",
        f"data.eval={place / 'data.jsonl'}", "training.eval_strategy=steps",
        "training.eval_steps=3", "training.eval_on_start=true", "evaluation.max_new_tokens=3",
        "evaluation.samples=7", "evaluation.scorer=operator:lt",  # of random texts
    ]  # fmt: skip
    together = torchrun(
        *words, f"output={tmp_path / 'two'}", "training.gradient_accumulation_steps=1"
    )
    assert together.returncode == 0, together.stderr[-3000:]
    rows = logged(tmp_path / "two")
    assert [r["step"] for r in rows] == [1, 2, 3]
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["world_size"] == 2 and record["status"] == "finished"
    assert (tmp_path / "two" / "checkpoint-2" / "rng_state_1.pth").is_file()
    assert torch.isfinite(logits_of(tmp_path / "two" / "final")).all()
    lines = (tmp_path / "two" / "train_log.jsonl").read_text().splitlines()
    before, after = (r for r in map(json.loads, lines) if "eval_loss" in r)
    assert (before["step"], after["step"]) == (0, 3) and after["eval_loss"] < before["eval_loss"]
    one = [*words[1:], f"output={tmp_path / 'one'}"]
    (settings,) = runs_of(read_recipe(words[0], one))
    alone = trainer_of(settings)[0].evaluate()
    assert {f"eval_loss/{m}" for m in ("text", "video", "video+audio")} < alone.keys()
    assert 0 < alone["eval_score"] < 1
    assert {k: before[k] for k in alone} == pytest.approx(alone, rel=1e-5)
    again = torchrun(
        *words, f"output={tmp_path / 'two'}", "training.gradient_accumulation_steps=1", "--resume"
    )
    assert again.returncode == 0 and "is finished" in again.stderr
