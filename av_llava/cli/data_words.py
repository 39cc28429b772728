"""What ``av-llava data`` found, in lines for people and as data for programs.

Contract: nothing is printed here, and torch is not imported.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av_llava.training.index import LengthIndex
    from av_llava.training.report import Validation
    from av_llava.training.statistics import Statistics


def validation_lines(
    found: Validation, problems: Mapping[str, str], warnings: Mapping[str, str]
) -> list[str]:
    """What ``data validate`` found; problems and warnings say what each kind means."""
    lines = [f"{found.n_rows:,} rows, {found.n_bad:,} that cannot be used"]
    decoded = f", {found.n_decoded:,} decoded on trial" if found.n_decoded else ""
    lines.append(f"{found.n_media:,} media named{decoded}")
    for title, counted, words in (
        ("problem", found.problems, problems),
        ("warning", found.warnings, warnings),
    ):
        for kind, n in counted.most_common():
            lines += ["", f"{title}: {kind}, {n:,} ({words.get(kind, 'said by a reader')})"]
            shown = [f for f in found.findings if f.kind == kind]
            lines += [f"  {f.where}: {f.text}" for f in shown]
            if n > len(shown):
                lines.append(f"  … and {n - len(shown):,} more")
    return lines


def statistics_lines(found: Statistics) -> list[str]:
    """What ``data stats`` counted, with a histogram."""
    from av_llava.training.statistics import Histogram

    lines = [f"{found.n_rows:,} rows, {found.n_bad:,} that cannot be used"]
    counted: tuple[tuple[str, Counter[Any]], ...] = (
        ("modality", found.modalities),
        ("source", found.sources),
        ("answers in a row", Counter(dict(sorted(found.turns.items())))),
        ("media", found.media),
    )
    for title, counter in counted:
        lines += ["", title]
        width = max((len(str(k)) for k in counter), default=0)
        lines += [f"  {k!s:<{width}}  {n:,}" for k, n in counter.items()]
    lines += ["", f"{found.unit} of a row"]
    lines += [f"  {k:<6}  {v:,.0f}" for k, v in found.summary().items()]
    if found.n_supervised is not None:
        lines.append(f"  learned {found.n_supervised:,}")
    lines += [f"  {line}" for line in Histogram.of(found.lengths).lines()]
    return lines


def index_data(found: LengthIndex) -> dict[str, Any]:
    """What ``data index`` measured, for --json."""
    return {
        "rows": len(found),
        "bad_rows": len(found.errors),
        "tokens": int(found.lengths.sum(dtype="int64")),
        "supervised_tokens": int(found.supervised.sum(dtype="int64")),
        "longest": int(found.lengths.max(initial=0)),
        "errors": [{"row": k, "error": v} for k, v in sorted(found.errors.items())][:100],
    }


def index_lines(found: LengthIndex, file: Path) -> list[str]:
    """What ``data index`` measured and wrote to a file."""
    data = index_data(found)
    mean = data["tokens"] / max(1, len(found) - len(found.errors))
    lines = [
        f"{file}: {data['rows']:,} rows, {data['bad_rows']:,} that cannot be used",
        f"{data['tokens']:,} tokens, {data['supervised_tokens']:,} of them learned; a row has "
        f"{math.ceil(mean):,} on average, the longest {data['longest']:,}",
    ]
    return lines + [f"  {entry['error']}" for entry in data["errors"][:10]]
