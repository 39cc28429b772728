"""From scored records to point scores: means over questions, over groups, and the headline.

Contract: an answer without a score (unparsed, failed) counts as wrong; only samples without public
labels stay out. No numpy: intervals are in ``stats``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from av_llava.errors import DataError, UsageError

Record = Mapping[str, Any]
"""One scored answer, as ``Task.score_record`` gives it."""


def group_values(record: Record, field: str) -> list[str]:
    """The values of one grouping that a record counts for; a list counts for each."""
    value = (record.get("meta") or {}).get(field)
    if value is None:
        return []
    return [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]


def group_scores(records: Sequence[Record], field: str) -> dict[str, dict[str, Any]]:
    """Score and count of each value of a grouping, in order of appearance."""
    rows: dict[str, list[float]] = {}
    for record in records:
        if record.get("labelled", True):
            for value in group_values(record, field):
                rows.setdefault(value, []).append(points(record))
    return {v: {"score": sum(s) / len(s), "n": len(s)} for v, s in rows.items()}


def headline(records: Sequence[Record], rule: str) -> float | None:
    """The one number: a mean over questions or over the groups of a field; None without labels."""
    labelled = [r for r in records if r.get("labelled", True)]
    if not labelled:
        return None
    if rule == "micro":
        return sum(map(points, labelled)) / len(labelled)
    kind, _, field = rule.partition(":")
    if kind != "macro" or not field:
        raise UsageError(f"A headline is 'micro' or 'macro:FIELD', not {rule!r}.")
    groups = group_scores(labelled, field)
    if not groups:
        raise DataError(f"No record has the field {field!r}, over which the headline is a mean.")
    return sum(g["score"] for g in groups.values()) / len(groups)


def points(record: Record) -> float:
    """The score that counts: an unparsed or failed answer is wrong."""
    score = record.get("score")
    return 0.0 if score is None else float(score)


def means(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each name over the rows that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: sum(v) / len(v) for name, v in found.items()}
