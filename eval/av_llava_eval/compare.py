"""Two runs, or two arms of one, question by question: is the difference more than chance?

Contract: only questions that both were asked are compared, and how many are not is said. The
difference is that of the means over questions, whatever the task's headline. A failure and an
answer that cannot be read are wrong on either side. The interval (paired bootstrap) and the p-value
(both sides of a video exchanged) respect that questions about one video belong together; McNemar's
test does not, and is given for scores of 0 and 1 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from av_llava.errors import DataError
from av_llava_eval import stats
from av_llava_eval.failures import OK
from av_llava_eval.points import group_values, headline, points
from av_llava_eval.scoring import Record, Scored
from av_llava_eval.task import Task

FLIPPED_SHOWN = 1000


def compare(
    task: Task, first: Sequence[Record], second: Sequence[Record], names: tuple[str, str]
) -> dict[str, Any]:
    """Compare scored answers to the same questions.

    Args:
        task: of both.
        first, second: records, in any order; the difference is second minus first.
        names: of the two, for tables.

    Raises:
        DataError: no question is common to both.
    """
    others = {r["id"]: r for r in second if r["labelled"]}
    pairs = [(r, others[r["id"]]) for r in first if r["labelled"] and r["id"] in others]
    if not pairs:
        raise DataError(f"{names[0]!r} and {names[1]!r} have no labelled question in common.")
    a, b = ([points(pair[i]) for pair in pairs] for i in (0, 1))
    groups = [pair[0]["group"] for pair in pairs]
    diff = np.subtract(b, a)
    stderr = stats.clustered_stderr(diff, groups)  # type: ignore[arg-type]
    return {
        "names": list(names),
        "n": len(pairs),
        "videos": len(set(groups)),
        "not_common": len(first) + len(second) - 2 * len(pairs),
        "scores": [float(np.mean(a)), float(np.mean(b))],
        "headlines": [headline([pair[i] for pair in pairs], task.headline) for i in (0, 1)],
        **_difference(diff, groups),
        "stderr": None if np.isnan(stderr) else stderr,
        "detectable": stats.detectable_difference(stderr) if stderr > 0 else None,
        "table": _two_by_two(a, b),
        "failed": [sum(p[i]["status"] != OK for p in pairs) for i in (0, 1)],
        "groups": {field: _groups(pairs, field) for field in task.groupings},
        "flipped": _flipped(pairs),
    }


def compare_runs(first: Scored, second: Scored, arms: tuple[str, str]) -> dict[str, Any]:
    """Compare an arm of one run with an arm of another of the same task.

    Raises:
        DataError: the runs are of different tasks, or one has no such arm.
    """
    ours, theirs = (s.manifest.identity for s in (first, second))
    for key in ("task", "split"):
        if ours[key] != theirs[key]:
            raise DataError(
                f"{first.folder} is a run of {key} {ours[key]!r}, {second.folder} of "
                f"{theirs[key]!r}: they cannot be compared."
            )
    for scored, arm in zip((first, second), arms, strict=True):
        if arm not in scored.arms:
            known = ", ".join(map(repr, scored.arms))
            raise DataError(f"{scored.folder} has no arm {arm!r}; it has {known}.")
    names = _names(first, second, arms)
    return compare(first.task, first.arms[arms[0]], second.arms[arms[1]], names)


def compare_arms(scored: Scored) -> list[dict[str, Any]]:
    """Each further arm of an experiment with its first; p-values corrected for their number."""
    names = list(scored.arms)
    reference = scored.arms[names[0]]
    found = [
        compare(scored.task, reference, scored.arms[name], (names[0], name))
        for name in names[1:]
        if _common(reference, scored.arms[name])
    ]
    add_holm(found)
    return found


def _names(first: Scored, second: Scored, arms: tuple[str, str]) -> tuple[str, str]:
    if first.folder == second.folder:
        return arms
    labels = [
        s.folder.name + (f" ({arm})" if len(s.arms) > 1 else "")
        for s, arm in zip((first, second), arms, strict=True)
    ]
    if labels[0] == labels[1]:
        labels = [str(s.folder) for s in (first, second)]
    return labels[0], labels[1]


def _common(first: Sequence[Record], second: Sequence[Record]) -> bool:
    ids = {r["id"] for r in first if r["labelled"]}
    return any(r["id"] in ids for r in second if r["labelled"])


def _difference(diff: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    """Mean difference, its interval by resampling videos, its p-value by exchanging their sides."""
    index, n_clusters = stats.cluster_index(groups)
    mean = float(diff.mean())
    if n_clusters < 2:
        return {"difference": mean, "interval": None, "p_value": None}
    sums = np.bincount(index, diff, n_clusters)[:, None]
    counts = np.bincount(index, minlength=n_clusters)[:, None].astype(float)
    draws = stats.bootstrap_means(sums, counts)[:, 0]
    interval = stats.percentile_interval(draws, method="paired cluster bootstrap")
    return {
        "difference": mean,
        "interval": None if interval is None else interval.to_dict(),
        "p_value": stats.flip_p_value(diff, groups),  # type: ignore[arg-type]
    }


def _two_by_two(a: Sequence[float], b: Sequence[float]) -> dict[str, Any] | None:
    """Right and wrong of both, and McNemar's test; None for scores between 0 and 1."""
    if not (stats.is_binary(a) and stats.is_binary(b)):
        return None
    counts = {
        "both": sum(x == y == 1 for x, y in zip(a, b, strict=True)),
        "only_first": sum(x > y for x, y in zip(a, b, strict=True)),
        "only_second": sum(x < y for x, y in zip(a, b, strict=True)),
        "neither": sum(x == y == 0 for x, y in zip(a, b, strict=True)),
    }
    p_value = stats.mcnemar_exact(counts["only_first"], counts["only_second"])
    return {**counts, "mcnemar_p": p_value}


def _groups(pairs: Sequence[tuple[Record, Record]], field: str) -> dict[str, dict[str, Any]]:
    """The difference in each value of a grouping, with Holm's correction over the values."""
    by_value: dict[str, list[tuple[Record, Record]]] = {}
    for pair in pairs:
        for value in group_values(pair[0], field):
            by_value.setdefault(value, []).append(pair)
    rows = []
    for some in by_value.values():
        a, b = ([points(p[i]) for p in some] for i in (0, 1))
        diff = np.subtract(b, a)
        found = _difference(diff, [p[0]["group"] for p in some])
        rows.append({"n": len(some), "scores": [float(np.mean(a)), float(np.mean(b))], **found})
    add_holm(rows)
    return dict(zip(by_value, rows, strict=True))


def add_holm(rows: Sequence[dict[str, Any]]) -> None:
    """Give each comparison that has a p-value its ``p_holm``, corrected for their number."""
    known = [row for row in rows if row["p_value"] is not None]
    for row, adjusted in zip(known, stats.holm([r["p_value"] for r in known]), strict=True):
        row["p_holm"] = adjusted


def _flipped(pairs: Sequence[tuple[Record, Record]]) -> dict[str, list[str]]:
    """Ids of questions that one has better than the other, the first thousand of each kind."""
    better = [b["id"] for a, b in pairs if points(b) > points(a)]
    worse = [b["id"] for a, b in pairs if points(b) < points(a)]
    return {"better": better[:FLIPPED_SHOWN], "worse": worse[:FLIPPED_SHOWN]}
