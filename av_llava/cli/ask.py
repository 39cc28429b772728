"""``av-llava ask``: one question about some media, or a file of questions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from av_llava.answers import Answer
from av_llava.cli import batch as batches
from av_llava.cli import engine, inputs
from av_llava.cli import options as o
from av_llava.cli.inputs import Inputs
from av_llava.cli.options import Loading, Request
from av_llava.cli.output import Output, configure_logging
from av_llava.errors import UsageError

if TYPE_CHECKING:
    from av_llava.inference import AVLlava
    from av_llava.media import MediaInfo


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(hidden=True),  # the text below says more than a line of a list can
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p", "--prompt", metavar="TEXT", help="The question; all other words are then media."
        ),
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, also when it fails.")
    ] = False,
    show_plan: Annotated[
        bool,
        typer.Option(
            "--show-plan", help="Print frames and tokens of the request, without loading weights."
        ),
    ] = False,
    batch: Annotated[
        Path | None,
        typer.Option(
            "--batch",
            metavar="FILE.jsonl",
            help='Answer rows {"id": …, "media": [paths], "prompt": …}, one JSON object a line.',
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="OUT.jsonl",
            help="Append the batch's answers here. Rows whose id is in it already are skipped, "
            "so that an interrupted run goes on where it was.",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", min=1, metavar="N", help="Rows answered together."),
    ] = 1,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try rows of --out again that failed.")
    ] = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> int:
    """Ask a question about videos, sounds and pictures.

    \b
    av-llava ask clip.mp4 "What happens after the bell?"
    av-llava ask talk.mp4 --start 1:30 --end 2:00 --frames 16 "What is on the slide?"
    av-llava ask before.jpg after.jpg "What has changed?" --json
    echo "Who speaks?" | av-llava ask talk.mp4
    av-llava ask --batch questions.jsonl --out answers.jsonl

    MEDIA are videos, sounds and pictures: files, folders of frames, http addresses. The last word
    is the prompt. Without one, or with - in its place, it is read from standard input.

    The answer is printed on stdout, as it comes on a terminal; what was used to make it, on stderr.
    """
    output = Output(as_json, quiet)
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
    if batch is not None:
        if words or show_plan:
            what = "--show-plan" if show_plan else f"{words[0]!r}" if words else ""
            raise UsageError(f"--batch takes media and prompts from its file; leave out {what}.")
        settings = batches.Settings(batch, out, batch_size, retry_failed, prompt)
        return batches.run(settings, loading, request, output)
    for flag, given in (("--out", out is not None), ("--retry-failed", retry_failed)):
        if given:
            raise UsageError(f"{flag} belongs to --batch; redirect stdout to keep one answer.")
    asked = inputs.split(words or [], prompt)
    request.check(has_media=bool(asked.media))
    found = inputs.check_media(asked.media, request.audio)
    engine.check_model(loading.model)
    if show_plan:
        return _show_plan(loading, asked, request, output)
    _check_fit(loading, asked, request)
    loaded = load(loading, output)
    answer = _answer(loaded, asked, request, found, output)
    conclude(answer, output)
    return 0


def load(loading: Loading, output: Output) -> AVLlava:
    """Load the model, and say so if it is a random one."""
    loaded = engine.load(loading)
    if loaded.is_random:
        output.warn(engine.RANDOM)
    return loaded


def conclude(answer: Answer, output: Output) -> None:
    """Tell what was used for an answer, and what was wrong with the media."""
    for warning in dict.fromkeys(answer.warnings):
        output.warn(warning)
    if answer.finish_reason == "length":
        n = answer.usage.completion_tokens
        output.note(f"note: the answer was cut after {n} tokens; --max-tokens sets the limit.")
    output.note(answer.used())


def _answer(
    loaded: AVLlava, asked: Inputs, request: Request, found: dict[str, MediaInfo], output: Output
) -> Answer:
    """Answer and print: piece by piece for a person, whole otherwise."""
    media = list(asked.media)
    with engine.memory_guard(loaded, request, found.values()):
        if not output.streams:
            answer = loaded.ask(media, asked.prompt, **request.given())
            if output.as_json:
                output.data({**answer.to_dict(), "model_is_random": loaded.is_random})
            else:
                output.answer(answer.text)
            return answer
        stream = loaded.stream(media, asked.prompt, **request.given())
        for _ in output.pieces(stream):
            pass
    assert stream.answer is not None, "a stream that has ended holds its answer"
    return stream.answer


def _check_fit(loading: Loading, asked: Inputs, request: Request) -> None:
    """Plan before weights are loaded, which can take minutes: what does not fit is told now.

    The built-in model loads at once, and addresses would be fetched twice.
    """
    if loading.model is None or any(inputs.is_address(word) for word in asked.media):
        return
    logging.disable(logging.WARNING)  # the answer will say it again
    try:
        engine.plan(loading, asked.media, asked.prompt, request)
    finally:
        logging.disable(logging.NOTSET)


def _show_plan(loading: Loading, asked: Inputs, request: Request, output: Output) -> int:
    plan = engine.plan(loading, asked.media, asked.prompt, request)
    if loading.model is None:
        output.note("This is the plan of the built-in tiny model; name another with --model.")
    if output.as_json:
        output.data(plan.to_dict())
    else:
        output.answer(plan.describe())
    return 0
