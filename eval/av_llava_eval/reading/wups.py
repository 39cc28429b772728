"""WUPS: agreement of two short answers by the similarity of their words.

Contract: as NExT-QA defines it (after Malinowski and Fritz), but words are brought to their base
form by WordNet's own rules instead of a part-of-speech tagger, and stop words are those below. So
it is close to published numbers, not equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from av_llava_eval.reading.short_text import normal
from av_llava_eval.reading.wordnet import PARTS, WordNet

EXACT = ("DC", "DB")
"""NExT-QA's kinds (counting, yes or no) that are scored by equality."""
_STOP_WORDS = """
a an the is are was were be been being am do does did doing have has had he she it they them his
her hers its their theirs him i you we us our your my me this that these those of to in on at by for
with from and or as so than then there here
"""
_STOP = frozenset(_STOP_WORDS.split())


@lru_cache(maxsize=2)
def wordnet(folder: Path) -> WordNet:
    """The dictionary of a folder, read once."""
    return WordNet(folder)


def beside(path: Path | None) -> WordNet | None:
    """The dictionary in ``wordnet/`` beside a file or one of its folders; None if there is none."""
    for parent in list(path.parents)[:4] if path is not None else ():
        if (parent / "wordnet" / "index.noun").is_file():
            return wordnet(parent / "wordnet")
    return None


def wups(said: str, expected: str, words: WordNet, exact: bool = False) -> float:
    """WUPS@0 of two answers, 0 to 1.

    Args:
        said: what was answered.
        expected: the right answer.
        words: the dictionary.
        exact: whether only the same words are right.
    """
    one, two = _kept(said, words), _kept(expected, words)
    if exact:
        return float(one == two)
    return min(_product(one, two, words), _product(two, one, words))


def _kept(text: str, words: WordNet) -> list[str]:
    return [_base(w, words) for w in normal(text).split() if w not in _STOP]


def _base(word: str, words: WordNet) -> str:
    found = [base for part in PARTS for base in words.bases(word, part)]
    return min(found, key=len) if found else word


def _product(these: Sequence[str], those: Sequence[str], words: WordNet) -> float:
    """Each word's best partner, multiplied; words without any are passed over, as published."""
    best = [max((words.similarity(a, b) for b in those), default=0.0) for a in these]
    kept = [b for b in best if b > 0]
    out = 1.0 if kept else 0.0
    for value in kept:
        out *= value
    return out
