"""Videos that are only watched or only heard for an epoch: chosen alike, planned exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny
from training_data import ListStore, make_media, sample

from av_llava.chat import MediaPart
from av_llava.training.batching import PlannedBatch, TokenBudgetBatchSampler
from av_llava.training.choices import fractions, hashed
from av_llava.training.dataset import TrainingDataset
from av_llava.training.index import MODALITY_BITS, build_index
from av_llava.training.modality_dropout import (
    NO_FRAMES,
    NO_SOUND,
    WHOLE,
    ModalityDropout,
    in_form,
    modality_in_form,
    plan_dropout,
)
from av_llava.training.settings import DropoutSettings

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module", params=["block", "interleave"])
def processor(request):
    return tiny(placement=request.param)[1]


def samples_of(media):
    own_sound = MediaPart("video", media["silent"], audio=media["sound"], start_s=0.5, end_s=1.8)
    return [
        sample(0, ("video", media["film"])),
        sample(1, ("video", media["silent"])),
        sample(2, ("audio", media["sound"])),
        sample(3),
        sample(4, MediaPart("video", media["long"], start_s=1.0, end_s=3.5)),
        sample(5, own_sound),
        sample(6, ("image", media["picture"])),
        sample(7, ("video", media["film"]), question="And then? " * 5),
    ]


WITH_SOUND = (0, 4, 5, 7)


def dropping(media, processor, tmp_path=None, **shares):
    store = ListStore(samples_of(media))
    options = processor.media_options(frames=4)
    index = build_index(store, processor, options)
    dropout = plan_dropout(
        DropoutSettings(**shares), store, processor, options, index, folder=tmp_path
    )
    return TrainingDataset(store, processor, options, index, seed=3, dropout=dropout)


@pytest.mark.parametrize(
    ("shares", "form"), [({"sound": 1.0}, NO_SOUND), ({"frames": 1.0}, NO_FRAMES)]
)
def test_lengths_are_planned_for_what_is_left(media, processor, tmp_path, shares, form):
    data = dropping(media, processor, tmp_path, **shares)
    batch = data.__getitems__(range(8))
    assert list(batch["info"].lengths) == data.lengths(0).tolist()
    whole = data.index.lengths
    for i in range(8):
        tokens = data[i]["info"].tokens
        if i not in WITH_SOUND:
            assert data.lengths(0)[i] == whole[i]
        elif form == NO_SOUND:
            assert tokens["audio"] == 0 < tokens["video"] and data.lengths(0)[i] < whole[i]
        else:
            assert tokens["video"] == 0 < tokens["audio"] and data.lengths(0)[i] < whole[i]
    assert (tmp_path / ("no_sound.index" if form == NO_SOUND else "no_frames.index")).exists()


def test_the_sound_is_that_of_the_window_and_the_file(media, processor):
    """What is heard without the frames is what was heard with them."""
    whole = dropping(media, processor, frames=0.0)
    heard = dropping(media, processor, frames=1.0)
    for i in WITH_SOUND:
        a, b = whole[i]["media"].audios[0], heard[i]["media"].audios[0]
        assert abs(a.n_samples - b.n_samples) <= 16_000 * 0.15 and a.start_s == b.start_s
        if a.n_samples == b.n_samples:
            assert torch.equal(whole[i]["input_features"], heard[i]["input_features"])
    assert heard[4]["media"].audios[0].duration_s == pytest.approx(2.5, abs=0.05)
    assert heard[5]["media"].audios[0].duration_s == pytest.approx(1.3, abs=0.05)


def test_answers_stay(media, processor):
    for shares in ({"sound": 1.0}, {"frames": 1.0}):
        data = dropping(media, processor, **shares)
        assert (
            list(data.__getitems__(range(8))["info"].supervised) == data.index.supervised.tolist()
        )


def test_choices_are_those_of_seed_epoch_and_sample(media, processor):
    data = dropping(media, processor, sound=0.4, frames=0.3)
    for epoch in range(4):
        lengths = data.lengths(epoch)
        for i in range(8):  # one at a time, all together, in another order: the same
            assert data.__getitems__(PlannedBatch([i], epoch, 0))["info"].lengths[0] == lengths[i]
        order = [5, 0, 7, 4]
        info = data.__getitems__(PlannedBatch(order, epoch, 0))["info"]
        assert list(info.lengths) == lengths[order].tolist()
    assert len({tuple(data.lengths(e)) for e in range(8)}) > 3


def test_shares_are_kept_and_epochs_differ():
    n = 20_000
    lengths = np.tile(np.array([[30], [20], [10]], np.int32), (1, n))
    lengths[NO_SOUND, ::4] = lengths[NO_FRAMES, ::4] = 0  # every fourth has no sound
    dropout = ModalityDropout(DropoutSettings(sound=0.3, frames=0.2), lengths)
    rows = np.arange(n)
    forms = dropout.forms(1, 0, rows)
    assert (forms[::4] == WHOLE).all()
    others = forms[rows % 4 != 0]
    assert np.mean(others == NO_SOUND) == pytest.approx(0.3, abs=0.02)
    assert np.mean(others == NO_FRAMES) == pytest.approx(0.2, abs=0.02)
    again = dropout.forms(1, 1, rows)[rows % 4 != 0]
    assert np.mean((again == NO_SOUND) & (others == NO_SOUND)) == pytest.approx(0.09, abs=0.02)
    assert (dropout.forms(1, 0, 17)[0], dropout.forms(1, 0, 18)[0]) == (forms[17], forms[18])


def test_batches_keep_their_budget_in_every_epoch(media, processor):
    data = dropping(media, processor, sound=0.5, frames=0.3)
    sampler = TokenBudgetBatchSampler(data.lengths, max_tokens=300, epochs=5)
    seen = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        infos = [data.__getitems__(batch)["info"] for batch in sampler]
        assert len(infos) == len(sampler) and all(i.padded <= 300 for i in infos)
        assert sorted(i for info in infos for i in info.indices) == list(range(8))
        seen.append(sum(sum(i.lengths) for i in infos))
    assert len(set(seen)) > 1


def test_nothing_is_dropped_without_being_asked(media, processor):
    store = ListStore(samples_of(media))
    options = processor.media_options(frames=4)
    index = build_index(store, processor, options)
    assert plan_dropout(DropoutSettings(), store, processor, options, index) is None
    plain = TrainingDataset(store, processor, options, index)
    assert plain.lengths(3).tolist() == index.lengths.tolist()


def test_the_modality_that_is_left():
    video, audio, image = (MODALITY_BITS[k] for k in ("video", "audio", "image"))
    codes = np.array([video | audio] * 3 + [image], np.uint8)
    forms = np.array([WHOLE, NO_SOUND, NO_FRAMES, WHOLE], np.uint8)
    assert modality_in_form(codes, forms).tolist() == [video | audio, video, audio, image]


def test_a_replacement_is_planned_in_its_form_too(media, processor):
    """A heard sample is replaced by one that is heard, and no longer than planned."""
    data = dropping(media, processor, frames=1.0)
    data.store.samples[0] = sample(0, ("video", media["film"] + ".gone"))
    info = data.__getitems__([0, 2])["info"]
    assert info.bad[0].sample == "0" and info.tokens["video"] == 0
    assert info.padded <= 2 * max(data.lengths(0)[[0, 2]])


def muted_samples(media):
    """Videos whose own sound is off, where something else is heard."""
    muted = MediaPart("video", media["film"], audio="off")
    return [
        sample(0, muted, ("video", media["long"])),
        sample(1, ("video", media["long"]), muted),
        sample(2, muted, ("audio", media["sound"])),
        sample(3, ("video", media["film"])),
    ]


@pytest.mark.parametrize("shares", [{"frames": 1.0}, {"frames": 0.5, "sound": 0.5}])
def test_a_muted_video_is_never_heard(media, processor, tmp_path, shares):
    """Without frames nothing would be left of it: such a sample keeps them."""
    store = ListStore(muted_samples(media))
    options = processor.media_options(frames=4)
    index = build_index(store, processor, options)
    dropout = plan_dropout(
        DropoutSettings(**shares), store, processor, options, index, folder=tmp_path
    )
    assert dropout.lengths[NO_FRAMES].astype(bool).tolist() == [False, False, False, True]
    data = TrainingDataset(store, processor, options, index, seed=3, dropout=dropout)
    whole = TrainingDataset(store, processor, options, index)
    for epoch in range(6 if len(shares) > 1 else 1):
        forms = dropout.forms(3, epoch, np.arange(4))
        assert NO_FRAMES not in forms[:3]
        for i in range(4):
            info = data.__getitems__(PlannedBatch([i], epoch, 0))["info"]
            assert info.lengths[0] == data.lengths(epoch)[i]
            if forms[i] == WHOLE:
                assert info.tokens == whole[i]["info"].tokens
            elif i < 3:
                assert info.tokens["video"] == whole[i]["info"].tokens["video"]


def test_sound_that_is_off_for_all_is_not_heard_in_place_of_frames(media, processor):
    """The sound of another file beside the video is no reason to hear the video's own."""
    both = sample(0, ("video", media["film"]), ("audio", media["sound"]))
    store, options = ListStore([both]), processor.media_options(frames=4, audio="off")
    index = build_index(store, processor, options)
    dropout = plan_dropout(DropoutSettings(frames=1.0), store, processor, options, index)
    assert dropout.forms(0, 0, 0).tolist() == [WHOLE]
    assert in_form(both, NO_FRAMES, options) is both
    heard = in_form(both, NO_FRAMES, processor.media_options(frames=4))
    assert [part.kind for part in heard.media] == ["audio", "audio"]


