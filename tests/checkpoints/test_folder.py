"""Checkpoint folders: which files count, and faults that are named before anything is loaded."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from av_llava.checkpoints.folder import CheckpointFolder, load_bin, load_pickle, read_json
from av_llava.errors import CheckpointError

from .folders import locked, public_path, write_weights

__all__ = ["public_path"]
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def folder(path, state=TENSORS, **layout):
    write_weights(path, state, **layout)
    return CheckpointFolder(path)


def error(function, *args):
    with pytest.raises(CheckpointError) as caught:
        function(*args)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_keys_come_from_every_layout(tmp_path, kind, shards):
    found = folder(tmp_path, kind=kind, shards=shards)
    found.check_files()
    assert found.keys == set(TENSORS) and len(found.weight_files) == shards
    assert found.has("a.") and not found.has("c")


def test_safetensors_win_over_bin_and_a_stale_index_is_not_read(tmp_path):
    folder(tmp_path, {"old": torch.zeros(1)}, kind="bin", shards=2)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink(missing_ok=True)
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = CheckpointFolder(tmp_path)
    assert [f.name for f in found.weight_files] == ["model.safetensors"]
    assert found.keys == set(TENSORS)


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path):
    folder(tmp_path, {"x": torch.zeros(1), "y": torch.zeros(1)}, shards=2)
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert CheckpointFolder(tmp_path).keys == set(TENSORS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{oops", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1]", "holds a list"),
        (b"null", "holds a NoneType"),
    ],
)
def test_broken_json_is_named(tmp_path, text, words):
    file = tmp_path / "config.json"
    file.write_bytes(text)
    message = error(read_json, file)
    assert str(file) in message and words in message


def test_an_absent_config_and_a_folder_in_its_place_are_named(tmp_path):
    assert "config.json does not exist" in error(read_json, tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    assert "cannot be opened" in error(read_json, tmp_path / "config.json")


def test_no_weights_lists_what_is_expected(tmp_path):
    message = error(lambda: CheckpointFolder(tmp_path).weight_files)
    assert "model.safetensors" in message and "pytorch_model.bin.index.json" in message
    (tmp_path / "mm_projector.bin").touch()
    assert "only a projector" in error(lambda: CheckpointFolder(tmp_path).weight_files)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_absent_shards_are_named(tmp_path, kind):
    found = folder(tmp_path, kind=kind, shards=2)
    gone = found.weight_files[1]
    gone.unlink()
    message = error(lambda: CheckpointFolder(tmp_path).weight_files)
    assert gone.name in message and "index.json" in message and "1 file(s)" in message


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}}]
)
def test_a_broken_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json" in error(lambda: CheckpointFolder(tmp_path).weight_files)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("left", [0, 4, 60, -1])
def test_a_file_cut_short_is_named_without_being_loaded(tmp_path, kind, shards, left):
    file = folder(tmp_path, kind=kind, shards=shards).weight_files[-1]
    file.write_bytes(file.read_bytes()[:left])
    message = error(CheckpointFolder(tmp_path).check_files)
    assert str(file) in message and "damaged" in message and "fetch it again" in message.lower()


@pytest.mark.parametrize(
    "data", [b"hello world" * 9, b"<html>not found</html>", pickle.dumps({1: 2})]
)
def test_other_files_named_bin_are_refused(tmp_path, data):
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    assert "not a file of torch.save" in error(CheckpointFolder(tmp_path).check_files)


def test_a_zip_without_tensors_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as file:
        file.writestr("readme.txt", "hello")
    assert "damaged" in error(CheckpointFolder(tmp_path).check_files)


@pytest.mark.parametrize("flipped", range(0, 300, 7))
def test_no_damage_ends_in_another_error(tmp_path, flipped):
    file = folder(tmp_path, kind="bin").weight_files[0]
    data = bytearray(file.read_bytes())
    data[flipped : flipped + 3] = b"\xff\x00\x93"
    file.write_bytes(data)
    with suppress(CheckpointError):
        load_bin(file)


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, new_format):
    proof = tmp_path / "it-ran"
    file = tmp_path / "pytorch_model.bin"
    state = {**TENSORS, "evil": Runs(proof)}
    torch.save(state, file, _use_new_zipfile_serialization=new_format)
    message = error(CheckpointFolder(tmp_path).check_files)
    assert "posix.system" in message or "nt.system" in message
    assert str(file) in message and not proof.exists()
    torch.load(file, weights_only=False)  # the trap works: whoever trusts the file is caught
    assert proof.exists()


def test_files_older_than_zip_are_read(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    loaded = load_bin(file)
    assert all(torch.equal(loaded[k], v) for k, v in TENSORS.items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "type list"),
        ({"step": 3}, "'step'"),
        ({"state_dict": TENSORS}, "'state_dict'"),
        ({1: torch.ones(1)}, "under 1"),
    ],
)
def test_what_is_not_tensors_by_name_is_refused(tmp_path, content, words):
    file = tmp_path / "pytorch_model.bin"
    torch.save(content, file)
    assert words in error(load_bin, file)
    load_pickle(file)  # plain data is fine where more than tensors is expected


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_unreadable_files_are_named(public_path, name):
    folder(public_path, kind="bin" if name.endswith("bin") else "safetensors")
    (public_path / "config.json").write_text("{}")
    found = CheckpointFolder(public_path)
    with locked(public_path / name):
        message = error(lambda: (found.config, found.check_files()))
    assert message == f"{public_path / name} cannot be opened: Permission denied."


def test_an_unreadable_folder_is_named(public_path):
    (public_path / "inner").mkdir()
    with locked(public_path / "inner"):
        message = error(lambda: CheckpointFolder(public_path / "inner").weight_files)
    assert message == f"{public_path / 'inner'} cannot be opened: Permission denied."
