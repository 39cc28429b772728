"""The trainer: accumulation, losses, what stops it, what it logs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny
from train_runs import logged, losses, make_data, recipe, trainer_of
from training_data import dataset_of, make_media, sample, some_samples
from transformers import TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from av_llava.errors import DataError, UsageError
from av_llava.training.callbacks import register_entry_points
from av_llava.training.collate import BatchInfo
from av_llava.training.index import modality_name
from av_llava.training.loss import weighted_loss, where_learned
from av_llava.training.meters import LossWatch, Meters, check_supervised
from av_llava.training.prepare import Hooks
from av_llava.training.preview import preview
from av_llava.training.run import train


@pytest.fixture
def run_of(place: Path, tmp_path: Path):
    """Settings of a run in a folder of its own."""

    def make(**changes):
        return recipe(place / "base", place / "data.jsonl", tmp_path / "out", **changes)

    return make


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        if not self.kept:
            self.kept = {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            }


def gradients_of(settings) -> tuple[dict[str, torch.Tensor], float]:
    trainer, _ = trainer_of(settings)
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    return kept.kept, trainer.state.log_history[0]["loss"]


# ---------------------------------------------------------------- accumulation


def test_four_batches_of_one_equal_one_of_four(place: Path, tmp_path: Path) -> None:
    file = make_data(tmp_path, 4)  # text, a picture, a sound, a silent film

    def settings(accumulation: int, n: int, out: str):
        return recipe(
            place / "base",
            file,
            tmp_path / out,
            batch={"max_tokens": 4000, "max_samples": n},
            training={
                "max_steps": 1,
                "gradient_accumulation_steps": accumulation,
                "max_grad_norm": 0.0,
            },
        )

    few, loss_few = gradients_of(settings(1, 4, "a"))
    many, loss_many = gradients_of(settings(4, 1, "b"))
    assert few.keys() == many.keys() and len(few) > 20
    # One scale for all: a tensor of tiny gradients has the rounding of what it was summed from.
    scale = max(g.abs().max() for g in few.values())
    assert loss_few == pytest.approx(loss_many, abs=1e-6)
    for name in few:
        torch.testing.assert_close(few[name], many[name], rtol=1e-5, atol=1e-6 * float(scale))


# ---------------------------------------------------------------- the loss


def test_logits_where_something_is_learned_give_the_same_loss(place: Path) -> None:
    model, processor = tiny("llama")
    data = dataset_of(some_samples(make_media(place / "own"), 5), processor)
    inputs = data.__getitems__(range(5))
    inputs.pop("info")
    less = where_learned(inputs)
    assert len(less["logits_to_keep"]) < inputs["labels"].shape[1] / 2
    results = []
    for given in (inputs, less):
        model.zero_grad()
        out = model(**given, use_cache=False)
        out.loss.backward()
        gradient = model.lm_head.weight.grad.clone()
        results.append((out.loss.detach(), gradient, out.logits.shape[1]))
    (full, full_gradient, n), (few, few_gradient, k) = results
    assert (n, k) == (inputs["labels"].shape[1], len(less["logits_to_keep"]))
    torch.testing.assert_close(full, few, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(full_gradient, few_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_labels_of_kept_rows_against_an_oracle(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((3, 40), -100)
    for row in labels:
        start = int(torch.randint(1, 30, (), generator=generator))
        row[start : start + 4] = torch.randint(0, 9, (4,), generator=generator)
    logits = torch.randn(3, 40, 9, generator=generator)
    less = where_learned({"labels": labels})
    kept = logits[:, less["logits_to_keep"]]
    own = ForCausalLMLoss(kept, less["labels"], vocab_size=9)
    torch.testing.assert_close(own, ForCausalLMLoss(logits, labels, vocab_size=9))


def test_where_everything_is_learned_nothing_is_left_out() -> None:
    inputs = {"labels": torch.zeros(2, 8, dtype=torch.long)}
    assert where_learned(inputs) is inputs


def test_weights_of_samples_weigh_their_tokens() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6))
    labels[0, :4] = -100
    oracle = 0.0
    for row, weight in enumerate((2.0, 0.5)):
        for at in range(5):
            if labels[row, at + 1] != -100:
                oracle -= weight * logits[row, at].log_softmax(-1)[labels[row, at + 1]]
    torch.testing.assert_close(weighted_loss(logits, labels, (2.0, 0.5), 7), oracle / 7)
    alone = weighted_loss(logits, labels, (1.0, 1.0), None)
    torch.testing.assert_close(alone, ForCausalLMLoss(logits, labels, vocab_size=5))


def test_a_sample_of_weight_nought_changes_nothing(place: Path, tmp_path: Path) -> None:
    """Two runs that differ only in a sample whose weight is 0."""
    found = []
    for answer in ("Left.", "Something else entirely."):
        rows = [
            sample("a", question="Where?", answer="Right.").to_row(),
            sample("b", question="Where?", answer=answer, weight=0.0).to_row(),
        ]
        file = tmp_path / f"{len(found)}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        settings = recipe(
            place / "base",
            file,
            tmp_path / f"out{len(found)}",
            batch={"max_samples": 1, "shuffle": False},
            training={"max_steps": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0},
            trainable=dict.fromkeys(
                ("mm_projector", "mm_audio_projector", "media_tokens"), "freeze"
            ),
        )
        gradients, _ = gradients_of(settings)
        found.append(gradients["lm_head.weight"])
    # The number of tokens differs, by which both are divided.
    ratio = found[0].norm() / found[1].norm()
    torch.testing.assert_close(found[0], found[1] * ratio, rtol=1e-4, atol=1e-8)


# ---------------------------------------------------------------- what stops a run


def info(**changes) -> BatchInfo:
    own = BatchInfo(
        ids=("a", "b"),
        sources=("f.jsonl:1", "f.jsonl:2"),
        indices=(0, 1),
        epoch=0,
        modalities=(2, 6),
        lengths=(10, 8),
        padded=20,
        supervised=(3, 2),
        tokens={"text": 18},
        weights=(1.0, 1.0),
    )
    return replace(own, **changes)


def test_a_loss_that_is_no_number_names_the_samples_at_once() -> None:
    watch = LossWatch(at_once=True)
    watch.add(torch.tensor(1.0), info(), 1)
    with pytest.raises(DataError, match=r"step 2 is nan, for samples 'a' \(f.jsonl:1\), 'b'"):
        watch.add(torch.tensor(float("nan")), info(), 2)


def test_a_loss_on_a_device_is_looked_at_later_but_before_saving() -> None:
    watch = LossWatch(at_once=False)
    watch.add(torch.tensor(float("inf")), info(ids=("x",), sources=("",)), 5)
    watch.add(torch.tensor(1.0), info(), 6)
    with pytest.raises(DataError, match="step 5 is inf, for sample 'x'"):
        watch.check()
    watch.check()  # once


def test_a_gradient_that_is_no_number_is_noticed_before_it_is_saved() -> None:
    watch = LossWatch(at_once=False)
    watch.add(torch.tensor(1.0), info(), 7)
    watch.add_norm(torch.tensor(float("inf")), 7)
    with pytest.raises(DataError, match="The gradient norm of step 7 is inf, for samples 'a'"):
        watch.check()


def test_gradients_without_bound_stop_the_run(run_of) -> None:
    settings = run_of(training={"save_strategy": "steps", "save_steps": 1})
    trainer, _ = trainer_of(settings)

    class Explode(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 1:
                model.lm_head.weight.register_hook(lambda g: g * float("inf"))

    trainer.add_callback(Explode())
    with pytest.raises(DataError, match="gradient norm of step 2"):
        trainer.train()
    assert [p.name for p in Path(settings.output).glob("*checkpoint*")] == ["checkpoint-1"]


def test_steps_that_fp16_skips_end_nothing(run_of) -> None:
    """Its scale grows until a gradient overflows; then the step is skipped and the scale halved."""
    trainer, _ = trainer_of(run_of(training={"max_steps": 12, "bf16": True}))
    accelerator = trainer.accelerator
    # accelerate has fp16 on GPUs alone; the scaler is the real one, in a hurry.
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", 2.0**16, growth_interval=1)
    norms = []
    trainer.log = lambda logs, _=None: norms.append(logs.get("grad_norm"))
    try:
        trainer.train()
    finally:
        accelerator.state._mixed_precision = "bf16"
    assert trainer.state.global_step == 12 and scaler.get_scale() < 2.0**28
    assert sum(n == float("inf") for n in norms) >= 1


def test_a_run_with_a_broken_weight_stops_and_keeps_nothing(run_of) -> None:
    settings = run_of(training={"save_strategy": "steps", "save_steps": 1})
    trainer, _ = trainer_of(settings)

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                with torch.no_grad():
                    model.lm_head.weight[3, 5] = float("nan")

    trainer.add_callback(Break())
    with pytest.raises(DataError, match="The loss of step 3 is nan, for sample"):
        trainer.train()
    kept = sorted(p.name for p in Path(settings.output).glob("*checkpoint*"))
    assert kept == ["checkpoint-1", "checkpoint-2"]


def test_nothing_learned_names_the_sample() -> None:
    check_supervised(info())
    with pytest.raises(DataError, match="f.jsonl:2: nothing of the sample 'b' is learned"):
        check_supervised(info(supervised=(3, 0)))


def test_a_sample_without_an_answer_stops_the_run(place: Path, tmp_path: Path) -> None:
    rows = [sample("fine").to_row(), sample("mute", train_turns=(False,)).to_row()]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = recipe(
        place / "base", file, tmp_path / "out",
        trainable={"mm_projector": "freeze", "mm_audio_projector": "freeze"},
    )  # fmt: skip
    with pytest.raises(DataError, match="mute"):
        train(settings)


def test_a_row_that_does_not_fit_the_template_stops_the_run(place: Path, tmp_path: Path) -> None:
    twice = [("human", "<video>\nHello."), ("human", "What is it?"), ("gpt", "A ball.")]
    film = str(place / "media" / "film.mp4")
    row = {
        "id": "twice",
        "video": film,
        "conversations": [{"from": f, "value": v} for f, v in twice],
    }
    file = tmp_path / "d.jsonl"
    others = (place / "data.jsonl").read_text()
    file.write_text(others + json.dumps(row) + "\n")
    with pytest.raises(DataError, match="d.jsonl, line 9: sample 'twice': .*user"):
        train(recipe(place / "base", file, tmp_path / "out"))
    row["conversations"] = row["conversations"][1:]
    row["video"] = str(tmp_path / "gone.mp4")  # a file that is missing is another matter
    row["conversations"][0]["value"] = "<video>\nWhat is it?"
    file.write_text(others + json.dumps(row) + "\n")
    train(recipe(place / "base", file, tmp_path / "out2", training={"max_steps": 1}))


def test_16_bits_need_mixed_precision(run_of) -> None:
    with pytest.raises(UsageError, match=r"model\.dtype=bfloat16 .* add training\.bf16=true"):
        trainer_of(run_of(model={"dtype": "bfloat16"}))
    trainer, _ = trainer_of(
        run_of(model={"dtype": "bfloat16"}, training={"bf16": True, "max_steps": 1})
    )
    trainer.train()


def test_videos_lose_frames_until_a_batch_holds_them(run_of) -> None:
    long = dict(data={"frames": 12}, batch={"max_tokens": 118})
    with pytest.raises(DataError, match="longer than max_tokens = 118"):
        trainer_of(run_of(**long))
    long["data"]["too_long"] = "trim"
    trainer, prepared = trainer_of(run_of(**long))
    assert prepared.dataset.lengths().max() == 118 < prepared.index.lengths.max()
    trainer.train()


@pytest.mark.parametrize(
    ("part", "kind", "what"),
    [("mm_audio_projector", "silent", "sound"), ("mm_projector", "sound", "pictures or videos")],
)
def test_a_part_that_nothing_would_train(place, tmp_path, part, kind, what) -> None:
    media = make_media(tmp_path / "media")
    medium = ("video", media["silent"]) if kind == "silent" else ("audio", media["sound"])
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(sample("only", medium).to_row()) + "\n")
    settings = recipe(place / "base", file, tmp_path / "out")
    with pytest.raises(
        DataError, match=f"trainable.{part} trains, but none of the 1 samples has {what}"
    ):
        train(settings)


# ---------------------------------------------------------------- what is logged and shown


def test_the_loss_falls_and_everything_is_logged(run_of) -> None:
    settings = run_of(training={"max_steps": 12})
    said: list[str] = []
    result = train(settings, hooks=Hooks(say=said.append))
    assert result == Path(settings.output) / "final"
    rows = logged(Path(settings.output))
    assert [r["step"] for r in rows] == list(range(1, 13))
    first, last = (sum(r["loss"] for r in part) for part in (rows[:3], rows[-3:]))
    assert last < first - 0.3
    for row in rows:
        assert row["tokens_per_s"] > 0 and 0 <= row["data_wait"] <= 1 and row["bad_media"] == 0
        assert row["supervised_tokens"] > 0 and 0 <= row["padding"] < 1
        assert row["grad_norm"] > 0
    assert rows[3]["lr/language_model"] == pytest.approx(rows[3]["lr/mm_projector"])
    text = "\n".join(said)
    assert ("⟦Answer" in text and "<video × " in text) or "⟦Answer" in text
    assert "step 12/12  loss" in text and "tokens/s" in text and "mm_projector" in text
    record = json.loads((Path(settings.output) / "run.json").read_text())
    assert record["status"] == "finished" and record["steps"] == 12
    assert record["data"]["samples"] == 8 and len(record["data"]["digest"]) == 64
    assert record["versions"]["torch"] == metadata.version("torch")
    assert (Path(settings.output) / "recipe.yaml").is_file()


def test_the_only_step_of_a_run_has_a_rate(run_of) -> None:
    """A share of the steps is warm-up, rounded up: one step was one of warm-up, at rate 0."""
    for steps, wanted in ((1, [1.0]), (3, [1.0, 0.75, 0.25]), (34, [0.0, 0.5])):
        trainer, _ = trainer_of(run_of(training={"max_steps": steps, "warmup_steps": 0.03}))
        trainer.create_optimizer()
        schedule = trainer.create_scheduler(steps)
        shares = []
        for _ in range(len(wanted)):
            shares.append(schedule.get_last_lr()[0] / schedule.base_lrs[0])
            trainer.optimizer.step()
            schedule.step()
        assert shares == pytest.approx(wanted)


def test_a_schedule_that_cannot_be_made_is_named(run_of) -> None:
    trainer, _ = trainer_of(run_of(training={"lr_scheduler_kwargs": {"a": 1}}))
    with pytest.raises(UsageError, match=r"lr_scheduler_kwargs=\{'a': 1\}: .*'a'"):
        trainer.train()


def test_meters_add_up_and_begin_anew() -> None:
    meters = Meters()
    meters.add(info())
    meters.add(info(lengths=(5, 5), padded=10))
    meters.wait_s = 0.001
    taken = meters.take()
    assert taken["supervised_tokens"] == 10
    assert taken["padding"] == pytest.approx(1 - 28 / 30, abs=1e-4)
    assert meters.take()["supervised_tokens"] == 0


def test_meters_of_several_processes_are_summed() -> None:
    meters = Meters()
    meters.add(info())
    taken = meters.take(lambda rows: torch.cat([rows, rows * 3]))
    assert taken["supervised_tokens"] == 20


def test_the_preview_marks_what_is_learned() -> None:
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(chr(96 + i) for i in ids))
    text = preview(
        torch.tensor([1, 2, -201, -201, 3, 4, 5, 9]),
        torch.tensor([-100, -100, -100, -100, -100, 4, 5, -100]),
        torch.tensor([1, 1, 1, 1, 1, 1, 1, 0]),
        tokenizer,
        {"video": -201},
    )
    assert text == "ab<video × 2>c⟦de⟧"


def test_steps_read_through_worker_processes_are_the_same(run_of) -> None:
    here = run_of(training={"max_steps": 5})
    train(here)
    there = run_of(training={"max_steps": 5}, batch={"workers": 2})
    there = there.replace(output=f"{there.output}-workers")
    train(there)
    assert losses(Path(here.output)) == losses(Path(there.output))


def test_tensorboard_gets_what_is_logged(run_of) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = run_of(training={"report_to": ["tensorboard"]})
    train(settings)
    (folder,) = (Path(settings.output) / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    shown = [e.value for e in events.Scalars("train/loss")]
    assert shown == pytest.approx(list(losses(Path(settings.output)).values()), rel=1e-6)
    assert "train/tokens_per_s" in events.Tags()["scalars"]


def test_evaluation_measures_loss_and_answers_without_touching_training(run_of, place) -> None:
    plain = run_of()
    train(plain)
    settings = run_of(
        data={"eval": str(place / "data.jsonl")},
        training={"eval_strategy": "steps", "eval_steps": 2},
        evaluation={"samples": 3, "max_new_tokens": 3},
    )
    settings = settings.replace(output=f"{settings.output}-eval")
    train(settings)
    assert losses(Path(plain.output)) == losses(Path(settings.output))
    lines = (Path(settings.output) / "train_log.jsonl").read_text().splitlines()
    rows = [r for r in map(json.loads, lines) if "eval_loss" in r]
    assert [r["step"] for r in rows] == [2, 4]
    assert rows[1]["eval_loss"] < rows[0]["eval_loss"] and rows[0]["eval_score"] == 0


def test_evaluation_loss_against_an_oracle(run_of, place) -> None:
    settings = run_of(
        data={"eval": str(place / "data.jsonl")},
        training={"eval_strategy": "steps"},
        evaluation={"samples": 0},
    )
    trainer, prepared = trainer_of(settings)
    found = trainer.evaluate()
    model = prepared.model.model.eval()
    sums: dict[str, list[float]] = {}
    for row in range(len(prepared.held_out)):
        batch = prepared.held_out[row]
        (code,) = batch.pop("info").modalities
        out = model(**batch, use_cache=False)
        n = int((batch["labels"][:, 1:] != -100).sum())
        for name in ("eval_loss", f"eval_loss/{modality_name(code)}"):
            known = sums.setdefault(name, [0.0, 0])
            sums[name] = [known[0] + out.loss.item() * n, known[1] + n]
    assert len(sums) > 3
    assert found.pop("eval_bad_media") == 0
    assert found == pytest.approx({k: total / n for k, (total, n) in sums.items()}, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_language_models_train_alike(run_of, monkeypatch, backend) -> None:
    """Traced and run as they stand; and as ``compile`` does it, where there is a C++ compiler."""
    if backend == "inductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no compiler of C++")
    plain = run_of(training={"max_steps": 3})
    train(plain)
    compiled, calls = torch.nn.Module.compile, []

    def traced(self, **options):
        calls.append((type(self).__name__, options))
        compiled(self, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    settings = run_of(training={"max_steps": 3}, compile=True)
    settings = settings.replace(output=f"{settings.output}-compiled")
    train(settings)
    assert len(calls) == 1
    wanted = losses(Path(plain.output))
    assert losses(Path(settings.output)) == pytest.approx(wanted, rel=1e-4)


def test_the_best_checkpoint_can_be_gone_back_to(run_of, place) -> None:
    settings = run_of(
        data={"eval": str(place / "data.jsonl")},
        evaluation={"samples": 0},
        training={
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "greater_is_better": True,  # the worst one, which is not the last
        },
    )
    trainer, prepared = trainer_of(settings)
    trainer.train()
    first = Path(settings.output) / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(first)
    held = load_file(first / "model.safetensors")["lm_head.weight"]
    assert torch.equal(prepared.model.model.lm_head.weight, held)


def test_weights_alone_cannot_be_gone_on_with(run_of) -> None:
    settings = run_of(training={"save_strategy": "steps", "save_steps": 2, "save_only_model": True})
    trainer, _ = trainer_of(settings)
    trainer.train()
    again, _ = trainer_of(settings.replace(output=f"{settings.output}-2"))
    with pytest.raises(UsageError, match="no state of the optimiser"):
        again.train(resume_from_checkpoint=str(Path(settings.output) / "checkpoint-2"))


def test_deepspeed_is_named_when_it_is_not_there(run_of) -> None:
    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed")
    with pytest.raises(UsageError, match="pip install deepspeed"):
        train(run_of(training={"deepspeed": {"zero_optimization": {"stage": 2}}}))


def test_entry_points_of_a_sharded_model_gather_their_weights() -> None:
    """FSDP2 on one process: outside forward, weights are shards unless the method is registered."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, _ = tiny("llama")
        pixels = torch.zeros(1, 3, 56, 56, dtype=torch.uint8)
        plan = [model.model.planner.image((56, 56))]
        wanted = model.get_image_features(pixels, plan).pooler_output[0]
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        register_entry_points(model)
        found = model.get_image_features(pixels, plan).pooler_output[0]
        torch.testing.assert_close(found, wanted)
    finally:
        destroy_process_group()
