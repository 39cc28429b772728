"""``ask --batch``: rows, failures, resuming, interruption, the output file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_fake import FakeModel
from hypothesis import given
from hypothesis import strategies as st

from av_llava.answers import SCHEMA
from av_llava.cli.batch import read_rows
from av_llava.cli.options import Request
from av_llava.cli.rows_file import RowsFile
from av_llava.errors import DataError, UsageError

ROOT = Path(__file__).parents[2]


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def read(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def rows(tmp_path: Path, clip: str) -> str:
    return write(
        tmp_path / "rows.jsonl",
        {"id": "a", "media": clip, "prompt": "One?"},
        {"id": "b", "media": [clip], "prompt": "Two?"},
        {"id": 3, "prompt": "Three?"},
    )


def test_rows_are_answered_in_order(cli_run: Callable, model: FakeModel, rows: str, clip) -> None:
    done = cli_run("ask", "--batch", rows)
    assert done.code == 0
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", 3]
    assert lines[1]["answer"] == "word word <Two?>" and lines[1]["schema"] == SCHEMA
    assert lines[1]["asked"]["media"] == [clip]
    assert "3 answered, 0 failed, 0 were there already" in done.err


def test_a_failing_row_does_not_end_the_run(cli_run, model, tmp_path: Path, clip: str) -> None:
    file = write(
        tmp_path / "rows.jsonl",
        {"id": 1, "media": clip, "prompt": "fail:bug"},
        {"id": 2, "media": "missing.mp4", "prompt": "What?"},
        {"id": 3, "media": clip, "prompt": "fail:memory"},
        {"id": 4, "media": clip, "prompt": "Good?"},
    )
    done = cli_run("ask", "--batch", file, "--out", str(tmp_path / "out.jsonl"))
    assert done.code == 7
    assert done.out == ""
    errors = [row.get("error") for row in read(tmp_path / "out.jsonl")]
    assert [e and (e["type"], e["exit_code"]) for e in errors] == [
        ("ValueError", 1),
        ("MediaError", 3),
        ("BudgetError", 5),
        None,
    ]
    assert "missing.mp4" in errors[1]["message"]
    assert "1 answered, 3 failed" in done.err


def test_a_second_run_asks_only_what_is_new(cli_run, model, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    cli_run("ask", "--batch", rows, "--out", str(out))
    before = out.read_bytes()
    with open(rows, "a") as handle:
        handle.write('{"id": "d", "prompt": "Four?"}\n')
    model.calls.clear()
    done = cli_run("ask", "--batch", rows, "--out", str(out))
    assert [c["ask"] for c in model.calls] == ["Four?"]
    assert out.read_bytes().startswith(before)
    assert "1 answered, 0 failed, 3 were there already" in done.err


def test_a_finished_file_loads_no_model(cli_run, model, rows, tmp_path, monkeypatch) -> None:
    out = str(tmp_path / "out.jsonl")
    cli_run("ask", "--batch", rows, "--out", out)
    monkeypatch.setattr("av_llava.cli.engine.load", lambda loading: pytest.fail("loaded"))
    assert cli_run("ask", "--batch", rows, "--out", out).code == 0


def test_failed_rows_are_tried_again_on_request(cli_run, model, tmp_path, clip) -> None:
    video = tmp_path / "later.mp4"
    file = write(tmp_path / "rows.jsonl", {"id": 1, "media": str(video), "prompt": "What?"})
    out = str(tmp_path / "out.jsonl")
    assert cli_run("ask", "--batch", file, "--out", out).code == 7
    video.write_bytes(Path(clip).read_bytes())
    again = cli_run("ask", "--batch", file, "--out", out)
    assert again.code == 7 and "--retry-failed" in again.err and len(read(out)) == 1
    assert cli_run("ask", "--batch", file, "--out", out, "--retry-failed").code == 0
    assert "error" in read(out)[0] and "answer" in read(out)[1]
    assert cli_run("ask", "--batch", file, "--out", out).code == 0  # the last row of an id counts


def test_other_questions_under_the_same_ids_are_refused(cli_run, model, rows, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    cli_run("ask", "--batch", rows, "--out", str(out))
    before = out.read_bytes()
    done = cli_run("ask", "--batch", rows, "--out", str(out), "--temperature", "1")
    assert done.code == 7 and "temperature" in done.err
    write(Path(rows), {"id": "a", "prompt": "Something else?"})
    done = cli_run("ask", "--batch", rows, "--out", str(out))
    assert done.code == 7 and "Something else?" in done.err
    assert out.read_bytes() == before


def test_rows_can_set_their_own_options(cli_run, model: FakeModel, tmp_path, clip) -> None:
    file = write(
        tmp_path / "rows.jsonl",
        {"media": clip, "start": "0:01", "frames": 3, "audio": "off", "system": "Be brief."},
        {"media": clip, "prompt": "Own?", "end": 1.5},
    )
    cli_run("ask", "--batch", file, "-p", "Which?", "--frames", "8")
    assert [c["ask"] for c in model.calls] == ["Which?", "Own?"]
    assert model.calls[0]["options"] == {
        "start_s": 1.0,
        "frames": 3,
        "audio": "off",
        "system": "Be brief.",
    }
    assert model.calls[1]["options"] == {"end_s": 1.5, "frames": 8}


def test_rows_together(cli_run, model: FakeModel, tmp_path: Path, clip: str, mute_clip) -> None:
    media = [clip, clip, clip, mute_clip, clip]
    file = write(
        tmp_path / "rows.jsonl",
        *({"id": i, "media": m, "prompt": f"{i}?"} for i, m in enumerate(media)),
        {"id": 5, "media": clip, "prompt": "5?", "frames": 2},
    )
    done = cli_run("ask", "--batch", file, "--batch-size", "2")
    assert done.code == 0
    kinds = [next(iter(c)) for c in model.calls]
    assert kinds == ["ask_many", "ask_batch", "ask", "ask"]
    assert [json.loads(line)["answer"] for line in done.out.splitlines()] == [
        f"word word <{i}?>" for i in range(6)
    ]


def test_one_bad_row_does_not_spoil_those_beside_it(cli_run, model, tmp_path, clip) -> None:
    prompts = ["a", "fail:bug", "c"]
    file = write(tmp_path / "r.jsonl", *({"media": clip, "prompt": p} for p in prompts))
    done = cli_run("ask", "--batch", file, "--batch-size", "3")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert ["error" in line for line in lines] == [False, True, False] and done.code == 7


def test_interruption_keeps_what_is_written(cli_run, model, tmp_path: Path, clip: str) -> None:
    prompts = ["a", "b", "fail:interrupt", "d"]
    file = write(tmp_path / "r.jsonl", *({"media": clip, "prompt": p} for p in prompts))
    out = str(tmp_path / "out.jsonl")
    done = cli_run("ask", "--batch", file, "--out", out)
    assert done.code == 130 and "interrupted" in done.err and "goes on" in done.err
    assert [row["id"] for row in read(out)] == [1, 2]


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_in_the_middle_keeps_what_is_written(tmp_path, clip, signal_number) -> None:
    prompts = ["a", "b", "wait", "d"]
    file = write(tmp_path / "r.jsonl", *({"media": clip, "prompt": p} for p in prompts))
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    words = [sys.executable, str(Path(__file__).with_name("cli_fake.py"))]
    process = subprocess.Popen(
        [*words, "ask", "--batch", file, "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FAKE_LOG": str(log)},
    )
    wait_until(lambda: log.exists() and '"wait"' in log.read_text())
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == (130 if signal_number == signal.SIGINT else -9)
    assert "Traceback" not in err
    assert [row["id"] for row in read(out)] == [1, 2]


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "JSON object, not a list"),
        ('{"prompt": "x", "medai": "y"}', "Did you mean 'media'"),
        ('{"media": 3, "prompt": "x"}', "'media'"),
        ('{"media": [""], "prompt": "x"}', "'media'"),
        ('{"media": "x.mp4"}', "'prompt'"),
        ('{"prompt": " "}', "'prompt'"),
        ('{"id": 1.5, "prompt": "x"}', "id"),
        ('{"id": true, "prompt": "x"}', "id"),
        ('{"id": "first", "prompt": "x"}', "line 1's too"),
        ('{"media": "x.mp4", "prompt": "x", "start": "1:99"}', "1:99"),
        ('{"media": "x.mp4", "prompt": "x", "frames": "4"}', "frames"),
        ('{"media": "x.mp4", "prompt": "x", "frames": 0}', "frames"),
        ('{"prompt": "x", "frames": 4}', "--frames needs"),
    ],
)
def test_wrong_rows_are_told_before_any_work(cli_run, model, tmp_path, line, message) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text('{"id": "first", "prompt": "x"}\n' + line + "\n")
    out = tmp_path / "out.jsonl"
    done = cli_run("ask", "--batch", str(file), "--out", str(out))
    assert done.code == 7 and message in done.err and "line 2" in done.err
    assert not out.exists() and not model.calls


def test_files_that_are_no_rows(cli_run, model, tmp_path: Path, clip: str) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    assert cli_run("ask", "--batch", str(empty)).code == 7
    assert cli_run("ask", "--batch", clip).code == 7
    assert cli_run("ask", "--batch", str(tmp_path / "none.jsonl")).code == 2
    assert cli_run("ask", "--batch", str(tmp_path)).code == 2


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text('\ufeff{"prompt": "a\u2028b\x85c"}\r\n', encoding="utf-8", newline="")
    assert read_rows(file, Request())[0].prompt == "a\u2028b\x85c"


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "{tmp}/no/such/folder/out.jsonl"],
        ["--out", "{tmp}"],
        ["--out", "{rows}"],
        ["--retry-failed"],
        ["--prompt", "-"],
        ["--show-plan"],
        ["word"],
    ],
)
def test_flags_that_do_not_go_together(cli_run, model, rows, tmp_path, words) -> None:
    before = Path(rows).read_bytes()
    words = [w.format(tmp=tmp_path, rows=rows) for w in words]
    assert cli_run("ask", "--batch", rows, *words).code == 2
    assert not model.calls and Path(rows).read_bytes() == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root can write everywhere")
def test_an_unwritable_file_is_told_before_any_work(cli_run, model, rows, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    out.touch(mode=0o400)
    assert cli_run("ask", "--batch", rows, "--out", str(out)).code == 2 and not model.calls


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch) -> None:
    out = RowsFile(tmp_path / "out.jsonl")
    out.append({"schema": SCHEMA, "id": 1})
    full = os.open("/dev/full", os.O_WRONLY)
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(full, data))
    with pytest.raises(UsageError, match="No space"):
        out.append({"schema": SCHEMA, "id": 2})
    monkeypatch.undo()
    assert [r["id"] for r in read(tmp_path / "out.jsonl")] == [1]


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with RowsFile(tmp_path / "out.jsonl"), pytest.raises(UsageError, match="another run"):
        RowsFile(tmp_path / "out.jsonl")
    RowsFile(tmp_path / "out.jsonl")


@given(st.lists(st.text(max_size=8), min_size=1, max_size=5, unique=True), st.data())
def test_a_torn_file_loses_only_its_last_row(tmp_path_factory, texts, data) -> None:
    path = tmp_path_factory.mktemp("torn") / "out.jsonl"
    with RowsFile(path) as out:
        for text in texts:
            out.append({"schema": SCHEMA, "id": text, "answer": text + "\u2028\ud800"})
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    with RowsFile(path) as out:
        # a last row that lacks only its newline is whole
        lacks_newline = cut < len(whole) and whole[cut : cut + 1] == b"\n"
        assert list(out.rows) == [json.dumps(t) for t in texts[: kept + lacks_newline]]
        for text in texts[kept + lacks_newline :]:
            out.append({"schema": SCHEMA, "id": text, "answer": text + "\u2028\ud800"})
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b"hello", b"hello\n", b'{"a": 1}\n', b"[1]\n", b"\xff\xfe\n", b"{", b'{"id": 1}']
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    if content == b"{":  # could be the first byte of a row of ours
        RowsFile(path)
        return
    with pytest.raises(DataError, match="Nothing was changed"):
        RowsFile(path)
    assert path.read_bytes() == content
