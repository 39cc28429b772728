"""``av-llava eval run``: ask a model every question of a benchmark.

Contract: what can be wrong without a model is said before torch is imported. Progress goes to
stderr, the scores to stdout, both into the folder of the run. Among several processes only the one
that finds the run complete tells the scores. Exit code 7: more answers failed than were allowed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from av_llava.answers import SCHEMA
from av_llava.cli import engine
from av_llava.cli import eval_options as e
from av_llava.cli import options as o
from av_llava.cli.eval_scores import keep_scores, lines_of
from av_llava.cli.failures import ROWS_FAILED
from av_llava.cli.output import Output, configure_logging
from av_llava.errors import UsageError

if TYPE_CHECKING:
    from av_llava_eval.answerer import Answerer, MediaSettings
    from av_llava_eval.experiment import Arm
    from av_llava_eval.runner import Outcome, Progress
    from av_llava_eval.sharding import Place

_TELL_EVERY_S = 30.0


def command(
    task: e.Task,
    data: e.Data,
    out: e.Out = None,
    split: e.Split = None,
    model: o.Model = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    attn: o.Attn = "auto",
    quantize: o.Quantize = None,
    base: o.Base = None,
    frames: o.Frames = None,
    fps: o.Fps = None,
    audio: e.Audio = "auto",
    aggregator: e.Aggregators = None,
    max_visual_tokens: e.Budgets = None,
    text_only: e.TextOnly = False,
    audio_only: e.AudioOnly = False,
    style: e.Style = None,
    system: o.System = None,
    time_instruction: o.TimeInstruction = None,
    backend: o.Backend = None,
    max_tokens: e.NewTokens = None,
    limit: e.Limit = None,
    questions_at_once: e.AtOnce = 8,
    workers: e.Workers = 2,
    ahead: e.Ahead = 4,
    decode_timeout: e.DecodeSeconds = 120.0,
    decode_memory: e.DecodeMemory = 16.0,
    skip_bad_rows: e.SkipBadRows = False,
    no_retry_failed: e.NoRetry = False,
    max_failures: e.MaxFailures = 0.01,
    compat: e.Compat = None,
    report: e.Report = False,
    as_json: e.AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> int:
    """Ask a model every question of a benchmark, and score the answers.

    \b
    av-llava eval run --task videomme --data DIR --model CHECKPOINT --out runs/one
    av-llava eval run --task worldsense --data DIR --model CHECKPOINT --audio on,off,swap
    torchrun --nproc-per-node 8 -m av_llava.cli eval run --task mvbench --data DIR ...

    The same command goes on where it was interrupted, with any number of processes. See
    docs/evaluation.md.
    """
    output = Output(as_json, quiet)
    configure_logging(verbose, output)
    from av_llava_eval.experiment import arms_of
    from av_llava_eval.runner import RunSettings, run
    from av_llava_eval.sharding import place_of
    from av_llava_eval.task import check_compat, get_task

    check_compat(compat)
    if report:
        from av_llava_eval.report.plots import need_matplotlib

        need_matplotlib()
    place = place_of(os.environ)
    loading = o.Loading(model, device, dtype, attn, quantize, base)
    loading.check()
    engine.check_model(model)
    chosen = get_task(task)
    media = _media_settings(frames, fps, backend, time_instruction, system, questions_at_once)
    media = _limited(media, decode_timeout, decode_memory)
    settings = RunSettings(
        split=split,
        style=style,
        arms=arms_of(
            audio=e.words("--audio", audio),
            aggregators=e.words("--aggregator", aggregator),
            max_visual_tokens=e.numbers("--max-visual-tokens", max_visual_tokens),
            text_only=text_only,
            audio_only=audio_only,
        ),
        max_new_tokens=max_tokens,
        limit=limit,
        retry_failed=not no_retry_failed,
        skip_bad_rows=skip_bad_rows,
        workers=workers,
        ahead=ahead,
    )
    folder = out or Path("runs") / chosen.name
    outcome = run(
        chosen,
        data,
        folder,
        lambda: _answerer(loading, place, media, settings.arms, output),
        settings,
        place=place,
        about=_about(loading),
        on_progress=_teller(output, place),
    )
    return _finish(folder, outcome, max_failures, compat, place, report, output)


def _about(loading: o.Loading) -> dict[str, str]:
    """How the model was asked for, for readers of a report."""
    given = {"model": loading.model or "the model that comes with av-llava", "base": loading.base}
    given |= {"device": loading.device, "dtype": loading.dtype, "attn": loading.attn}
    given |= {"quantize": loading.quantize}
    return {k: str(v) for k, v in given.items() if v is not None}


def _media_settings(
    frames: int | None,
    fps: float | None,
    backend: str | None,
    time_instruction: bool | None,
    system: str | None,
    questions_at_once: int,
) -> MediaSettings:
    from av_llava.settings import SamplingSettings
    from av_llava_eval.answerer import MediaSettings

    SamplingSettings(frames=frames, fps=fps, backend=backend or "auto")  # checks them
    return MediaSettings(frames, fps, backend, time_instruction, system, questions_at_once)


def _limited(media: MediaSettings, seconds: float, gib: float) -> MediaSettings:
    limits = media.limits.replace(max_decode_s=seconds, max_worker_bytes=int(gib * 2**30))
    return replace(media, limits=limits)


def _answerer(
    loading: o.Loading,
    place: Place,
    media: MediaSettings,
    arms: Sequence[Arm],
    output: Output,
) -> Answerer:
    """Load the model, on the GPU of this process.

    Raises:
        UsageError: sound is insisted on, but the model has no ears.
    """
    from av_llava_eval.answerer import AVLlavaAnswerer

    if loading.device == "auto" and place.world > 1:
        import torch

        if torch.cuda.is_available():
            number = place.local_rank % torch.cuda.device_count()
            loading = replace(loading, device=f"cuda:{number}")
    loaded = engine.load(loading)
    if loaded.is_random and place.rank == 0:
        output.warn(engine.RANDOM)
    deaf = loaded.processor.config.audio_config is None
    if deaf and any(arm.sound in ("on", "swap") for arm in arms):
        raise UsageError(
            "This model has no audio tower, so that it cannot be asked with sound: use --audio off."
        )
    return AVLlavaAnswerer(loaded, media)


def _teller(output: Output, place: Place) -> Callable[[Progress], None]:
    """Show progress: in place to a person, a line from time to time in a log."""
    last = [-_TELL_EVERY_S]
    name = f"[{place.name}] " if place.world > 1 else ""

    def tell(progress: Progress) -> None:
        if output.shows_progress and place.world == 1:
            sys.stderr.write(f"\r{progress_line(progress)}\x1b[K")
            sys.stderr.write("\n" if progress.kept + progress.done >= progress.total else "")
            sys.stderr.flush()
        elif time.monotonic() - last[0] >= _TELL_EVERY_S or progress.left_s == 0:
            last[0] = time.monotonic()
            output.note(name + progress_line(progress))

    return tell


def progress_line(progress: Progress) -> str:
    """``120 of 900 answers · 2.1/s · 3 failed (missing 3) · 6 min left``."""
    parts = [f"{progress.kept + progress.done:,} of {progress.total:,} answers"]
    if progress.done:
        parts.append(f"{progress.per_s:.3g}/s")
    if progress.failures:
        kinds = ", ".join(f"{kind} {n}" for kind, n in progress.failures.most_common())
        parts.append(f"{progress.failures.total()} failed ({kinds})")
    if progress.left_s:
        parts.append(f"{_duration(progress.left_s)} left")
    return " · ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _finish(
    folder: Path,
    outcome: Outcome,
    max_failures: float,
    compat: str | None,
    place: Place,
    report: bool,
    output: Output,
) -> int:
    """Score a complete run, write a report if asked to; say what failed."""
    if not outcome.complete:
        output.note(f"{folder}: this process is done; others have answers to give.")
        return 0
    found = keep_scores(folder, compat)
    if output.as_json:
        output.data({"schema": SCHEMA, "folder": str(folder), **found})
    else:
        for line in lines_of(found):
            output.answer(line)
        if not report:
            output.note(
                f"Answers and scores are in {folder}; av-llava eval report {folder} shows them."
            )
    if report:
        from av_llava_eval.report import write_report

        _, page = write_report([folder], compat=compat)
        output.note(f"Answers, scores and report are in {folder}: {page}")
    if outcome.failed_share > max_failures:
        output.warn(
            f"{outcome.failed} of {outcome.answers} answers failed and count as wrong; the same "
            f"command tries them again. More than {max_failures:.2%} is exit code {ROWS_FAILED}."
        )
        return ROWS_FAILED
    return 0
