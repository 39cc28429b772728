"""Batches are what the model needs, whoever makes them, and nothing grows."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny
from torch.utils.data import DataLoader
from training_data import dataset_of, make_media, sample, some_samples

from av_llava.chat import MediaPart, Message, TextPart
from av_llava.errors import DataError
from av_llava.training import open_store
from av_llava.training.batching import PlannedBatch, TokenBudgetBatchSampler
from av_llava.training.collate import as_is
from av_llava.training.dataset import TrainingDataset
from av_llava.training.index import build_index
from av_llava.training.samples import Sample

torch.set_num_threads(1)
TENSORS = (
    "input_ids",
    "attention_mask",
    "labels",
    "pixel_values",
    "pixel_values_videos",
    "input_features",
)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def model():
    return tiny()[0]


@pytest.fixture(scope="module")
def processor():
    return tiny()[1]


@pytest.fixture(scope="module")
def dataset(media, processor):
    return dataset_of(some_samples(media), processor)


def same(a, b):
    return all(
        (name in a) == (name in b) and (name not in a or torch.equal(a[name], b[name]))
        for name in TENSORS
    )


def test_a_batch_is_what_the_processor_makes_of_its_samples(dataset, processor):
    batch = dataset.__getitems__([4, 0, 3])
    messages = [dataset.store[i].messages for i in (4, 0, 3)]
    expected = processor.prepare(
        messages,
        processor.media_options(frames=4),
        add_generation_prompt=False,
        supervised=True,
        padding_side="right",
    )
    plan = expected.media.splice
    assert torch.equal(batch["labels"], plan.labels())
    assert torch.equal(batch["attention_mask"], plan.attention_mask())
    for name, tensor in expected.tensors.items():
        assert torch.equal(batch[name], tensor)
    assert batch["media"].splice.samples == plan.samples


def test_a_batch_goes_through_the_model(dataset, model):
    batch = dataset.__getitems__(list(range(5)))
    info = batch.pop("info")
    out = model(**batch)
    assert torch.isfinite(out.loss)
    assert out.logits.shape[:2] == batch["labels"].shape == (5, max(info.lengths))


def test_the_loss_of_a_batch_is_that_of_its_samples(dataset, model):
    """Padding and neighbours change nothing."""
    batch = dataset.__getitems__(list(range(5)))
    batch.pop("info")
    together = model(**batch).loss
    parts = []
    for i in range(5):
        one = dataset[i]
        info = one.pop("info")
        parts.append(model(**one, num_items_in_batch=1).loss)
        assert one["labels"].shape[1] == info.padded
    n = (batch["labels"][:, 1:] != -100).sum()
    assert together.item() == pytest.approx((sum(parts) / n).item(), rel=1e-5)


def test_lengths_of_the_index_are_those_of_the_batches(dataset):
    batch = dataset.__getitems__(list(range(10)))
    assert list(batch["info"].lengths) == dataset.lengths().tolist()
    assert list(batch["info"].supervised) == dataset.index.supervised.tolist()


def test_the_account_of_a_batch(dataset):
    info = dataset.__getitems__(PlannedBatch([4, 1], 7, 3))["info"]
    assert info.ids == ("4", "1") and info.indices == (4, 1) and info.epoch == 7
    assert info.sources == ("data.jsonl:4", "data.jsonl:1")
    assert sum(info.tokens.values()) == sum(info.lengths)
    assert info.tokens["video"] and info.tokens["audio"] and info.tokens["image"]
    assert info.padded == 2 * max(info.lengths) and info.bad == () and info.seconds > 0
    assert info.rss_bytes > 1e7


def test_the_mask_counts_samples_and_not_ids(dataset, processor):
    """A pad id inside a text is content (trap: masks made of ids)."""
    pad = processor.tokenizer.pad_token
    inside = dataset_of(
        [sample(0, question=f"a{pad}b"), sample(1, question="long " * 20)], processor
    )
    batch = inside.__getitems__([0, 1])
    info = batch["info"]
    assert batch["attention_mask"].sum(1).tolist() == list(info.lengths)
    n = info.lengths[0]
    assert (batch["input_ids"][0, :n] == processor.tokenizer.pad_token_id).any()
    assert batch["attention_mask"][0, :n].all() and not batch["attention_mask"][0, n:].any()


def test_only_the_turns_that_are_to_be_learned(processor):
    turns = tuple(
        Message(role, (TextPart(text),))
        for role, text in [
            ("user", "a"),
            ("assistant", "first"),
            ("user", "b"),
            ("assistant", "second"),
        ]
    )
    tokenizer = processor.tokenizer

    def learned(flags):
        data = dataset_of([Sample("x", turns, "f:1", train_turns=flags)], processor)
        labels = data[0]["labels"][0]
        return tokenizer.decode(labels[labels >= 0]).replace(tokenizer.eos_token, "|")

    assert learned(None).replace("\n", "") == "first|second|"
    assert learned((False, True)).replace("\n", "") == "second|"


def test_nothing_to_learn_is_an_error_with_the_sample(processor):
    turns = (Message("user", (TextPart("a"),)), Message("assistant", (TextPart("b"),)))
    good = Sample("good", turns, "f:1")
    silent = Sample("silent", turns, "f:2", train_turns=(False,))
    data = dataset_of([good, good], processor)
    data.store.samples[1] = silent
    with pytest.raises(
        DataError, match="f:2: sample 'silent': Nothing of the conversation would be"
    ):
        data.__getitems__([0, 1])


def test_weights_of_samples_reach_the_trainer(processor):
    data = dataset_of([sample(0), sample(1, weight=0.5)], processor)
    assert data.__getitems__([0, 1])["info"].weights == (1.0, 0.5)


# ---------------------------------------------------------------- too long


def test_a_sample_beyond_the_limit_is_an_error_at_once(media, processor):
    samples = some_samples(media)
    longest = int(dataset_of(samples, processor).lengths().max())
    with pytest.raises(
        DataError,
        match=rf"1 of 10 samples are longer than max_length = {longest - 1}: the longest, data.jsonl:\d",
    ):
        dataset_of(samples, processor, max_length=longest - 1)


def test_a_sample_beyond_the_limit_loses_frames_and_keeps_its_answer(media, processor):
    text = sample(1, question="w " * 10)
    film = sample(0, ("video", media["silent"]), answer="The whole answer stays.")
    whole = dataset_of([film, text], processor, frames=8)
    n_frames = whole[0]["media"].videos[0].frames
    limit = int(whole.lengths()[0]) - 1
    data = dataset_of([film, text], processor, frames=8, max_length=limit, too_long="trim")
    batch = data.__getitems__([0, 1])
    assert data.lengths().max() == limit >= max(batch["info"].lengths)
    fewer = batch["media"].videos[0].frames
    assert 1 <= fewer == n_frames - 1, "as many frames as fit"
    labels = batch["labels"][0]
    assert "The whole answer stays." in processor.tokenizer.decode(labels[labels >= 0])
    assert torch.equal(labels[labels >= 0], whole[0]["labels"][0][whole[0]["labels"][0] >= 0])


def test_text_is_never_cut(media, processor):
    long, fine = "word " * 50, sample(0)
    with pytest.raises(
        DataError,
        match="data.jsonl:1: sample '1': It has .* tokens .with one frame.*text is never cut",
    ):
        dataset_of(
            [fine, sample(1, ("video", media["silent"]), question=long)],
            processor, max_length=60, too_long="trim",
        )  # fmt: skip
    with pytest.raises(DataError, match="there is no video to take frames from"):
        dataset_of([fine, sample(1, question=long)], processor, max_length=60, too_long="trim")


def test_samples_beyond_those_that_are_tried_first_are_refused_when_they_come(
    media, processor, monkeypatch
):
    monkeypatch.setattr("av_llava.training.dataset._TRIMMED_FIRST", 1)
    film = sample(0, ("video", media["long"]))
    limit = int(dataset_of([film], processor, frames=8).lengths()[0]) - 1
    wordy = sample(1, ("video", media["silent"]), question="word " * limit)
    data = dataset_of([film, wordy], processor, frames=8, max_length=limit, too_long="trim")
    assert max(data[0]["info"].lengths) <= limit
    with pytest.raises(DataError, match="sample '1': It has .* tokens .with one frame"):
        data[1]


def test_an_index_of_other_data_is_refused(dataset, media, processor):
    with pytest.raises(DataError, match="The index holds 10 samples, but the data 5"):
        dataset_of(some_samples(media, 5), processor, index=dataset.index)


def test_other_errors_name_the_sample(processor):
    two = Message("user", (TextPart("a"),))
    data = dataset_of([sample("ok")], processor)
    data.store.samples[0] = Sample("odd", (two, two, Message("assistant", (TextPart("b"),))), "f:9")
    with pytest.raises(DataError, match="^f:9: sample 'odd': "):
        data[0]


# ---------------------------------------------------------------- worker processes


def test_it_pickles_with_all_it_makes(dataset):
    again = pickle.loads(pickle.dumps(dataset))
    assert same(again.__getitems__([4, 1]), dataset.__getitems__([4, 1]))
    batch = dataset.__getitems__([4, 2])
    sent = pickle.loads(pickle.dumps(batch))
    assert same(sent, batch) and sent["info"] == batch["info"]
    assert sent["media"].splice.samples == batch["media"].splice.samples
    assert sent["media"].videos == batch["media"].videos


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_give_the_same_batches(dataset, start_method):
    sampler = TokenBudgetBatchSampler(dataset.lengths(), max_tokens=400, seed=1)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=as_is, num_workers=2,
        persistent_workers=True, multiprocessing_context=start_method,
    )  # fmt: skip
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        here = [dataset.__getitems__(b) for b in sampler]
        there = list(loader)
        assert len(here) == len(there) > 1
        for a, b in zip(here, there, strict=True):
            assert same(a, b) and a["info"].ids == b["info"].ids
            assert b["info"].epoch == epoch, "persistent workers are told of the epoch"


def test_tensors_can_be_pinned(dataset):
    """A worker sends, and pinning copies, whole storages: no tensor is a part of a larger one."""
    batch = dataset.__getitems__([4, 1, 2])
    for name in TENSORS:
        tensor = batch[name]
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
        assert tensor.device.type == "cpu" and not tensor.requires_grad
    assert batch["pixel_values_videos"].dtype == torch.uint8


def test_no_object_stays_behind(media, processor):
    """Of some hundred samples of every kind: counted exactly, by Python's own allocator."""
    data = dataset_of(some_samples(media, 20), processor, frames=2)
    rows = [i for i in range(20) if i % 5 not in (3, 4)] * 5 + list(range(20))

    def blocks():
        for start in range(0, len(rows), 10):
            data.__getitems__(rows[start : start + 10])
        gc.collect()
        return sys.getallocatedblocks()

    blocks()  # caches fill
    before = blocks()
    # A sample has hundreds; caches of libraries still gain one now and then.
    assert blocks() - before < 3 * len(rows)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_a_worker_does_not_grow(media, processor):
    """Thousands of samples through one persistent worker, videos with sound among them."""
    samples = [sample(i, question=f"Question {i}? " * (1 + i % 7)) for i in range(3000)]
    for i in range(0, 3000, 75):
        samples[i] = sample(i, ("video", media["film"]))
    data = dataset_of(samples, processor, frames=2)
    sampler = TokenBudgetBatchSampler(data.lengths(), max_tokens=4000)
    loader = DataLoader(
        data, batch_sampler=sampler, collate_fn=as_is, num_workers=1, persistent_workers=True
    )
    least = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        least.append(min(batch["info"].rss_bytes for batch in loader))
    # Buffers of the allocator come and go by some 30 MB; batches themselves are 500 MB in all.
    assert least[2] - least[1] < 64e6, f"{[round(m / 1e6) for m in least]} MB in three epochs"


