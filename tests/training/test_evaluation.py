"""Scores of held-out answers: the functions and how samples are chosen."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import UsageError
from av_llava.training.evaluation import (
    contains,
    exact,
    scorer_named,
    spread,
)


@pytest.mark.parametrize(
    ("answer", "reference", "is_exact", "is_in"),
    [
        ("Red", "red", 1, 1),
        (" red. ", "Red", 1, 1),
        ("It is red.", "red", 0, 1),
        ("It is reddish.", "red", 0, 0),
        ("two\n beeps", "two beeps", 1, 1),
        ("", "red", 0, 0),
    ],
)
def test_scorers(answer: str, reference: str, is_exact: float, is_in: float) -> None:
    assert exact(answer, reference) == is_exact
    assert contains(answer, reference) == is_in


def test_scorers_by_name() -> None:
    assert scorer_named("exact") is exact
    assert scorer_named("av_llava.training.evaluation:contains") is contains
    for name in ("nowhere:score", "av_llava.training.evaluation:nothing"):
        with pytest.raises(UsageError, match="cannot be imported"):
            scorer_named(name)
    with pytest.raises(UsageError, match="cannot be called"):
        scorer_named("av_llava.training.evaluation:SCORERS")


@given(st.integers(1, 500), st.integers(1, 500))
def test_samples_are_spread_evenly(n: int, k: int) -> None:
    k = min(n, k)
    rows = spread(n, k)
    assert len(set(rows)) == k and rows[0] == 0 and rows[-1] < n
    gaps = {b - a for a, b in itertools.pairwise(rows)}
    assert len(gaps) <= 2
