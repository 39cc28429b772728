"""Letters as three other harnesses read them, for comparison with their published numbers.

Contract: the same text gives the same letter as in VLMEvalKit (e8e78f05), VideoLLaMA2 (c0bb03ab)
and SlowFast-LLaVA, on Video-MME's four options; a letter that one of them invents is called
``default letter``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from av_llava_eval.sample import LETTERS, Prediction

# Two commas are missing in the original's list, so that these pairs stand as one phrase each,
# which no answer holds.
_VLM_PREFIXES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    "The best option isThe correct option is",
    "Best answer:Best option:",
    *("Answer:", "Option:"),
)
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def vlmevalkit_rule(text: str, options: Sequence[str]) -> Prediction:
    """The first capital A to D anywhere, after a few phrases are removed; ``""`` without one."""
    said = text.strip()
    for prefix in _VLM_PREFIXES:
        said = said.replace(prefix, "")
    match = re.search("[ABCD]", said)
    return Prediction(match[0], "first capital") if match else Prediction("", "unparsed")


def videollama2_rule(text: str, options: Sequence[str]) -> Prediction:
    """The first capital A to D, else the first option whose text appears, else C."""
    said = text.replace("answer", "").replace("Answer", "")
    match = re.search("[A-D]", said)
    if match:
        return Prediction(match[0], "first capital")
    lower = said.lower()
    for letter, option in zip(LETTERS, options, strict=False):
        word = _DIGITS[int(option)] if re.fullmatch("[0-9]", option) else option
        if option.lower() in lower or word.lower() in lower:
            return Prediction(letter, "option text")
    return Prediction("C", "default letter")


def sfllava_rule(text: str, options: Sequence[str]) -> Prediction:
    """The first character, unless ``X:`` or ``X)`` appears, of which the first letter wins.

    ``"none"``, its own word, without a letter. The original fails on an empty answer.
    """
    if not text:
        return Prediction(None, "empty")
    found = text[0].upper() if text[0] in "abcdeABCDE" else "none"
    if "answer is " in text:
        text = text[text.index("answer is") :]
    for letter in "ABCDE":
        if f"{letter}:" in text or f"{letter})" in text:
            return Prediction(letter, "labelled")
    return Prediction(found, "first character" if found != "none" else "unparsed")
