"""Held-out samples: read as in training, nothing in the place of another, and as questions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny
from training_data import ListStore, make_media, sample

from av_llava.chat import Message, TextPart
from av_llava.errors import DataError
from av_llava.training.bad_media import BadMediaSettings, BadMedium
from av_llava.training.held_out import HeldOut, question_and_answer
from av_llava.training.index import build_index


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> dict[str, str]:
    return make_media(tmp_path_factory.mktemp("media"))


def held_out_of(samples, **settings) -> HeldOut:
    _, processor = tiny("llama")
    store, options = ListStore(samples), processor.media_options(frames=4)
    return HeldOut(store, processor, options, build_index(store, processor, options), **settings)


def test_the_last_answer_is_the_reference() -> None:
    first = sample("a", question="Which?", answer="One.")
    turns = (*first.messages, *sample("b").messages, Message("user", (TextPart("And?"),)))
    before, reference = question_and_answer(turns)
    assert reference == "A red ball moves." and before == turns[:3]
    assert isinstance(before[0], Message) and before[1].parts == (TextPart("One."),)


def test_nothing_counts_of_a_sample_that_cannot_be_read(media) -> None:
    good = sample(0, ("image", media["picture"]))
    gone = sample(1, ("video", "gone.mp4"), answer="Nothing of this is learned.")
    data = held_out_of([good, gone])
    batch = data.__getitems__([0, 1])
    info = batch["info"]
    assert info.indices == (0, 1) and [b.index for b in info.bad] == [1]
    assert info.bad[0].file == "gone.mp4" and info.bad[0].replacement == ""
    alone = data[0]
    (n,) = alone["info"].supervised
    assert info.supervised == (n, 0)
    assert bool((batch["labels"][1] == -100).all())
    n_tokens = alone["labels"].shape[1]
    assert torch.equal(batch["labels"][0, :n_tokens], alone["labels"][0])
    assert bool((data[1]["labels"] == -100).all())  # a batch of nothing is one, too
    assert [m.file for m in data.unusable()] == ["gone.mp4"]


def test_a_question_is_the_sample_without_its_answer(media) -> None:
    one = sample(0, ("video", media["film"]), question="What?", answer="A ball.")
    data = held_out_of([one])
    prepared, reference = data.prompt(0)
    batch = data[0]
    assert reference == "A ball."
    n = prepared.media.splice.lengths[0]
    ids = prepared.media.splice.input_ids(data.processor.config.media_token_ids, 0)
    learned = (batch["labels"][0] != -100).nonzero()[:, 0]
    assert n == int(learned[0])
    assert torch.equal(ids[0], batch["input_ids"][0, :n])
    for name, value in prepared.tensors.items():
        assert torch.equal(value, batch[name]), name
    planned, _ = data.prompt(0, decode=False)
    assert planned.media.splice.lengths == (n,) and not planned.tensors


def test_a_question_that_cannot_be_read_is_said(media) -> None:
    samples = [sample(0), sample(1, ("video", "gone.mp4"))]
    found = held_out_of(samples).prompt(1)
    assert isinstance(found, BadMedium) and (found.file, found.index) == ("gone.mp4", 1)
    data = held_out_of(samples)
    data.bad_media = replace(data.bad_media, policy="error")
    for read in (data.prompt, data.__getitem__):
        with pytest.raises(DataError, match=r"sample '1' cannot be read.*gone\.mp4"):
            read(1)


def test_what_cannot_be_used_at_all_is_refused(media, tmp_path: Path) -> None:
    gone = [sample(i, ("image", str(tmp_path / "gone.png"))) for i in range(2)]
    with pytest.raises(DataError, match="None of the 2 held-out samples can be used"):
        held_out_of(gone)
    held_out_of([*gone, sample(2)])
    with pytest.raises(DataError, match="2 of 3 samples cannot be used"):
        held_out_of([*gone, sample(2)], bad_media=BadMediaSettings(policy="error"))
