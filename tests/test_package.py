"""Importing the package is cheap, and every public name exists."""

from __future__ import annotations

import subprocess
import sys

import av_llava


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_costs_no_torch():
    code = (
        "import sys, av_llava, av_llava.audio, av_llava.aggregators; print('torch' in sys.modules)"
    )
    assert run(code).strip() == "False"


def test_every_public_name_exists():
    for name in av_llava.__all__:
        assert getattr(av_llava, name) is not None
    for name in av_llava.audio.__all__:
        assert getattr(av_llava.audio, name) is not None


def test_unknown_names_are_attribute_errors():
    assert not hasattr(av_llava, "laod") and not hasattr(av_llava.audio, "LogMle")


def test_auto_classes_know_the_model_after_any_model_name():
    code = (
        "import av_llava; av_llava.AVLlavaConfig\n"
        "from transformers import AutoConfig; print(type(AutoConfig.for_model('av_llava')).__name__)"
    )
    assert run(code).strip() == "AVLlavaConfig"
