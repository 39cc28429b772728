"""A run in the shape of Video-MME: three questions about each film, 64 frames, eight new tokens.

Against asking each question from the file, as harnesses do: there every question decodes, encodes
and prefills its film again. The model is that of the benchmark of sessions. What the harness itself
costs is the time outside model and decoder, which here work in line; memory is that of a process
that runs ten thousand samples with a stand-in for the model.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from av_llava_eval.answerer import AVLlavaAnswerer, MediaSettings, Reply
from av_llava_eval.records import RunFolder
from av_llava_eval.runner import RunSettings
from av_llava_eval.runner import run as run_task
from av_llava_eval.sample import Sample
from av_llava_eval.task import Task
from bench.measure import Row, Timing, check, in_child, race, rows_of

TITLE = "Three questions about each film"
RATIO = "ratio to the first column"
FILE, OURS, ALONE = "each question from the file", "av-llava eval", "model and decoder alone"
SPEEDUP, OVERHEAD, GROWTH = 2.5, 1.02, 1.05
NEW_TOKENS, SAMPLES, EARLY = 8, 10_000, 1_000
ONCE: Any = {"rounds": 1, "min_rounds": 1, "warm_up": False}
QUESTIONS = (
    "What happens at the beginning?",
    "How many people are there?",
    "What colour is the car that comes from the left?",
)
OPTIONS = ("One.", "Two.", "Three.", "None.")


class Films(Task):
    """Questions about numbered films."""

    name = "films"
    version = "1"

    def __init__(self, n_films: int, source: Path) -> None:
        self.n_films, self.source = n_films, source

    def docs(self, root: Path, split: str) -> Any:
        return ({"film": f, "question": q} for f in range(self.n_films) for q in QUESTIONS)

    def sample(self, doc: Any, index: int, root: Path) -> Sample:
        return Sample(
            id=str(index),
            group=str(doc["film"]),
            question=doc["question"],
            options=OPTIONS,
            answer="A",
            video=self.source,
        )


class Timed(AVLlavaAnswerer):
    """Counts the seconds in which model and decoder work."""

    seconds = 0.0

    def _timed(self, work: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*args)
        finally:
            self.seconds += time.perf_counter() - started

    def fingerprint(self) -> dict[str, Any]:
        return self._timed(super().fingerprint)

    def open(self, *args: Any) -> Any:
        return self._timed(super().open, *args)

    def answer(self, *args: Any) -> Any:
        return self._timed(super().answer, *args)


class StandIn:
    """Answers at once, with an account as long as a real one."""

    def __init__(self) -> None:
        self.n, self.sizes = 0, {}  # type: ignore[var-annotated]

    def fingerprint(self) -> dict[str, Any]:
        return {"model": "none"}

    def open(self, clip: Any, arms: Any, lenders: Any) -> Any:
        return clip

    def answer(self, opened: Any, arm: Any, prompts: Sequence[str], n_new: int) -> list[Reply]:
        self.n += len(prompts)
        if self.n % EARLY < len(prompts):
            self.sizes[self.n // EARLY * EARLY] = resident_mb()
        used = {"frames": 64, "frame_times_s": [i * 4.6875 for i in range(64)]}
        return [Reply("A.", used, {"generate": 0.0}) for _ in prompts]


def run(quick: bool) -> list[Row]:
    """All rows."""
    from bench.session import build_model
    from bench.video import film

    model, source = build_model(quick), film(quick)
    frames, n_films = (4, 2) if quick else (64, 2)
    task = Films(n_films, source)
    media = MediaSettings(frames=frames)
    texts: dict[str, list[str]] = {}
    shares: list[float] = []

    def from_the_file() -> None:
        texts[FILE] = [
            model.ask(s.video, task.prompt(s), frames=frames, max_new_tokens=NEW_TOKENS).text
            for s in task.load(source.parent)
        ]

    def harness() -> None:
        texts[OURS] = _run(task, AVLlavaAnswerer(model, media), workers=2)

    def in_line() -> None:
        timed = Timed(model, media)
        started = time.perf_counter()
        _run(task, timed, workers=0)
        shares.append((time.perf_counter() - started) / timed.seconds)

    model.ask(source, QUESTIONS[0], frames=2, max_new_tokens=1)  # what only the first call costs
    timings = race({FILE: from_the_file, OURS: harness}, **ONCE)
    check(texts[FILE] == texts[OURS], f"{texts[FILE]} from the file, {texts[OURS]} in a run")
    each = {name: timing.divided(len(texts[OURS])) for name, timing in timings.items()}
    size = sum(p.numel() for p in model.model.parameters()) / 1e6
    case = f"{n_films} films, {frames} frames, {size:.0f} M weights; a question"
    rows = rows_of(case, each, FILE, "speedup", {OURS: SPEEDUP})
    whole = race({OURS: in_line}, **ONCE)[OURS].divided(len(texts[OURS]))
    (share,) = shares
    alone = Timing(*(t / share for t in (whole.best_s, whole.median_s, whole.cpu_s)))
    both = {ALONE: alone, OURS: whole}
    rows += rows_of("decoding in line; a question", both, ALONE, "cost", {OURS: OVERHEAD})
    return rows + _memory_rows(quick)


def _run(task: Task, answerer: Any, workers: int) -> list[str]:
    """Run into a new folder; the answers in the order of the samples."""
    with tempfile.TemporaryDirectory() as folder:
        settings = RunSettings(max_new_tokens=NEW_TOKENS, workers=workers)
        done = run_task(task, Path(folder), Path(folder) / "run", lambda: answerer, settings)
        check(done.complete and not done.failed, f"{done}")
        answers = RunFolder(Path(folder) / "run").answers()
        return [row["raw"] for row in answers.values()]


def _memory_rows(quick: bool) -> list[Row]:
    samples = 3 * EARLY if quick else SAMPLES
    early, late = in_child("bench.eval", [str(samples)])
    case = f"memory of the harness, {samples:,} samples"
    return [
        Row(case, f"after {EARLY:,} samples", early, early, "MB", 1.0, "cost"),
        Row(case, OURS, late, late, "MB", late / early, "cost", GROWTH),
    ]


def resident_mb() -> float:
    """Memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main(samples: str) -> None:
    """Run many samples without a model; print the memory early and late."""
    answerer = StandIn()
    task = Films(int(samples) // len(QUESTIONS) + 1, Path("film.mp4"))
    with tempfile.TemporaryDirectory() as folder:
        run_task(task, folder, Path(folder) / "run", lambda: answerer, RunSettings())
    sizes = [answerer.sizes[n] for n in sorted(answerer.sizes)]
    print(json.dumps([sizes[0], sizes[-1]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
