"""How a video's patch features become tokens: pooling, slow and fast streams, marks, budgets.

``build`` makes an aggregator from a name or settings, ``plan`` says exactly what it will give
(without torch), and calling it does it::

    aggregator = build("llava_video_slowfast:k=3")
    plan = aggregator.plan(frames=64, height=24, width=24)
    out = aggregator(features, plan, {"newline": newline, "frame_end": faster_token})
    out.tokens  # [plan.n_tokens, d]

Importing this package costs no torch; pooling imports it.
"""

from __future__ import annotations

from av_llava.aggregators.plan import Span, StreamPlan, TokenPlan
from av_llava.aggregators.presets import PRESETS, settings_for
from av_llava.aggregators.registry import AGGREGATORS, build, settings_of
from av_llava.aggregators.slow_fast import Aggregator

__all__ = [
    "AGGREGATORS",
    "PRESETS",
    "Aggregator",
    "Span",
    "StreamPlan",
    "TokenPlan",
    "build",
    "settings_for",
    "settings_of",
]
