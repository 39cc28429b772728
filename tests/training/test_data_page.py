"""The examples of docs/data.md are data of the format that they stand for."""

from __future__ import annotations

import re

import pytest
from clips import make_clip
from docs_data import PAGE, examples, write_examples
from PIL import Image

from av_llava.training.readers import READERS, detect, reader_named
from av_llava.training.report import validate
from av_llava.training.store import FileStore, open_store

FORMATS = {"llava_video": "llava", "video_salmonn2": "llava"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    for name, options in (("clip", {}), ("silent", {"audio": None})):
        make_clip(folder / f"{name}.mp4", seconds=2, size=(64, 48), **options)
    make_clip(folder / "sound.wav", seconds=1, video=False)
    Image.new("RGB", (60, 40)).save(folder / "photo.jpg")
    write_examples(folder)
    return folder


def test_every_example_is_found():
    fences = re.findall(r"^```(json|yaml)$", PAGE.read_text(), re.MULTILINE)
    assert len(examples()) == len(fences) > 10


@pytest.mark.parametrize("name", examples())
def test_an_example_can_be_used(folder, name):
    store = open_store(folder / name) if name != "sharegpt.json" else open_store(folder)
    found = validate(store, decode=True)
    assert len(store) and found.n_media and not found.problems
    expected = {"video_salmonn2.json": {"preference turns": 1}}
    assert found.warnings == expected.get(name, {}), found.findings


def test_examples_are_of_their_formats(folder):
    shown = set()
    for name in examples():
        format = name.partition(".")[0]
        if name == "dataset_info.json" or name.endswith("yaml"):
            continue
        if name == "sharegpt.json":  # its own names of keys, which dataset_info.json tells
            shown.add("sharegpt")
            continue
        store = FileStore(folder / name)
        found = [detect(store.row(i)).name for i in range(len(store))]
        assert found[0] == reader_named(FORMATS.get(format, format)).name
        shown |= set(found)
    assert shown == set(READERS) - {"swift_pairs"}
