"""Annotation files: the same rows from every format, and errors that name file and line."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from av_llava.errors import DataError, MissingExtraError
from av_llava_eval.annotations import AUDIO_ENDINGS, find_file, find_medium, read_rows

ROWS = [{"id": "1", "question": "Is it “red”?"}, {"id": "2", "question": "one, two"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8-sig")
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [
            mark.join(f'"{v}"' for v in line) for line in (rows[0], *(r.values() for r in rows))
        ]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / f"a.{ending}", ROWS)) == ROWS


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_null_and_empty_cells_are_missing_fields(ending: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": "1", "answer": "A"}, {"id": "2", "answer": None}]
    if ending == "csv":
        rows[1]["answer"] = ""
    assert read_rows(write(tmp_path / f"a.{ending}", rows)) == [rows[0], {"id": "2"}]


def test_pictures_inside_a_table_are_not_read(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "image": {"bytes": b"xx", "path": "a.jpg"}, "sounds": [b"x"], "tags": ["a"]}
    ]
    assert read_rows(write(tmp_path / "a.parquet", rows)) == [{"id": "1", "tags": ["a"]}]


def test_a_list_inside_an_object(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"data": [{"id": 1}], "other": 2}')
    assert read_rows(file, "data") == [{"id": 1}]
    with pytest.raises(DataError, match="has no 'rows'; it has 'data', 'other'"):
        read_rows(file, "rows")
    with pytest.raises(DataError, match="holds a dict where a list"):
        read_rows(file)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "[1, 2", r"a.json is not JSON \(.*line 1"),
        ("a.json", "[3]", r"a.json\[0\]: a row is an object, not a int"),
        ("a.jsonl", '{"a": 1}\n\n{"a":', "a.jsonl, line 3: not JSON"),
        ("a.parquet", "PAR1", "a.parquet is not a parquet file"),
        ("a.txt", "x", "read from .json, .jsonl, .csv, .tsv, .parquet, not '.txt'"),
        ("a.csv", '"a\x00', "a.csv"),
    ],
)
def test_files_that_cannot_be_read(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    if name == "a.csv":
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=said):
        read_rows(tmp_path / name)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.parquet", ROWS)
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r'pip install "av-llava\[eval\]"'):
        read_rows(file)


def test_the_first_pattern_wins_and_missing_files_name_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("test-2.parquet", "test-1.parquet", "b/x.json"):
        (tmp_path / name).write_text("")
    assert find_file(tmp_path, "b/*.json", "test-*.parquet").name == "x.json"
    assert find_file(tmp_path, "c/*.json", "test-*.parquet").name == "test-1.parquet"
    with pytest.raises(
        DataError, match=r"holds no annotation file: looked for qa.json, q/\*\.json"
    ):
        find_file(tmp_path, "qa.json", "q/*.json")
    with pytest.raises(DataError, match="There is no folder .*Give the benchmark's folder"):
        find_file(tmp_path / "nowhere", "qa.json")


def test_media_are_found_by_folder_and_ending(tmp_path: Path) -> None:
    for name in ("videos/a.mkv", "other/b.mp4", "sound/c.flac"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    folders = ("videos", "other")
    assert find_medium(tmp_path, folders, "a") == tmp_path / "videos" / "a.mkv"
    assert find_medium(tmp_path, folders, "b.mp4") == tmp_path / "other" / "b.mp4"
    assert find_medium(tmp_path, ("",), "other/b") == tmp_path / "other" / "b.mp4"
    assert find_medium(tmp_path, ("sound",), "c", AUDIO_ENDINGS).suffix == ".flac"
    # What is missing is where it is expected first, so that the failure names it.
    assert find_medium(tmp_path, folders, "d") == tmp_path / "videos" / "d.mp4"
    assert find_medium(tmp_path, folders, "d.avi") == tmp_path / "videos" / "d.avi"
    assert find_medium(tmp_path, folders, "d.5") == tmp_path / "videos" / "d.5.mp4"
