"""Importing the package is cheap, every public name exists, and versions agree."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import av_llava

ROOT = Path(__file__).parents[1]


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


def pinned(name: str) -> dict[str, Version]:
    """Package → version of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(r.name): Version(next(iter(r.specifier)).version) for r in found}


def declared() -> dict[str, SpecifierSet]:
    """Package → versions that pyproject.toml allows, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(word) for words in lists for word in words]
    return {canonicalize_name(r.name): r.specifier for r in found if r.specifier}


# What does not run with the model, and is tested as pinned.
TOOLS = {"pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "import-linter", "protobuf"}


def test_the_oldest_versions_that_are_tested_are_those_declared() -> None:
    lowest = {
        name: Version(bound.version)
        for name, allowed in declared().items()
        for bound in allowed
        if bound.operator == ">="
    }
    oldest = pinned("constraints-oldest.txt")
    assert {n: v for n, v in lowest.items() if n not in TOOLS} == oldest


def test_the_pinned_versions_are_allowed() -> None:
    newest, allowed = pinned("constraints.txt"), declared()
    known = allowed.keys() & newest.keys()
    assert len(known) > 15
    assert not [n for n in known if newest[n] not in allowed[n]]