def test_a_form_leaves_the_sample_alone(media, processor):
    whole = samples_of(media)[5]
    options = processor.media_options()
    assert in_form(whole, WHOLE, options) is whole
    (heard,) = in_form(whole, NO_FRAMES, options).media
    assert (heard.kind, heard.source, heard.start_s, heard.end_s) == (
        "audio",
        media["sound"],
        0.5,
        1.8,
    )
    (watched,) = in_form(whole, NO_SOUND, options).media
    assert (watched.kind, watched.audio, watched.source) == ("video", "off", media["silent"])
    assert whole.media[0].audio == media["sound"]


# ---------------------------------------------------------------- the hash behind the choices


def test_hashes_are_even_and_independent():
    a = fractions(1, 0, np.arange(50_000), "x")
    assert a.min() >= 0 and a.max() < 1
    assert np.bincount((a * 20).astype(int)) == pytest.approx(np.full(20, 2500), rel=0.1)
    for other in (
        fractions(2, 0, np.arange(50_000), "x"),
        fractions(1, 1, np.arange(50_000), "x"),
        fractions(1, 0, np.arange(50_000), "y"),
        fractions(1, 0, np.arange(50_000) + 1, "x"),
    ):
        assert abs(np.corrcoef(a, other)[0, 1]) < 0.02


def test_hashes_stay_the_same_for_ever():
    """Runs that were begun with an earlier version can be resumed."""
    found = hashed(42, 3, [0, 1, 10**12], "modality dropout").tolist()
    assert found == [hashed(42, 3, i, "modality dropout")[0] for i in (0, 1, 10**12)]
    assert found == [15368621409019580015, 14924486923990473223, 38942672662016319]
