"""Time contestants side by side: interleaved repeats, minima and medians, ratios with bounds.

Contract: contestants take turns, so that a busy moment hits all of them; a slow one drops out
after its share of time, but not before ``min_rounds``. Ratios are of minima, which a busy machine
disturbs least. Results are dropped at once, so that one contestant's memory serves the next.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[1]

P = ParamSpec("P")
T = TypeVar("T")

Contestants = dict[str, Callable[[], Any]]
"""What takes turns, by name."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant's repeats."""

    best_s: float
    median_s: float
    cpu_s: float
    """Least processor time, all threads together."""

    def divided(self, n: int) -> Timing:
        """The same for one of ``n`` frames or questions."""
        return Timing(self.best_s / n, self.median_s / n, self.cpu_s / n)


@dataclass(frozen=True)
class Row:
    """One contestant in one case."""

    case: str
    contestant: str
    best: float
    """Least of all repeats, in ``unit``."""
    median: float
    unit: str
    """s, MB or M tokens."""
    ratio: float
    """To the reference contestant of the case, see ``meaning``."""
    meaning: str
    """cost: this one's value over the reference's; speedup: the reference's over this one's."""
    bound: float | None = None
    """Most allowed cost, or least allowed speedup; None for contestants without a target."""
    cpu_s: float | None = None
    """Least processor time in seconds, all threads together."""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.bound is None:
            return None
        return self.ratio <= self.bound if self.meaning == "cost" else self.ratio >= self.bound


def race(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    seconds: float = 1.0,
    min_rounds: int = 3,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Time contestants in turns.

    Args:
        contestants: functions by name; what they return is dropped.
        rounds: most repeats of each.
        seconds: time after which a contestant drops out.
        min_rounds: repeats that each gets in any case.
        warm_up: run each once before; this counts only for one that takes its share of time.
    """
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for done in range(-1 if warm_up else 0, rounds):
        for name, run in contestants.items():
            if done == 0 and warm_up and sum(wall[name]) < seconds:
                wall[name].clear()
                cpu[name].clear()
            if len(wall[name]) >= min_rounds and sum(wall[name]) > seconds:
                continue
            cpu_start, start = time.process_time(), time.perf_counter()
            run()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return {
        name: Timing(min(times), statistics.median(times), min(cpu[name]))
        for name, times in wall.items()
    }


def single_threaded(run: Callable[P, T]) -> Callable[P, T]:
    """Run a function with one PyTorch thread, so that processor time is all there is."""

    @functools.wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return wrapped


def rows_of(
    case: str,
    timings: Mapping[str, Timing],
    reference: str,
    meaning: str = "cost",
    bounds: Mapping[str, float] | None = None,
) -> list[Row]:
    """Make rows whose ratios are to the contestant ``reference``.

    Args:
        case: what was done.
        timings: as :func:`race` gives them.
        reference: its ratio is 1.
        meaning: cost or speedup.
        bounds: targets by contestant.
    """
    base = timings[reference].best_s
    rows = []
    for name, timing in timings.items():
        ratio = timing.best_s / base if meaning == "cost" else base / timing.best_s
        bound = (bounds or {}).get(name)
        times = (timing.best_s, timing.median_s)
        rows.append(Row(case, name, *times, "s", ratio, meaning, bound, timing.cpu_s))
    return rows


def check(condition: bool, what: str) -> None:
    """Refuse to compare contestants that do not do the same."""
    if not condition:
        raise AssertionError(f"The contestants do not agree, so nothing is compared: {what}")


def in_child(module: str, arguments: Iterable[str], env: Mapping[str, str] | None = None) -> list:
    """Run ``python -m module arguments`` and return the JSON list of its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    data: list = json.loads(done.stdout.splitlines()[-1])
    return data


def print_rows(rows: Iterable[Row]) -> None:
    """Hand rows to the parent process."""
    print(json.dumps([asdict(row) for row in rows]))
