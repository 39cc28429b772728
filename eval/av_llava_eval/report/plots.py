"""The plots of a report, as SVG text: matplotlib draws, nothing is fetched.

Contract: each function takes the columns of a report and returns one ``<svg>`` element, or None
where there is nothing to show. Texts stay texts, so that a page can be searched. Which colour is
which column is the page's to say (:func:`key`): names may be long and many.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from av_llava.errors import MissingExtraError
from av_llava_eval.report.facts import Column, Estimate

COLORS = (
    "#3b6fb6",
    "#d9822b",
    "#4f9d69",
    "#a05195",
    "#7a7a7a",
    "#c4504b",
    "#2a9fa5",
    "#8a6d3b",
    "#6b5bd2",
    "#b5a52c",
)
"""Of the columns, in order; told apart also by people who do not see red and green."""

STAGE_COLORS = ("#8fb4dd", "#f0bf8a", "#a5cfb2", "#cbaacd", "#bdbdbd")
"""Of the stages of a run."""

INK, FAINT = "#333a45", "#d8dce3"
_WIDTH = 7.4  # inches
GROUPS = 60
"""Values of a grouping that a plot shows; further ones are in the Markdown."""

Key = list[tuple[str, str]]
"""Names and their colours."""


def key(columns: Sequence[Column]) -> Key:
    """The columns' colours."""
    return [(c.label, color) for c, color in zip(columns, _cycle(len(columns)), strict=True)]


def letters_key(columns: Sequence[Column]) -> Key:
    """Of :func:`letters`."""
    return [("how often it is right", FAINT), *key(columns)]


def stages_key(columns: Sequence[Column]) -> Key:
    """Of :func:`stages`."""
    return [(n, STAGE_COLORS[i % len(STAGE_COLORS)]) for i, n in enumerate(_stages(columns))]


def headline(columns: Sequence[Column]) -> str | None:
    """The headline score of every run, with its interval, and what guessing gives."""
    figure, axes = _figure(0.55 * len(columns) + 0.9)
    _bars(axes, [[c.headline] for c in columns], [c.label for c in columns], by_row=True)
    chance = columns[0].chance
    if chance is not None:
        axes.axvline(100 * chance, color=INK, linewidth=1, linestyle=(0, (3, 3)))
        axes.annotate(
            "chance",
            (100 * chance, 1),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=8,
            color=INK,
        )
    return _svg(figure)


def groups(columns: Sequence[Column], grouping: str, most: int = GROUPS) -> str | None:
    """Accuracy with intervals by the values of one grouping, the runs side by side."""
    names = [e.name for e in columns[0].groups.get(grouping, ())][:most]
    if len(names) < 2:
        return None
    found = [{e.name: e for e in c.groups.get(grouping, ())} for c in columns]
    rows = [[f[n] for f in found if n in f] for n in names]
    figure, axes = _figure((0.17 * len(columns) + 0.22) * len(names) + 0.7)
    _bars(axes, rows, [f"{n} ({rows[i][0].n})" for i, n in enumerate(names)])
    return _svg(figure)


def length(columns: Sequence[Column]) -> str | None:
    """Accuracy against the length of the video."""
    if len(columns[0].by_length) < 2:
        return None
    figure, axes = _figure(2.9)
    for column, color in zip(columns, _cycle(len(columns)), strict=True):
        points = column.by_length
        x = np.arange(len(points))
        score, low, high = _percent(points)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(x, score, color=color, marker="o", markersize=4)
    labels = [f"{e.name}\n({e.n})" for e in columns[0].by_length]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("%")
    _clean(axes, "y")
    return _svg(figure)


def dumbbells(
    columns: Sequence[Column], second: int, grouping: str, most: int = GROUPS
) -> str | None:
    """The first column and another, joined for each group: what sound changes, for instance."""
    ends = columns[0], columns[second]
    left, right = ({e.name: e for e in c.groups.get(grouping, ())} for c in ends)
    names = [name for name in left if name in right][:most]
    pairs = [(ends[0].headline, ends[1].headline), *((left[n], right[n]) for n in names)]
    figure, axes = _figure(0.3 * len(pairs) + 0.6)
    rows = range(len(pairs))
    first, other = ([100 * pair[at].score for pair in pairs] for at in (0, 1))
    axes.hlines(rows, first, other, color=FAINT, linewidth=3, zorder=1)
    colors = _cycle(len(columns))
    # A ring around a point where both are the same.
    ring = {"facecolors": "white", "edgecolors": colors[0], "linewidths": 2}
    axes.scatter(first, rows, s=75, zorder=2, **ring)
    axes.scatter(other, rows, s=26, zorder=3, color=colors[second])
    axes.set_yticks(rows, list(map(_label, ["all", *names])))
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("%")
    _clean(axes, "x")
    return _svg(figure)


