"""VideoMMMU's open answers: a number or a short text somewhere in an explanation.

Contract: candidates are what follows the signal words of a conclusion ("is", "so", "equals" …),
line by line, and every number in it; an answer is right when one of them equals the expected
number, or holds the expected text. The same for the default rule and for lmms-eval's, which calls
an empty answer ``API Error`` and leaves it out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from av_llava_eval.sample import Prediction

_SIGNALS = (
    *("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "are "),
    *("in total ", "total ", "identify ", "recognize ", "calculated as ", "counted as "),
    *("measured as ", "observed as ", "concluded as ", "found to be ", "equals "),
    *("determined to be ", "number of ", "value is ", "adds up to ", "have ", "has "),
)
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
MISSING = "API Error"


def read(text: str, compat: str | None = None) -> Prediction:
    """Candidates as sorted texts; floats are written as Python writes them."""
    if text in ("", MISSING):
        return Prediction(MISSING if compat else None, "empty")
    found: set[str | float] = set()
    for candidate in _conclusions(text):
        for piece in (candidate, *_numbers(candidate)):
            found.update(_normal(piece))
    if not found:
        return Prediction(None, "unparsed")
    return Prediction(sorted(map(str, found)), "conclusions")


def score(candidates: Sequence[str], expected: str | Sequence[str]) -> float:
    """1 if a candidate is the expected number or holds the expected text."""
    wanted = [expected] if isinstance(expected, str) else list(expected)
    right = [n for answer in wanted for n in _normal(answer)]
    texts = [r for r in right if isinstance(r, str)]
    for candidate in candidates:
        value = _number(candidate)
        if value is not None:
            if value in right:
                return 1.0
        elif any(r in candidate for r in texts):
            return 1.0
    return 0.0


def _conclusions(text: str) -> list[str]:
    said = text.strip().strip(".").lower()
    lines = re.split(r"\.\s(?=[A-Z])|\n", said)
    found = []
    for index, line in enumerate(lines):
        signals = (*_SIGNALS, "=") if index == len(lines) - 1 else _SIGNALS
        tails = [line.rsplit(signal, 1)[1].strip() for signal in signals if signal in line]
        shortest = ""
        for tail in tails:
            # An empty tail is replaced by whatever comes next, as in the original.
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    return found or [said]


def _numbers(text: str) -> list[str]:
    return [n for pattern in _NUMBERS for n in re.findall(pattern, text)]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _normal(text: str) -> list[str | float]:
    said = text.strip()
    value = _number(said)
    if value is not None:
        return [round(value, 2)]
    lower = said.lower()
    # A lone letter only counts beside a space, or it would be found in every word.
    return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
