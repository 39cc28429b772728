"""Packed samples give the loss and gradients of the same samples side by side, or are refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny import tiny
from train_runs import make_base, make_data, recipe, trainer_of
from training_data import dataset_of, make_media, sample, some_samples
from transformers import CONFIG_MAPPING

from av_llava.errors import DataError, UsageError
from av_llava.training.checking import check_run
from av_llava.training.packing import check_packing, packed
from av_llava.training.parts import apply_trainable
from av_llava.training.prepare import Hooks
from av_llava.training.run import train
from av_llava.training.settings import LoraSettings, PartSettings, TrainableSettings

torch.set_num_threads(1)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


def gradients(model, batch):
    model.zero_grad()
    loss = model(**{k: v for k, v in batch.items() if k != "info"}).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_and_gradients_are_those_of_padded_rows(media, kind, attention):
    model, processor = tiny(kind, text={"attn_implementation": attention})
    model.train()
    check_packing(model)
    plain = dataset_of(some_samples(media, 7), processor)
    together = dataset_of(some_samples(media, 7), processor, packing=True)
    rows = [4, 0, 3, 1, 2, 6]
    loss, expected = gradients(model, plain.__getitems__(rows))
    batch = together.__getitems__(rows)
    assert (
        batch["labels"].shape == (1, sum(batch["info"].lengths)) and batch["attention_mask"].all()
    )
    packed_loss, found = gradients(model, batch)
    torch.testing.assert_close(packed_loss, loss, atol=1e-6, rtol=1e-6)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-4, msg=name)


def test_several_rows_of_different_length(media):
    model, processor = tiny()
    data = dataset_of(some_samples(media, 7), processor)
    batch = data.__getitems__(range(7))
    loss, _ = gradients(model, batch)
    plan = packed(batch["media"], [[2, 0], [5], [1, 3, 4, 6]])
    tensors = {k: batch[k] for k in ("pixel_values", "pixel_values_videos", "input_features")}
    out = model(media=plan, **tensors)
    torch.testing.assert_close(out.loss, loss, atol=1e-6, rtol=1e-6)
    lengths = batch["info"].lengths
    assert plan.splice.packed[0] == (lengths[2], lengths[0])
    positions = plan.splice.position_ids()
    assert positions[0, lengths[2]] == 0 and positions[0, lengths[2] - 1] == lengths[2] - 1


def test_without_reset_positions_samples_see_each_other(media):
    """What the test above would miss if nothing kept them apart."""
    model, processor = tiny()
    data = dataset_of(some_samples(media, 5), processor, packing=True)
    batch = data.__getitems__(range(5))
    loss, _ = gradients(model, batch)
    plan = batch["media"].splice
    mixed = type(plan)(plan.samples, plan.text_ids, plan.counts, plan.text_labels)
    object.__setattr__(batch["media"], "splice", mixed)
    assert abs(gradients(model, batch)[0] - loss) > 1e-4


def test_the_first_token_of_a_sample_is_not_learned_from_the_one_before(media):
    _, processor = tiny()
    data = dataset_of([sample(i) for i in range(3)], processor)
    plan = data.__getitems__(range(3))["media"]
    plan.splice.text_labels[:] = 7  # all are learned
    labels = packed(plan).splice.labels()[0]
    n = plan.splice.lengths[0]
    assert (labels[[0, n, 2 * n]] == -100).all() and (labels == 7).sum() == 3 * (n - 1)
    assert (plan.splice.text_labels == 7).all(), "the plan that was given is as it was"


def test_the_account_is_of_samples(media):
    _, processor = tiny()
    plain = dataset_of(some_samples(media, 7), processor).__getitems__(range(7))["info"]
    info = dataset_of(some_samples(media, 7), processor, packing=True).__getitems__(range(7))[
        "info"
    ]
    assert (info.lengths, info.supervised, info.ids) == (plain.lengths, plain.supervised, plain.ids)
    assert info.padded == sum(info.lengths) < plain.padded


@pytest.mark.parametrize("mode", ["lora", "freeze", "last:1"])
def test_token_rows_beside_the_language_model_train_alike(media, mode):
    """The rows of the audio tokens put a module around the embedding."""
    model, processor = tiny("qwen2")
    trainable = TrainableSettings(language_model=PartSettings(mode))
    assert trainable.audio_token_rows.is_trained
    apply_trainable(model, trainable, LoraSettings(rank=2))
    for name, parameter in model.named_parameters():  # a fresh LoRA has no effect
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.train()
    check_packing(model)
    rows = [4, 0, 3, 1, 2, 6]
    found = []
    for packing in (False, True):
        data = dataset_of(some_samples(media, 7), processor, packing=packing)
        found.append(gradients(model, data.__getitems__(rows)))
    (loss, expected), (packed_loss, same) = found
    torch.testing.assert_close(packed_loss, loss, atol=1e-6, rtol=1e-6)
    assert set(same) == set(expected) and any("trainable_tokens" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(same[name], gradient, atol=2e-6, rtol=1e-4, msg=name)


def test_weights_of_samples_cannot_be_packed(media):
    _, processor = tiny()
    rows = [sample(0), sample(1, weight=0.5)]
    dataset_of(rows, processor)
    with pytest.raises(DataError, match="data.jsonl:1: sample '1' has a weight of 0.5"):
        dataset_of(rows, processor, packing=True)
    # A sample that is not used has no weight.
    gone = sample(1, ("video", media["film"] + ".gone"), weight=0.5)
    data = dataset_of([sample(0, ("video", media["film"])), gone], processor, packing=True)
    assert data.__getitems__([0, 1])["info"].ids == ("0", "0")


def test_a_weighted_row_is_refused_before_the_first_step(tmp_path):
    """Also where only the weight of a file in a mixture says so, and by --check."""
    base, folder = make_base(tmp_path), tmp_path / "out"
    rows = [sample(i, question="Q " * (1 + i % 5)) for i in range(20)]
    rows[7] = sample(7, question="Why?", weight=2.0)
    file, mixture = tmp_path / "rows.jsonl", tmp_path / "mix.yaml"
    file.write_text("".join(json.dumps(row.to_row()) + "\n" for row in rows))
    only = {"mm_projector": "freeze", "mm_audio_projector": "freeze", "audio_token_rows": "freeze"}
    settings = recipe(
        base,
        file,
        folder,
        batch={"packing": True, "max_samples": 2},
        trainable={**only, "media_tokens": "freeze"},
    )
    for run in (train, lambda settings: check_run(settings, Hooks())):
        with pytest.raises(DataError, match="rows.jsonl.*8.*: sample '7' has a weight of 2,.*pack"):
            run(settings)
        assert not (folder / "train_log.jsonl").exists()
    rows[7] = sample(7)
    file.write_text("".join(json.dumps(row.to_row()) + "\n" for row in rows))
    mixture.write_text("datasets:\n  - {path: rows.jsonl, weight: 3.0}\n")
    with pytest.raises(DataError, match="rows.jsonl.*sample '0' has a weight of 3,"):
        train(settings.replace(data=dataclasses.replace(settings.data, train=str(mixture))))


def test_a_family_that_ignores_positions_is_refused():
    """BLOOM counts positions from the mask (ALiBi): samples would see each other."""
    model, _ = tiny()
    config = CONFIG_MAPPING["bloom"](
        vocab_size=400, hidden_size=64, n_layer=2, n_head=4, attn_implementation="eager"
    )
    from transformers import AutoModel

    body = AutoModel.from_config(config).eval()
    model.model.language_model = body
    model.config.text_config = config
    with pytest.raises(UsageError, match="cannot be packed for this language model .bloom."):
        check_packing(model)


def test_every_sample_belongs_into_one_row(media):
    _, processor = tiny()
    plan = dataset_of([sample(i) for i in range(3)], processor).__getitems__(range(3))["media"]
    for rows in ([[0, 1]], [[0, 1], [1, 2]]):
        with pytest.raises(UsageError, match="Every sample of a batch belongs into one row"):
            packed(plan, rows)


@pytest.mark.slow
def test_a_recipe_trains_alike_with_and_without(tmp_path):
    base, file = make_base(tmp_path), make_data(tmp_path, 8)
    found = []
    for packing in (False, True):
        out = tmp_path / f"packing-{packing}"
        settings = recipe(base, file, out, batch={"packing": packing, "max_tokens": 900})
        trainer, _ = trainer_of(settings)
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], rel=1e-4)
