"""How training data are made up: counts, lengths, the picture."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import DataError, MissingExtraError, UsageError
from av_llava.training.index import LengthIndex
from av_llava.training.statistics import Histogram, plot, statistics
from av_llava.training.store import open_store


def row(n_words=2, answers=1, **more):
    turn = [{"from": "human", "value": "word " * (n_words - 1)}, {"from": "gpt", "value": "yes"}]
    return {"conversations": turn * answers, **more}


@pytest.fixture
def store(tmp_path):
    rows = [
        row(),
        row(5, image=["a.png", "b.png"]),
        row(3, 2, video="v.mp4", data_source="academic"),
        row(4, video="v.mp4", audio="s.wav"),
        {"text": "x"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    return open_store(tmp_path / "a.json")


def test_what_is_counted(store, tmp_path):
    calls = []
    found = statistics(store, progress=lambda *x: calls.append(x))
    name = str(tmp_path / "a.json")
    assert (found.n_rows, found.n_bad, found.unit) == (5, 1, "words")
    assert found.modalities == {"text": 1, "image": 1, "video": 1, "video+audio": 1}
    assert found.sources == {name: 3, f"{name} (academic)": 1}
    assert found.turns == {1: 3, 2: 1} and found.media == {"image": 2, "video": 2}
    assert found.lengths.tolist() == [2, 5, 6, 4]
    assert found.summary()["sum"] == 17 and calls[-1] == (5, 5)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["answers_a_row"] == {"1": 3, "2": 1} and data["supervised_tokens"] is None


def test_with_an_index_tokens_are_counted(store):
    index = LengthIndex(
        np.array([10, 20, 0, 40, 0], np.int32),
        np.array([1, 2, 0, 4, 0], np.int32),
        np.array([0, 1, 2, 6, 0], np.uint8),
        {2: "gone", 4: "broken"},
    )
    found = statistics(store, index)
    assert (found.unit, found.n_bad, found.n_supervised) == ("tokens", 2, 7)
    assert found.lengths.tolist() == [10, 20, 40]
    assert found.modalities == {"text": 1, "image": 1, "video+audio": 1}
    with pytest.raises(DataError, match="index holds 2 rows, but the data 5"):
        statistics(store, LengthIndex(*(np.zeros(2, np.int32) for _ in range(3))))


@given(st.lists(st.integers(0, 200_000), max_size=50))
def test_every_row_is_in_one_bin(values):
    values = np.array(values, np.int64)
    found = Histogram.of(values)
    widths = set(np.diff(found.edges).tolist())
    assert found.counts.sum() == len(values) and found.edges[0] == 0 and len(widths) == 1
    assert str(widths.pop()).rstrip("0") in ("1", "2", "5")
    assert len(found.counts) <= 25
    for low, high, n in zip(found.edges, found.edges[1:], found.counts, strict=False):
        last = high == found.edges[-1]
        assert n == ((values >= low) & ((values < high) | (last & (values == high)))).sum()
    assert len(found.lines()) == len(found.counts)


def test_bars_are_as_long_as_their_counts():
    lines = Histogram.of(np.array([0, 0, 0, 0, 1, 3])).lines()
    assert [line.count("█") for line in lines[:4]] == [40, 10, 0, 10]


@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".html", b"<!doctype html>")],
)
def test_a_plot(store, tmp_path, suffix, start):
    plot(statistics(store), tmp_path / f"out{suffix}")
    data = (tmp_path / f"out{suffix}").read_bytes()
    assert data.startswith(start) and len(data) > 5000
    if suffix == ".html":
        assert b"data:image/png;base64,iVBOR" in data and b"<td>rows with video+audio</td>" in data


def test_plots_that_cannot_be_made(store, tmp_path, monkeypatch):
    found = statistics(store)
    with pytest.raises(UsageError, match="not 'out.txt'"):
        plot(found, tmp_path / "out.txt")
    with pytest.raises(DataError, match="cannot be written"):
        plot(found, tmp_path / "none" / "out.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "av-llava\[eval\]"'):
        plot(found, tmp_path / "out.png")


def test_a_plot_of_nothing(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": 1}]')
    plot(statistics(open_store(tmp_path / "a.json")), tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000
