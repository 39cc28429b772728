"""Lengths from headers: those of training, never stale, resumable, safe to interrupt."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from clips import make_clip
from PIL import ExifTags, Image
from train_runs import make_base, make_data, recipe, trainer_of

import av_llava
from av_llava.cli.main import run
from av_llava.demo_model import tiny_config, tiny_tokenizer
from av_llava.errors import DataError, UsageError
from av_llava.inspection import light_processor
from av_llava.processor import AVLlavaProcessor
from av_llava.settings import IGNORE_INDEX
from av_llava.training import index as index_module
from av_llava.training.index import Measurer, build_index, modality_name
from av_llava.training.index_file import CHUNK_ROWS, IndexFile
from av_llava.training.run_folder import LENGTHS
from av_llava.training.store import open_store

torch.set_num_threads(1)


def tiny_processor():
    tokenizer = tiny_tokenizer()
    return AVLlavaProcessor(tokenizer, tiny_config(tokenizer))


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    make_clip(folder / "film.mp4", seconds=3, size=(64, 48))
    make_clip(folder / "mute.mp4", seconds=2, size=(64, 48), audio=None)
    make_clip(folder / "sound.wav", seconds=1, video=False)
    Image.new("RGB", (60, 40)).save(folder / "picture.png")
    return folder


@pytest.fixture
def folder(media, tmp_path):
    shutil.copytree(media, tmp_path, dirs_exist_ok=True)
    return tmp_path


def row(question="What?", answer="A red ball.", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


ROWS = [
    row(),
    row(image="picture.png"),
    row(video="film.mp4", answer="It rolls."),
    row(video="film.mp4", use_audio=False),
    row(video="mute.mp4"),
    row(video="mute.mp4", audio="sound.wav"),
    row(audio="sound.wav"),
    row(image=["picture.png", "picture.png"], audio="sound.wav", question="<image><audio><image>"),
]
NAMES = ["text", "image", "video+audio", "video", "video", "video+audio", "audio", "image+audio"]


TEXTS = [row(f"Why {i}?") for i in range(3 * CHUNK_ROWS)]


def write(folder, rows):
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return open_store(file)


def spy(monkeypatch):
    """Chunks that are measured from now on, and rows that are."""
    chunks = []
    measure = Measurer.chunk
    monkeypatch.setattr(Measurer, "chunk", lambda self, c: chunks.append(c) or measure(self, c))
    return chunks


def test_lengths_are_those_of_decoded_batches(folder, processor):
    store = write(folder, ROWS)
    index = build_index(store, processor)
    assert (index.lengths.dtype, index.supervised.dtype) == (np.int32, np.int32)
    assert index.modality.dtype == np.uint8 and not index.errors and index.usable.all()
    for i, sample in enumerate(store):
        prepared = processor.prepare(
            [sample.messages], supervised=True, add_generation_prompt=False, decode=True
        )
        plan = prepared.media.splice
        assert index.lengths[i] == plan.lengths[0]
        assert index.supervised[i] == (plan.labels() != IGNORE_INDEX).sum()
    assert [modality_name(code) for code in index.modality] == NAMES


def test_turns_that_are_not_learned_do_not_count(folder, processor):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c d"}]
    both = {"messages": [*turns, *turns]}
    one = {"messages": [*turns, turns[0], {**turns[1], "train": False}]}
    index = build_index(write(folder, [both, one]), processor)
    assert index.lengths[0] == index.lengths[1]
    assert index.supervised[0] == 2 * index.supervised[1] > 0


def test_options_count(folder, processor):
    store = write(folder, ROWS)
    lengths = {
        name: build_index(store, processor, processor.media_options(**o)).lengths.tolist()
        for name, o in {"own": {}, "few": {"frames": 2}, "mute": {"audio": "off"}}.items()
    }
    films = [i for i, r in enumerate(ROWS) if "video" in r]
    assert all(lengths["few"][i] < lengths["own"][i] for i in films)
    assert all(
        (lengths["mute"][i] < lengths["own"][i]) == (NAMES[i] == "video+audio") for i in range(8)
    )


def test_rows_that_cannot_be_measured_end_nothing(folder, processor, caplog):
    (folder / "text.mp4").write_text("no film at all\n" * 50)
    rows = [
        row(video="none.mp4"),
        *ROWS,
        row(question="<image>"),
        row(video="text.mp4", use_audio=False),
        row(answer=""),
    ]
    store = write(folder, rows)
    with (folder / "train.jsonl").open("a") as file:
        file.write("{broken\n")
    index = build_index(open_store(folder / "train.jsonl"), processor)
    assert sorted(index.errors) == [0, 9, 10, 12] or sorted(index.errors) == [0, 9, 10, 11, 12]
    assert index.errors[0].startswith(f"{store.where(0)}: ") and "none.mp4" in index.errors[0]
    assert "line 10: The text holds 1 × <image>" in index.errors[9]
    assert "text.mp4" in index.errors[10] and "line 13: not JSON" in index.errors[12]
    assert not index.lengths[~index.usable].any() and index.lengths[index.usable].all()
    assert "cannot be used" in caplog.text


def test_the_modality_of_what_cannot_be_read_is_that_of_its_like(folder, processor):
    def codes(rows):
        return [modality_name(c) for c in build_index(write(folder, rows), processor).modality]

    gone = [row(video="none.mp4"), row(video="none.mp4", use_audio=False), row(audio="none.wav")]
    assert codes([*gone, *[row(video="film.mp4")] * 2])[:3] == ["video+audio", "video", "audio"]
    assert codes([*gone, *[row(video="mute.mp4")] * 2])[:3] == ["video", "video", "audio"]
    assert codes([row(video="none.mp4", audio="sound.wav")]) == ["video+audio"]


# ------------------------------------------------------------------ the file


def test_what_was_measured_is_read_again(folder, processor, monkeypatch):
    store = write(folder, [*TEXTS, *ROWS])
    file = folder / "cache" / "train.index"
    calls = []
    first = build_index(store, processor, file=file, progress=lambda *x: calls.append(x))
    n = len(store)
    assert calls[-1] == (n, n) and len(calls) == -(-n // CHUNK_ROWS)
    chunks = spy(monkeypatch)
    again = build_index(store, processor, file=file, progress=lambda *x: calls.append(x))
    assert not chunks and calls[-1] == (n, n)
    for name in ("lengths", "supervised", "modality"):
        assert np.array_equal(getattr(first, name), getattr(again, name))


def test_errors_are_remembered_and_can_be_tried_again(folder, processor, monkeypatch):
    store = write(folder, [row(video="none.mp4"), *ROWS * 5])
    file = folder / "train.index"
    first = build_index(store, processor, file=file)
    chunks = spy(monkeypatch)
    assert build_index(store, processor, file=file).errors == first.errors and not chunks
    build_index(store, processor, file=file, retry_errors=True)
    assert chunks == [0]


def change_data(folder, processor):
    return write(folder, [*ROWS, row("Else?")]), processor, {}


def change_root(folder, processor):
    other = shutil.copytree(folder, folder.parent / f"{folder.name}-elsewhere")
    return open_store(folder / "train.jsonl", media_root=other), processor, {}


def change_options(folder, processor):
    return open_store(folder / "train.jsonl"), processor, {"frames": 2}


def change_model(folder, processor):
    other = tiny_processor()
    other.config.audio = other.config.audio.replace(pool_stride=4)
    return open_store(folder / "train.jsonl"), other, {}


def change_template(folder, processor):
    other = type(processor)(processor.tokenizer, processor.config, "vicuna_v1")
    return open_store(folder / "train.jsonl"), other, {}


@pytest.mark.parametrize(
    "change", [change_data, change_root, change_options, change_model, change_template]
)
def test_a_file_for_something_else_is_made_anew(folder, processor, change, monkeypatch):
    file = folder / "cache" / "train.index"
    build_index(write(folder, ROWS), processor, file=file)
    store, other, options = change(folder, processor)
    chunks = spy(monkeypatch)
    found = build_index(store, other, other.media_options(**options), file=file)
    assert chunks == [0]
    alone = build_index(store, other, other.media_options(**options))
    assert np.array_equal(found.lengths, alone.lengths)


def change_length(folder):
    make_clip(folder / "film.mp4", seconds=1, size=(64, 48))


def change_time(folder):
    os.utime(folder / "film.mp4", ns=(1, 1))


def change_presence(folder):
    (folder / "film.mp4").unlink()


def change_sound(folder):
    make_clip(folder / "sound.wav", seconds=2, video=False)


def test_training_uses_what_the_command_measured(folder, monkeypatch):
    """Other spellings of the same: weights loaded, patience, sampling kept in the model."""
    store, file = write(folder, ROWS), folder / "train.index"
    light = light_processor(None)
    build_index(store, light, light.media_options(frames=5), file=file)
    other = av_llava.load(device="cpu", dtype="bfloat16").processor
    options = other.media_options(frames=5)
    other.config.sampling = options.sampling
    patient = dataclasses.replace(options, limits=options.limits.replace(max_decode_s=7))
    chunks = spy(monkeypatch)
    build_index(store, other, patient, file=file)
    assert not chunks
    strict = dataclasses.replace(options, limits=options.limits.replace(max_duration_s=2.5))
    assert build_index(store, other, strict, file=file).errors and chunks == [0]


def test_training_finds_the_index_beside_its_data(tmp_path, monkeypatch):
    base, data = make_base(tmp_path), make_data(tmp_path, 4)
    command = ["data", "index", data.name, "--model", "base", "--frames"]
    monkeypatch.chdir(tmp_path)
    assert run([*command, "4"]) == 0
    file, chunks = tmp_path / "data.jsonl.index", spy(monkeypatch)
    kept = file.read_bytes()

    def lengths(output, **changes):
        _, prepared = trainer_of(recipe(base, data, tmp_path / output, **changes))
        return prepared.index.lengths.tolist()

    as_kept = lengths("one")
    assert not chunks and not (tmp_path / "one" / LENGTHS).exists()
    other = lengths("two", data={"frames": 2})  # not what it was made for: left as it is
    assert chunks == [0] and other != as_kept and file.read_bytes() == kept
    with file.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # as one that writes it does
        assert lengths("three") == as_kept
    assert chunks == [0, 0] and (tmp_path / "three" / LENGTHS / "train.index").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]\n", b'{"schema": "av-llava-index/1"}\n'])
def test_what_lies_beside_the_data_is_not_touched(tmp_path, content):
    base, data = make_base(tmp_path), make_data(tmp_path, 4)
    file = tmp_path / "data.jsonl.index"
    file.write_bytes(content)
    trainer_of(recipe(base, data, tmp_path / "out"))
    assert file.read_bytes() == content


@pytest.mark.parametrize("change", [change_length, change_time, change_presence, change_sound])
def test_media_that_change_are_measured_again(folder, processor, change, monkeypatch):
    film, sound = row(video="film.mp4"), row(video="mute.mp4", audio="sound.wav")
    fill = [row()] * (CHUNK_ROWS - 1)
    rows = [row(), *fill, film, *fill, sound, *fill]
    store = write(folder, rows)
    file = folder / "train.index"
    before = build_index(store, processor, file=file)
    change(folder)
    chunks = spy(monkeypatch)
    after = build_index(store, processor, file=file)
    touched = 2 if change is change_sound else 1
    assert chunks == [touched]
    chunks.clear()
    alone = build_index(store, processor)
    assert np.array_equal(after.lengths, alone.lengths) and after.errors == alone.errors
    if change is not change_time:
        assert not np.array_equal(before.lengths, after.lengths)
    chunks.clear()
    build_index(store, processor, file=file)
    assert not chunks


def test_a_file_that_appears_is_measured(folder, processor):
    store = write(folder, [row(video="late.mp4")])
    file = folder / "train.index"
    assert build_index(store, processor, file=file).errors
    shutil.copy(folder / "film.mp4", folder / "late.mp4")
    assert not build_index(store, processor, file=file).errors


def test_a_file_cut_anywhere_is_finished(folder, processor, monkeypatch):
    """Whatever a kill left: what is whole is used, the rest is measured."""
    store = write(folder, TEXTS)
    file = folder / "train.index"
    whole = build_index(store, processor, file=file)
    data = file.read_bytes()
    head = data.index(b"\n") + 1
    chunks = spy(monkeypatch)
    for cut in (0, 5, head - 1, head, head + 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        chunks.clear()
        found = build_index(store, processor, file=file)
        assert np.array_equal(found.lengths, whole.lengths)
        assert len(chunks) == 3 - max(0, data[:cut].count(b"\n") - 1)
        assert sorted(file.read_bytes().splitlines()) == sorted(data.splitlines())


def test_damage_in_the_middle_is_measured_again(folder, processor, caplog):
    store = write(folder, TEXTS)
    file = folder / "train.index"
    whole = build_index(store, processor, file=file)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b"\0" * 50 + b"\n", *lines[3:]]))
    assert np.array_equal(build_index(store, processor, file=file).lengths, whole.lengths)
    assert "cut off" in caplog.text


@pytest.mark.parametrize("content", ["my notes\n", '{"a": 1}\n', "[1, 2]\n", "x" * 99_999])
def test_a_file_that_is_no_index_stays_as_it_is(folder, processor, content):
    file = folder / "notes"
    file.write_text(content)
    with pytest.raises(UsageError, match="is no index.*Nothing was changed"):
        build_index(write(folder, ROWS), processor, file=file)
    assert file.read_text() == content


def test_one_writer_at_a_time(folder, processor):
    store = write(folder, ROWS)
    file = folder / "train.index"

    def progress(done, total):
        with pytest.raises(UsageError, match="being written by another run"):
            build_index(store, processor, file=file)

    assert len(build_index(store, processor, file=file, progress=progress)) == len(ROWS)
    assert len(build_index(store, processor, file=file)) == len(ROWS)


def test_any_number_of_readers(folder, processor):
    """All ranks of a run read the index that the first has written, at the same time."""
    store = write(folder, ROWS)
    file = folder / "train.index"
    lengths = build_index(store, processor, file=file).lengths
    key = Measurer(store, processor, processor.media_options()).key()
    readers = [IndexFile(file, key, len(store)) for _ in range(3)]
    assert np.array_equal(build_index(store, processor, file=file).lengths, lengths)
    with pytest.raises(UsageError, match="being written by another run"):
        build_index(store, processor, file=file, retry_errors=True)
    for reader in readers:
        assert reader.take(0) is not None
        reader.close()
    assert len(build_index(store, processor, file=file, retry_errors=True)) == len(store)


def test_a_folder_that_cannot_be_written(folder, processor):
    (folder / "x").write_text("a file")
    with pytest.raises(UsageError, match="cannot be written"):
        build_index(write(folder, ROWS), processor, file=folder / "x" / "train.index")


def test_a_full_disk(folder, processor, monkeypatch):
    """What was written before stays; the next run goes on from there."""
    store, file = write(folder, TEXTS), folder / "train.index"
    build_index(store, processor, file=folder / "whole.index")
    room = (folder / "whole.index").stat().st_size - 50  # the third chunk fits in part
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(DataError, match="cannot be written any more: File too large"):
            build_index(store, processor, file=file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_bytes().count(b"\n") == 3 and file.read_bytes().endswith(b"\n")
    chunks = spy(monkeypatch)
    assert len(build_index(store, processor, file=file)) == len(store)
    assert chunks == [2]


def test_sound_given_as_an_array_is_refused(folder, processor):
    options = processor.media_options(audio=np.zeros(9, np.float32))
    with pytest.raises(UsageError, match="name a file"):
        build_index(write(folder, ROWS), processor, options)


# ------------------------------------------------------------------ processes

SCRIPT = """
import sys, json, time, threading, os
from av_llava.cli.main import run
from av_llava.demo_model import tiny_config, tiny_tokenizer
from av_llava.processor import AVLlavaProcessor
from av_llava.training.index import build_index
from av_llava.training.store import open_store
if __name__ == "__main__":
    folder, workers = sys.argv[1], int(sys.argv[2])
    store = open_store(folder + "/train.jsonl")
    def progress(done, total):
        print(done, flush=True)
        time.sleep(float(sys.argv[3]))
    tokenizer = tiny_tokenizer()
    processor = AVLlavaProcessor(tokenizer, tiny_config(tokenizer))
    index = build_index(store, processor, file=folder + "/train.index",
                        workers=workers, progress=progress)
    print(json.dumps([index.lengths.tolist(), sorted(index.errors)]), flush=True)
