"""Keep N patches chosen without looking: what every cleverer reducer has to beat.

Contract: no pooling, raster and time order kept, the number of tokens exact and known before
anything is decoded. ``random`` draws with a seed, ``uniform`` takes evenly spaced patches of the
flattened video. Random pruning is a strong baseline (UniPruneBench, arXiv 2511.02650).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from av_llava.aggregators.plan import StreamPlan
from av_llava.aggregators.slow_fast import Aggregator
from av_llava.errors import BudgetError, UsageError
from av_llava.settings import PoolSettings


class PruneAggregator(Aggregator):
    """Keeps ``settings.prune.tokens`` tokens, marks counted, or all if there are fewer."""

    def streams(
        self, frames: int, height: int, width: int, given: Sequence[int] | None
    ) -> tuple[tuple[StreamPlan, ...], str]:
        """Choose the patches; every frame keeps its marks, if the settings ask for any."""
        settings = self.settings
        if settings.prune is None:
            raise UsageError(f"The aggregator {settings.kind!r} needs 'prune' settings.")
        if given is not None:
            raise UsageError(f"The aggregator {settings.kind!r} has no slow stream.")
        per_frame = (settings.newline == "frame") + settings.frame_end
        marks = frames * per_frame + (settings.newline == "video")
        room = settings.prune.tokens - marks
        if room < 1:
            raise BudgetError(
                f"{settings.prune.tokens} tokens leave no room for patches beside the {marks} "
                f"marks of {frames} frames. Use '{settings.kind}:{marks + 1}' or more."
            )
        total = frames * height * width
        count = min(room, total)
        if settings.kind == "random":
            kept = sorted(random.Random(settings.prune.seed).sample(range(total), count))
        else:
            kept = [(2 * i + 1) * total // (2 * count) for i in range(count)]
        stream = StreamPlan(
            name="single",
            frames=tuple(range(frames)),
            groups=None,
            pool=PoolSettings("identity"),
            rows=height,
            cols=width,
            kept=tuple(kept),
        )
        return (stream,), f"{settings.kind} {settings.prune.tokens}: no pooling"
