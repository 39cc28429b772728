"""What several modules of training tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_runs import make_base, make_data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and eight samples, of every modality."""
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder)
    make_data(folder, 8)
    return folder