"""


def start(folder, workers, pause_s=0.0):
    script = folder / "run.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(workers), str(pause_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def members(group):
    """Processes of a process group that are still there."""
    out = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True)
    rows = (line.split() for line in out.stdout.splitlines())
    return sum(int(pgid) == group and not stat.startswith("Z") for pgid, stat in rows)


def gone(group):
    end = time.monotonic() + 20
    while members(group) and time.monotonic() < end:
        time.sleep(0.1)
    return not members(group)


def test_ctrl_c_keeps_what_was_measured(folder, processor, monkeypatch):
    store, file = write(folder, TEXTS), folder / "train.index"

    def progress(done, total):
        if done == 2 * CHUNK_ROWS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(store, processor, file=file, progress=progress)
    chunks = spy(monkeypatch)
    build_index(store, processor, file=file)
    assert chunks == [2]


@pytest.mark.slow
def test_several_processes_measure_the_same(folder, processor):
    store = write(folder, [*ROWS * 8, row(video="none.mp4")])
    here = build_index(store, processor)
    run = start(folder, 2)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    lengths, errors = json.loads(out.splitlines()[-1])
    assert lengths == here.lengths.tolist() and errors == [len(store) - 1]
    assert gone(run.pid)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["INT", "KILL"])
def test_an_interrupted_run_is_resumed(folder, processor, how, monkeypatch):
    """Ctrl-C of the whole group, as a terminal sends it, or a kill of the one that was started."""
    store = write(folder, ROWS * 32)
    run = start(folder, 2, 0.5)
    assert run.stdout is not None
    while (line := run.stdout.readline()) and int(line) < 2 * CHUNK_ROWS:
        pass
    assert line, run.communicate()[1]
    if how == "INT":
        os.killpg(run.pid, signal.SIGINT)
    else:
        run.kill()
    _, err = run.communicate(timeout=300)
    assert run.returncode != 0 and gone(run.pid)
    if how == "INT":
        assert err.count("KeyboardInterrupt\n") == 1, err
    chunks = spy(monkeypatch)
    found = build_index(store, processor, file=folder / "train.index")
    total = -(-len(store) // CHUNK_ROWS)
    assert 0 < len(chunks) <= total - 2
    assert np.array_equal(found.lengths, np.tile(found.lengths[: len(ROWS)], 32))


def die(self, chunk):
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(Measurer):
    """Ends the process that measures."""

    chunk = die


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_not_a_wait(folder, processor, monkeypatch):
    monkeypatch.setattr(index_module, "Measurer", Deadly)
    with pytest.raises(DataError, match="process that measures samples died"):
        build_index(write(folder, ROWS * 8), processor, workers=2)


def test_an_error_that_nobody_foresaw_names_the_row(folder, processor, monkeypatch):
    def broken(self, sample):
        raise ZeroDivisionError

    monkeypatch.setattr(Measurer, "length", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        build_index(write(folder, ROWS), processor)
    assert caught.value.__notes__ == [f"while measuring {folder / 'train.jsonl'}, line 1"]


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (400, 90), (30, 300)])
def test_tiles_of_pictures_are_counted_from_headers(folder, size):
    """The same as when pictures are decoded and cut, turned ones too."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", size).save(folder / "turned.jpg", exif=exif)
    processor = tiny_processor()
    side = processor.pixels.side
    processor.config.image = processor.config.image.replace(
        aspect_ratio="anyres", grid_pinpoints=[[side, 2 * side], [2 * side, side], [3 * side, side]]
    )
    store = write(folder, [row(image="turned.jpg")])
    prepared = processor.prepare([store[0].messages], add_generation_prompt=False)
    assert build_index(store, processor).lengths[0] == prepared.media.splice.lengths[0]
    assert len(prepared.tensors["pixel_values"]) > 1
