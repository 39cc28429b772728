"""Reading yes or no.

Contract: ``yes``, ``no``, or a reason why neither: both words without a preference, or none. "no"
is a word here: "Nothing moves" and "not sure" are not a no.
"""

from __future__ import annotations

import re

from av_llava_eval.mcq import clean
from av_llava_eval.sample import Prediction

_FIRST = re.compile(r"^[\W_]*(yes|no)\b(?![-'’]?\w)", re.IGNORECASE)
_DECLARED = re.compile(r"\banswer\b\W*(?:is|:|=)?\W*\b(yes|no)\b", re.IGNORECASE)
_WORD = re.compile(r"(?<![\w-])(yes|no)(?![\w'’-])", re.IGNORECASE)
_ENDS_WITH_NO = re.compile(r"(?<![\w-])no[\s.!)*\"']*$", re.IGNORECASE)


def read(text: str) -> Prediction:
    """The last declared word, else the first word of the answer, else the only one of the two."""
    said = clean(text)
    if not said:
        return Prediction(None, "empty")
    declared = _DECLARED.findall(said)
    if declared:
        return Prediction(declared[-1].lower(), "declared")
    first = _FIRST.match(said)
    words = {w.lower() for w in _WORD.findall(said)}
    if first and not re.match(r"\W*or\b", said[first.end() :], re.IGNORECASE):
        return Prediction(first[1].lower(), "first word")
    if len(words) == 1:
        # "No" before a noun ("there is no car") says something else than the answer no.
        only = words.pop()
        if only == "yes" or _ENDS_WITH_NO.search(said):
            return Prediction(only, "only word")
        return Prediction(None, "unparsed")
    return Prediction(None, "several" if words else "unparsed")


def lmms(text: str) -> Prediction:
    """TempCompass's rule in lmms-eval: how the text begins, so that "Nothing moves" is a no."""
    lower = text.lower()
    for word in ("yes", "no"):
        if lower.startswith(word):
            return Prediction(word, "beginning")
    return Prediction(None, "judge")
