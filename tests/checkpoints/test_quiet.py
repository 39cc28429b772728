"""Loading says nothing on its own, and leaves the settings of other libraries as they were."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_data import golden
from transformers.utils import logging as hf_logging

from av_llava.checkpoints.quiet import BITSANDBYTES, quiet_loading

from .folders import V15, load

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bars", [True, False])
def test_no_bar_is_shown_and_the_callers_settings_come_back(capfd, monkeypatch, bars):
    monkeypatch.setattr(hf_logging, "_tqdm_active", bars)
    verbosity = hf_logging.get_verbosity()
    load(golden(f"llava/{V15}") / "checkpoint")
    out, err = capfd.readouterr()
    assert out == "" and "Loading weights" not in err and "%" not in err
    assert hf_logging.is_progress_bar_enabled() is bars
    assert hf_logging.get_verbosity() == verbosity


def test_bars_are_back_after_an_error(monkeypatch):
    monkeypatch.setattr(hf_logging, "_tqdm_active", True)
    seen = []

    @quiet_loading()
    def failing():
        seen.append(hf_logging.is_progress_bar_enabled())
        raise OSError

    with pytest.raises(OSError):
        failing()
    assert seen == [False] and hf_logging.is_progress_bar_enabled()


def test_bitsandbytes_says_nothing_of_a_kernel_that_is_not_used(caplog):
    log = logging.getLogger(BITSANDBYTES)
    with caplog.at_level(logging.WARNING, logger=BITSANDBYTES):
        log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
        assert not caplog.records
        log.warning("something else")
    assert [r.getMessage() for r in caplog.records] == ["something else"]


def test_a_program_that_loads_and_saves_prints_nothing(tmp_path):
    folder = str(golden(f"llava/{V15}") / "checkpoint")
    code = f"import av_llava; av_llava.load({folder!r}).save_pretrained({str(tmp_path / 'a')!r})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == "" and done.stderr == ""
