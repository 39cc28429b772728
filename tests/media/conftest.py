"""Clips made once per run and shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip

ClipMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipMaker:
    """Return a maker of clips: clip("name.mp4", **options of make_clip), made once each."""
    folder = tmp_path_factory.mktemp("clips")
    made: dict[str, Path] = {}

    def make(name: str = "plain.mp4", **options: Any) -> Path:
        key = f"{name} {sorted(options.items())!r}"
        if key not in made:
            suffix = Path(name).suffix
            made[key] = make_clip(folder / f"{Path(name).stem}_{len(made)}{suffix}", **options)
        return made[key]

    return make
