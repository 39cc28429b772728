"""At most N visual tokens: exact, known before anything is decoded, no training needed.

Contract: for N tokens and T frames the result is deterministic, never above N with marks counted,
and never shrinks when N grows. Detail is given up in the order in which SF-LLaVA's ablations
(arXiv 2407.15841, tables 4 to 7) say that it costs least:

1. every frame stays in the fast stream, whose grid shrinks from 4x4 to 3x3, 2x2 and 1x1;
2. before each of these steps, slow frames (evenly spaced) get coarser: unpooled while ten or more
   fit, then 1x2, 2x2 and 3x3 windows while five or more fit;
3. then there are fewer slow frames, down to none;
4. only then are frames left out, evenly, down to ``BudgetSettings.min_frames``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from av_llava.aggregators.plan import StreamPlan, item_tokens
from av_llava.aggregators.slow_fast import Aggregator
from av_llava.aggregators.streams import pooled_grid, stream_plan
from av_llava.errors import BudgetError, UsageError
from av_llava.settings import AggregatorSettings, PoolSettings, SelectSettings, StreamSettings

FAST_SIDES = (4, 3, 2, 1)
"""Sides of the fast grid, best first."""


@dataclass(frozen=True)
class Rung:
    """One way to spend tokens: a fast grid, and a slow grid finer than it."""

    fast: PoolSettings
    fast_cost: int
    """Tokens of a frame in the fast stream."""
    slow: PoolSettings | None
    """None where no grid is finer than the fast one."""
    slow_cost: int
    """Tokens that one slow frame adds."""
    wanted: int
    """Slow frames for which the rung is worth taking."""


@dataclass(frozen=True)
class Allocation:
    """How a budget is spent."""

    budget: int
    """Tokens allowed."""
    frames: int
    """Frames shown."""
    rung: Rung
    """Grids of both streams."""
    slow_frames: int
    """Frames in the slow stream."""
    n_tokens: int
    """Tokens used, marks included."""


class BudgetAggregator(Aggregator):
    """Two streams that together stay within ``settings.budget.tokens``."""

    def streams(
        self, frames: int, height: int, width: int, given: Sequence[int] | None
    ) -> tuple[tuple[StreamPlan, ...], str]:
        """Spend the budget; the frames of both streams are evenly spaced."""
        if given is not None:
            raise UsageError("The aggregator 'budget' chooses its slow frames itself.")
        spent = allocate(self.settings, frames, height, width)
        slow_settings = StreamSettings(
            SelectSettings("uniform", count=spent.slow_frames),
            spent.rung.slow or PoolSettings("identity"),
        )
        slow = stream_plan("slow", slow_settings, frames, height, width)
        fast_settings = StreamSettings(
            SelectSettings("uniform", count=spent.frames), spent.rung.fast
        )
        without = frozenset(slow.frames if self.settings.layout == "by_frame" else ())
        fast = stream_plan("fast", fast_settings, frames, height, width, without=without)
        note = f"budget {spent.budget}: {spent.budget - spent.n_tokens} tokens unused"
        if spent.frames < frames:
            note += f", {frames - spent.frames} frames left out"
        return (slow, fast), note


def allocate(settings: AggregatorSettings, frames: int, height: int, width: int) -> Allocation:
    """Spend ``settings.budget`` on a video.

    Raises:
        BudgetError: not even the fewest frames allowed fit, at one token each and their marks.
    """
    budget = settings.budget
    assert budget is not None, "settings of kind budget are checked when they are made"
    end = int(settings.newline == "video")
    room = budget.tokens - end
    rungs = list(_rungs(settings, budget.pool, height, width))
    best = next((rung for rung in rungs if _affordable(rung, frames, room)), None)
    if best is not None:
        rung, slow = _spend(rungs, best, frames, room)
        shown = frames
    else:
        rung = rungs[-1]
        slow = max(_slow_frames(rung, frames, room), 0)
        shown = min(frames, room // rung.fast_cost)
    least = min(budget.min_frames, frames)
    if shown < least:
        needed = least * rung.fast_cost + end
        raise BudgetError(
            f"A budget of {budget.tokens} visual tokens does not hold {least} of {frames} frames. "
            f"The smallest that works is {needed}: use 'budget:{needed}' or more."
        )
    n_tokens = shown * rung.fast_cost + slow * rung.slow_cost + end
    return Allocation(budget.tokens, shown, rung, slow, n_tokens)


def _rungs(settings: AggregatorSettings, mode: str, height: int, width: int) -> Iterator[Rung]:
    """All rungs, best first."""
    slow_pools = (
        (PoolSettings("identity"), 10),
        (PoolSettings(f"pair_{mode}", tail="partial"), 5),
        (PoolSettings(mode, 2, tail="partial"), 5),
        (PoolSettings(mode, 3, tail="partial"), 5),
    )

    def cost(grid: tuple[int, int]) -> int:
        return item_tokens(*grid, settings.newline, settings.frame_end)

    for side in FAST_SIDES:
        fast = PoolSettings("adaptive", size=(side, side))
        fast_grid = pooled_grid(fast, height, width)
        fast_cost = cost(fast_grid)
        finer, coarsest = fast_grid[0] * fast_grid[1], height * width + 1
        for pool, wanted in slow_pools:
            grid = pooled_grid(pool, height, width)
            cells = grid[0] * grid[1]
            if finer < cells < coarsest:
                replaced = fast_cost if settings.layout == "by_frame" else 0
                yield Rung(fast, fast_cost, pool, cost(grid) - replaced, wanted)
                coarsest = cells
        if coarsest > height * width:
            yield Rung(fast, fast_cost, None, 0, 0)


def _affordable(rung: Rung, frames: int, budget: int) -> bool:
    """Whether all frames fit, and as many slow ones as make the rung worth taking."""
    return budget >= frames * rung.fast_cost + min(rung.wanted, frames) * rung.slow_cost


def _slow_frames(rung: Rung, frames: int, budget: int) -> int:
    if rung.slow is None:
        return 0
    return min(frames, (budget - frames * rung.fast_cost) // rung.slow_cost)


def _spend(rungs: list[Rung], best: Rung, frames: int, budget: int) -> tuple[Rung, int]:
    """Take as many slow frames as fit; when all are slow, perhaps fewer and finer ones."""
    slow = _slow_frames(best, frames, budget)
    at = rungs.index(best)
    if slow == frames and at and rungs[at - 1].fast == best.fast:
        finer = rungs[at - 1]
        fewer = _slow_frames(finer, frames, budget)
        if fewer * finer.slow_cost > slow * best.slow_cost:
            return finer, fewer
    return best, slow
