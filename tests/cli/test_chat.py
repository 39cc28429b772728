"""``chat``: turns and commands, through a pipe and at a real terminal."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_fake import FakeModel

from av_llava.demo_model import tiny_random

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(Path(__file__).with_name("cli_fake.py"))]
CTRL_C, CTRL_D = "\x03", "\x04"


def lines(*words: str) -> str:
    return "".join(word + "\n" for word in words)


def test_turns_build_on_each_other(cli_run: Callable, model: FakeModel, clip: str) -> None:
    done = cli_run("chat", clip, stdin=lines("One?", "", "Two?"))
    assert done.code == 0
    assert done.out == "word word <One?> \nword word <Two?> \n"
    streams = [c for c in model.calls if "stream" in c]
    assert streams[1]["history"] == [("One?", "word word <One?>")]
    assert sum("session" in c for c in model.calls) == 1  # encoded once


def test_media_change_on_the_way(cli_run, model: FakeModel, clip: str, mute_clip: str) -> None:
    script = lines(
        "No media?", f"/add {clip}", "One?", f"/add {mute_clip}", "Two?", "/drop 1", "Three?",
        "/clear", "Four?", "/exit", "never",
    )  # fmt: skip
    done = cli_run("chat", "--frames", "4", stdin=script)
    assert done.code == 0
    streams = [c for c in model.calls if "stream" in c]
    assert [s["media"] for s in streams] == [
        [],
        [clip],
        [clip, mute_clip],
        [mute_clip],
        [mute_clip],
    ]
    assert [s["stream"] for s in streams] == ["No media?", "One?", "Two?", "Three?", "Four?"]
    assert streams[0]["options"] == {} and streams[1]["options"] == {"frames": 4}
    assert len(streams[3]["history"]) == 3 and streams[4]["history"] == []


def test_a_conversation_without_media_keeps_its_turns(cli_run, model: FakeModel) -> None:
    cli_run("chat", stdin=lines("One?", "Two?"))
    assert [m["role"] for m in model.calls[-2]["messages"]] == ["user", "assistant", "user"]


def test_a_failing_turn_leaves_the_talk_as_it_was(cli_run, model: FakeModel, clip) -> None:
    done = cli_run("chat", clip, stdin=lines("One?", "fail:budget", "Two?"))
    assert done.code == 5 and "9000 tokens" in done.err
    assert model.calls[-2]["history"] == [("One?", "word word <One?>")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/ad x", "Did you mean '/add'"),
        ("/add", "/add FILE"),
        ("/add missing.mp4", "missing.mp4"),
        ("/add 'unclosed", "unclosed"),
        ("/drop 2", "1 to 1"),
        ("/drop x", "1 to 1"),
        ("/drop 0", "1 to 1"),
        (f"{__file__}", "/add /"),
    ],
)
def test_wrong_commands_are_told_and_the_talk_goes_on(cli_run, model, clip, line, message) -> None:
    done = cli_run("chat", clip, stdin=lines(line, "Go on?"))
    assert message in done.err and done.code != 0
    assert model.calls[-2]["stream"] == "Go on?" and model.calls[-2]["media"] == [clip]


def test_info_and_help(cli_run, model: FakeModel, clip: str) -> None:
    done = cli_run("chat", clip, "-q", stdin=lines("/info", "One?", "/info", "/help"))
    assert f"1. {clip}" in done.err and "turns: 1" in done.err and "model: fake" in done.err
    assert "last answer: video 2/20 frames" in done.err and "/drop N" in done.err
    assert done.out == "word word <One?> \n"


def test_files_are_checked_before_the_model_is_loaded(cli_run, monkeypatch) -> None:
    monkeypatch.setattr("av_llava.cli.engine.load", lambda loading: pytest.fail("loaded"))
    assert cli_run("chat", "missing.mp4", stdin="").code == 3


def test_a_path_with_spaces_needs_no_quotes(cli_run, model, clip: str, tmp_path: Path) -> None:
    file = tmp_path / "my clip.mp4"
    file.write_bytes(Path(clip).read_bytes())
    cli_run("chat", stdin=lines(f"/add {file}", f"/add '{file}' {clip}", "What?"))
    assert model.calls[-2]["media"] == [str(file), str(file), clip]


pty = pytest.importorskip("pty")


class Screen:
    """A program at a terminal of its own."""

    def __init__(self, words: list[str], log: Path, program: list[str]) -> None:
        ours, theirs = pty.openpty()
        self.fd, self.text = ours, ""
        self.log = log
        self.process = subprocess.Popen(
            [*program, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,
            env={**os.environ, "FAKE_LOG": str(log), "TERM": "dumb", "PYTHONPATH": str(ROOT)},
        )
        os.close(theirs)

    def wait_for(self, text: str, seconds: float = 20.0) -> str:
        """Read until some text appears after what was waited for before; return all before it."""
        end = time.monotonic() + seconds
        while text not in self.text:
            left = end - time.monotonic()
            assert left > 0, f"no {text!r} within {seconds} s, only {self.text!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    self.text += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:  # the program has ended
                    assert text in self.text, f"ended without {text!r}: {self.text!r}"
        before, _, self.text = self.text.partition(text)
        return before

    def wait_for_prompt(self) -> None:
        """Wait for the prompt, and until the program waits for keys.

        Python forgets a Ctrl-C between the two until the next key (no person is that fast).
        """
        self.wait_for("> ")
        stat = Path(f"/proc/{self.process.pid}/stat")
        asleep, end = 0, time.monotonic() + 20
        while asleep < 5 and time.monotonic() < end:
            time.sleep(0.02)
            state = stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else "S"
            asleep = asleep + 1 if state == "S" else 0

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self, seconds: float = 20.0) -> int:
        """Wait for the end; return the exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    self.text += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:
                    break
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def calls(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def _take_terminal() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Callable[..., Screen]]:
    opened: list[Screen] = []

    def start(*words: str, program: list[str] = PROGRAM) -> Screen:
        opened.append(Screen(list(words), tmp_path / "log", program))
        return opened[-1]

    yield start
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        os.close(one.fd)


