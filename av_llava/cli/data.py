"""``av-llava data``: look at training data, convert them, measure them, and make some.

Contract: what is printed on stdout is the report; progress and notes go to stderr. The exit code is
7 if rows cannot be used. torch is imported only where lengths are measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from av_llava.answers import SCHEMA
from av_llava.cli import data_synth, engine
from av_llava.cli import options as o
from av_llava.cli.data_words import index_data, index_lines, statistics_lines, validation_lines
from av_llava.cli.failures import ROWS_FAILED
from av_llava.cli.output import Output, configure_logging
from av_llava.errors import UsageError

if TYPE_CHECKING:
    from av_llava.training.index import LengthIndex
    from av_llava.training.store import SampleStore

Path_ = Annotated[str | None, typer.Argument(metavar="PATH", hidden=True)]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="NAME", help="Format of the rows; by default told by their keys."
    ),
]
MediaRoot = Annotated[
    Path | None,
    typer.Option(
        "--media-root", metavar="DIR", help="Folder of the media; by default that of the file."
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, metavar="N", help="Seed of a mixture's random choices.")
]
Workers = Annotated[
    int, typer.Option("--workers", min=0, metavar="N", help="Processes; 0 works in this one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
IndexFile = Annotated[
    Path | None,
    typer.Option("--index", metavar="FILE", help="Keep the lengths in this file, or read them."),
]


def group(guarded: Callable[[Callable[..., int]], Callable[..., int]]) -> typer.Typer:
    """Make the command ``data`` and those below it.

    Args:
        guarded: turns what a command raises into an exit code.
    """
    app = typer.Typer(
        name="data",
        help="Training data: look at them, convert them, measure them, make some to learn with.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    app.command("validate", cls=o.usage("PATH"))(guarded(validate))
    app.command("stats", cls=o.usage("PATH"))(guarded(stats))
    app.command("convert", cls=o.usage("PATH", "DESTINATION"))(guarded(convert))
    app.command("index", cls=o.usage("PATH"))(guarded(index))
    app.command("synth")(guarded(data_synth.command))
    return app


def validate(
    path: Path_ = None,
    format: Format = None,
    media_root: MediaRoot = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode a little of every file, too.")
    ] = False,
    workers: Annotated[
        int, typer.Option("--workers", min=1, metavar="N", help="Files decoded at a time.")
    ] = 2,
    first: Annotated[
        int, typer.Option("--first", min=0, metavar="N", help="Show so many of each kind.")
    ] = 10,
    strict: Annotated[
        bool, typer.Option("--strict", help="Warnings count as problems, too.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> int:
    """Say what is wrong with training data, with file and line.

    \b
    av-llava data validate train.json
    av-llava data validate mixture.yaml --decode --workers 8

    PATH is a .json or .jsonl file, a mixture (.yaml), dataset_info.json, or a folder of them. The
    exit code is 7 if there are rows that cannot be used.
    """
    output = _begin(as_json, quiet, verbose)
    from av_llava.training import report

    store = _open(path, "validate", format, media_root, seed)
    with _progress(output, len(store), "row") as progress:
        found = report.validate(
            store, decode=decode, workers=workers, first=first, progress=progress
        )
    if as_json:
        output.data({"schema": SCHEMA, **found.to_dict()})
    else:
        output.answer("\n".join(validation_lines(found, report.PROBLEMS, report.WARNINGS)))
    failed = found.n_bad or (strict and found.warnings.total())
    return ROWS_FAILED if failed else 0


def stats(
    path: Path_ = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="PATH|ID",
            help="Count tokens as this model does (only its configuration is read); without it, "
            "words are counted.",
        ),
    ] = None,
    index_file: IndexFile = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw it: .png, .svg, .pdf or .html."),
    ] = None,
    format: Format = None,
    media_root: MediaRoot = None,
    frames: o.Frames = None,
    fps: o.Fps = None,
    source_fps: o.SourceFps = None,
    audio: o.Audio = "auto",
    workers: Workers = 0,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> int:
    """Say how training data are made up and how long they are.

    \b
    av-llava data stats train.json
    av-llava data stats mixture.yaml --model checkpoints/my-model --plot lengths.png

    PATH is a .json or .jsonl file, a mixture (.yaml), dataset_info.json, or a folder of them.
    """
    output = _begin(as_json, quiet, verbose)
    from av_llava.training import statistics as made_up

    if plot is not None:
        if plot.suffix.lower() not in made_up.PLOT_SUFFIXES:
            raise UsageError(f"--plot must end in {', '.join(made_up.PLOT_SUFFIXES)}.")
        made_up.check_matplotlib()
    if model is None:
        _only_with_model(
            frames=frames, fps=fps, source_fps=source_fps, audio=audio, index=index_file
        )
    store = _open(path, "stats", format, media_root, seed)
    request = o.Request(frames=frames, fps=fps, source_fps=source_fps, audio=audio)
    lengths = (
        None if model is None else _measured(store, model, request, index_file, workers, output)
    )
    with _progress(output, len(store), "row") as progress:
        found = made_up.statistics(store, lengths, progress)
    if plot is not None:
        made_up.plot(found, plot)
        output.note(f"drawn: {plot}")
    if as_json:
        output.data({"schema": SCHEMA, **found.to_dict()})
    else:
        output.answer("\n".join(statistics_lines(found)))
    return 0


def convert(
    path: Path_ = None,
    destination: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    to: Annotated[
        str, typer.Option("--to", metavar="NAME", help="Format to write: normal or llava.")
    ] = "normal",
    format: Format = None,
    media_root: MediaRoot = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DESTINATION if it exists.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> int:
    """Write training data of any format in the normal form, or as LLaVA's.

    \b
    av-llava data convert train.json train.normal.jsonl
    av-llava data convert mixture.yaml all.json --to llava

    PATH is a .json or .jsonl file, a mixture (.yaml), dataset_info.json, or a folder of them.
    DESTINATION ends in .jsonl (a row a line) or .json (one array), and appears when it is whole.
    """
    output = _begin(as_json, quiet, verbose)
    from av_llava.training import writers

    if destination is None:
        raise UsageError("Name the data and the file to write: av-llava data convert SOURCE FILE")
    store = _open(path, "convert", format, media_root, seed)
    with _progress(output, len(store), "row") as progress:
        done = writers.convert(
            store,
            destination,
            to=to,
            skip_bad=skip_bad,
            overwrite=overwrite,
            progress=progress,
        )
    for reason in done.reasons:
        output.warn(f"left out: {reason}")
    if as_json:
        data = {"file": str(destination), **dataclasses.asdict(done)}
        output.data({"schema": SCHEMA, **data})
    else:
        output.answer(f"{destination}: {done.written:,} rows, {done.skipped:,} left out")
    return 0


def index(
    path: Path_ = None,
    model: o.Model = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="File to write; by default PATH.index."),
    ] = None,
    format: Format = None,
    media_root: MediaRoot = None,
    frames: o.Frames = None,
    fps: o.Fps = None,
    source_fps: o.SourceFps = None,
    audio: o.Audio = "auto",
    workers: Workers = 0,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Measure rows again that could not be measured.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> int:
    """Measure how many tokens every row has, from the headers of its media.

    \b
    av-llava data index train.json --model checkpoints/my-model --workers 8

    PATH is a .json or .jsonl file, a mixture (.yaml), dataset_info.json, or a folder of them. An
    interrupted run goes on where it was. The exit code is 7 if rows cannot be used.
    """
    output = _begin(as_json, quiet, verbose)
    store = _open(path, "index", format, media_root, seed)
    assert path is not None
    from av_llava.training.index_file import beside

    file = out or beside(path)
    request = o.Request(frames=frames, fps=fps, source_fps=source_fps, audio=audio)
    found = _measured(store, model, request, file, workers, output, retry_errors)
    if as_json:
        output.data({"schema": SCHEMA, "file": str(file), **index_data(found)})
    else:
        output.answer("\n".join(index_lines(found, file)))
    return ROWS_FAILED if found.errors else 0


# ------------------------------------------------------------------ shared by the commands


def _begin(as_json: bool, quiet: bool, verbose: int) -> Output:
    output = Output(as_json, quiet)
    configure_logging(verbose, output)
    return output


def _open(
    path: str | None, command: str, format: str | None, media_root: Path | None, seed: int
) -> SampleStore:
    if path is None:
        raise UsageError(f"Name the data: av-llava data {command} PATH")
    from av_llava.training.store import open_store

    return open_store(path, format=format, media_root=media_root, seed=seed)


def _only_with_model(**given: Any) -> None:
    """Refuse options that only mean something where tokens are counted."""
    for name, value in given.items():
        if value not in (None, "auto"):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} counts only with --model, which says how tokens are made.")


def _measured(
    store: SampleStore,
    model: str | None,
    request: o.Request,
    file: Path | None,
    workers: int,
    output: Output,
    retry_errors: bool = False,
) -> LengthIndex:
    """Lengths of all rows as a model sees them."""
    request.check(has_media=True)
    engine.check_model(model)
    from av_llava.inspection import light_processor
    from av_llava.training.index import build_index

    processor = light_processor(model)
    options = processor.media_options(
        frames=request.frames,
        fps=request.fps,
        source_fps=request.source_fps,
        audio=request.audio,
    )
    with _progress(output, len(store), "row") as progress:
        return build_index(
            store,
            processor,
            options,
            file=file,
            workers=workers,
            progress=progress,
            retry_errors=retry_errors,
        )


@contextmanager
def _progress(output: Output, total: int, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for a person who watches."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, disable=not output.shows_progress, leave=False) as bar:

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)

        yield progress
