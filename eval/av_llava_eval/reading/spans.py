"""Reading a span of seconds from an answer, and its overlap with the right one.

Contract: the default rule gives one ``(start, end)`` with start < end, or a reason why there is
none; more than two times that are not one range are no answer. Times are seconds, ``mm:ss`` or
``hh:mm:ss``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from av_llava_eval.mcq import clean
from av_llava_eval.sample import Prediction

_CLOCK = r"\d{1,2}:\d{2}(?::\d{2})?(?:\.\d+)?"
_NUMBER = r"\d+(?:\.\d+)?"
_TIME = rf"(?:{_CLOCK}|{_NUMBER})"
_UNIT = r"\s*(?:s|sec|secs|second|seconds)?\b\.?"
_RANGE = re.compile(
    rf"(?<![\d.:])({_TIME}){_UNIT}\s*(?:-|–|—|~|to|until|till)\s*({_TIME})(?![\d:])",
    re.IGNORECASE,
)
_ANY = re.compile(rf"(?<![\d.:])({_TIME})(?![\d:])")
_CONTAINER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)

Span = tuple[float, float]


def seconds(text: str) -> float:
    """Seconds of ``12.5``, ``1:02`` or ``0:01:02.5``."""
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total


def read(text: str) -> Prediction:
    """The only range of the answer; else its only two times."""
    said = clean(text)
    if not said:
        return Prediction(None, "empty")
    if inside := _CONTAINER.findall(said):
        said = inside[-1]
    ranges = {_ordered(a, b) for a, b in _RANGE.findall(said)}
    if len(ranges) > 1:
        return Prediction(None, "several")
    if ranges:
        return _span(ranges.pop(), "range")
    times = _ANY.findall(said)
    return _span(_ordered(*times), "two times") if len(times) == 2 else Prediction(None, "unparsed")


def _ordered(first: str, second: str) -> Span:
    start, end = sorted((seconds(first), seconds(second)))
    return start, end


def _span(span: Span, how: str) -> Prediction:
    return Prediction(list(span), how) if span[1] > span[0] else Prediction(None, "no duration")


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two spans; 0 where both have no length."""
    union = max(first[1], second[1]) - min(first[0], second[0])
    shared = min(first[1], second[1]) - max(first[0], second[0])
    return max(shared, 0) / union if union > 0 else 0.0


_KEYWORDS = ("start", "end", "happen")
_EXAMPLE = "a specific example is : 20.8 - 30.0 seconds"


def lmms(text: str) -> Prediction:
    """lmms-eval's rule: a list of at most one ``[start, end]``; an empty list where it has none.

    Every "to" becomes a dash, in whichever word. Clock times are paired in order; then the first
    range; then the first number of each line that speaks of a start, an end or a happening.
    """
    said = text.lower().replace(_EXAMPLE, "").replace("to", "-")
    clocks = [seconds(t) for t in re.findall(rf"\b{_CLOCK}\b", said)]
    ranges = re.findall(r"(\d+\.*\d*)\s*s?\s*[-–—]\s*(\d+\.*\d*)", said)
    if len(clocks) >= 2:
        pair: tuple[float, float] | None = (clocks[0], clocks[1])
    elif ranges:
        pair = (float(ranges[0][0]), float(ranges[0][1]))
    else:
        lines = [line for line in re.split(r"[!?\n]", said) if any(k in line for k in _KEYWORDS)]
        firsts = [found[0] for line in lines if (found := re.findall(rf"\b{_NUMBER}\b", line))]
        pair = (float(firsts[0]), float(firsts[1])) if len(firsts) >= 2 else None
    return Prediction([sorted(pair)] if pair else [], "spans")
