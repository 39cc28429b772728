"""Where rows begin and end, against json's own parser, at every size of block."""

from __future__ import annotations

import contextlib
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import DataError
from av_llava.training import offsets
from av_llava.training.offsets import scan

TEXT = st.text(st.sampled_from('ab"\\[]{},:\n\té€\u2028 '), max_size=8)
VALUES = st.recursive(
    TEXT | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), min_size=1, max_size=6)
SPACE = st.sampled_from(["", " ", "\n", "\r\n", "\t\n\n"])


def rows_of(path, block_bytes, monkeypatch):
    monkeypatch.setattr(offsets, "BLOCK_BYTES", block_bytes)
    table = scan(path)
    data = path.read_bytes()
    rows = [data[a:b] for a, b in zip(table.starts, table.ends, strict=True)]
    lines = [data[:a].count(b"\n") + 1 for a in table.starts]
    assert [table.line(i) for i in range(len(table))] == lines
    assert table.sha256 == hashlib.sha256(data).hexdigest()
    return table, rows


@given(ROWS, st.data(), st.integers(1, 40))
def test_arrays(tmp_path_factory, rows, data, block_bytes):
    indent = data.draw(st.sampled_from([None, 2]))
    written = [json.dumps(r, ensure_ascii=data.draw(st.booleans()), indent=indent) for r in rows]
    text = data.draw(st.sampled_from(["", "\ufeff"])) + data.draw(SPACE) + "["
    text += data.draw(SPACE)
    for i, row in enumerate(written):
        text += ("," if i else "") + data.draw(SPACE) + row + data.draw(SPACE)
    text += "]" + data.draw(SPACE)
    path = tmp_path_factory.mktemp("array") / "rows.json"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        table, found = rows_of(path, block_bytes, patch)
    assert table.is_array and [json.loads(r) for r in found] == rows


@given(ROWS, st.data(), st.integers(1, 40))
def test_lines(tmp_path_factory, rows, data, block_bytes):
    text = data.draw(st.sampled_from(["", "\ufeff"]))
    for i, row in enumerate(rows):
        text += "\n" if i else ""
        text += data.draw(st.sampled_from(["", "", "\n", "  \n", "\r\n", "\n\n"]))
        text += data.draw(st.sampled_from(["", " "])) + json.dumps(row)
    text += data.draw(st.sampled_from(["", "\n", "\n\n", "\n  "]))
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        table, found = rows_of(path, block_bytes, patch)
    assert not table.is_array and [json.loads(r) for r in found] == rows


@given(st.binary(min_size=1, max_size=40), st.integers(1, 9))
def test_any_bytes_give_rows_or_an_error(tmp_path_factory, data, block_bytes):
    path = tmp_path_factory.mktemp("bytes") / "rows.json"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(DataError):
        _, rows = rows_of(path, block_bytes, patch)
        assert rows and all(row.strip() for row in rows)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b"[]", "holds no rows"),
        (b'[{"a": 1}, {"b": "\n', "ends inside its JSON array.*begins is in line 1"),
        (b'[\n{"a": 1},\n{"b": [1, 2}\n', "ends inside.*line 3"),
        (b'[{"a": 1}] {"b": 2}', "follows the JSON array"),
        (b'[{"a": 1}, 3]', "', 3' stands where a row is expected"),
        (b"[1, 2, 3]", "'1, 2, 3' stands where a row is expected"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        (b"\0\0", "is not UTF-8"),
        (b'{\n  "data": []\n}', "one JSON object over several lines"),
        (b'\n{"data": [\r\n\t{"a": 1}\n]}', "one JSON object over several lines"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, data, says):
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"(?s)rows.json.*{says}|{says}"):
        scan(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="none.json cannot be read"):
        scan(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot be read"):
        scan(tmp_path)