def test_resuming_decodes_nothing_that_was_seen(dataset, monkeypatch):
    from accelerate import skip_first_batches

    opened = []
    plain = type(dataset).__getitems__
    monkeypatch.setattr(
        type(dataset), "__getitems__", lambda self, i: opened.append(list(i)) or plain(self, i)
    )
    sampler = TokenBudgetBatchSampler(dataset.lengths(), max_tokens=400, seed=1)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=as_is)
    whole = [batch["info"].ids for batch in loader]
    opened.clear()
    rest = [batch["info"].ids for batch in skip_first_batches(loader, 2)]
    assert rest == whole[2:] and opened == [list(b) for b in sampler][2:]


# ---------------------------------------------------------------- media options


def test_decoding_is_isolated_and_uses_one_thread(dataset):
    assert dataset.options.isolate is True and dataset.options.decoder_threads == 1


def test_a_video_may_bring_its_own_sound_file(media, processor):
    own = MediaPart("video", media["silent"], audio=media["sound"])
    data = dataset_of([sample(0, own), sample(1, ("video", media["silent"]))], processor)
    info = data.__getitems__([0, 1])["info"]
    assert info.tokens["audio"] > 0 and info.lengths[0] > info.lengths[1]


def test_folders_of_frames_have_rates_of_their_own(media, tmp_path):
    """LLaVA-Video-178K has folders with two pictures a second; other sources, other rates."""
    frames = tmp_path / "frames"
    frames.mkdir()
    for i in range(8):
        shutil.copy(media["picture"], frames / f"{i}{Path(media['picture']).suffix}")
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A ball."}]
    rows = [
        {"video": "frames", "conversations": turns},
        {"video": {"path": "frames", "source_fps": 4}, "conversations": turns},
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    _, processor = tiny()
    store = open_store(tmp_path / "d.json")
    assert Sample.from_row(store[1].to_row()) == store[1]
    counts = []
    for changes in ({}, {"source_fps": 2.0}):
        options = processor.media_options(fps=1.0, frames=8, **changes)
        index = build_index(store, processor, options)
        data = TrainingDataset(store, processor, options, index)
        batches = [data[row] for row in (0, 1)]
        assert [b["info"].lengths[0] for b in batches] == index.lengths.tolist()
        counts.append([len(b["pixel_values_videos"]) for b in batches])
    # Eight pictures are eight seconds, four, or two; one frame a second is looked at.
    assert counts == [[8, 2], [4, 2]]