def test_an_answer_at_a_terminal_and_ctrl_d(screen: Callable[..., Screen], clip: str) -> None:
    talk = screen("chat", clip)
    talk.wait_for("> ")
    talk.send("What?\n")
    talk.wait_for("word word <What?>")
    talk.wait_for("video 2/20 frames")
    talk.wait_for("> ")
    talk.send(CTRL_D)
    assert talk.end() == 0 and "Traceback" not in talk.text


def test_ctrl_c_stops_only_the_answer(screen: Callable[..., Screen], clip: str) -> None:
    talk = screen("chat", clip)
    talk.wait_for_prompt()
    talk.send("slow?\n")
    talk.wait_for("word word")
    talk.send(CTRL_C)
    rest = talk.wait_for("[stopped]")
    assert rest.count("word") < 35
    talk.wait_for_prompt()
    talk.send("Next?\n")
    talk.wait_for("<Next?>")
    talk.wait_for_prompt()
    history = talk.calls()[-2]["history"]
    assert history[0][0] == "slow?" and re.fullmatch(r"(word ?){2,35}", history[0][1])
    talk.send(CTRL_C)
    talk.wait_for("again")
    talk.wait_for_prompt()
    talk.send(CTRL_C)
    assert talk.end() == 0 and "Traceback" not in talk.text


def test_ctrl_c_twice_leaves_from_an_answer(screen: Callable[..., Screen], clip: str) -> None:
    talk = screen("chat", clip)
    talk.wait_for_prompt()
    talk.send("slow?\n")
    talk.wait_for("word")
    talk.send(CTRL_C)
    talk.wait_for_prompt()
    talk.send(CTRL_C)
    assert talk.end() == 0


def test_a_question_between_two_ctrl_c_keeps_the_talk(screen, clip: str) -> None:
    talk = screen("chat", clip)
    talk.wait_for_prompt()
    talk.send("half a line" + CTRL_C)
    talk.wait_for("again")
    talk.wait_for_prompt()
    talk.send("What?\n")
    talk.wait_for("<What?>")
    talk.wait_for_prompt()
    talk.send(CTRL_C)
    talk.wait_for("again")
    talk.wait_for_prompt()
    talk.send("/exit\n")
    assert talk.end() == 0


def test_ask_at_a_terminal_streams_and_ctrl_c_is_130(screen, clip: str) -> None:
    ask = screen("ask", clip, "slow?")
    ask.wait_for("word word")
    ask.send(CTRL_C)
    ask.wait_for("nterrupted")
    assert ask.end() == 130 and "Traceback" not in ask.text


def test_a_file_alone_at_a_terminal_does_not_wait(screen, clip: str) -> None:
    ask = screen("ask", clip)
    ask.wait_for("There is no prompt")
    assert ask.end() == 2


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_of_a_real_model(screen, clip: str, tmp_path: Path) -> None:
    words = ("--model", str(tiny_random(tmp_path / "random")), "--max-tokens", "3000")
    talk = screen("chat", clip, *words, program=[sys.executable, "-m", "av_llava.cli"])
    talk.wait_for("> ", 60)
    talk.send("What happens?\n")
    talk.wait_for("\n")  # the echo of the question
    end = time.monotonic() + 30
    while len(talk.text) < 20:
        assert time.monotonic() < end and select.select([talk.fd], [], [], 30)[0]
        talk.text += os.read(talk.fd, 4096).decode(errors="replace")
    talk.send(CTRL_C)
    talk.wait_for("[stopped]", 20)
    talk.wait_for_prompt()
    talk.send("/info\n")
    talk.wait_for("turns: 1")
    talk.wait_for_prompt()
    talk.send(CTRL_D)
    assert talk.end() == 0 and "Traceback" not in talk.text
