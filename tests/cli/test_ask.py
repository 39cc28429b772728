"""``ask`` with the fake model: streams, JSON, errors, exit codes."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_fake import FakeModel

from av_llava.answers import SCHEMA


def test_stdout_is_the_answer_and_stderr_one_line(
    cli_run: Callable, model: FakeModel, clip
) -> None:
    done = cli_run("ask", clip, "What?")
    assert done.code == 0
    assert done.out == "word word <What?>\n"
    assert done.err.count("\n") == 1 and "video 2/20 frames" in done.err


def test_quiet_leaves_stderr_empty(cli_run: Callable, model: FakeModel, clip: str) -> None:
    assert cli_run("ask", clip, "What?", "-q").err == ""


def test_a_random_model_says_so_even_when_quiet(cli_run, model: FakeModel, clip: str) -> None:
    model.is_random = True
    assert "random" in cli_run("ask", clip, "What?", "--quiet").err
    assert cli_run("ask", clip, "What?", "--json").json["model_is_random"] is True


def test_warnings_about_media_are_told(cli_run: Callable, model: FakeModel, clip: str) -> None:
    assert "warning: the file is odd" in cli_run("ask", clip, "odd?").err


def test_flags_reach_the_library(cli_run: Callable, model: FakeModel, clip: str) -> None:
    words = "--frames 4 --fps 2 --source-fps 3 --start 0:01 --end 1.5 --audio off --aggregator budget:99"
    words += " --max-tokens 7 --temperature 0.5 --top-p 0.9 --seed 3 --system Be. --backend pyav"
    cli_run("ask", clip, "What?", *words.split(), "--time-instruction")
    assert model.calls[0]["options"] == {
        "frames": 4,
        "fps": 2.0,
        "source_fps": 3.0,
        "start_s": 1.0,
        "end_s": 1.5,
        "audio": "off",
        "aggregator": "budget:99",
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "system": "Be.",
        "backend": "pyav",
        "time_instruction": True,
    }


def test_json_is_one_object_with_a_schema(cli_run: Callable, model: FakeModel, clip: str) -> None:
    done = cli_run("ask", clip, "What?", "--json")
    assert done.out.count("\n") == 1
    assert done.json["schema"] == SCHEMA and done.json["answer"] == "word word <What?>"
    assert done.json["media"][0]["source"] == clip


def test_a_terminal_gets_the_pieces_as_they_come(
    cli_run, model: FakeModel, clip, monkeypatch
) -> None:
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    written: list[str] = []

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Screen())
    assert cli_run("ask", clip, "What?").code == 0
    assert written == ["word ", "word ", "<What?> ", "\n"]
    assert "stream" in model.calls[0]


def test_a_terminal_is_not_steered_by_the_answer(cli_run, model, clip, monkeypatch) -> None:
    piped = cli_run("ask", clip, "escape")
    assert "\x1b" in piped.out  # a pipe gets what the model said
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", screen)
    cli_run("ask", clip, "escape")
    assert "\x1b" not in screen.getvalue() and "evil" in screen.getvalue()


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["{clip}", "fail:budget"], 5, "BudgetError"),
        (["{clip}", "fail:memory"], 5, "BudgetError"),
        (["{clip}", "fail:bug"], 1, "ValueError"),
        (["{clip}", "fail:interrupt"], 130, "Interrupted"),
        (["no-such.mp4", "What?"], 3, "MediaError"),
        (["{clip}"], 2, "UsageError"),
        (["{clip}", "What?", "--frames", "0"], 2, "UsageError"),
        (["{clip}", "What?", "--start", "1:99"], 2, "UsageError"),
        (["{clip}", "What?", "--no-such-flag"], 2, "UsageError"),
        (["{clip}", "What?", "--device", "tpu"], 2, "UsageError"),
        (["{clip}", "What?", "--model", "./no/such/folder"], 4, "CheckpointError"),
        (["{clip}", "What?", "--out", "x.jsonl"], 2, "UsageError"),
        (["What?", "--frames", "3"], 2, "UsageError"),
    ],
)
def test_errors_have_a_code_and_a_json_object(cli_run, model, clip, words, code, kind) -> None:
    words = [w.format(clip=clip) for w in words]
    plain = cli_run("ask", *words)
    assert plain.code == code
    assert plain.out == "" and "rror" in plain.err and "Traceback" not in plain.err
    as_json = cli_run("ask", *words, "--json")
    assert as_json.code == code
    assert as_json.json["schema"] == SCHEMA
    assert as_json.json["error"]["type"] == kind
    assert as_json.json["error"]["exit_code"] == code
    assert as_json.json["error"]["message"] in as_json.err or kind == "UsageError"


def test_unforeseen_errors_are_one_line_unless_debugging(cli_run, model, clip, monkeypatch) -> None:
    done = cli_run("ask", clip, "fail:bug")
    assert done.err.count("\n") == 1
    assert "something odd" in done.err and "AV_LLAVA_DEBUG=1" in done.err
    monkeypatch.setenv("AV_LLAVA_DEBUG", "1")
    done = cli_run("ask", clip, "fail:bug")
    assert "Traceback" in done.err and "second line" in done.err and done.code == 1


def test_exhausted_memory_names_what_would_fit(cli_run, model, clip) -> None:
    # the clip has 20 frames, fewer than the 32 that the model would take
    assert "--frames 10." in cli_run("ask", clip, "fail:memory").err
    assert "--frames 4." in cli_run("ask", clip, "fail:memory", "--frames", "8").err
    done = cli_run("ask", clip, "fail:memory", "--max-visual-tokens", "100")
    assert "--max-visual-tokens 50." in done.err


def test_the_model_comes_from_the_environment(cli_run, model, clip, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("AV_LLAVA_MODEL", str(tmp_path))
    done = cli_run("ask", clip, "What?")
    assert done.code == 4 and "config.json" in done.err
    (tmp_path / "config.json").write_text("{}")
    assert cli_run("ask", clip, "What?").code == 0


def test_a_file_is_no_model(cli_run, model, clip) -> None:
    assert cli_run("ask", clip, "What?", "-m", clip).code == 4


def test_stdin_holds_the_prompt(cli_run, model, clip) -> None:
    assert cli_run("ask", clip, stdin="What?\n").out == "word word <What?>\n"
    assert cli_run("ask", stdin="Hello\n").out == "word word <Hello>\n"


def test_version_and_help(cli_run) -> None:
    assert cli_run("--version").out.startswith("av-llava 0.")
    for words in (["--help"], ["ask", "-h"], ["chat", "-h"], ["info", "-h"], ["doctor", "-h"]):
        done = cli_run(*words)
        assert done.code == 0 and done.out.startswith("Usage: av-llava")


def test_paths_with_control_characters_cannot_steer(cli_run, model, tmp_path: Path) -> None:
    done = cli_run("ask", str(tmp_path / "\x1b[2J.mp4"), "What?")
    assert done.code == 3 and "\x1b" not in done.err
