"""``av-llava convert``: out of av_llava, one command a converter.

Contract: the commands are those of ``av_llava.checkpoints.convert.CONVERTERS``, with the options
that are declared there; adding a converter adds its command. Nothing heavy is imported until a
conversion begins.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from av_llava.answers import SCHEMA
from av_llava.checkpoints.convert import (
    CONVERTERS,
    TOLERANCE,
    Converter,
    Option,
    Report,
    convert,
    listed,
    parse_size,
)
from av_llava.checkpoints.staging import check_destination, size
from av_llava.cli import engine
from av_llava.cli import options as o
from av_llava.cli.output import Output, configure_logging
from av_llava.errors import CheckpointError, UsageError, unknown_name

_NOTE_SECONDS = 10.0

Source = Annotated[str | None, typer.Argument(metavar="SOURCE", hidden=True)]
Destination = Annotated[str | None, typer.Argument(metavar="DESTINATION", hidden=True)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Load both sides and compare them on a fixed input before the destination appears.",
    ),
]
Tolerance = Annotated[
    float,
    typer.Option("--tolerance", metavar="X", help="Largest difference that --verify accepts."),
]
ShardSize = Annotated[
    str, typer.Option("--shard-size", metavar="SIZE", help="Largest file of weights: 5GB, 500MB.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="NAME", help="Type of the weights; auto keeps each tensor's own."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]

_COMMON: dict[str, tuple[Any, Any]] = {
    "source": (Source, None),
    "destination": (Destination, None),
    "dry_run": (DryRun, False),
    "verify": (Verify, False),
    "tolerance": (Tolerance, TOLERANCE),
    "shard_size": (ShardSize, "5GB"),
    "dtype": (Dtype, "auto"),
}
_LAST: dict[str, tuple[Any, Any]] = {
    "as_json": (AsJson, False),
    "quiet": (o.Quiet, False),
    "verbose": (o.Verbose, 0),
}


def group(guarded: Callable[[Callable[..., int]], Callable[..., int]]) -> typer.Typer:
    """Make the command ``convert`` and those below it.

    Args:
        guarded: turns what a command raises into an exit code.
    """
    app = typer.Typer(
        name="convert",
        help="Convert a checkpoint: to transformers, to a plain language model, into its parts.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )

    @app.callback()
    def about(
        names: Annotated[
            bool,
            typer.Option(
                "--list", callback=_list, is_eager=True, help="List converters and their options."
            ),
        ] = False,
    ) -> None:
        """Convert a checkpoint: to transformers, to a plain language model, into its parts."""

    for name, converter in CONVERTERS.items():
        pieces = ["SOURCE", "DESTINATION" if converter.needs_destination else "[DESTINATION]"]
        kind = o.usage(*pieces)
        app.command(name, cls=kind, help=_help(name, converter))(guarded(_command(name, converter)))
    return app


def _list(wanted: bool) -> None:
    if not wanted:
        return
    width = max(map(len, CONVERTERS))
    for name, converter in CONVERTERS.items():
        typer.echo(f"{name.ljust(width)}  {converter.summary}")
        for option, about in converter.options.items():
            typer.echo(f"{' ' * width}    {_flag(option)}: {about.help}")
    raise typer.Exit


def _help(name: str, converter: Converter) -> str:
    return (
        f"{converter.summary[0].upper()}{converter.summary[1:]}.\n\n"
        "SOURCE is a checkpoint folder or hub id, which is only read; DESTINATION must not exist. "
        "It appears whole or not at all."
    )


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _command(name: str, converter: Converter) -> Callable[..., int]:
    """The function of one command, with a signature that typer reads."""

    def command(**given: Any) -> int:
        return _run(name, converter, given)

    extra = {key: (_annotation(key, option), option.default) for key, option in _own(converter)}
    parameters = {**_COMMON, **extra, **_LAST}
    command.__name__ = name.replace("-", "_")
    command.__annotations__ = {k: kind for k, (kind, _) in parameters.items()}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for key, (kind, default) in parameters.items()
        ]
    )
    return command


def _own(converter: Converter) -> list[tuple[str, Option]]:
    return list(converter.options.items())


def _annotation(key: str, option: Option) -> Any:
    """What typer needs to know of a converter's option."""
    if option.kind is bool:
        return Annotated[bool, typer.Option(_flag(key), help=option.help)]
    names = {str: "NAME", Path: "PATH", float: "X", int: "N"}
    wanted = typer.Option(_flag(key), metavar=names[option.kind], help=option.help)
    kind = str if option.kind is Path else option.kind
    return Annotated[kind | None if option.default is None else kind, wanted]  # type: ignore[index]


