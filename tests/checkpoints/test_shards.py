"""Reading tensors one at a time and writing them into shards, against the safetensors library."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.shards import Shard, ShardWriter, Slot, Transfer, copy_tensors, mean_row
from av_llava.checkpoints.source import open_source
from av_llava.checkpoints.stored import (
    DTYPES,
    StoredTensor,
    TensorReader,
    stored_tensors,
    tensors_in,
)
from av_llava.errors import CheckpointError

from .folders import V16, copy_case, edit_config

torch.set_num_threads(1)

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits that the type can hold."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    n_bytes = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    bits = torch.randint(0, 120, (n_bytes,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape)


def folder_of(path: Path, shards: dict[str, dict[str, torch.Tensor]]) -> CheckpointFolder:
    """A folder of safetensors or .bin shards with an index."""
    path.mkdir(exist_ok=True)
    for name, state in shards.items():
        if name.endswith(".bin"):
            torch.save(state, path / name)
        else:
            save_file(state, path / name)
    if len(shards) > 1:
        stem = "pytorch_model.bin" if next(iter(shards)).endswith(".bin") else "model.safetensors"
        weight_map = {key: name for name, state in shards.items() for key in state}
        (path / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return CheckpointFolder(path)


def read_all(found: list[StoredTensor]) -> dict[str, torch.Tensor]:
    with TensorReader() as reader:
        return {t.name: reader.read(t).clone() for t in found}


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_every_tensor_is_read_as_the_libraries_read_it(tmp_path, kind):
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    shards = {
        f"{stem}-00001-of-00002.{kind}": {
            "a": torch.randn(3, 4),
            "b": torch.randn(5).half(),
            "scalar": torch.tensor(7),
        },
        f"{stem}-00002-of-00002.{kind}": {
            "c": torch.randn(2, 2).bfloat16(),
            "e": torch.empty(0, 3),
        },
    }
    found = stored_tensors(folder_of(tmp_path, shards))
    read = read_all(found)
    wanted = {k: v for state in shards.values() for k, v in state.items()}
    assert read.keys() == wanted.keys()
    for stored in found:
        value = wanted[stored.name]
        assert (stored.dtype, stored.shape) == (value.dtype, tuple(value.shape))
        assert stored.n_bytes == value.numel() * value.itemsize
        assert torch.equal(read[stored.name], value)


def test_old_pickles_and_views_are_read(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"turned": whole.T, "part": whole[1:, ::2]}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    read = read_all(stored_tensors(CheckpointFolder(tmp_path)))
    assert all(torch.equal(read[k], v) for k, v in state.items())


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("was_here"),))


def test_pickles_that_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"a": Hostile()}, file)
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        stored_tensors(CheckpointFolder(tmp_path))
    assert not (tmp_path / "was_here").exists()


def test_a_cut_file_is_named(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    found = tensors_in([file])
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        tensors_in([file])
    with (
        TensorReader() as reader,
        pytest.raises(CheckpointError, match="ends within the data of 'a'"),
    ):
        reader.read(found[0])


def test_an_index_that_names_an_absent_tensor_is_an_error(tmp_path):
    shards = {f"model-{i}.safetensors": {f"t{i}": torch.ones(1)} for i in (1, 2)}
    folder_of(tmp_path, shards)
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["ghost"] = "model-2.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"names 1 tensor\(s\) that no file holds: ghost"):
        stored_tensors(CheckpointFolder(tmp_path))


def test_one_name_in_two_files_is_an_error(tmp_path):
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"'a' is both in .*one.* and in .*two"):
        tensors_in([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def test_a_file_that_goes_away_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    found = tensors_in([tmp_path / "model.safetensors"])
    (tmp_path / "model.safetensors").unlink()
    with TensorReader() as reader, pytest.raises(CheckpointError, match="cannot be opened"):
        reader.read(found[0])


# ---------------------------------------------------------------- writing


@given(
    entries=st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=8),
    max_bytes=st.integers(1, 300),
)
def test_what_is_written_is_what_the_library_reads(tmp_path_factory, entries, max_bytes):
    folder = tmp_path_factory.mktemp("out")
    state = {
        f"t{i}": random_tensor(DTYPES[name], shape, i) for i, (name, shape) in enumerate(entries)
    }
    slots = [Slot(k, v.dtype, tuple(v.shape)) for k, v in state.items()]
    with ShardWriter(folder, slots, max_bytes) as writer:
        for name, value in state.items():
            writer.write(name, [value])
    found: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        size = sum(v.numel() * v.itemsize for v in held.values())
        assert size <= max_bytes or len([v for v in held.values() if v.numel()]) == 1
        found |= held
        where |= dict.fromkeys(held, file.name)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert (
            found[name]
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(value.contiguous().reshape(-1).view(torch.uint8))
        )
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(writer.shards) > 1)
    if index.exists():
        data = json.loads(index.read_text())
        assert data["weight_map"] == where
        assert data["metadata"]["total_size"] == sum(v.numel() * v.itemsize for v in state.values())
    assert sorted(p.name for p in writer.files) == sorted(p.name for p in folder.iterdir())


@given(st.lists(st.sampled_from(sorted(DTYPES)), min_size=1, max_size=12))
def test_every_tensor_lies_aligned(names):
    slots = [Slot(f"t{i}", DTYPES[n], (3,)) for i, n in enumerate(names)]
    shard = Shard.lay_out(Path("x"), slots)
    assert all(slot.offset % slot.dtype.itemsize == 0 for slot in shard.slots)
    assert len({slot.offset for slot in shard.slots}) == len(slots)


def test_shards_are_cut_in_order_and_named_as_transformers_names_them(tmp_path):
    slots = [Slot(f"t{i}", torch.float32, (n,)) for i, n in enumerate((10, 10, 30, 5, 5))]
    writer = ShardWriter(tmp_path, slots, 80)
    assert [[s.name for s in shard.slots] for shard in writer.shards] == [
        ["t0", "t1"],
        ["t2"],
        ["t3", "t4"],
    ]
    assert [f.name for f in writer.files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]


def test_leaving_a_tensor_out_is_noticed(tmp_path):
    slots = [Slot("a", torch.float32, (2,)), Slot("b", torch.float32, (2,))]
    with (
        pytest.raises(AssertionError, match="unfinished"),
        ShardWriter(tmp_path, slots, 99) as writer,
    ):
        writer.write("a", [torch.zeros(2)])


def test_too_few_rows_are_noticed(tmp_path):
    writer = ShardWriter(tmp_path, [Slot("a", torch.float32, (2,))], 99)
    with pytest.raises(AssertionError, match="4 bytes"), writer:
        writer.write("a", [torch.zeros(1)])


def test_a_type_that_safetensors_lacks_is_an_error(tmp_path):
    slot = Slot("odd", torch.complex128, (2,))
    with pytest.raises(CheckpointError, match="'odd' has the type torch.complex128"):
        ShardWriter(tmp_path, [slot], 99)


# ---------------------------------------------------------------- copying


def test_copying_changes_no_bit_and_tells_how_far_it_is(tmp_path):
    state = {"a": torch.randn(4, 3), "b": torch.randn(6).half(), "n": torch.arange(3)}
    found = stored_tensors(folder_of(tmp_path / "in", {"pytorch_model.bin": state}))
    (tmp_path / "out").mkdir()
    seen = []
    files = copy_tensors(
        [Transfer(t, f"new.{t.name}") for t in found],
        tmp_path / "out",
        10**9,
        progress=lambda done, total: seen.append((done, total)),
    )
    out = load_file(files[0])
    assert {k: v.dtype for k, v in out.items()} == {f"new.{k}": v.dtype for k, v in state.items()}
    assert all(torch.equal(out[f"new.{k}"], v) for k, v in state.items())
    assert seen == [(48, 84), (60, 84), (84, 84)]


def test_conversion_touches_floating_types_only(tmp_path, monkeypatch):
    monkeypatch.setattr("av_llava.checkpoints.shards._PIECE_BYTES", 16)  # rows in several pieces
    state = {"a": torch.randn(7, 3), "n": torch.arange(3), "s": torch.tensor(1.5)}
    found = stored_tensors(folder_of(tmp_path, {"model.safetensors": state}))
    (tmp_path / "out").mkdir()
    copy_tensors([Transfer(t, t.name) for t in found], tmp_path / "out", 10**9, torch.bfloat16)
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out["n"].dtype == torch.int64 and torch.equal(out["a"], state["a"].bfloat16())
    assert out["s"].dtype == torch.bfloat16 and out["s"].shape == ()


@pytest.mark.parametrize(("rows", "n_used"), [(3, None), (8, None), (8, 2), (5, 2)])
def test_rows_are_cut_off_or_added(tmp_path, rows, n_used):
    table = torch.randn(5, 4)
    found = stored_tensors(folder_of(tmp_path, {"model.safetensors": {"t": table}}))
    (tmp_path / "out").mkdir()
    transfer = Transfer(found[0], "t", rows=rows, n_used=n_used)
    assert transfer.reshaped == (rows != 5)
    copy_tensors([transfer], tmp_path / "out", 10**9)
    out = load_file(tmp_path / "out" / "model.safetensors")["t"]
    assert out.shape == (rows, 4) and torch.equal(out[:5], table[:rows])
    for row in out[5:]:
        torch.testing.assert_close(row, table[:n_used].mean(0))


def test_the_mean_of_many_rows_in_half_precision_is_not_rounded_on_the_way():
    table = torch.full((50_000, 2), 1.0009765625, dtype=torch.float16)
    assert torch.equal(mean_row(table, 50_000), table[0])


# ---------------------------------------------------------------- memory

MEASURE = r"""
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from av_llava.checkpoints.convert import convert
name, source, destination = sys.argv[1:4]
report = convert(name, source, destination, shard_size=int(sys.argv[4]))
# Not ru_maxrss: a child begins with that of the process that started it.
status = Path("/proc/self/status").read_text()
peak = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
print(json.dumps({"peak": peak, "bytes": report.n_bytes, "reshaped": len(report.reshaped)}))
"""


def hollow_shard(file: Path, slots: list[Slot]) -> None:
    """A shard of zeros that takes no room on the disk."""
    shard = Shard.lay_out(file, slots)
    with file.open("wb") as handle:
        handle.write(shard.header)
        handle.truncate(len(shard.header) + sum(s.n_bytes for s in shard.slots))


def hollow_checkpoint(folder: Path, shard_bytes: int) -> int:
    """A LLaVA folder of 1.6 GB; returns the size of its largest shard."""
    source = copy_case(V16, folder)
    width, vocabulary, layers = 2048, 24_000, 14
    edit_config(
        source,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        torch_dtype="bfloat16",
        mm_vision_tower="vision_tower",
    )
    expected = open_source(source).complete().expected
    (source / "model.safetensors").unlink()
    slots = [Slot(name, torch.bfloat16, shape) for name, shape in expected.items()]
    writer = ShardWriter(source, slots, shard_bytes)
    for shard in writer.shards:
        hollow_shard(shard.file, list(shard.slots))
    writer._write_index()
    return max(f.stat().st_size for f in source.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is not told here")
@pytest.mark.parametrize("name", ["llava", "hf", "text-only"])
def test_memory_is_bounded_by_the_largest_shard(tmp_path, name):
    gib = 2**30
    largest = hollow_checkpoint(tmp_path, 100 * 2**20)
    total = sum(f.stat().st_size for f in (tmp_path / "checkpoint").glob("*.safetensors"))
    assert total > 1.4 * gib and largest < 0.12 * gib  # holding everything would exceed the bound
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURE,
            name,
            tmp_path / "checkpoint",
            tmp_path / "out",
            str(100 * 2**20),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["bytes"] > 1.4 * gib
    assert measured["peak"] <= largest + gib, f"{measured['peak'] / gib:.2f} GiB"
