"""Mini-benchmarks: a few invented questions in the exact form of each benchmark, with real media."""

from __future__ import annotations

from eval_mini import audio_visual, choices, open_ended
from eval_mini.form import Media, Mini

MINIS: list[Mini] = [*choices.MINIS, *open_ended.MINIS, *audio_visual.MINIS]
"""At least one per task; several where a benchmark is found in several layouts."""

__all__ = ["MINIS", "Media", "Mini"]
