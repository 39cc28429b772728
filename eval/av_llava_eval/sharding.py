"""Which process answers which video.

Contract: a function of the samples and the number of processes only, never of what is done
already, so that processes that start at different times agree. A group is never split.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from av_llava.errors import UsageError


@dataclass(frozen=True)
class Place:
    """This process among those of a run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Number on its machine, which chooses the GPU."""
    local_world: int = 1

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise UsageError(
                f"RANK is {self.rank} and WORLD_SIZE {self.world}: ranks go from 0 to one less."
            )

    @property
    def name(self) -> str:
        """For files: ``0of1``."""
        return f"{self.rank}of{self.world}"


def place_of(environment: Mapping[str, str]) -> Place:
    """Read what torchrun, accelerate and most launchers set; one process where they set nothing.

    Raises:
        UsageError: a value is no whole number, or the rank does not fit.
    """
    found = {}
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    for name, default in defaults.items():
        text = environment.get(name, str(default))
        if not text.isascii() or not text.isdigit():
            raise UsageError(f"The environment variable {name} is {text!r}, not a whole number.")
        found[name] = int(text)
    return Place(found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"])


def assign(questions: Mapping[str, int], world: int) -> dict[str, int]:
    """Spread groups over ranks, so that all have about as many questions.

    Args:
        questions: group → number of its questions.
        world: number of processes.

    Returns:
        Group → rank.
    """
    loads = [(0, rank) for rank in range(world)]
    out = {}
    # The largest first, each to whoever has least.
    for group in sorted(questions, key=lambda g: (-questions[g], g)):
        load, rank = heapq.heappop(loads)
        out[group] = rank
        heapq.heappush(loads, (load + questions[group], rank))
    return out
