"""Files that cannot be read: replaced alike everywhere, counted, listed, and not without end."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter
from pathlib import Path

import media_jobs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny
from training_data import dataset_of, make_media, sample

import av_llava.media.video as video
from av_llava.errors import DataError, UsageError
from av_llava.media import Limits
from av_llava.training.bad_media import (
    BadMediaSettings,
    BadMediaWatch,
    BadMedium,
    Quarantine,
    Replacements,
)
from av_llava.training.batching import PlannedBatch, TokenBudgetBatchSampler
from av_llava.training.index import LengthIndex
from av_llava.training.samples import Sample

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    files = make_media(folder)
    data = Path(files["film"]).read_bytes()
    # The header is whole, the frames are not: headers alone do not tell.
    hollow = bytearray(data)
    at = data.index(b"mdat") + 8
    hollow[at:] = b"\x00" * (len(data) - at)
    (folder / "hollow.mp4").write_bytes(hollow)
    (folder / "garbage.mp4").write_bytes(
        bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8))
    )
    (folder / "cut.mp4").write_bytes(data[: len(data) // 3])
    (folder / "empty.wav").write_bytes(b"")
    return files | {
        n: str(folder / n) for n in ("hollow.mp4", "garbage.mp4", "cut.mp4", "empty.wav")
    }


@pytest.fixture(scope="module")
def processor():
    return tiny()[1]


def films(media, n, bad=(), file="hollow.mp4", **fields):
    """Films with sound; those numbers are of the bad file."""
    return [
        sample(i, ("video", media[file] if i in bad else media["film"]), question=f"Why {i}?")
        for i in range(n)
    ]


# ---------------------------------------------------------------- which sample takes the place


CODES = st.lists(st.sampled_from([0, 1, 6]), min_size=1, max_size=60)


@settings(deadline=None)
@given(codes=CODES, data=st.data(), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_replacements_are_of_the_same_modality_and_fit_the_batch(codes, data, seed, epoch):
    n = len(codes)
    lengths = np.array(data.draw(st.lists(st.integers(0, 90), min_size=n, max_size=n)))
    index = data.draw(st.integers(0, n - 1))
    limit = data.draw(st.none() | st.integers(max(1, lengths[index]), 90))
    codes = np.array(codes, np.uint8)
    chooser = Replacements(codes, lengths, seed, epoch)
    tried = []
    while (found := chooser.choose(index, len(tried), limit)) is not None:
        tried.append(found)
    others = [i for i in range(n) if i != index and codes[i] == codes[index] and lengths[i] > 0]
    assert len(set(tried)) == len(tried) and set(tried) <= set(others)
    assert bool(tried) == bool(others)
    fitting = [i for i in others if limit is None or lengths[i] <= limit]
    if fitting:
        assert set(tried) <= set(fitting)
    again = Replacements(codes.copy(), lengths.copy(), seed, epoch)
    assert [again.choose(index, k, limit) for k in range(len(tried))] == tried


def test_replacements_are_about_as_long_and_differ_by_epoch_and_sample():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 5000, 5000)
    modality = rng.integers(0, 3, 5000).astype(np.uint8)
    chosen = Counter()
    for index in range(300):
        picks = [Replacements(modality, lengths, 1, e).choose(index) for e in range(2)]
        chosen.update(picks)
        for pick in picks:
            assert modality[pick] == modality[index]
            assert lengths[pick] <= max(lengths[index], np.sort(lengths)[60])
    far = [
        lengths[Replacements(modality, lengths, 1, 0).choose(i)] / lengths[i] for i in range(300)
    ]
    assert np.median(far) > 0.8
    assert len(chosen) > 500 and max(chosen.values()) <= 4, "no neighbour is used again and again"


# ---------------------------------------------------------------- in a batch


@pytest.mark.parametrize("file", ["hollow.mp4", "garbage.mp4"])
def test_a_sample_of_the_same_modality_takes_the_place(media, processor, file):
    samples = films(media, 6)
    samples[2] = sample(2, ("audio", media["sound"]))
    samples[4] = sample(4)
    data = dataset_of(samples, processor)
    data.store.samples[1] = films(media, 6, bad=[1], file=file)[1]
    batch = data.__getitems__(PlannedBatch([0, 1, 2], 3, 0))
    info = batch["info"]
    (bad,) = info.bad
    assert (bad.sample, bad.source, bad.index, bad.epoch) == ("1", "data.jsonl:1", 1, 3)
    assert bad.file.endswith(file) and bad.file in bad.reason
    assert info.ids[1] == bad.replacement and info.ids[1] in {"0", "3", "5"}
    assert info.ids[0] == "0" and info.ids[2] == "2"
    again = dataset_of(samples, processor)
    again.store.samples[1] = data.store.samples[1]
    assert again.__getitems__(PlannedBatch([5, 1], 3, 0))["info"].ids[1] == info.ids[1]


def test_a_file_that_ends_early_is_used_as_far_as_it_goes(media, processor):
    data = dataset_of(films(media, 2), processor)
    planned = data.lengths()
    data.store.samples[1] = films(media, 2, bad=[1], file="cut.mp4")[1]
    info = data.__getitems__([0, 1])["info"]
    assert info.bad == () and info.lengths[1] <= planned[1]
    assert any("cut.mp4" in w and "could not be decoded" in w for w in info.warnings)


def test_other_epochs_choose_others(media, processor):
    data = dataset_of(films(media, 12), processor)
    data.store.samples[1] = films(media, 2, bad=[1])[1]
    ids = {data.__getitems__(PlannedBatch([1], e, 0))["info"].ids[0] for e in range(6)}
    assert len(ids) > 2


def test_a_bad_replacement_is_replaced_itself(media, processor):
    data = dataset_of(films(media, 5), processor)
    data.store.samples = films(media, 5, bad=[0, 1, 2, 3])
    info = data.__getitems__([0])["info"]
    assert info.ids == ("4",)
    assert info.bad[0].sample == "0" and {b.replacement for b in info.bad} == {"4"}


def test_what_is_known_to_be_bad_is_not_decoded_again(media, processor, monkeypatch):
    data = dataset_of(films(media, 4), processor)
    data.store.samples = films(media, 4, bad=[0])
    first = data.__getitems__([0])["info"]
    opened = []
    plain = video.read_local
    monkeypatch.setattr(
        video,
        "read_local",
        lambda b, file, *a, **k: opened.append(file.name) or plain(b, file, *a, **k),
    )
    data.options = data.options.__class__(data.options.sampling, isolate=False)
    second = data.__getitems__([0])["info"]
    assert first.ids == second.ids and first.bad == second.bad
    assert opened and not any("hollow" in name for name in opened)


def test_none_left_is_an_error(media, processor):
    data = dataset_of(films(media, 3), processor)
    data.store.samples = films(media, 3, bad=[0, 1, 2])
    with pytest.raises(
        DataError, match="data.jsonl:0: the sample cannot be read.*2 others of its kind"
    ):
        data.__getitems__([0])
    alone = dataset_of([*films(media, 1), sample(9)], processor)
    alone.store.samples[0] = films(media, 1, bad=[0])[0]
    with pytest.raises(DataError, match="0 others of its kind"):
        alone.__getitems__([0])


def test_as_an_error(media, processor):
    data = dataset_of(films(media, 3), processor, bad_media=BadMediaSettings(policy="error"))
    data.store.samples = films(media, 3, bad=[1])
    with pytest.raises(DataError, match="data.jsonl:1: sample '1' cannot be read.*hollow.mp4"):
        data.__getitems__([0, 1])


def test_missing_files_are_bad_media(media, processor, tmp_path):
    data = dataset_of(films(media, 4), processor)
    data.store.samples[2] = sample(2, ("video", str(tmp_path / "gone.mp4")))
    (bad,) = data.__getitems__([2])["info"].bad
    assert bad.file.endswith("gone.mp4")


def test_a_picture_and_a_sound_that_cannot_be_read(media, processor):
    samples = [
        *(sample(i, ("image", media["picture"])) for i in range(2)),
        *(sample(i, ("audio", media["sound"])) for i in (2, 3)),
    ]
    data = dataset_of(samples, processor)
    data.store.samples[0] = sample(0, ("image", media["garbage.mp4"]))
    data.store.samples[2] = sample(2, ("audio", media["empty.wav"]))
    info = data.__getitems__([0, 2])["info"]
    assert info.ids == ("1", "3")
    assert [Path(b.file).name for b in info.bad] == ["garbage.mp4", "empty.wav"]


def test_a_decoder_that_hangs_is_killed_and_replaced(media, processor, monkeypatch):
    """A worker that really hangs, and really ends."""
    plain = video.run_in_worker
    pids = []

    def hanging(fn, *args, timeout_s, what=None, **kwargs):
        if "silent" not in str(what):
            return plain(fn, *args, timeout_s=timeout_s, what=what, **kwargs)
        pids.append(plain(media_jobs.pid, timeout_s=10, what="pid"))
        return plain(media_jobs.sleep, 600.0, timeout_s=0.5, what=what)

    data = dataset_of(films(media, 4), processor)
    data.store.samples[2] = sample(2, ("video", media["silent"]))
    monkeypatch.setattr(video, "run_in_worker", hanging)
    started = time.monotonic()
    info = data.__getitems__([2])["info"]
    assert time.monotonic() - started < 20
    assert "did not finish within 0.5 s" in info.bad[0].reason and info.ids[0] != "2"
    assert not Path(f"/proc/{pids[0]}").exists()


def test_decoding_has_the_time_limit_of_the_options(media, processor):
    data = dataset_of(films(media, 3), processor)
    slow = Limits(max_decode_s=1e-3)
    data.options = data.options.__class__(data.options.sampling, limits=slow, isolate=True)
    with pytest.raises(DataError, match="max_decode_s"):
        data.__getitems__([0])


# ---------------------------------------------------------------- known before training


def test_samples_that_the_index_cannot_measure_are_replaced_as_planned(media, processor):
    samples = films(media, 30)
    samples[7] = sample(7, ("video", media["garbage.mp4"]))
    data = dataset_of(samples, processor, bad_media=BadMediaSettings(max_fraction=0.5))
    assert set(data.index.errors) == {7}
    for epoch in (0, 1):
        lengths = data.lengths(epoch)
        batch = PlannedBatch([7, 3], epoch, 0)
        info = data.__getitems__(batch)["info"]
        assert info.lengths[0] == lengths[7], "its place is planned for what takes it"
        assert info.bad[0].index == 7 and "garbage" in info.bad[0].reason
    sampler = TokenBudgetBatchSampler(data.lengths(), max_tokens=1000)
    assert sorted(i for b in sampler for i in b) == list(range(30))


def test_a_row_that_is_no_sample_is_replaced_too(media, processor):
    class Broken(type(dataset_of([sample(0)], processor).store)):
        def __getitem__(self, index):
            if index == 1:
                raise DataError("list:1: not JSON")
            return super().__getitem__(index)

    data = dataset_of([sample(i, question="w " * (i + 1)) for i in range(4)], processor)
    data.store = Broken(data.store.samples)
    index = data.index
    lengths = index.lengths.copy()
    lengths[1] = 0
    data.index = LengthIndex(lengths, index.supervised, index.modality, {1: "list:1: not JSON"})
    data._epoch = None
    info = data.__getitems__([1])["info"]
    assert info.ids[0] in {"0", "2", "3"} and info.bad[0].reason == "list:1: not JSON"


def test_too_many_unreadable_samples_stop_before_training(media, processor):
    samples = films(media, 20, bad=range(0, 12), file="garbage.mp4")
    with pytest.raises(
        DataError, match="12 of 20 samples cannot be used .60.0%; bad_media allows 2.0%.*garbage"
    ):
        dataset_of(samples, processor)
    with pytest.raises(DataError, match="1 of 20 samples cannot be used.*allows 0.0%"):
        dataset_of(
            films(media, 20, bad=[3], file="garbage.mp4"),
            processor,
            bad_media=BadMediaSettings(policy="error"),
        )
    assert dataset_of(films(media, 20, bad=[3], file="garbage.mp4"), processor)


def test_what_headers_tell_names_the_file_once(media, processor, tmp_path):
    gone = ("video", str(tmp_path / "gone.mp4"))
    both = sample(1, ("image", media["picture"]), gone)
    more = [sample(i, ("image", media["picture"]), ("video", media["film"])) for i in (3, 4, 5)]
    data = dataset_of([sample(0, gone), both, sample(2, gone), *films(media, 9), *more], processor)
    bad = [b for i in range(3) for b in data.__getitems__([i])["info"].bad]
    assert [(b.file, b.sample, b.source) for b in bad] == [
        (gone[1], str(i), f"data.jsonl:{i}") for i in range(3)
    ]
    assert Quarantine(tmp_path / "q.jsonl").add(bad) == 1


# ---------------------------------------------------------------- counted, listed, stopped


def medium(i, file=None):
    return BadMedium(file or f"{i}.mp4", f"{i}.mp4: damaged.", f"s{i}", f"f:{i}", i, 0, "r")


def test_the_share_is_watched(caplog):
    watch = BadMediaWatch(BadMediaSettings(max_fraction=0.1, grace=3))
    for i in range(3):
        watch.update(2, [medium(i)])
    assert (watch.n_bad, watch.n_samples, watch.fraction) == (3, 6, 0.5)
    assert "Sample s0: 0.mp4: damaged. Sample r takes its place." in caplog.text
    watch.update(100, [])
    for i in range(3, 11):
        watch.update(1, [medium(i)])
    with pytest.raises(
        DataError,
        match="12 of 115 samples could not be read .10.4%, more than .*10.0%.*11.mp4: damaged",
    ):
        watch.update(1, [medium(11)])


def test_a_file_is_listed_once(tmp_path):
    file = tmp_path / "run" / "quarantine.jsonl"
    settings_ = BadMediaSettings(max_fraction=1.0, quarantine=str(file))
    watch = BadMediaWatch(settings_)
    watch.update(4, [medium(1), medium(2), medium(1)])
    watch.update(4, [medium(2), medium(3)])
    BadMediaWatch(settings_).update(4, [medium(3), medium(4)])  # a run that goes on
    watch.update(4, [medium(4), medium(5)])  # which the first one learns of
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["file"] for r in rows] == ["1.mp4", "2.mp4", "3.mp4", "4.mp4", "5.mp4"]
    assert rows[0] == {
        "file": "1.mp4", "reason": "1.mp4: damaged.", "sample": "s1", "source": "f:1",
        "index": 1, "epoch": 0, "replacement": "r",
    }  # fmt: skip


def _list_many(path, start):
    quarantine = Quarantine(path)
    for i in range(start, start + 60):
        quarantine.add([medium(i % 80)])


def test_processes_that_list_at_the_same_time(tmp_path):
    file = tmp_path / "q.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_list_many, args=(file, s)) for s in (0, 20, 40)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    names = [json.loads(line)["file"] for line in file.read_text().splitlines()]
    assert len(names) == len(set(names)) == 80


def test_another_file_is_not_overwritten(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("my notes\n")
    with pytest.raises(DataError, match="notes.txt is not a list of bad media"):
        Quarantine(file).add([medium(1)])
    assert file.read_text() == "my notes\n"


def test_a_line_that_was_not_finished_is_written_again(tmp_path):
    file = tmp_path / "q.jsonl"
    Quarantine(file).add([medium(1)])
    Quarantine(file).add([medium(2)])
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):  # as a full disk, or a power cut, leaves it
        file.write_bytes(whole[:end])
        Quarantine(file).add([medium(2)])
        assert file.read_bytes() == whole
        file.write_bytes(whole[:end])
        Quarantine(file).add([medium(3), medium(1)])
        names = [json.loads(line)["file"] for line in file.read_text().splitlines()]
        # The second one was whole but for the end of its line.
        assert names == (
            ["1.mp4", "2.mp4", "3.mp4"] if end == len(whole) - 1 else ["1.mp4", "3.mp4"]
        )


def test_notes_without_an_end_of_line_are_not_taken_for_an_unfinished_line(tmp_path):
    file = tmp_path / "notes.txt"
    for text in ("my notes", '{"film": 1'):
        file.write_text(text)
        with pytest.raises(DataError, match="notes.txt is not a list of bad media"):
            Quarantine(file).add([medium(1)])
        assert file.read_text() == text


@pytest.mark.parametrize(
    "change", [{"policy": "skip"}, {"max_fraction": 2}, {"max_tries": 0}, {"grace": -1}]
)
def test_wrong_settings_are_refused(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        BadMediaSettings(**change)


def test_a_sample_with_several_media_names_the_bad_one(media, processor):
    both = [("image", media["picture"]), ("video", media["film"])]
    data = dataset_of([sample(i, *both) for i in range(3)], processor)
    bad = Sample(
        "x", sample(0, ("image", media["picture"]), ("video", media["hollow.mp4"])).messages, "f:1"
    )
    data.store.samples[0] = bad
    (found,) = data.__getitems__([0])["info"].bad
    assert Path(found.file).name == "hollow.mp4"


def test_a_list_that_cannot_be_written_is_known_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "list.jsonl", tmp_path):
        with pytest.raises(UsageError, match=r"cannot be written \(.*quarantine="):
            BadMediaWatch(BadMediaSettings(quarantine=str(path)))
        with pytest.raises(UsageError, match=r"cannot be written \(.*quarantine="):
            Quarantine(path).add([medium(1)])


def test_trying_the_list_out_leaves_no_file(tmp_path):
    file = tmp_path / "deep" / "list.jsonl"
    BadMediaWatch(BadMediaSettings(quarantine=str(file)))
    assert list(file.parent.iterdir()) == []
    file.write_text("kept\n")
    BadMediaWatch(BadMediaSettings(quarantine=str(file)))
    assert file.read_text() == "kept\n"
