"""Where the reference data is: the compact set in the repository, then the full set beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

COMPACT = Path(__file__).parent / "goldens"
FULL = Path(__file__).parents[2] / "shared" / "goldens"


def golden(relative: str) -> Path:
    """Return the file or folder; skip the test when neither set holds it."""
    for root in (COMPACT, FULL):
        if (root / relative).exists():
            return root / relative
    pytest.skip(f"golden {relative} is not in this clone")


def golden_dirs(pattern: str) -> list[Path]:
    """Return all folders that match, the full set winning over the compact one by name."""
    found = {p.name: p for root in (COMPACT, FULL) for p in root.glob(pattern) if p.is_dir()}
    return [found[name] for name in sorted(found)]
