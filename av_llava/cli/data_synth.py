"""``av-llava data synth``: clips of a synthetic world, with questions, to learn and test with.

Contract: arguments are checked and the work is done by ``av_llava.training.world``; here is only
what a person sees. stdout carries the path of the JSON file (or one JSON object).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from av_llava.answers import SCHEMA
from av_llava.cli import options as o
from av_llava.cli.output import Output, configure_logging

_NOTE_SECONDS = 10.0

Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder to write to; made if absent.")
]
N = Annotated[int, typer.Option("--n", metavar="N", help="Number of clips.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the data set.")]
Split = Annotated[
    str,
    typer.Option(
        "--split", metavar="NAME", help="train, test, ...: splits never share a clip's contents."
    ),
]
Workers = Annotated[int, typer.Option("--workers", metavar="N", help="Processes that make clips.")]
Size = Annotated[int, typer.Option("--size", metavar="PIXELS", help="Side of the picture.")]
Form = Annotated[
    str,
    typer.Option(
        "--form",
        metavar="NAME",
        help="conversation: a row has all questions of a clip; question: a row each, with choices.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was made as one JSON object.")]


def command(
    out: Out,
    n: N = 1000,
    seed: Seed = 0,
    split: Split = "train",
    workers: Workers = 1,
    size: Size = 64,
    form: Form = "conversation",
    as_json: AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> int:
    """Make clips of shapes and sounds (H.264 and AAC) with questions, in LLaVA's format.

    av-llava data synth --out world --n 8000 --split train --workers 2

    av-llava data synth --out world --n 500 --split test --form question

    The same arguments make the same files. A run that was stopped goes on where it stopped.
    """
    output = Output(as_json, quiet)
    configure_logging(verbose, output)
    from av_llava.training.world.generate import synthesize
    from av_llava.training.world.parts import SceneSettings

    began = time.monotonic()
    progress = _Progress(output)
    try:
        file = synthesize(
            out, n, seed, split, workers, progress, settings=SceneSettings(size=size), form=form
        )
    finally:
        progress.close()
    seconds = time.monotonic() - began
    if as_json:
        made = {"file": str(file), "clips": n, "seconds": round(seconds, 1)}
        output.data({"schema": SCHEMA, "synth": made})
    else:
        output.answer(str(file))
        output.note(f"{n} clips in {seconds:.0f} s")
    return 0


class _Progress:
    """Shows how far it is: a bar for a person, a note now and then otherwise."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bar: Any = None
        self._noted = time.monotonic()

    def __call__(self, done: int, n: int) -> None:
        if self._output.shows_progress:
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=n, unit="clip", leave=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._noted > _NOTE_SECONDS and not self._output.as_json:
            self._noted = time.monotonic()
            self._output.note(f"{done} of {n} clips")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
