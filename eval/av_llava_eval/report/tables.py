"""The tables of a report, which Markdown and the page both show: a head, and rows of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from av_llava_eval.report.facts import Column, Difference, Facts


@dataclass(frozen=True)
class Table:
    """Texts in rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def scores(columns: Sequence[Column]) -> Table:
    """One row a column: score, interval, and everything that qualifies it."""
    head = ("column", "score % (95 %)", "questions", "unparsed", "failed", "of those answered")
    rows = tuple(
        (
            c.label,
            c.headline.percent(),
            str(c.headline.n),
            str(c.n_unparsed),
            failures(c) or "0",
            _percent(c.answered),
            _percent(c.chance),
            "" if c.media_tokens is None else f"{c.media_tokens:.0f}",
        )
        for c in columns
    )
    return Table((*head, "chance", "tokens a video"), rows)


def differences(found: Sequence[Difference]) -> Table:
    """One row a pair of columns, on the questions that both have."""
    head = ("columns", "points (95 %)", "p (videos)", "after Holm", "p (McNemar)")
    rows = tuple(
        (
            f"{d.first} → {d.second}",
            f"{_signed(d.difference)} ({_signed(d.low)} to {_signed(d.high)})",
            *map(_p_value, (d.p, d.p_holm, d.p_mcnemar)),
            str(d.gained),
            str(d.lost),
            str(d.n),
        )
        for d in found
    )
    return Table((*head, "gained", "lost", "questions"), rows)


def groups(columns: Sequence[Column], grouping: str) -> Table:
    """Scores by the values of one grouping, a column a run."""
    found = [{e.name: e for e in c.groups.get(grouping, ())} for c in columns]
    rows = tuple(
        (e.name, str(e.n), *(f[e.name].percent() if e.name in f else "" for f in found))
        for e in columns[0].groups[grouping]
    )
    return Table((grouping, "questions", *(c.label for c in columns)), rows)


def metrics(columns: Sequence[Column]) -> Table | None:
    """Further metrics, those of other harnesses under their own names."""
    names = list(dict.fromkeys(n for c in columns for n in c.metrics))
    rows = tuple((n, *(_plain(c.metrics.get(n)) for c in columns)) for n in names)
    return Table(("metric", *(c.label for c in columns)), rows) if rows else None


def settings(facts: Facts) -> Table | None:
    """How the first run was made."""
    return Table(("setting", "value"), tuple(facts.settings.items())) if facts.settings else None


def failures(column: Column) -> str:
    """Failures by kind: ``3 decode_error, 1 timeout``."""
    return ", ".join(f"{n} {kind}" for kind, n in column.failed.items() if n)


def smallest_difference(facts: Facts) -> str | None:
    """One sentence about what these runs cannot show."""
    if facts.smallest_difference is None:
        return None
    return (
        f"With so many questions, a difference under {100 * facts.smallest_difference:.1f} points "
        f"would usually not be seen."
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _p_value(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"
