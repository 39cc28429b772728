"""``av-llava train``: fine-tune a checkpoint as a recipe says.

Contract: what is wrong with the recipe's form is said before torch is imported. Under torchrun the
first process alone talks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from av_llava.answers import SCHEMA
from av_llava.cli import options as o
from av_llava.cli.output import Output, configure_logging
from av_llava.errors import UsageError

Recipe = Annotated[str | None, typer.Argument(metavar="RECIPE", hidden=True)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", hidden=True)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint of the output folder.")
]
Stage = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="Run only this stage of the recipe.")
]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Estimate the memory, measure all samples, run one step on the largest batch, and "
        "write nothing.",
    ),
]


def command(
    recipe: Recipe = None,
    overrides: Overrides = None,
    check: Check = False,
    resume: Resume = False,
    stage: Stage = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> int:
    """Fine-tune a checkpoint as a recipe says.

    \b
    av-llava train recipe.yaml model.path=CHECKPOINT data.train=data.json output=runs/one
    av-llava train recipe.yaml trainable.mm_projector.lr=1e-4 --check
    torchrun --nproc_per_node 8 -m av_llava.cli train recipe.yaml

    RECIPE is a YAML file; the recipes that come with this package are in scripts/recipes. KEY=VALUE
    lays a value over the recipe's: section.key=value. See docs/training.md.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    output = Output(as_json, quiet or not first)
    configure_logging(verbose, output)
    if recipe is None:
        raise UsageError("Name a recipe: av-llava train recipe.yaml output=runs/one")
    if check and resume:
        raise UsageError("--check writes nothing, so there is nothing to resume: leave one out.")
    from av_llava.training.recipe import read_recipe
    from av_llava.training.stages import runs_of

    runs = list(runs_of(read_recipe(recipe, overrides or ()), stage))
    result: dict[str, Any] = {}
    for settings in runs:
        if len(runs) > 1:
            output.note(f"Stage {settings.output}")
        if check and runs.index(settings) and not os.path.exists(settings.model.path or ""):
            output.note(f"It starts from {settings.model.path}, which is not there yet.")
            continue
        result = _run(settings, check, resume, output)
    if first and as_json:
        output.data({"schema": SCHEMA, **result})
    elif first and "folder" in result:
        output.answer(result["folder"])
    return 0


def _run(settings: Any, check: bool, resume: bool, output: Output) -> dict[str, Any]:
    """One run; returns what there is to tell."""
    from av_llava.training.checking import check_run
    from av_llava.training.prepare import Hooks
    from av_llava.training.run import train

    hooks = Hooks(say=output.note, bar=output.shows_progress, progress=_measuring(output))
    if check:
        return check_run(settings, hooks)
    return {"folder": str(train(settings, resume=resume, hooks=hooks))}


def _measuring(output: Output) -> Callable[[int, int], None] | None:
    """Show how many samples were measured, to a person."""
    if not output.shows_progress:
        return None

    def progress(done: int, total: int) -> None:
        sys.stderr.write(f"\rmeasured {done:,} of {total:,} samples")
        sys.stderr.write("\n" if done >= total else "")
        sys.stderr.flush()

    return progress
