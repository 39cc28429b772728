"""Short open answers: normal form, exact match, containment, overlap of words.

Contract: offline and deterministic, so that open benchmarks have numbers without a judge. The
normal form is lower case without punctuation and articles, with digits up to ten as words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from av_llava_eval.mcq import clean
from av_llava_eval.sample import Prediction

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ARTICLES = {"a", "an", "the"}
_LEAD = re.compile(r"^(?:the |my )?(?:final |short )?answer(?: is|:|=)\s*", re.IGNORECASE)


def normal(text: str) -> str:
    """The normal form."""
    kept = re.sub(r"[^\w\s.'-]|_", " ", text.casefold())
    kept = re.sub(r"(?<!\d)\.|\.(?!\d)|'|(?<!\w)-|-(?!\w)", " ", kept)
    words = [_WORDS[int(w)] if w.isdigit() and int(w) <= 10 else w for w in kept.split()]
    return " ".join(w for w in words if w not in _ARTICLES)


def read(text: str) -> Prediction:
    """The answer in its normal form, without "The answer is"."""
    said = normal(_LEAD.sub("", clean(text)))
    return Prediction(said, "text") if said else Prediction(None, "empty")


def exact(said: str, expected: Iterable[str]) -> float:
    """1 if the normal form is that of one of the expected answers."""
    return float(any(said == normal(e) for e in expected))


def contains(text: str, expected: Iterable[str]) -> float:
    """1 if an expected answer stands in the text as whole words."""
    said = f" {normal(clean(text))} "
    return float(any(f" {normal(e)} " in said for e in expected if normal(e)))


def word_f1(text: str, expected: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, against the best expected answer."""
    return max((_f1(normal(clean(text)).split(), normal(e).split()) for e in expected), default=0.0)


def _f1(said: Sequence[str], expected: Sequence[str]) -> float:
    shared = sum((Counter(said) & Counter(expected)).values())
    return 2 * shared / (len(said) + len(expected)) if shared else 0.0


def one_of(text: str, vocabulary: Iterable[str]) -> Prediction:
    """The only word of a closed vocabulary in an answer; the longest, where one holds another."""
    terms = {normal(v.replace("_", " ")): v for v in vocabulary}
    said = read(text)
    if said.extracted is None or said.extracted in terms:
        return said if said.extracted is None else Prediction(terms[said.extracted], "text")
    spaced = f" {said.extracted} "
    found = [t for t in terms if t and f" {t} " in spaced]
    found = [t for t in found if not any(t != o and f" {t} " in f" {o} " for o in found)]
    if len(found) == 1:
        return Prediction(terms[found[0]], "only known word")
    return Prediction(None, "several" if found else "unparsed")
