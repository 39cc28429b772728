"""How training data are made up: rows by modality, source and turns, and how long they are.

Contract: one pass, memory for a few integers a row. Lengths in tokens come from an index; without
one, the words of a row are counted, and called so.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from av_llava.chat import TextPart
from av_llava.errors import DataError, MissingExtraError, UsageError
from av_llava.training.samples import Sample
from av_llava.training.store import SampleStore

if TYPE_CHECKING:
    from av_llava.training.index import LengthIndex

Progress = Callable[[int, int], None]

PLOT_SUFFIXES = (".png", ".svg", ".pdf", ".html")
_MODALITIES = ("image", "video", "audio")
_BINS = 24
_BAR = 40
_MOST_SOURCES = 50


@dataclass(frozen=True)
class Histogram:
    """How many rows are how long."""

    edges: np.ndarray
    """int64 [k + 1]: a bin holds ``edges[i] <= x < edges[i + 1]``; the last one is closed."""
    counts: np.ndarray
    """int64 [k]: rows of each bin."""

    @classmethod
    def of(cls, values: np.ndarray) -> Histogram:
        """Bins of one round width over all values. [n]"""
        top = int(values.max()) if len(values) else 0
        width = _round_width(max(1, math.ceil((top + 1) / _BINS)))
        edges = np.arange(0, top + width + 1, width, dtype=np.int64)
        return cls(edges, np.histogram(values, edges)[0].astype(np.int64))

    def lines(self) -> list[str]:
        """The histogram as text, one bar a bin."""
        most = max(1, int(self.counts.max(initial=0)))
        wide = len(f"{self.edges[-1]:,}")
        return [
            f"{low:>{wide},} – {high - 1:>{wide},} {'█' * math.ceil(n / most * _BAR):<{_BAR}} {n:,}"
            for low, high, n in zip(self.edges, self.edges[1:], self.counts, strict=False)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {"edges": self.edges.tolist(), "counts": self.counts.tolist()}


def _round_width(least: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 10 ** int(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least)


@dataclass
class Statistics:
    """How training data are made up."""

    n_rows: int
    n_bad: int = 0
    """Rows that cannot be used; they are in no other number."""
    modalities: Counter[str] = field(default_factory=Counter)
    """``text``, ``image``, ``video``, ``video+audio``, … → rows."""
    sources: Counter[str] = field(default_factory=Counter)
    """File, and ``data_source`` where rows have one → rows."""
    turns: Counter[int] = field(default_factory=Counter)
    """Number of answers → rows."""
    media: Counter[str] = field(default_factory=Counter)
    """Kind of medium → how often."""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Tokens, or words, of each usable row. [n]"""
    unit: str = "words"
    """What ``lengths`` counts: ``tokens`` or ``words``."""
    n_supervised: int | None = None
    """Tokens that are learned; None without an index."""

    def summary(self) -> dict[str, float]:
        """Mean, quantiles, maximum and sum of the lengths."""
        if not len(self.lengths):
            return {}
        names = ("p10", "median", "p90", "p99")
        found = dict(zip(names, np.percentile(self.lengths, (10, 50, 90, 99)), strict=True))
        ends = {"mean": self.lengths.mean(), "max": self.lengths.max(), "sum": self.lengths.sum()}
        return {k: float(v) for k, v in {**found, **ends}.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "rows": self.n_rows,
            "bad_rows": self.n_bad,
            "modalities": dict(self.modalities.most_common()),
            "sources": dict(self.sources.most_common()),
            "answers_a_row": {str(k): n for k, n in sorted(self.turns.items())},
            "media": dict(self.media.most_common()),
            "unit": self.unit,
            "lengths": self.summary(),
            "supervised_tokens": self.n_supervised,
            "histogram": Histogram.of(self.lengths).to_dict(),
        }


