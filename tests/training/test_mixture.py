"""Mixtures: what is chosen, alike on every rank; what is wrong, with its line."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import DataError
from av_llava.training.mixture import Entry, chosen_rows
from av_llava.training.store import open_store


def write(folder, name, n, **more):
    turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]
    rows = [{"id": f"{name}{i}", "conversations": turns, **more} for i in range(n)]
    (folder / f"{name}.json").write_text(json.dumps(rows))


@pytest.fixture
def folder(tmp_path):
    for name, n in (("a", 10), ("b", 4)):
        write(tmp_path, name, n)
    return tmp_path


def mixture(folder, text, **options):
    (folder / "mix.yaml").write_text(text)
    return open_store(folder / "mix.yaml", **options)


def ids(store):
    return [s.id for s in store]


def test_llava_next_writes_it_so(folder):
    store = mixture(
        folder,
        """
datasets:
  - json_path: a.json
    sampling_strategy: "first:25%"
  - json_path: b.json
    sampling_strategy: end:2
""",
    )
    assert ids(store) == ["a0", "a1", "a2", "b2", "b3"]
    assert store.sources == (str(folder / "a.json"), str(folder / "b.json"))
    assert store.where(3) == f"{folder / 'b.json'}, line 1 (row 2)"


@pytest.mark.parametrize(
    ("strategy", "n"),
    [
        ("all", 10), ("first:3", 3), ("first:99", 10), ("end:1", 1), ("random:4", 4),
        ("random:35%", 4), ("end:100%", 10), ("first:0.1%", 1), ("first:30%", 3),
    ],
)  # fmt: skip
def test_how_many_rows_a_strategy_takes(strategy, n):
    rows = chosen_rows(10, Entry("a.json", sampling_strategy=strategy), 0)
    assert len(rows) == n == len(set(rows)) and sorted(rows) == rows.tolist()
    if strategy.startswith("end"):
        assert rows[-1] == 9
    if strategy.startswith("first"):
        assert rows[0] == 0


@given(st.integers(1, 50), st.floats(0.05, 4), st.integers(0, 9))
def test_rows_are_repeated_evenly(n, repeat, seed):
    rows = chosen_rows(n, Entry("a.json", repeat=repeat), seed)
    count = Counter(rows.tolist())
    assert len(rows) == n * int(repeat) + math.ceil((repeat - int(repeat)) * n - 1e-9)
    assert max(count.values()) <= math.ceil(repeat)
    assert repeat < 1 or (min(count.values()) >= int(repeat) and len(count) == n)


RANDOM = """
datasets:
  - {path: a.json, sampling_strategy: random:5}
  - {path: b.json, sampling_strategy: random:50%, seed: 7}
  - {path: a.json, repeat: 1.3}
"""


def test_every_rank_draws_the_same(folder):
    """Another process, other random numbers used before, another working directory."""
    here = ids(mixture(folder, RANDOM))
    code = (
        "import random, sys; import numpy as np; np.random.seed(3); random.seed(4); random.random()\n"
        "from av_llava.training.store import open_store\n"
        "print([s.id for s in open_store('mix.yaml')])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=folder
    )
    assert out.stdout.strip() == str(here)


def test_drawing_leaves_other_random_numbers_alone(folder):
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    mixture(folder, RANDOM)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_the_seed_changes_what_is_drawn_but_not_where_one_is_named(folder):
    one, two = (mixture(folder, RANDOM, seed=s) for s in (1, 2))
    assert ids(one)[:5] != ids(two)[:5] and ids(one)[5:7] == ids(two)[5:7]
    assert one.digest() != two.digest() == mixture(folder, RANDOM, seed=2).digest()


def test_two_files_do_not_draw_the_same_rows():
    entries = [Entry(p, sampling_strategy="random:10") for p in ("a.json", "b.json")]
    one, two = (chosen_rows(1000, e, 0).tolist() for e in entries)
    assert one != two


def test_roots_weights_and_formats(folder):
    for name in ("v", "s", "pics"):
        (folder / name).mkdir()
    write(folder, "c", 2, video="x.mp4", audio="x.wav", weight=2)
    (folder / "d.json").write_text(json.dumps([{"ask": "Q", "say": "A", "images": ["p.png"]}]))
    store = mixture(
        folder,
        """
root: pics
datasets:
  - {path: c.json, video_root: v, audio_root: s, weight: 0.25}
  - path: d.json
    format: alpaca
    columns: {prompt: ask, response: say}
