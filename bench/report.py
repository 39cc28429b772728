"""Turn rows into tables, for the terminal and between the markers of docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from bench.measure import ROOT, Row

PACKAGES = ("torch", "transformers", "av", "pillow", "numpy")


def tables(rows: Sequence[Row], ratio: str) -> str:
    """Markdown: a line a case, a column a contestant; cases with other contestants apart."""
    groups: dict[tuple[str, ...], list[list[Row]]] = {}
    for case in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == case]
        groups.setdefault(tuple(row.contestant for row in own), []).append(own)
    return "\n".join(_table(names, cases, ratio) for names, cases in groups.items())


def _table(names: Sequence[str], cases: Sequence[Sequence[Row]], ratio: str) -> str:
    lines = [[f"case ({ratio})", *names]]
    lines += [[case[0].case, *(cell(row) for row in case)] for case in cases]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    lines.insert(1, rule)
    aligned = [
        " | ".join([line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:])])
        for line in lines
    ]
    return "\n".join(f"| {line} |" for line in aligned) + "\n"


def cell(row: Row) -> str:
    """One measurement: the ratio, what was measured, and the target with its outcome."""
    text = f"{row.ratio:.2f} · {amount(row.best, row.unit)}"
    if row.bound is None:
        return text
    sign = "≤" if row.meaning == "cost" else "≥"
    return f"**{text}** ({sign} {row.bound:g} {'✓' if row.met else '✗ MISSED'})"


def amount(value: float, unit: str) -> str:
    """A value with a unit that suits its size."""
    if unit != "s":
        return f"{value:.0f} {unit}"
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.2f} s"


def verdict(rows: Sequence[Row]) -> str:
    """One line about the targets."""
    aimed = [row for row in rows if row.met is not None]
    missed = [f"{row.case}: {row.contestant} {row.ratio:.2f}" for row in aimed if not row.met]
    text = f"{len(aimed) - len(missed)} of {len(aimed)} targets met."
    return text if not missed else f"{text} Missed: " + "; ".join(missed)


def machine(extra: str = "") -> str:
    """What the figures were measured on and with, and how busy it was."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"Measured on {time.strftime('%d %B %Y')} at commit {_commit()} with {_cpu()}, "
        f"{os.cpu_count()} processors{extra}; {platform.system()}, Python "
        f"{platform.python_version()}, {versions}. Load average at the end: {load}."
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def write(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of one benchmark.

    Raises:
        ValueError: the file does not have them.
    """
    whole = path.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    if begin not in whole or end not in whole:
        raise ValueError(f"{path} has no markers {begin.strip()} and {end}; add them.")
    before, rest = whole.split(begin, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")
