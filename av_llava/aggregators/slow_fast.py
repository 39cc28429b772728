"""The aggregator: plan a video's tokens, pool its features, put them in order.

Contract: ``plan`` is pure Python and exact; ``reduce`` pools each frame (and then over time);
``assemble`` orders the streams and inserts the marks. No learned weights inside: the marks come
from outside. Slow/fast streams follow SF-LLaVA (arXiv 2407.15841) and LLaVA-Video (2410.02713).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, SupportsFloat, SupportsIndex

from av_llava.aggregators.plan import StreamPlan, TokenPlan
from av_llava.aggregators.streams import stream_plan
from av_llava.errors import BudgetError, UsageError
from av_llava.settings import AggregatorSettings

if TYPE_CHECKING:
    from torch import Tensor

    from av_llava.aggregators.tokens import AggregatedTokens, Reduced


class Aggregator:
    """Turns the patch features of one video into tokens.

    To make another kind, override :meth:`streams` (which frames, pooled how) and register the
    class in ``aggregators.AGGREGATORS``.

    Args:
        settings: which streams, layout and marks.
    """

    def __init__(self, settings: AggregatorSettings) -> None:
        self.settings = settings

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings!r})"

    @property
    def marks_needed(self) -> tuple[str, ...]:
        """Names of the learned vectors that the settings insert: newline, frame_end."""
        newline = ("newline",) if self.settings.newline != "none" else ()
        return newline + (("frame_end",) if self.settings.frame_end else ())

    def check_marks(self, available: Iterable[str]) -> None:
        """Raise unless every mark that the settings insert is available."""
        have = set(available)
        for name in self.marks_needed:
            if name not in have:
                from av_llava.aggregators.newline import missing_mark

                raise UsageError(missing_mark(name, have))

    def plan(
        self,
        frames: SupportsIndex,
        height: SupportsIndex,
        width: SupportsIndex,
        times: Iterable[SupportsFloat] | None = None,
        *,
        slow_frames: Sequence[SupportsIndex] | None = None,
        limit: int | None = None,
        name: str = "the video",
    ) -> TokenPlan:
        """Plan one video.

        Args:
            frames: number of frames given.
            height: rows of patches of a frame, where pooling stands.
            width: columns of patches.
            times: time of each frame in seconds, not decreasing; counts never depend on it.
            slow_frames: frames of the slow stream, if its selector is ``given``.
            limit: most tokens allowed.
            name: what messages call the video.

        Raises:
            UsageError: no frames, a grid that cannot be pooled, times that do not fit.
            BudgetError: more tokens than ``limit``, or a budget too small for any plan.
        """
        frames, height, width = (operator.index(n) for n in (frames, height, width))
        if frames < 1:
            raise UsageError(f"There are no frames in {name}: at least one is needed.")
        if height < 1 or width < 1:
            raise UsageError(f"The patch grid of {name} is {height}x{width}: it has no patches.")
        given = None if slow_frames is None else tuple(operator.index(f) for f in slow_frames)
        streams, note = self.streams(frames, height, width, given)
        plan = TokenPlan(
            frames=frames,
            height=height,
            width=width,
            streams=streams,
            layout=self.settings.layout,
            newline=self.settings.newline,
            frame_end=self.settings.frame_end,
            times=_checked_times(times, frames, name),
            note=note,
        )
        if not any(stream.n_items for stream in streams):
            raise UsageError(f"The settings select none of the {frames} frames of {name}.")
        if limit is not None and plan.n_tokens > limit:
            raise BudgetError(
                f"The {frames} frames of {name} make {plan.n_tokens} tokens, but only {limit} fit. "
                f"Use the aggregator 'budget:{limit}', or give fewer frames."
            )
        return plan

    def streams(
        self, frames: int, height: int, width: int, given: Sequence[int] | None
    ) -> tuple[tuple[StreamPlan, ...], str]:
        """Choose the streams of a plan (slow before fast), and say why in a note."""
        settings = self.settings
        if settings.slow is None:
            raise UsageError(f"An aggregator of kind {settings.kind} needs 'slow' settings.")
        if settings.fast is None:
            single = stream_plan("single", settings.slow, frames, height, width, given=given)
            return (single,), ""
        slow = stream_plan("slow", settings.slow, frames, height, width, given=given)
        without = frozenset(slow.frames if settings.layout == "by_frame" else ())
        fast = stream_plan("fast", settings.fast, frames, height, width, without=without)
        return (slow, fast), ""

    def reduce(self, features: Tensor, plan: TokenPlan) -> Reduced:
        """Pool.

        Args:
            features: [T, h, w, d], or [T, h * w, d] in raster order.
            plan: made by :meth:`plan` for these T, h, w.
        """
        return self.reduce_chunks([features], plan)

    def reduce_chunks(self, chunks: Iterable[Tensor], plan: TokenPlan) -> Reduced:
        """Pool features that come in pieces of consecutive frames; equal to pooling them at once.

        Only pooled patches are kept, so a long video needs memory for one piece at a time.
        """
        from av_llava.aggregators.reduce import reduce_chunks

        return reduce_chunks(chunks, plan)

    def assemble(
        self, reduced: Reduced, plan: TokenPlan, marks: Mapping[str, Tensor] | None = None
    ) -> AggregatedTokens:
        """Order the pooled patches and insert the marks.

        Args:
            reduced: what :meth:`reduce` returned, perhaps projected since.
            plan: the same plan.
            marks: vectors [d], at least those in :attr:`marks_needed`.
        """
        from av_llava.aggregators.newline import assemble
        from av_llava.aggregators.tokens import AggregatedTokens

        return AggregatedTokens(assemble(reduced.streams, plan, marks), plan)

    def __call__(
        self, features: Tensor, plan: TokenPlan, marks: Mapping[str, Tensor] | None = None
    ) -> AggregatedTokens:
        """Pool and assemble: features [T, h, w, d] to ``.tokens`` [n, d] and ``.meta``."""
        return self.assemble(self.reduce(features, plan), plan, marks)


def _checked_times(
    times: Iterable[SupportsFloat] | None, frames: int, name: str
) -> tuple[float, ...] | None:
    """Return frame times as floats; they must be finite, as many as frames, not decreasing."""
    if times is None:
        return None
    seconds = tuple(float(time) for time in times)
    if len(seconds) != frames:
        raise UsageError(f"There are {frames} frames in {name}, but {len(seconds)} frame times.")
    for i, time in enumerate(seconds):
        if not math.isfinite(time):
            raise UsageError(f"The time of frame {i} of {name} is {time}, not a number of seconds.")
        if i and time < seconds[i - 1]:
            raise UsageError(
                f"Frame times of {name} must not decrease, but frame {i} is at {time} s after "
                f"{seconds[i - 1]} s."
            )
    return seconds
