"""``av-llava data``: what it prints, its exit codes, its files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip
from conftest import ROOT, program
from PIL import Image

from av_llava.cli import data as command

COMMANDS = ("validate", "stats", "convert", "index")


def row(question: str = "What?", answer: str = "A ball.", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    make_clip(folder / "film.mp4", seconds=2, size=(64, 48))
    (folder / "text.mp4").write_text("no film\n" * 50)
    return folder


@pytest.fixture
def folder(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(media, tmp_path, dirs_exist_ok=True)
    good = [row(), row(video="film.mp4"), row(video="film.mp4", use_audio=False)]
    (tmp_path / "good.json").write_text(json.dumps(good))
    bad = [
        good[0],
        "{",
        row("<image>"),
        row(video="none.mp4"),
        row(vdeo=1),
        row("<video>?", video="text.mp4"),
    ]
    lines = [r if isinstance(r, str) else json.dumps(r) for r in bad]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------ validate


def test_good_data_are_good(cli_run: Callable, folder: Path) -> None:
    done = cli_run("data", "validate", "good.json", "--decode")
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "3 rows, 0 that cannot be used",
        "2 media named, 2 decoded on trial",
    ]


def test_what_is_wrong_is_said_with_its_line(cli_run: Callable, folder: Path) -> None:
    done = cli_run("data", "validate", "bad.jsonl")
    assert done.code == 7
    assert done.out.startswith("6 rows, 3 that cannot be used\n")
    for line in (
        "problem: malformed row, 1 (a row that is no JSON, or of no known format)",
        "  bad.jsonl, line 2: not JSON: Expecting property name enclosed in double quotes",
        "  bad.jsonl, line 3: The text holds 1 × <image> but no such medium was given.",
        "  bad.jsonl, line 4: there is no file none.mp4",
        "warning: unknown key, 1 (a key that no reader uses; it is kept in meta)",
        "  bad.jsonl, line 5: 'vdeo' is not used",
    ):
        assert line in done.out, done.out
    deeper = cli_run("data", "validate", "bad.jsonl", "--decode", "--json")
    assert deeper.code == 7 and deeper.json["problems"]["unreadable media"] == 1
    assert deeper.json["bad_rows"] == 4 and deeper.err == ""


def test_only_the_first_are_shown(cli_run: Callable, folder: Path) -> None:
    (folder / "many.jsonl").write_text("{\n" * 5)
    done = cli_run("data", "validate", "many.jsonl", "--first", "2")
    assert done.out.count("many.jsonl, line") == 2 and "… and 3 more" in done.out


def test_warnings_alone_are_no_failure_unless_strict(cli_run: Callable, folder: Path) -> None:
    (folder / "odd.jsonl").write_text(json.dumps(row(vdeo=1)))
    assert cli_run("data", "validate", "odd.jsonl").code == 0
    assert cli_run("data", "validate", "odd.jsonl", "--strict").code == 7


# ------------------------------------------------------------------ stats


def test_words_are_counted_without_a_model(cli_run: Callable, folder: Path) -> None:
    done = cli_run("data", "stats", "good.json")
    assert done.code == 0
    for text in (
        "3 rows, 0 that",
        "\n  video  2\n",
        "answers in a row\n  1  3\n",
        "words of a row",
    ):
        assert text in done.out
    assert "█" in done.out


def test_tokens_are_counted_with_one(cli_run: Callable, folder: Path, tiny_folder: str) -> None:
    words = ("data", "stats", "good.json", "-m", tiny_folder, "--plot", "lengths.png", "--json")
    done = cli_run(*words, "--index", "lengths.index")
    assert done.code == 0, done.err
    assert done.json["unit"] == "tokens" and done.json["supervised_tokens"] > 0
    assert done.json["modalities"] == {"text": 1, "video+audio": 1, "video": 1}
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")
    fewer = cli_run(*words[:5], "--frames", "2", "--json")
    assert fewer.json["lengths"]["sum"] < done.json["lengths"]["sum"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from av_llava.inspection import light_processor

    folder = tmp_path_factory.mktemp("model")
    light_processor(None).save_pretrained(folder)
    return str(folder)


def test_a_plot_needs_matplotlib(
    cli_run: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli_run("data", "stats", "good.json", "--plot", "x.png")
    assert done.code == 6 and 'pip install "av-llava[eval]"' in done.err and done.out == ""


# ------------------------------------------------------------------ convert


def test_converting_there_and_back(cli_run: Callable, folder: Path) -> None:
    done = cli_run("data", "convert", "good.json", "out/normal.jsonl")
    assert done.code == 0 and done.out == "out/normal.jsonl: 3 rows, 0 left out\n"
    first = json.loads((folder / "out/normal.jsonl").read_text().splitlines()[1])
    assert first["messages"][0]["content"][0] == {"type": "video", "path": "../film.mp4"}
    assert cli_run("data", "convert", "out/normal.jsonl", "back.json", "--to", "llava").code == 0
    back = json.loads((folder / "back.json").read_text())
    assert [r.get("video") for r in back] == [None, "film.mp4", "film.mp4"]
    assert back[2]["use_audio"] is False
    assert cli_run("data", "validate", "back.json").code == 0


def test_bad_rows_end_it_or_are_left_out(cli_run: Callable, folder: Path) -> None:
    done = cli_run("data", "convert", "bad.jsonl", "out.jsonl")
    assert done.code == 7 and "bad.jsonl, line 2: not JSON" in done.err
    assert not (folder / "out.jsonl").exists()
    done = cli_run("data", "convert", "bad.jsonl", "out.jsonl", "--skip-bad", "--json")
    assert done.code == 0 and (done.json["written"], done.json["skipped"]) == (4, 2)
    assert done.err.count("warning: left out: bad.jsonl, line") == 2
    again = cli_run("data", "convert", "bad.jsonl", "out.jsonl", "--skip-bad")
    assert again.code == 2 and "--overwrite" in again.err


# ------------------------------------------------------------------ index


def test_an_index_is_written_and_used_again(cli_run: Callable, folder: Path) -> None:
    done = cli_run("data", "index", "good.json")
    assert done.code == 0, done.err
    assert done.out.startswith("good.json.index: 3 rows, 0 that cannot be used\n")
    before = (folder / "good.json.index").read_bytes()
    again = cli_run("data", "index", "good.json", "--json")
    assert again.json["rows"] == 3 and again.json["tokens"] > again.json["supervised_tokens"] > 0
    assert (folder / "good.json.index").read_bytes() == before
    bad = cli_run("data", "index", "bad.jsonl", "--out", "x.index", "--json")
    assert bad.code == 7 and [e["row"] for e in bad.json["errors"]] == [1, 2, 3, 5]


def test_a_folder_of_frames_is_measured_at_its_rate(cli_run: Callable, folder: Path) -> None:
    frames = folder / "frames"
    frames.mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (30 * i, 0, 0)).save(frames / f"{i:03}.png")
    (folder / "frames.json").write_text(json.dumps([row(video="frames")]))

    def tokens(*words: str) -> int:
        given = ("frames.json", "--out", f"{''.join(words)}.index", "--fps", "1", *words)
        return cli_run("data", "index", *given, "--json").json["tokens"]

    assert tokens("--source-fps", "1") == tokens() > tokens("--source-fps", "4")
    wrong = cli_run("data", "index", "frames.json", "--source-fps", "0")
    assert wrong.code == 2 and "source_fps" in wrong.err


# ------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_words(cli_run: Callable, folder: Path, name: str) -> None:
    to = ["out.jsonl"] if name == "convert" else []
    assert cli_run("data", name).code == 2
    for words, code, says in (
        (["none.json"], 7, "none.json do not exist"),
        (["film.mp4"], 2, "no kind of file"),
        (["good.json", "--format", "lava"], 2, "Did you mean 'llava'"),
        (["good.json", "--media-root", "none"], 7, "folder of media none does not exist"),
        (["good.json", "--seed", "-1"], 2, "seed"),
    ):
        done = cli_run("data", name, *words[:1], *to, *words[1:])
        assert done.code == code and says in done.err, done.err
        assert "Traceback" not in done.err and done.out == ""


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["convert", "good.json"], 2, "file to write"),
        (["convert", "good.json", "out.txt"], 2, "must end in .jsonl"),
        (["convert", "good.json", "out.json", "--to", "x"], 2, "Unknown format to write"),
        (["stats", "good.json", "--plot", "x.bmp"], 2, "--plot must end in"),
        (["stats", "good.json", "--frames", "3"], 2, "--frames counts only with --model"),
        (["stats", "good.json", "--source-fps", "3"], 2, "--source-fps counts only with --model"),
        (["stats", "good.json", "--index", "x"], 2, "--index counts only with --model"),
        (["index", "good.json", "-m", "none/of/this"], 4, "no folder 'none/of/this'"),
        (["index", "good.json", "--out", "film.mp4"], 2, "is no index of av_llava"),
        (["validate", "good.json", "--workers", "0"], 2, "workers"),
    ],
)
def test_words_that_do_not_go_together(
    cli_run: Callable, folder: Path, words: list[str], code: int, says: str
) -> None:
    done = cli_run("data", *words)
    assert done.code == code and says in done.err, done.err


def test_errors_are_json_when_asked(cli_run: Callable, folder: Path) -> None:
    done = cli_run("data", "validate", "none.json", "--json")
    assert done.json["error"]["type"] == "DataError"


def test_help_and_looking_need_no_torch(folder: Path) -> None:
    code = (
        "import sys; from av_llava.cli import main\n"
        "assert main.run(['data', 'validate', 'good.json']) == 0\n"
        "assert main.run(['data', 'stats', 'good.json']) == 0\n"
        "assert main.run(['data', 'convert', 'good.json', 'o.json']) == 0\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


def test_progress_is_for_people(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for watched in (True, False):
        output = command.Output()
        monkeypatch.setattr(type(output), "shows_progress", watched)
        with command._progress(output, 4, "row") as progress:
            progress(2, 4)
            progress(4, 4)
        assert ("/4 " in capsys.readouterr().err) == watched


def test_ctrl_c(folder: Path) -> None:
    (folder / "long.jsonl").write_text((json.dumps(row()) + "\n") * 400_000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [sys.executable, "-m", "av_llava.cli", "data", "convert", "long.jsonl", "out.jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    while not list(folder.glob(".out.jsonl.*")):
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err
    assert not list(folder.glob("*out.jsonl*"))


def test_the_program_says_its_commands() -> None:
    done = program("data", "--help")
    assert done.code == 0 and all(f"\n  {name} " in done.out for name in (*COMMANDS, "synth"))
