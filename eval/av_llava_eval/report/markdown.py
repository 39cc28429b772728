"""A report as Markdown: tables that can be pasted into a paper's appendix or an issue."""

from __future__ import annotations

from av_llava_eval.report import tables
from av_llava_eval.report.facts import Facts
from av_llava_eval.report.tables import Table


def markdown(facts: Facts) -> str:
    """The whole report without plots and pictures."""
    parts: list[str | Table | None] = [f"# {facts.title}", tables.scores(facts.columns)]
    parts += [f"> {note}" for note in facts.notes]
    if facts.differences:
        parts += ["## What differs", tables.differences(facts.differences)]
        parts.append(tables.smallest_difference(facts))
    for grouping in facts.columns[0].groups:
        parts += [f"## By {grouping}", tables.groups(facts.columns, grouping)]
    for title, found in (
        ("Other metrics", tables.metrics(facts.columns)),
        ("How it was made", tables.settings(facts)),
    ):
        parts += [f"## {title}", found] if found is not None else []
    texts = (render(p) if isinstance(p, Table) else p for p in parts)
    return "\n\n".join(t for t in texts if t) + "\n"


def render(table: Table) -> str:
    """A Markdown table; pipes and line ends in cells are escaped."""
    lines = [table.head, ("---",) * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