def _run(name: str, converter: Converter, given: dict[str, Any]) -> int:
    """Convert, and print the report."""
    output = Output(given["as_json"], given["quiet"])
    configure_logging(given["verbose"], output)
    source, destination = given["source"], given["destination"]
    _check(name, converter, given)
    progress = _Progress(output)
    report = convert(
        name,
        source,
        destination,
        dry_run=given["dry_run"],
        verify=given["verify"],
        tolerance=given["tolerance"],
        shard_size=given["shard_size"],
        dtype=o.DTYPES[given["dtype"]],
        progress=progress,
        **{key: given[key] for key in converter.options},
    )
    progress.close()
    if given["as_json"]:
        output.data({"schema": SCHEMA, "report": report.to_dict()})
    else:
        output.answer("\n".join(lines(report, given["tolerance"])))
    for problem in report.problems:
        output.warn(problem)
    return CheckpointError.exit_code if report.problems else 0


def _check(name: str, converter: Converter, given: dict[str, Any]) -> None:
    """Say what is wrong with the words before anything heavy is imported.

    Raises:
        UsageError, CheckpointError: a wrong value, no source, a destination that exists.
    """
    if given["source"] is None:
        raise UsageError(f"{name} needs a SOURCE: a checkpoint folder or hub id.")
    parse_size(given["shard_size"])
    if given["dtype"] not in o.DTYPES:
        raise unknown_name("dtype", given["dtype"], o.DTYPES)
    if not given["tolerance"] >= 0:
        raise UsageError(f"--tolerance must be at least 0, not {given['tolerance']:g}.")
    engine.check_model(given["source"])
    if given["destination"] is not None:
        source = Path(given["source"]).expanduser()
        check_destination(Path(given["destination"]), [source] if source.is_dir() else [])
    elif converter.needs_destination:
        raise UsageError(f"{name} needs a DESTINATION: the folder to make.")


class _Progress:
    """Shows how far a conversion is: a bar for a person, a note now and then otherwise."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bar: Any = None
        self._noted = time.monotonic()

    def __call__(self, n_bytes: int, total: int) -> None:
        if self._output.shows_progress:
            self._show(n_bytes, total)
        elif time.monotonic() - self._noted > _NOTE_SECONDS and not self._output.as_json:
            self._noted = time.monotonic()
            self._output.note(f"{size(n_bytes)} of {size(total)} written")

    def _show(self, n_bytes: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, leave=False)
        self._bar.update(n_bytes - self._bar.n)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def lines(report: Report, tolerance: float = TOLERANCE) -> list[str]:
    """A report for people."""
    verb = "would make" if report.dry_run else "made"
    out = [
        f"{report.converter}: {report.source} {verb} {report.destination}",
        f"  mapped       {report.mapped} tensors, {size(report.n_bytes)}",
        f"  missing      {len(report.missing)}",
        f"  unexpected   {len(report.unexpected)}",
        f"  wrong shape  {len(report.mismatched)}",
        f"  reshaped     {len(report.reshaped)}{_names(report.reshaped)}",
    ]
    out += [
        f"  left out     {len(names)} ({reason}){_names(names, 3)}"
        for reason, names in report.dropped.items()
    ]
    if report.files:
        out.append(f"  files        {len(report.files)}{_names(report.files)}")
    if report.difference is not None:
        out.append(f"  difference   {report.difference:.3g} (at most {tolerance:.3g} is allowed)")
    return [*out, *(f"  note: {note}" for note in report.notes)]


def _names(names: tuple[str, ...], shown: int = 12) -> str:
    return f": {listed(names, shown)}" if names else ""
