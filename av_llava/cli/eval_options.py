"""The flags of ``av-llava eval``, and what they mean to the harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from av_llava.errors import UsageError

Task = Annotated[
    str,
    typer.Option(
        "--task", metavar="NAME|FILE", help="Name from `eval list`, or a Python file of your own."
    ),
]
Data = Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder of the benchmark.")]
Split = Annotated[
    str | None,
    typer.Option("--split", metavar="NAME", help="By default the task's first."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Folder of the run; the same command goes on where it stopped. By default runs/TASK.",
    ),
]
Style = Annotated[
    str | None,
    typer.Option("--style", metavar="NAME", help="Wording of the prompt; lmms is lmms-eval's."),
]
Audio = Annotated[
    str,
    typer.Option(
        "--audio",
        metavar="LIST",
        help="Some of auto, on, off, swap (the sound of another video), with commas between: one "
        "column each.",
    ),
]
Aggregators = Annotated[
    str | None,
    typer.Option(
        "--aggregator",
        metavar="LIST",
        help="Ways to pool frames, with commas between: one column each; own is the model's.",
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        "--max-visual-tokens",
        metavar="LIST",
        help="Upper bounds of the visual tokens, with commas between: one column each.",
    ),
]
TextOnly = Annotated[
    bool, typer.Option("--text-only", help="Also ask without any media, as a blind baseline.")
]
AudioOnly = Annotated[bool, typer.Option("--audio-only", help="Also ask with the sound alone.")]
NewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", min=1, metavar="N", help="Longest answer, in tokens; by default the task's."
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, metavar="N", help="Only the first N questions, for a trial."),
]
AtOnce = Annotated[
    int,
    typer.Option(
        "--questions-at-once",
        min=1,
        metavar="N",
        help="Questions of one video that are answered as a batch.",
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers", min=0, metavar="N", help="Decoders that work ahead; 0 decodes in line."
    ),
]
Ahead = Annotated[
    int, typer.Option("--ahead", min=1, metavar="N", help="Videos that may wait in memory.")
]
DecodeSeconds = Annotated[
    float,
    typer.Option(
        "--decode-timeout", min=0.001, metavar="SECONDS", help="Longest time to decode one file."
    ),
]
DecodeMemory = Annotated[
    float,
    typer.Option(
        "--decode-memory", min=0.01, metavar="GIB", help="Memory that decoding one file may take."
    ),
]
SkipBadRows = Annotated[
    bool,
    typer.Option(
        "--skip-bad-rows", help="Go on without annotation rows that cannot be used; counts them."
    ),
]
NoRetry = Annotated[
    bool, typer.Option("--no-retry-failed", help="Do not ask again what failed before.")
]
MaxFailures = Annotated[
    float,
    typer.Option(
        "--max-failures",
        min=0.0,
        max=1.0,
        metavar="SHARE",
        help="Exit code 7 when a larger share of the answers failed.",
    ),
]
Compat = Annotated[
    str | None,
    typer.Option(
        "--compat", metavar="NAME", help="Also score by another harness's rules: lmms (lmms-eval)."
    ),
]
Report = Annotated[
    bool, typer.Option("--report", help="Also write report.md and report.html, as `eval report`.")
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="URL",
        help="Have open answers judged by the model behind this OpenAI-compatible address.",
    ),
]
JudgeModel = Annotated[
    str | None, typer.Option("--judge-model", metavar="NAME", help="Model of the judge.")
]
JudgeKey = Annotated[
    str | None,
    typer.Option(
        "--judge-key-env", metavar="NAME", help="Environment variable that holds the judge's key."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def words(flag: str, text: str | None) -> tuple[str, ...]:
    """The values of a list with commas; a comma in parentheses belongs to a value.

    Raises:
        UsageError: an empty value.
    """
    if text is None:
        return ()
    out, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth <= 0:
            out.append("")
        else:
            out[-1] += letter
    found = tuple(word.strip() for word in out)
    if not all(found):
        raise UsageError(f"{flag} has an empty value: {text!r}.")
    return found


def numbers(flag: str, text: str | None) -> tuple[int, ...]:
    """As :func:`words`, whole numbers.

    Raises:
        UsageError: a value is none.
    """
    found = words(flag, text)
    for word in found:
        if not (word.isascii() and word.isdigit()):
            raise UsageError(f"{flag} takes whole numbers, not {word!r}.")
    return tuple(int(word) for word in found)
