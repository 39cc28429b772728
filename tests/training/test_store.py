"""Rows by number: flat memory, any process, errors with their line."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time

import pytest

from av_llava.errors import DataError, UsageError
from av_llava.training.store import (
    ChainedStore,
    ChosenStore,
    FileStore,
    ReadAs,
    SampleStore,
    open_store,
)


def row(i, **more):
    turns = [{"from": "human", "value": f"Question {i}?"}, {"from": "gpt", "value": f"Answer {i}."}]
    return {"id": str(i), "conversations": turns, **more}


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(params=[".json", ".jsonl"])
def file(request, tmp_path):
    return write(tmp_path / f"train{request.param}", [row(i) for i in range(5)])


def test_rows_by_number(file):
    store = open_store(file)
    assert isinstance(store, SampleStore)
    assert len(store) == 5 and [s.id for s in store] == list("01234")
    assert store[-1] == store[4] and store.where(-1) == store.where(4)
    assert store.sources == (str(file),)
    for wrong in (5, -6):
        with pytest.raises(IndexError):
            store[wrong]
    place = f"{file}[2]" if file.suffix == ".json" else f"{file}:3"
    assert store[2].source == place


def test_a_store_goes_to_other_processes_and_threads(file):
    store = open_store(file)
    first = store[0]
    assert pickle.loads(pickle.dumps(store))[0] == first
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        assert [s.id for s in pool.map(store.__getitem__, range(5))] == list("01234")
    found, threads = [], []
    for i in range(5):
        threads.append(threading.Thread(target=lambda i=i: found.append(store[i].id)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list("01234") and store[0] == first


def test_the_digest_knows_the_content_and_the_settings(tmp_path):
    file = write(tmp_path / "a.jsonl", [row(0), row(1)])
    digests = [
        open_store(file).digest(),
        open_store(file, format="llava").digest(),
        open_store(file, media_root=tmp_path.parent).digest(),
        open_store(file, columns={"id": "name"}).digest(),
        ChosenStore(open_store(file), [0]).digest(),
        ChosenStore(open_store(file), [0, 1]).digest(),
        ChosenStore(open_store(file), [0, 1], 0.5).digest(),
        ChainedStore([open_store(file)] * 2).digest(),
    ]
    write(file, [row(0), row(2)])
    digests.append(open_store(file).digest())
    assert len(set(digests)) == len(digests)
    write(file, [row(0), row(1)])
    assert open_store(file).digest() == digests[0]


def test_stores_one_after_the_other(tmp_path):
    files = [write(tmp_path / f"{n}.jsonl", [row(f"{n}{i}") for i in range(n)]) for n in (2, 1, 3)]
    store = open_store(files)
    assert [s.id for s in store] == ["20", "21", "10", "30", "31", "32"]
    assert store[-1].id == "32" and store.where(2) == f"{files[1]}, line 1"
    assert store.reading(3).sample.id == "30"
    assert store.sources == tuple(str(f) for f in files)
    with pytest.raises(IndexError):
        store[6]


def test_some_samples_again(tmp_path):
    inner = open_store(write(tmp_path / "a.jsonl", [row(i, weight=i) for i in range(3)]))
    store = ChosenStore(inner, [2, 0, 2], 0.5)
    assert [(s.id, s.weight) for s in store] == [("2", 1.0), ("0", 0.0), ("2", 1.0)]
    assert store.reading(0).sample.weight == 1.0 and store.where(0).endswith("line 3")
    with pytest.raises(IndexError):
        store[3]


def test_a_folder_and_a_list_of_formats(tmp_path):
    write(tmp_path / "b.jsonl", [row(0)])
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    write(tmp_path / "a.json", [{"id": "m", "messages": messages}, row(1, video="v.mp4")])
    store = open_store(tmp_path)
    assert [s.id for s in store] == ["m", "1", "0"]
    assert store[1].paths == (str(tmp_path / "v.mp4"),)


def test_dataset_info(tmp_path):
    write(tmp_path / "a.json", [{"instruction": "Q", "output": "A", "pictures": ["p.png"]}])
    turns = [{"role": "me", "content": "<video>Q"}, {"role": "it", "content": "A"}]
    write(tmp_path / "b.json", [{"talk": turns, "videos": ["v.mp4"]}] * 3)
    info = {
        "one": {"file_name": "a.json", "columns": {"images": "pictures"}},
        "two": {
            "file_name": "b.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "me",
                     "assistant_tag": "it"},
            "num_samples": 2,
        },
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    for path in (tmp_path, tmp_path / "dataset_info.json"):
        store = open_store(path)
        assert [s.modalities for s in store] == [{"image"}, {"video"}, {"video"}]


def test_num_samples_draws_from_all_rows_and_repeats_where_there_are_fewer(tmp_path):
    write(tmp_path / "a.json", [{"instruction": f"Q{i}", "output": "A"} for i in range(6)])

    def drawn(wanted, seed=0):
        info = {"a": {"file_name": "a.json", "num_samples": wanted}}
        (tmp_path / "dataset_info.json").write_text(json.dumps(info))
        store = open_store(tmp_path, seed=seed)
        return [sample.messages[0].text for sample in store]

    few, many = [drawn(2, seed) for seed in range(30)], drawn(10)
    assert all(len(set(rows)) == 2 for rows in few)
    assert {row for rows in few for row in rows} == {f"Q{i}" for i in range(6)}
    assert len(many) == 10 and set(many) == {f"Q{i}" for i in range(6)}
    assert drawn(2, 5) == drawn(2, 5) and len(set(map(tuple, few))) > 5


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"hf_hub_url": "x/y"}, "'a' has no 'file_name'"),
        ({"file_name": "a.json", "ranking": True}, "ranks answers"),
        ({"file_name": "a.json", "formatting": "share"}, "'share'"),
        ({"file_name": "a.json", "column": {}}, "Did you mean 'columns'"),
        ({"file_name": "a.json", "tags": {"user": "x"}}, "tag 'user'"),
        ({"file_name": "a.json", "tags": 5}, "'tags' must map names"),
        ({"file_name": "a.json", "columns": {"images": 1}}, "'columns' must map names"),
        ({"file_name": "a.json", "num_samples": "x"}, "'num_samples' must be a whole number"),
        ({"file_name": "none.json"}, "none.json cannot be read"),
        (3, "one object for each data set"),
    ],
)
def test_a_dataset_info_that_cannot_be_read(tmp_path, entry, says):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": entry}))
    with pytest.raises(DataError, match=says):
        open_store(tmp_path)


# ------------------------------------------------------------------ what is wrong


BAD = [
    (b'{"id": 1, "conversations": [}', "not JSON: Expecting value at column 29"),
    (b'{"id": "\xff"}', "not UTF-8 text"),
    (b"[1]", "a row is a JSON object, not a list"),
    (b'{"text": "x"}', "No known format"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    (json.dumps(row(1, image="x", conversations=[{"from": "human", "value": "<video>"}])).encode(),
     "1 × <video>"),
]  # fmt: skip


def bad_rows():
    """Each in a file of lines and, where its brackets are whole, in an array."""
    for bad, says in BAD:
        for array in (False, True)[: 1 + (bad.count(b"[") == bad.count(b"]"))]:
            yield pytest.param(bad, says, array, id=f"{says}, {'array' if array else 'lines'}")


@pytest.mark.parametrize(("bad", "says", "array"), list(bad_rows()))
def test_a_bad_row_names_its_line_and_leaves_the_others(tmp_path, bad, says, array):
    good = json.dumps(row(0)).encode()
    if array:
        file = tmp_path / "train.json"
        file.write_bytes(b"[\n" + good + b",\n\n" + bad + b",\n" + good + b"]")
        place = "line 4 (row 1)"
    else:
        file = tmp_path / "train.jsonl"
        file.write_bytes(good + b"\n\n" + bad + b"\n" + good)
        place = "line 3"
    store = open_store(file)
    assert len(store) == 3 and store[0].messages == store[2].messages
    with pytest.raises(DataError) as caught:
        store[1]
    assert str(caught.value).startswith(f"{file}, {place}: ")
    assert says in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[%s %s]", "line 1 (row 1): before this row of the array stands no comma"),
        ("[%s,,\n\n %s]", "line 3 (row 1): before this row of the array stands ',,'"),
        ("[%s, 17, %s]", "(row 1): before this row of the array stands ', 17,'"),
        ('["x", %s, %s]', "(row 0): before this row of the array stands '\"x\",'"),
    ],
)
def test_what_stands_between_rows(tmp_path, text, says):
    file = tmp_path / "train.json"
    file.write_text(text % (json.dumps(row(0)), json.dumps(row(1))))
    store = FileStore(file)
    bad = int(says[says.index("(row ") + 5])
    assert store[1 - bad].id == str(1 - bad)
    with pytest.raises(DataError) as caught:
        store[bad]
    assert says in str(caught.value)


def test_another_file_of_the_same_name_changes_nothing(file, tmp_path):
    store = open_store(file)
    write(tmp_path / "new.jsonl", [row(9)]).replace(file)
    assert [s.id for s in store] == list("01234")


def test_a_copy_needs_the_file(file):
    data = pickle.dumps(open_store(file))
    file.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        pickle.loads(data)


def test_a_file_that_shrinks(file):
    store = open_store(file)
    file.write_text("[")
    with pytest.raises(DataError, match="shorter since it was opened"):
        store[4]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("none.json", {}, "do not exist"),
        ("a.txt", {}, "no kind of file"),
        ("empty", {}, "holds no .json or .jsonl"),
        ("a.jsonl", {"format": "lava"}, "Unknown format"),
        ("a.jsonl", {"media_root": "none"}, "folder of media none does not exist"),
        ("a.yaml", {"format": "llava"}, "is a mixture"),
        ([], {}, "No training data"),
    ],
)
def test_paths_that_cannot_be_opened(tmp_path, name, options, says):
    write(tmp_path / "a.jsonl", [row(0)])
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.yaml").write_text("datasets: [{path: a.jsonl}]")
    (tmp_path / "empty").mkdir()
    with pytest.raises((DataError, UsageError), match=says):
        open_store(tmp_path / name if name else [], **options)


def test_a_note_is_logged_once(tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", [row(i, vdeo=1) for i in range(3)])
    store = FileStore(file, ReadAs())
    assert len([store[i] for i in range(3)]) == 3
    (record,) = caplog.records
    assert "'vdeo' is not used" in record.message and "line 1" in record.message


# ------------------------------------------------------------------ a million rows

MEASURE = """
import sys, time, resource
from av_llava.training.store import open_store
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
start = time.perf_counter()
store = open_store(sys.argv[1])
opened = time.perf_counter() - start
n = len(store)
for i in range(0, n, n // 2000):
    assert store[i].id == str(i)
print(n, opened, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "n", "most_s", "most_mib"), [(".jsonl", 1_000_000, 8, 60), (".json", 300_000, 8, 40)]
)
def test_memory_stays_flat_and_opening_is_fast(tmp_path, suffix, n, most_s, most_mib):
    file = tmp_path / f"many{suffix}"
    line = (
        '{"id":%d,"conversations":[{"from":"human","value":"a[\\"?"},{"from":"gpt","value":"b"}]}'
    )
    array = suffix == ".json"
    with file.open("w") as handle:
        handle.write("[" if array else "")
        for start in range(0, n, 10_000):
            between = ",\n" if array else "\n"
            text = between.join(line % i for i in range(start, start + 10_000))
            handle.write((between if start else "") + text)
        handle.write("]" if array else "\n")
    size_mib = file.stat().st_size / 2**20
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)], check=True, capture_output=True, text=True
    ).stdout.split()
    assert int(out[0]) == n
    assert float(out[1]) < most_s
    assert float(out[2]) < most_mib, f"{out} for a file of {size_mib:.0f} MiB"


def test_reading_does_not_grow(file):
    """The same rows again and again leave nothing behind."""
    store = open_store(file)
    sizes = []
    for _ in range(3):
        start = time.perf_counter()
        while time.perf_counter() - start < 0.05:
            store[3]
        sizes.append(len(pickle.dumps(store)))
    assert len(set(sizes)) == 1
