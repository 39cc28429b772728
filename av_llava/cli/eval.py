"""``av-llava eval``: benchmarks, from what is on disk to scores that can be compared.

Contract: the harness is imported when a command runs, torch only by ``run``. Scores go to stdout,
everything else to stderr.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from av_llava.answers import SCHEMA
from av_llava.cli import eval_options as e
from av_llava.cli import eval_run
from av_llava.cli import options as o
from av_llava.cli.eval_scores import comparison_line, judge_of, keep_scores, lines_of
from av_llava.cli.failures import ROWS_FAILED
from av_llava.cli.output import Output, configure_logging
from av_llava.errors import UsageError

TaskName = Annotated[str | None, typer.Argument(metavar="TASK", hidden=True)]
Folder = Annotated[Path | None, typer.Argument(metavar="RUN", hidden=True)]
Folders = Annotated[list[Path] | None, typer.Argument(metavar="RUN...", hidden=True)]
Arms = Annotated[
    str | None,
    typer.Option(
        "--arms", metavar="A,B", help="Columns to compare; by default the first of each run."
    ),
]


def group(guarded: Callable[[Callable[..., int]], Callable[..., int]]) -> typer.Typer:
    """Make the command ``eval`` and those below it.

    Args:
        guarded: turns what a command raises into an exit code.
    """
    app = typer.Typer(
        name="eval",
        help="Evaluate a model on benchmarks of videos and sounds.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    app.command("list")(guarded(list_tasks))
    app.command("check", cls=o.usage("TASK"))(guarded(check))
    app.command("run")(guarded(eval_run.command))
    app.command("score", cls=o.usage("RUN"))(guarded(score))
    app.command("compare", cls=o.usage("RUN", "[RUN]"))(guarded(compare))
    app.command("report", cls=o.usage("RUN..."))(guarded(report))
    app.command("verify", cls=o.usage("DIR"))(guarded(verify))
    return app


def list_tasks(as_json: e.AsJson = False) -> int:
    """List the benchmarks with what each needs on disk."""
    from av_llava_eval.task import get_task, task_names

    tasks = [get_task(name) for name in task_names()]
    output = Output(as_json)
    if as_json:
        keys = (
            "name",
            "title",
            "version",
            "needs",
            "splits",
            "groupings",
            "headline",
            "hears",
            "styles",
        )
        rows = [{key: getattr(task, key) for key in keys} for task in tasks]
        output.data({"schema": SCHEMA, "tasks": rows})
        return 0
    width = max(len(task.name) for task in tasks)
    for task in tasks:
        output.answer(f"{task.name.ljust(width)}  {task.title}")
        for need in task.needs:
            output.answer(f"{' ' * width}    {need}")
    return 0


def check(
    task: TaskName = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Folder of the benchmark.")
    ] = None,
    split: e.Split = None,
    as_json: e.AsJson = False,
) -> int:
    """Say what of a benchmark is missing on disk. Exit code 7 if something is."""
    if task is None or data is None:
        raise UsageError("Name a task and its folder: av-llava eval check TASK --data DIR")
    from av_llava_eval.task import get_task

    chosen, output = get_task(task), Output(as_json)
    missing = chosen.check(data, split)
    if as_json:
        output.data({"schema": SCHEMA, "task": chosen.name, "missing": missing})
    elif missing:
        for line in missing:
            output.answer(line)
        output.note(f"{chosen.title} needs: {'; '.join(chosen.needs)}")
    else:
        n = len(chosen.scan(data, split).samples)
        output.answer(f"{chosen.title}: {n:,} questions, nothing is missing.")
    return ROWS_FAILED if missing else 0


def score(
    run: Folder = None,
    compat: e.Compat = None,
    judge: e.JudgeUrl = None,
    judge_model: e.JudgeModel = None,
    judge_key_env: e.JudgeKey = None,
    as_json: e.AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> int:
    """Score a run again, from its answers alone: no model and no media are needed."""
    output = Output(as_json, quiet)
    configure_logging(verbose, output)
    folder = _needed(run)
    found = keep_scores(folder, compat, judge_of(judge, judge_model, judge_key_env))
    if as_json:
        output.data({"schema": SCHEMA, "folder": str(folder), **found})
    else:
        for line in lines_of(found):
            output.answer(line)
    return 0


def compare(runs: Folders = None, arms: Arms = None, as_json: e.AsJson = False) -> int:
    """Compare two runs of a benchmark, or two columns of one, question by question."""
    if not runs or len(runs) > 2:
        raise UsageError("Name one run or two: av-llava eval compare runs/one runs/two")
    from av_llava_eval.compare import compare_arms, compare_runs
    from av_llava_eval.scoring import score_folder

    output, scored = Output(as_json), [score_folder(run) for run in runs]
    names = e.words("--arms", arms)
    if names and len(names) != 2 and not (len(names) == 1 and len(runs) == 2):
        raise UsageError(f"--arms names the two columns to compare, not {arms!r}.")
    if len(runs) == 1 and not names:
        pairs = compare_arms(scored[0])
        if not pairs:
            raise UsageError(f"{runs[0]} has one column; name a second run.")
    else:
        first, second = (names * 2)[:2] if names else (next(iter(s.arms)) for s in scored)
        pairs = [compare_runs(scored[0], scored[-1], (first, second))]
    if as_json:
        output.data({"schema": SCHEMA, "comparisons": pairs})
        return 0
    for pair in pairs:
        output.answer(_pair(pair))
    return 0


def _pair(pair: dict[str, Any]) -> str:
    """One comparison with its groups."""
    first, second = pair["names"]
    a, b = pair["scores"]
    lines = [
        f"{first}: {100 * a:.1f}, {second}: {100 * b:.1f} on {pair['n']:,} common questions about "
        f"{pair['videos']:,} videos",
        comparison_line(pair),
    ]
    if pair["not_common"]:
        lines.append(f"{pair['not_common']} answers have no partner and are left out")
    for field, values in pair["groups"].items():
        for value, row in values.items():
            known = "" if row["p_value"] is None else f"  p = {row['p_holm']:.3g} after Holm"
            said = f"{100 * row['difference']:+6.1f}  n={row['n']}{known}"
            lines.append(f"  {field} {value}: {said}")
    return "\n".join(lines)


def report(
    runs: Folders = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write here; by default into the first run."),
    ] = None,
    compat: e.Compat = None,
    misses: Annotated[
        int, typer.Option("--misses", min=0, metavar="N", help="Wrong answers to show.")
    ] = 60,
    as_json: e.AsJson = False,
) -> int:
    """Write a report of one run or several: Markdown, and one HTML page with plots."""
    if not runs:
        raise UsageError("Name one run or several: av-llava eval report runs/one")
    from av_llava_eval.report import write_report

    output = Output(as_json)
    files = [str(file) for file in write_report(runs, out, compat=compat, misses=misses)]
    if as_json:
        output.data({"schema": SCHEMA, "files": files})
    else:
        for file in files:
            output.answer(file)
    return 0


def verify(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", hidden=True)] = None,
    as_json: e.AsJson = False,
) -> int:
    """Compare our scorers with records that the published ones have scored. 7 if some differ."""
    if folder is None:
        raise UsageError("Name a folder of such records: av-llava eval verify DIR")
    from av_llava_eval.verify import verify as verify_records

    output, found = Output(as_json), verify_records(folder)
    if as_json:
        output.data({"schema": SCHEMA, "tasks": [asdict(v) for v in found]})
    else:
        for v in found:
            prompts = f", {v.prompts} of {v.with_prompt} prompts" if v.with_prompt else ""
            output.answer(f"{v.task}: {v.scores} of {v.records} records{prompts} agree")
            for line in v.differences:
                output.answer(f"  {line}")
    return 0 if all(v.agrees for v in found) else ROWS_FAILED


def _needed(run: Path | None) -> Path:
    if run is None:
        raise UsageError("Name the folder of a run.")
    return run
