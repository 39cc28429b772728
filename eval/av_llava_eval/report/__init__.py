"""Reports of one run or of several: Markdown, and one HTML page with plots and wrong answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from av_llava_eval.records import write_whole
from av_llava_eval.report.gather import FRAMES, MISSES, gather
from av_llava_eval.report.markdown import markdown
from av_llava_eval.report.page import page
from av_llava_eval.task import Task

__all__ = ["gather", "markdown", "page", "write_report"]


def write_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    compat: str | None = None,
    misses: int = MISSES,
    frames: int = FRAMES,
    task: Task | None = None,
) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.html``.

    Args:
        folders, compat, misses, frames, task: see :func:`gather`.
        out: folder to write into; by default that of the first run. Older reports are replaced.

    Returns:
        The two files.
    """
    facts = gather(folders, compat=compat, misses=misses, frames=frames, task=task)
    place = Path(out if out is not None else folders[0])
    text, html = place / "report.md", place / "report.html"
    write_whole(text, markdown(facts))
    write_whole(html, page(facts))
    return text, html
