"""Reading what a judge said, as lmms-eval reads it; what cannot be read is a failure, not a 0.

Contract: pure functions of the judge's words. The questions that the judge is asked are the
tasks'.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence


def yes_and_score(said: str) -> tuple[str, int] | None:
    """ActivityNet-QA: ``{'pred': 'yes', 'score': 4}`` anywhere in the text, as (word, 0 to 5).

    The word is ``yes`` where it holds a yes, else ``no`` where it holds a no, else as it is.
    """
    found = _dictionary(said)
    if found is None or "pred" not in found or "score" not in found:
        return None
    score = _whole(found["score"])
    if score is None:
        return None
    word = str(found["pred"]).lower()
    return next((w for w in ("yes", "no") if w in word), word), score


def mean_and_accuracy(verdicts: Sequence[tuple[str, int]]) -> dict[str, float]:
    """ActivityNet-QA's two numbers: other words than yes and no count for the mean score only."""
    if not verdicts:
        return {}
    words = [w for w, _ in verdicts]
    decided = words.count("yes") + words.count("no")
    return {
        "gpt_eval_score": sum(s for _, s in verdicts) / len(verdicts),
        "gpt_eval_accuracy": 100 * words.count("yes") / decided if decided else 0.0,
    }


def correct(said: str) -> int | None:
    """TempCompass: 1 for "Correct", 0 for "Incorrect", by the beginning, then by what appears."""
    for word, rating in (("Correct", 1), ("Incorrect", 0)):
        if said.startswith(word):
            return rating
    if "Incorrect" in said:
        return 0
    return 1 if "Correct" in said else None


def chosen(said: str, expected: str) -> dict[str, int | str | None]:
    """TempCompass's captions: the option that the judge finds in the caption, and whether right.

    Args:
        said: words of the judge, with lines "Reasoning: …" and "Answer: …".
        expected: the right option with its letter.

    Returns:
        ``chatgpt-answer``, ``chatgpt-reasoning``, and ``rating`` 1, 0 or -1 (no words at all).
    """
    if said in ("", "invalid_request_error"):
        return {"rating": -1, "chatgpt-answer": None, "chatgpt-reasoning": None}
    out: dict[str, int | str | None] = {"chatgpt-answer": said, "chatgpt-reasoning": None}
    for line in map(str.strip, said.split("\n")):
        for word, name in (("Reasoning", "chatgpt-reasoning"), ("Answer", "chatgpt-answer")):
            if word in line:
                out[name] = line.replace(f"{word}:", "").strip()
    answer = str(out["chatgpt-answer"])
    named = sum(answer.count(f"{letter}.") for letter in "ABCD")
    same = answer.split(". ")[0] == expected.split(". ")[0]
    return {**out, "rating": int(same and named == 1)}


def _dictionary(said: str) -> dict[str, object] | None:
    match = re.search(r"\{[^{}]*\}", said, re.DOTALL)
    if match is None:
        return None
    try:
        found = ast.literal_eval(match[0])
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _whole(value: object) -> int | None:
    try:
        return int(float(str(value)))
    except (ValueError, OverflowError):
        return None