""",
    )
    assert store[0].paths == (str(folder / "v/x.mp4"), str(folder / "s/x.wav"))
    assert store[2].paths == (str(folder / "pics/p.png"),)
    assert [s.weight for s in store] == [0.5, 0.5, 1.0]


def test_numbers_and_words_are_read_as_in_recipes(folder):
    text = "datasets: [{path: b.json, repeat: 1e1, weight: 5e-1, columns: {on: off}}]"
    store = mixture(folder, text)
    assert len(store) == 40 and store[0].weight == 0.5


def test_mixtures_of_mixtures(folder):
    (folder / "inner.yaml").write_text("datasets: [{path: b.json}]")
    text = "datasets: [{path: inner.yaml, repeat: 2, weight: 0.5}, {path: a.json}]"
    store = mixture(folder, text)
    assert ids(store)[:8] == ["b0", "b1", "b2", "b3"] * 2 and store[0].weight == 0.5
    with pytest.raises(DataError, match="line 1: .*mix.yaml is part of itself"):
        mixture(folder, "datasets: [{path: mix.yaml}]")
    with pytest.raises(DataError, match="says root and format of its files itself"):
        mixture(folder, "{root: ., format: llava, datasets: [{path: inner.yaml}]}")


def test_one_of_a_dataset_info(folder):
    info = {n: {"file_name": f"{n}.json", "formatting": "sharegpt"} for n in "ab"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert len(mixture(folder, "datasets: [{path: dataset_info.json}]")) == 14
    assert len(mixture(folder, "datasets: [{path: dataset_info.json, name: b}]")) == 4
    with pytest.raises(DataError, match="line 1: Unknown data set 'c'"):
        mixture(folder, "datasets: [{path: dataset_info.json, name: c}]")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no mixture: it needs 'datasets'"),
        ("[1]", "is no mixture"),
        ("datasets: 3", "is no mixture"),
        ("datasets: []", "lists no files"),
        ("datasets: [", "is not YAML"),
        ("data: []\ndatasets: [{path: a.json}]", "Unknown key 'data'"),
        ("datasets:\n  - path: a.json\n  - {path: b.json, wieght: 2}", "line 3: .*Did you mean 'weight'"),
        ("datasets:\n  - path: a.json\n    path: b.json", "line 3: the key 'path' stands here twice"),
        ("datasets:\n  - {path: a.json, json_path: a.json}", "line 2: an entry needs 'path'"),
        ("datasets:\n  - {weight: 1}", "line 2: an entry needs 'path'"),
        ("datasets:\n  - a.json", "line 2: an entry has keys"),
        ("datasets:\n  - {path: 3}", "'path' must be a text, not 3"),
        ("datasets:\n  - {path: none.json}", "line 2: The file .*none.json does not exist"),
        ("datasets:\n  - {path: a.json, root: none}", "line 2: The folder .*none .root. does not exist"),
        ("datasets:\n  - {path: a.json, sampling_strategy: half}", "line 2: sampling_strategy must be"),
        ("datasets:\n  - {path: a.json, sampling_strategy: first:1.5}", "line 2: sampling_strategy must"),
        ("datasets:\n  - {path: a.json, sampling_strategy: random:150%}", "line 2: .*100%.*'random:150%'"),
        ("datasets:\n  - {path: a.json, sampling_strategy: first:100.1%}", "line 2: .*100%.*'first:100.1%'"),
        ("datasets:\n  - {path: a.json, sampling_strategy: 3}", "line 2: sampling_strategy must be"),
        ("datasets:\n  - {path: a.json, sampling_strategy: first:0}", "line 2: 'first:0' leaves none of the 10"),
        (f"datasets:\n  - {{path: a.json, weight: 1{'0' * 400}}}", "'weight' must be a number above 0"),
        ("datasets:\n  - {path: a.json, repeat: 0}", "line 2: 'repeat' must be a number above 0"),
        ("datasets:\n  - {path: a.json, repeat: .inf}", "line 2: 'repeat' must be"),
        ("datasets:\n  - {path: a.json, weight: x}", "line 2: 'weight' must be a number"),
        ("datasets:\n  - {path: a.json, seed: -1}", "line 2: 'seed' must be a whole number"),
        ("datasets:\n  - {path: a.json, columns: [x]}", "line 2: 'columns' must map"),
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_read(folder, text, says):
    with pytest.raises(DataError, match=rf"(?s)mix\.yaml.*{says}|{says}"):
        mixture(folder, text)


def test_a_file_of_the_mixture_that_cannot_be_read(folder):
    (folder / "c.json").write_text("[{")
    with pytest.raises(DataError, match=r"mix\.yaml, line 1: .*c\.json ends inside"):
        mixture(folder, "datasets: [{path: c.json}]")