def statistics(
    store: SampleStore, index: LengthIndex | None = None, progress: Progress | None = None
) -> Statistics:
    """Count what a store holds.

    Args:
        store: the samples.
        index: their lengths; without it, words are counted, and a video's own sound is unknown.
        progress: called with the rows that are done and all rows.

    Raises:
        DataError: the index is of other data.
    """
    if index is not None and len(index) != len(store):
        raise DataError(f"The index holds {len(index)} rows, but the data {len(store)}.")
    found = Statistics(len(store), unit="words" if index is None else "tokens")
    lengths = np.zeros(len(store), np.int64)
    usable = np.zeros(len(store), bool)
    for row in range(len(store)):
        if index is None or row not in index.errors:
            try:
                sample = store[row]
            except DataError:
                pass  # counted below; data validate says why
            else:
                usable[row] = True
                lengths[row] = _n_words(sample) if index is None else index.lengths[row]
                _count(found, sample, None if index is None else int(index.modality[row]))
        if progress is not None:
            progress(row + 1, len(store))
    found.n_bad = int((~usable).sum())
    found.lengths = lengths[usable]
    if index is not None:
        found.n_supervised = int(index.supervised[usable].sum(dtype=np.int64))
    return found


def _count(found: Statistics, sample: Sample, code: int | None) -> None:
    if code is None:
        name = "+".join(k for k in _MODALITIES if k in sample.modalities) or "text"
    else:
        from av_llava.training.index import modality_name

        name = modality_name(code)
    found.modalities[name] += 1
    found.turns[sum(m.role == "assistant" for m in sample.messages)] += 1
    found.media.update(part.kind for part in sample.media)
    found.sources[_source(found, sample)] += 1


def _source(found: Statistics, sample: Sample) -> str:
    """The file of a sample and its ``data_source``; rare ones are counted together."""
    name = sample.source.rpartition("[" if sample.source.endswith("]") else ":")[0]
    data_source = sample.meta.get("data_source")
    name = f"{name} ({data_source})" if isinstance(data_source, str) else name
    return name if name in found.sources or len(found.sources) < _MOST_SOURCES else "others"


def _n_words(sample: Sample) -> int:
    texts = (p.text for m in sample.messages for p in m.parts if isinstance(p, TextPart))
    return sum(len(text.split()) for text in texts)


def plot(found: Statistics, path: str | Path) -> None:
    """Draw the histogram of the lengths and the modalities.

    Args:
        found: what to draw.
        path: .png, .svg, .pdf, or .html (the picture inside a page, with the numbers).

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: another suffix.
        DataError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise UsageError(f"A plot ends in {', '.join(PLOT_SUFFIXES)}, not {path.name!r}.")
    check_matplotlib()
    page = path.suffix.lower() == ".html"
    picture = _drawn(found, "png" if page else path.suffix.lower()[1:])
    try:
        path.write_bytes(_page(found, picture).encode() if page else picture)
    except OSError as error:
        raise DataError(f"The plot {path} cannot be written: {error.strerror}.") from error


def check_matplotlib() -> None:
    """Raise MissingExtraError if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "eval", "A plot") from error


def _drawn(found: Statistics, kind: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1))
    histogram = Histogram.of(found.lengths)
    top.stairs(histogram.counts, histogram.edges, fill=True)
    top.set(xlabel=f"{found.unit} of a row", ylabel="rows", title=f"{found.n_rows:,} rows")
    names, counts = (
        zip(*found.modalities.most_common(), strict=True) if found.modalities else ((), ())
    )
    bottom.barh(names, counts)
    bottom.set(xlabel="rows")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120)
    return buffer.getvalue()


def _page(found: Statistics, picture: bytes) -> str:
    """A page with the picture and the numbers that it shows."""
    rows = [(f"{k} ({found.unit})", f"{v:,.0f}") for k, v in found.summary().items()]
    rows += [(f"rows with {k}", f"{n:,}") for k, n in found.modalities.most_common()]
    cells = "".join(f"<tr><td>{html.escape(k)}</td><td>{v}</td></tr>" for k, v in rows)
    data = base64.b64encode(picture).decode()
    return (
        "<!doctype html><meta charset='utf-8'><title>Training data</title>"
        f"<h1>{found.n_rows:,} rows</h1><img alt='lengths and modalities' "
        f"src='data:image/png;base64,{data}'><table>{cells}</table>\n"
    )
