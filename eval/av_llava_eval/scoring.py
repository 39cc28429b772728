"""Scores of a run: a pure function of its answers, made again at any time without a model.

Contract: every sample is in the denominator. An answer that cannot be read and a failure are wrong,
and both are counted beside the headline; only questions that were not asked yet are left out, and
then the scores say that they are not complete. Another harness's rule (``compat``) gives columns of
its own and never changes ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from av_llava.errors import DataError
from av_llava_eval import stats
from av_llava_eval.failures import OK
from av_llava_eval.points import group_values, headline, means, points
from av_llava_eval.records import Answer, Manifest, RunFolder
from av_llava_eval.sample import Sample
from av_llava_eval.task import Task, get_task

UNPARSED = "unparsed"
Record = dict[str, Any]
"""A scored answer: what ``Task.score_sample`` gives, and ``status``, ``arm``, ``used``, ..."""


@dataclass(frozen=True)
class Scored:
    """A run with its scored answers."""

    folder: Path
    manifest: Manifest
    task: Task
    samples: tuple[Sample, ...]
    arms: Mapping[str, tuple[Record, ...]]
    """Arm → the records of the questions that were asked, in the order of the samples."""

    @property
    def complete(self) -> bool:
        """Whether every question was asked in every arm."""
        return all(len(records) == len(self.samples) for records in self.arms.values())


def task_of(manifest: Manifest) -> Task:
    """The task of a run, also one from a file of the user's."""
    return get_task(str(manifest.about.get("task_file") or manifest.task))


def score_folder(
    folder: str | Path, *, compat: str | None = None, task: Task | None = None
) -> Scored:
    """Score every answer of a run.

    Args:
        folder: of the run.
        compat: rule of another harness, or None for ours.
        task: by default the one that the run names.

    Raises:
        DataError: the folder holds no run, or a file of it cannot be read.
    """
    run = RunFolder(folder)
    manifest = run.need()
    task = task or task_of(manifest)
    samples, answers = run.samples(), run.answers()
    known = {(arm["name"], s.id) for arm in manifest.arms for s in samples}
    strange = [key for key in answers if key not in known]
    if strange:
        raise DataError(
            f"{run.path} holds {len(strange)} answers to questions that are not its own, such as "
            f"{strange[0][1]!r} in the arm {strange[0][0]!r}. Its files were mixed with another's."
        )
    arms = {
        arm["name"]: tuple(
            _record(task, sample, answers[arm["name"], sample.id], compat)
            for sample in samples
            if (arm["name"], sample.id) in answers
        )
        for arm in manifest.arms
    }
    return Scored(run.path, manifest, task, tuple(samples), arms)


def _record(task: Task, sample: Sample, answer: Answer, compat: str | None) -> Record:
    """A failure has no score, so that it counts as wrong."""
    if answer["status"] == OK:
        scored = task.score_sample(sample, answer["raw"], compat)
    else:
        scored = {
            **task.outline(sample),
            "raw": None,
            "extracted": None,
            "how": answer["status"],
            "score": None,
            "labelled": sample.answer is not None,
            "compat": compat,
            "metrics": {},
        }
    return {**answer, **scored}


def summarise(scored: Scored, compat: str | None = None) -> dict[str, Any]:
    """All scores of a run, JSON-ready.

    Args:
        scored: by our rule.
        compat: also give another harness's metrics, under ``compat`` of each arm.
    """
    manifest, task = scored.manifest, scored.task
    out: dict[str, Any] = {
        "task": task.name,
        "title": task.title,
        "metric": task.metric,
        "version": task.version,
        "split": manifest.identity["split"],
        "model": manifest.identity.get("model"),
        "complete": scored.complete,
        "bad_rows": manifest.about.get("bad_rows", 0),
        "chance": _chance(task, scored.samples),
        "arms": {name: arm_scores(task, records) for name, records in scored.arms.items()},
    }
    if task.version != manifest.identity["version"]:
        out["answered_with_version"] = manifest.identity["version"]
    if compat is not None:
        theirs = score_folder(scored.folder, compat=compat, task=task)
        for name, records in theirs.arms.items():
            found = task.aggregate(records, compat) if records else {}
            random = sum(r["how"] == "random" for r in records)
            out["arms"][name]["compat"] = {"rule": compat, "random": random, **found}
    return out


def few_videos(found: Mapping[str, Any]) -> str | None:
    """A sentence about scores that stand on few videos; None where there are enough.

    Args:
        found: as :func:`summarise` gives it.
    """
    fewest = min((arm["videos"] for arm in found["arms"].values() if arm["n"]), default=None)
    if fewest is None or fewest >= stats.FEW_CLUSTERS:
        return None
    return (
        f"Only {fewest} videos: too few to resample, so that intervals of scores are Wilson's, and "
        f"those of differences are too narrow."
    )


def _chance(task: Task, samples: Sequence[Sample]) -> float | None:
    """What guessing gives on average; None where some sample has no such number."""
    found = [task.chance(s) for s in samples if s.answer is not None]
    known = [c for c in found if c is not None]
    return sum(known) / len(known) if known and len(known) == len(found) else None