def tokens(columns: Sequence[Column]) -> str | None:
    """Score against the tokens that the pictures of a video become, for columns that hear alike."""
    sweeps: dict[str, list[tuple[float, Column, str]]] = {}
    for column, color in zip(columns, _cycle(len(columns)), strict=True):
        if column.visual_tokens:
            some = sweeps.setdefault(column.sound, [])
            some.append((column.visual_tokens, column, color))
    sweeps = {k: some for k, some in sweeps.items() if len({round(x) for x, _, _ in some}) > 1}
    if not sweeps:
        return None
    figure, axes = _figure(2.9)
    points = sorted((x for some in sweeps.values() for x, _, _ in some))
    for i, some in enumerate(sweeps.values()):
        aside = 1 + 0.012 * i  # so that intervals at the same number are both seen
        for run in dict.fromkeys(c.run for _, c, _ in some):
            line = sorted((x * aside, 100 * c.headline.score) for x, c, _ in some if c.run == run)
            axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=2, zorder=1)
        for x, column, color in some:
            score, low, high = _percent([column.headline])
            error = [[max(score[0] - low[0], 0)], [max(high[0] - score[0], 0)]]
            axes.errorbar([x * aside], score, yerr=error, fmt="o", color=color, capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xlim(points[0] / 1.15, points[-1] * 1.15)
    ticks = _apart(sorted({round(x) for x in points}))
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tokens of a video's pictures, mean")
    axes.set_ylabel("%")
    _clean(axes, "y")
    return _svg(figure)


def _apart(ticks: Sequence[int], part: float = 0.07) -> list[int]:
    """Ticks of a logarithmic axis without those whose labels would meet the one before."""
    step = (ticks[-1] * 1.15 / (ticks[0] / 1.15)) ** part
    out = [ticks[0]]
    for tick in ticks[1:]:
        if tick >= out[-1] * step:
            out.append(tick)
    return out


def letters(columns: Sequence[Column]) -> str | None:
    """How often each letter is answered, against how often it is right."""
    names = sorted({letter for c in columns for letter in c.letters})
    if not names:
        return None
    figure, axes = _figure(2.6)
    wide = 0.8 / (len(columns) + 1)
    right = [100 * columns[0].letters.get(n, (0.0, 0.0))[1] for n in names]
    x = np.arange(len(names)) - 0.4 + wide / 2
    axes.bar(x, right, wide, color=FAINT)
    for i, (column, color) in enumerate(zip(columns, _cycle(len(columns)), strict=True), 1):
        said = [100 * column.letters.get(n, (0.0, 0.0))[0] for n in names]
        axes.bar(x + i * wide, said, wide, color=color)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("% of questions")
    _clean(axes, "y")
    return _svg(figure)


def stages(columns: Sequence[Column]) -> str | None:
    """Where the time went."""
    names = _stages(columns)
    if not names:
        return None
    figure, axes = _figure(0.45 * len(columns) + 0.9)
    start = np.zeros(len(columns))
    for i, name in enumerate(names):
        color = STAGE_COLORS[i % len(STAGE_COLORS)]
        seconds = np.array([c.stage_s.get(name, 0.0) for c in columns])
        axes.barh(range(len(columns)), seconds, left=start, color=color, height=0.6)
        start += seconds
    axes.set_yticks(range(len(columns)), [_label(c.label) for c in columns])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    _clean(axes, "x")
    return _svg(figure)


def _stages(columns: Sequence[Column]) -> list[str]:
    return list(dict.fromkeys(n for c in columns for n in c.stage_s))


# -------------------------------------------------------------------- drawing


def need_matplotlib() -> None:
    """Raise MissingExtraError before a long run whose report could not be drawn."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "eval", "Drawing the plots of a report")


def _figure(height: float) -> tuple[Any, Any]:
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    out = io.StringIO()
    # A fixed salt and no date: the same scores give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "av_llava"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # The page sets the width; the height follows.
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)


def _bars(
    axes: Any, rows: Sequence[Sequence[Estimate]], labels: Sequence[str], by_row: bool = False
) -> None:
    """Horizontal bars with intervals.

    Args:
        axes: to draw on.
        rows: of bars; a row holds one estimate a run.
        labels: of the rows.
        by_row: each row is a run, and has its colour.
    """
    high = 0.8 / max(map(len, rows))
    for i, row in enumerate(rows):
        for j, estimate in enumerate(row):
            y = i - 0.4 + (j + 0.5) * high
            color = COLORS[(i if by_row else j) % len(COLORS)]
            (score,), (low,), (top,) = _percent([estimate])
            axes.barh(y, score, high * 0.86, color=color, alpha=0.85)
            axes.plot([low, top], [y, y], color=INK, linewidth=1.2, solid_capstyle="butt")
            axes.text(top + 1, y, f"{score:.1f}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(labels)), list(map(_label, labels)))
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("%")
    _clean(axes, "x")


def _percent(points: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = np.array([(e.score, e.low, e.high) for e in points]) * 100
    return found[:, 0], found[:, 1], found[:, 2]


def _clean(axes: Any, grid: str) -> None:
    for side in ("top", "right", "left" if grid == "x" else "bottom"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(FAINT)
    axes.grid(axis=grid, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _label(text: str, width: int = 30) -> str:
    """A name in a few short lines; of a long one the middle is left out."""
    if len(text) > 2 * width:
        text = f"{text[: width + 10]}…{text[-(width - 11) :]}"
    # A dollar sign would begin a formula.
    return "\n".join(textwrap.wrap(text, width) or [""]).replace("$", r"\$")


def _cycle(n: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]
