"""The program ``av-llava``: its commands, and the boundary where errors become exit codes.

Contract: importing this module costs typer and the standard library only, so that help and
errors of usage appear at once. :func:`run` never lets a traceback out, unless AV_LLAVA_DEBUG is
set.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

import av_llava
from av_llava.cli import ask, chat, convert, data, doctor, info, train
from av_llava.cli import eval as evaluation
from av_llava.cli.failures import BROKEN_PIPE, INTERRUPTED, CliError, attempt, failure_of
from av_llava.cli.options import usage
from av_llava.cli.output import discard_stdout, make_output_safe, report

app = typer.Typer(
    name="av-llava",
    help="Ask a language model about videos, sounds and pictures.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=(
        "Exit codes: 0 ok, 1 unexpected error, 2 usage, 3 media, 4 checkpoint, 5 does not fit, "
        "6 missing package, 7 data or failed rows, 130 interrupted."
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"av-llava {av_llava.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Ask a language model about videos, sounds and pictures."""


def _guarded(command: Callable[..., int]) -> Callable[..., int]:
    """Turn what a command raises into a report and an exit code."""

    @functools.wraps(command)
    def run_command(**arguments: Any) -> int:
        status, failure = attempt(functools.partial(command, **arguments))
        if failure is None:
            return status or 0
        if failure.exit_code == BROKEN_PIPE:
            discard_stdout()
        else:
            report(failure, as_json=bool(arguments.get("as_json")))
        return failure.exit_code

    return run_command


app.command("ask", cls=usage("[MEDIA]...", "PROMPT"))(_guarded(ask.command))
app.command("chat", cls=usage("[MEDIA]..."))(_guarded(chat.command))
app.command("info", cls=usage("TARGET"))(_guarded(info.command))
app.command("doctor")(_guarded(doctor.command))
app.command("train", cls=usage("RECIPE", "[KEY=VALUE]..."))(_guarded(train.command))
app.add_typer(convert.group(_guarded))
app.add_typer(data.group(_guarded))
app.add_typer(evaluation.group(_guarded))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the entry point of ``av-llava``.

    Args:
        arguments: the words after the program's name; ``sys.argv`` by default.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    make_output_safe()
    try:
        status = typer.main.get_command(app).main(
            args=words, prog_name="av-llava", standalone_mode=False
        )
        sys.stdout.flush()
    except CliError as error:  # typer's own errors of usage, raised before a command starts
        if "--json" in words:
            report(failure_of(error), as_json=True)
        else:
            error.show()
        return error.exit_code
    except typer.Abort:  # Ctrl-C while words are read, as older versions of typer report it
        return INTERRUPTED
    except BrokenPipeError:
        discard_stdout()
        return BROKEN_PIPE
    return int(status or 0)
