"""A batch between worker and model: encoders run once over it, whatever it holds."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny
from training_data import dataset_of, make_media, sample

from av_llava.aggregators import build
from av_llava.training.collate import as_is, collate, counts_of, pad_token_id, resident_bytes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


def everything(media):
    return [
        sample(0, ("image", media["picture"]), ("image", media["picture"])),
        sample(1, ("video", media["film"])),
        sample(2, ("video", media["silent"]), ("image", media["picture"])),
        sample(3, ("audio", media["sound"]), ("audio", media["sound"])),
        sample(4),
    ]


@pytest.mark.parametrize("spec", ["llava_video", "llava_next_video"])
def test_each_encoder_runs_once_a_batch(media, spec):
    """Also where videos are pooled before the projector, and images are not."""
    model, processor = tiny(aggregator=build(spec).settings)
    assert processor.config.aggregator.stage == {"llava_video": "post"}.get(spec, "pre")
    ran = []
    for part in ("vision_tower", "audio_tower"):
        getattr(model.model, part).register_forward_hook(lambda m, i, o, n=part: ran.append(n))
    data = dataset_of(everything(media), processor)
    batch = data.__getitems__(range(5))
    batch.pop("info")
    for mode in (True, False):
        ran.clear()
        model.train(mode)(**batch)
        assert ran == ["vision_tower", "audio_tower"]


@pytest.mark.parametrize("spec", ["llava_video", "llava_next_video"])
def test_together_and_apart_give_the_same_features(media, spec):
    """Images and videos in one call of the tower, against a call for each sample."""
    model, processor = tiny(aggregator=build(spec).settings)
    data = dataset_of(everything(media), processor)

    def embedded(rows):
        batch = data.__getitems__(rows)
        tensors = {
            k: batch.get(k) for k in ("pixel_values", "pixel_values_videos", "input_features")
        }
        with torch.no_grad():
            return model.prepare_inputs(batch["media"], **tensors)

    together = embedded(range(5))
    for i in range(5):
        alone = embedded([i])[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-5, rtol=1e-5)
        assert not together[i, len(alone) :].any()


def test_the_mapping_is_what_the_model_takes(media):
    processor = tiny()[1]
    batch = dataset_of(everything(media), processor).__getitems__(range(5))
    assert set(batch) == {
        "input_ids", "attention_mask", "labels", "media", "info",
        "pixel_values", "pixel_values_videos", "input_features",
    }  # fmt: skip
    shape = batch["media"].splice.shape
    for name in ("input_ids", "attention_mask", "labels"):
        assert batch[name].dtype == torch.int64 and tuple(batch[name].shape) == shape
    media_rows = batch["input_ids"] < 0
    assert (batch["labels"][media_rows] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (
        batch["input_ids"][batch["attention_mask"] == 0] == pad_token_id(processor.tokenizer)
    ).all()
    ends = batch["attention_mask"].diff(dim=1)
    assert (ends <= 0).all(), "padding is on the right"


def test_supervised_tokens_are_those_of_the_shifted_loss():
    """The first position predicts nothing: a token there is not counted."""
    processor = tiny()[1]
    messages = [[m for m in sample(0).messages]]
    prepared = processor.prepare(
        messages, supervised=True, add_generation_prompt=False, padding_side="right"
    )
    supervised, tokens = counts_of(prepared)
    labels = prepared.media.splice.labels()
    assert supervised == (int((labels[:, 1:] >= 0).sum()),) and tokens["text"] == labels.shape[1]
    prepared.media.splice.text_labels[0] = 7
    assert counts_of(prepared)[0] == supervised


def test_a_tokenizer_without_padding_token_pads_with_zero():
    processor = tiny()[1]
    processor.tokenizer.pad_token = None
    assert pad_token_id(processor.tokenizer) == 0
    data = dataset_of([sample(0), sample(1, question="w " * 30)], processor)
    batch = data.__getitems__([0, 1])
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


def test_the_batch_passes_the_loader_as_it_is():
    batch = {"a": 1}
    assert as_is(batch) is batch and callable(collate)
    assert resident_bytes() > 1e7