def arm_scores(task: Task, records: Sequence[Record]) -> dict[str, Any]:
    """Everything about one arm."""
    labelled = [r for r in records if r["labelled"]]
    answered = [r for r in labelled if r["status"] == OK]
    failures = Counter(r["status"] for r in records if r["status"] != OK)
    table = _Table(task, labelled)
    values = [points(r) for r in labelled]
    return {
        "score": headline(records, task.headline) if labelled else None,
        "interval": table.headline(),
        "stderr": _number(stats.clustered_stderr(values, [r["group"] for r in labelled])),
        "wilson": stats.wilson(sum(values), len(values)).to_dict() if values else None,
        "n": len(labelled),
        "unlabelled": len(records) - len(labelled),
        "videos": len({r["group"] for r in labelled}),
        "failed": sum(failures.values()),
        "failures": dict(failures),
        "unparsed": sum(r["score"] is None for r in answered),
        "of_answered": headline(answered, task.headline) if answered else None,
        "how": dict(Counter(r["how"] for r in records)),
        "metrics": _with_counts(answered),
        "groups": {field: table.group(field) for field in task.groupings},
        "letters": _letters(labelled),
        "silent": dict(Counter(r["used"]["no_audio"] for r in records if _silent(r))),
        "tokens": means(_numbers(r.get("used"), "tokens") for r in answered),
        "seconds": dict(sum((Counter(r.get("timing_s") or {}) for r in answered), Counter())),
    }


class _Table:
    """Sums and counts of each cluster in each group, resampled together once."""

    def __init__(self, task: Task, records: Sequence[Record]) -> None:
        self.task, self.records = task, records
        index, n_clusters = stats.cluster_index([r["group"] for r in records])
        columns: dict[tuple[str, str], int] = {("", ""): 0}
        cells = []
        for row, record in enumerate(records):
            cells.append((row, 0))
            for field in task.groupings:
                for value in group_values(record, field):
                    cells.append((row, columns.setdefault((field, value), len(columns))))
        self.columns = columns
        sums = np.zeros((n_clusters, len(columns)))
        counts = np.zeros((n_clusters, len(columns)))
        values = [points(r) for r in records]
        for row, column in cells:
            sums[index[row], column] += values[row]
            counts[index[row], column] += 1
        self.sums, self.counts = sums, counts
        self.draws = stats.bootstrap_means(sums, counts) if n_clusters > 1 else None

    def headline(self) -> dict[str, Any] | None:
        """Interval of the headline."""
        if self.draws is None:
            return None
        field = self.task.headline.partition(":")[2]
        if not field:
            return _dict(self._interval(0))
        own = self.draws[:, [c for (name, _), c in self.columns.items() if name == field]]
        drawn = ~np.isnan(own)
        average = np.where(drawn, own, 0.0).sum(1) / np.maximum(drawn.sum(1), 1)
        return _dict(stats.percentile_interval(average))

    def group(self, field: str) -> dict[str, dict[str, Any]]:
        """Score, count and interval of each value of a grouping."""
        out = {}
        for (name, value), column in self.columns.items():
            if name != field:
                continue
            total, n = self.sums[:, column].sum(), int(self.counts[:, column].sum())
            interval = _dict(self._interval(column))
            out[value] = {"score": float(total / n), "n": n, "interval": interval}
        return out

    def _interval(self, column: int) -> stats.Interval | None:
        """By resampling videos; with few of them Wilson's."""
        many = (self.counts[:, column] > 0).sum() >= stats.FEW_CLUSTERS
        if self.draws is not None and many:
            return stats.percentile_interval(self.draws[:, column])
        n = int(self.counts[:, column].sum())
        return stats.wilson(min(self.sums[:, column].sum(), n), n)


def _dict(interval: stats.Interval | None) -> dict[str, Any] | None:
    return None if interval is None else interval.to_dict()


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _with_counts(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Mean of each further metric, and over how many answers."""
    counts = Counter(name for r in records for name in r["metrics"])
    average = means(r["metrics"] for r in records)
    return {name: {"score": value, "n": counts[name]} for name, value in average.items()}


def _letters(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """How often each letter was said and was right; empty for open questions."""
    said = Counter(r["extracted"] for r in records if _is_letter(r["extracted"]))
    right = Counter(r["answer"] for r in records if _is_letter(r["answer"]))
    if not right:
        return {}
    return {k: {"said": said[k], "right": right[k]} for k in sorted({*said, *right})}


def _is_letter(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 1 and value.isupper()


def _silent(record: Record) -> bool:
    """Whether a video was used without sound for another reason than that the arm has none."""
    return (record.get("used") or {}).get("no_audio") not in (None, "off")


def _numbers(account: Mapping[str, Any] | None, ending: str) -> dict[str, float]:
    """The counts of an account: of tokens, and of frames."""
    return {k: v for k, v in (account or {}).items() if k.endswith(ending) or k == "frames"}
