"""The picture in docs/world.md is what its script draws."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("world_sheet", ROOT / "scripts/world_sheet.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_picture_is_current_and_small(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["world_sheet.py", str(file)])
    script.main()
    drawn, kept = (np.asarray(Image.open(f).convert("RGB")) for f in (file, script.FILE))
    # Not the text, whose font depends on Pillow.
    media = (slice(None), slice(script.WIDTH))
    np.testing.assert_allclose(drawn[media].astype(int), kept[media], atol=2)
    assert script.FILE.stat().st_size < 60_000


def test_the_sheet_shows_every_plot_once(script: ModuleType) -> None:
    scenes = script.scenes()
    assert len({s.key for s in scenes}) == 7
    assert {s.plot for s in scenes} >= {"crowd", "travel", "sequence", "change", "turns", "listen"}
    assert sum(not s.has_audio for s in scenes) == sum(not s.has_video for s in scenes) == 1
