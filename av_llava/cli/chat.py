"""``av-llava chat``: several questions about media that can change on the way."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from av_llava.answers import Answer
from av_llava.cli import engine, inputs
from av_llava.cli import options as o
from av_llava.cli.ask import conclude, load
from av_llava.cli.failures import INTERRUPTED, attempt
from av_llava.cli.options import Loading, Request
from av_llava.cli.output import Output, configure_logging, report
from av_llava.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from av_llava.inference import AVLlava
    from av_llava.media import MediaInfo

HELP = """\
/add FILE    show or play another file
/drop N      leave out file N (or the last one)
/info        files, turns, and what the last answer used
/clear       forget the questions and answers; the files stay
/help        this list
/exit        leave (Ctrl-D too)
Ctrl-C stops an answer; twice, it leaves."""


@dataclass
class Talk:
    """A conversation about some media, which are encoded once for all its turns."""

    model: AVLlava
    request: Request
    media: list[str] = field(default_factory=list)
    found: dict[str, MediaInfo] = field(default_factory=dict)
    """Headers of those media that are files."""
    history: list[tuple[str, str]] = field(default_factory=list)
    last: Answer | None = None
    _session: Any = None

    def stream(self, prompt: str) -> Any:
        """Begin to answer the next turn; the history does not change yet."""
        if not self.media:
            messages = [
                {"role": role, "content": text}
                for turn in [*self.history, (prompt, None)]
                for role, text in zip(("user", "assistant"), turn, strict=True)
                if text is not None
            ]
            return self.model.stream_messages(messages, **self._text_options())
        if self._session is None:
            self._session = self.model.session(self.media, **self.request.given())
        self._session.history = list(self.history)
        return self._session.stream(prompt, chat=True)

    def _text_options(self) -> dict[str, Any]:
        """Without media, their options have no meaning; they wait for the first file."""
        return {k: v for k, v in self.request.given().items() if k not in o.ABOUT_MEDIA}

    def changed(self) -> None:
        """Encode the media anew before the next turn."""
        self._session = None


def command(
    media: Annotated[
        list[str] | None,
        typer.Argument(hidden=True),
    ] = None,
    model: o.Model = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    attn: o.Attn = "auto",
    quantize: o.Quantize = None,
    base: o.Base = None,
    frames: o.Frames = None,
    fps: o.Fps = None,
    source_fps: o.SourceFps = None,
    start: o.Start = None,
    end: o.End = None,
    audio: o.Audio = "auto",
    aggregator: o.Aggregator = None,
    max_visual_tokens: o.MaxVisualTokens = None,
    time_instruction: o.TimeInstruction = None,
    backend: o.Backend = None,
    max_tokens: o.MaxTokens = 512,
    temperature: o.Temperature = 0.0,
    top_p: o.TopP = None,
    seed: o.Seed = None,
    system: o.System = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> int:
    """Talk about videos, sounds and pictures, over several turns.

    \b
    av-llava chat clip.mp4

    MEDIA are videos, sounds and pictures: files, folders of frames, http addresses. They are
    encoded once. /add FILE and /drop N change them, /help lists the commands. Ctrl-C
    stops the running answer only; Ctrl-C once more, or Ctrl-D, leaves. Lines that are piped in are
    answered one after the other.
    """
    output = Output(quiet=quiet)
    configure_logging(verbose, output)
    loading = Loading(model, device, dtype, attn, quantize, base)
    request = Request(
        frames=frames,
        fps=fps,
        source_fps=source_fps,
        start_s=start,
        end_s=end,
        audio=audio,
        time_instruction=time_instruction,
        backend=backend,
        aggregator=aggregator,
        max_visual_tokens=max_visual_tokens,
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        system=system,
    )
    loading.check()
    request.check(has_media=True)  # files can be added later
    files = list(media or [])
    found = inputs.check_media(files, request.audio)
    engine.check_model(loading.model)
    talk = Talk(load(loading, output), request, files, found)
    return Loop(talk, output).run()


class Loop:
    """Reads lines, obeys commands, shows answers.

    Args:
        talk: the conversation.
        output: where to speak.
    """

    def __init__(self, talk: Talk, output: Output) -> None:
        self.talk, self.output = talk, output
        self.interactive = sys.stdin.isatty()
        self.status = 0
        self._interrupted = False
        self._left = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/add": self.add,
            "/drop": self.drop,
            "/info": self.info,
            "/clear": self.clear,
            "/help": self.help,
            "/exit": self.exit,
        }

    def run(self) -> int:
        """Talk until the end; returns 0, or how the last bad line of piped input failed."""
        if self.interactive:
            self.output.note(f"{self.talk.model.name}. /help lists the commands.")
        while not self._left:
            line = self._read()
            if line is None:
                break
            if line:
                _, failure = attempt(lambda line=line: self._obey(line))  # type: ignore[misc]
                if failure is not None and failure.exit_code == INTERRUPTED:
                    self._interrupted = True
                elif failure is not None:
                    report(failure)
                    self.status = failure.exit_code
        return 0 if self.interactive else self.status

    def _read(self) -> str | None:
        """Read a line; None means to leave."""
        try:
            line = _input("> ") if self.interactive else sys.stdin.readline()
        except KeyboardInterrupt:
            if self.interactive and not self._interrupted:
                self._interrupted = True
                self.output.note("\nCtrl-C again, or Ctrl-D, leaves.")
                return ""
            line = ""
        if not line:  # the end of the input; an empty line still has its newline
            if self.interactive:
                self.output.note("")
            return None
        if line.strip():
            self._interrupted = False
        return line.strip()

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self.ask(line)
        elif word in self.commands:
            self.commands[word](rest.strip())
        elif os.path.exists(line):
            raise UsageError(f"To show a file, write: /add {line}")
        else:
            raise unknown_name("command", word, self.commands)

    def ask(self, prompt: str) -> None:
        """Answer a turn; stopped, what was said so far is kept."""
        talk = self.talk
        said: list[str] = []
        with engine.memory_guard(talk.model, talk.request, talk.found.values()):
            try:
                stream = talk.stream(prompt)
                for _ in self.output.pieces(_kept(stream, said)):
                    pass
            except KeyboardInterrupt:
                self.output.note("[stopped]")
                if said:
                    talk.history.append((prompt, "".join(said).strip()))
                raise
        answer = stream.answer
        talk.history.append((prompt, answer.text))
        talk.last = answer
        if not said:
            self.output.answer(answer.text)
        conclude(answer, self.output)

    def add(self, rest: str) -> None:
        """Show another file, from the next turn on."""
        if not rest:
            raise UsageError("Write /add FILE.")
        whole = os.path.exists(os.path.expanduser(rest)) or inputs.is_address(rest)
        files = [rest] if whole else _words(rest)
        audio = self.talk.request.audio
        found = inputs.check_media(files, "on" if audio == "on" else "auto")
        self.talk.media += files
        self.talk.found |= found
        self.talk.changed()
        self._list()

    def drop(self, rest: str) -> None:
        """Leave out a file, from the next turn on."""
        media = self.talk.media
        number = rest or str(len(media))
        if not (number.isascii() and number.isdigit() and 1 <= int(number) <= len(media)):
            known = f"1 to {len(media)}" if media else "none: there are no files"
            raise UsageError(f"There is no file {rest or 'to drop'!r}; known: {known}.")
        media.pop(int(number) - 1)
        self.talk.found = {k: v for k, v in self.talk.found.items() if k in media}
        self.talk.changed()
        self._list()

    def info(self, rest: str) -> None:
        """Say what the conversation holds."""
        talk = self.talk
        model = talk.model
        dtype = str(model.dtype).removeprefix("torch.")
        random = ", random weights" if model.is_random else ""
        self._say(f"model: {model.name} ({model.device}, {dtype}{random})")
        self._list()
        self._say(f"turns: {len(talk.history)}")
        if talk.last is not None:
            self._say(f"last answer: {talk.last.used()}")

    def clear(self, rest: str) -> None:
        """Forget the turns."""
        self.talk.history.clear()
        self.talk.last = None
        self._say("The questions and answers are forgotten; the files stay.")

    def help(self, rest: str) -> None:
        """List the commands."""
        self._say(HELP)

    def exit(self, rest: str) -> None:
        """Leave."""
        self._left = True

    def _list(self) -> None:
        files = [f"  {i}. {name}" for i, name in enumerate(self.talk.media, 1)]
        self._say("\n".join(["files:", *files]) if files else "files: none")

    def _say(self, text: str) -> None:
        """Answer a command: asked for, so --quiet does not matter."""
        Output().note(text)


def _kept(pieces: Iterable[str], said: list[str]) -> Iterator[str]:
    """Pass pieces on, each kept before it is shown: a Ctrl-C then loses none that was seen."""
    for piece in pieces:
        said.append(piece)
        yield piece


def _words(rest: str) -> list[str]:
    try:
        return shlex.split(rest)
    except ValueError as error:
        raise UsageError(f"{rest!r} cannot be read as file names: {error}.") from error


def _input(prompt: str) -> str:
    """Read a line from a terminal, with line editing where there is some.

    The prompt goes to stderr if stdout is not a terminal: stdout carries only answers.
    """
    if not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        return sys.stdin.readline()
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (input() then edits lines and has a history)
    try:
        return input(prompt) + "\n"
    except EOFError:
        return ""
