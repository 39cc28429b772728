"""``doctor``: finds what is broken, and survives it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, program

from av_llava.answers import SCHEMA
from av_llava.cli import doctor
from av_llava.cli.doctor import Package, in_range, markdown, problems, requirements


def fake_site(folder: Path, sources: dict[str, str], versions: dict[str, str]) -> Path:
    """Packages with metadata, some of them broken."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


BROKEN = {
    "torch": "import os; os.abort()",
    "torchaudio": "raise SystemExit(3)",
    "transformers": "def broken(:",
    "accelerate": "raise KeyboardInterrupt",
    "peft": "raise ImportError('undefined symbol: x\\nsecond line')",
    "einops": "print('chatter'); raise OSError('libfoo.so: cannot open')",
    "av": "import ctypes; ctypes.string_at(0)",
    "decord": "class E(BaseException): pass\nraise E('own')",
    "PIL": "raise RuntimeError('pillow')",
    "numpy": "raise AttributeError('numpy')",
    "tqdm": "import time; time.sleep(60)",
    "safetensors": "",
    "huggingface_hub": "",
}


def test_every_package_broken_is_survived(tmp_path: Path) -> None:
    site = fake_site(tmp_path, BROKEN, {})
    env = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    done = program("doctor", "--json", "--timeout", "3", env=env)
    assert done.code == 6, done.err
    assert done.json["schema"] == SCHEMA
    errors = {p["name"]: p["error"] for p in done.json["packages"]}
    assert "ended the process" in errors["torch"] and "ended the process" in errors["av"]
    assert errors["torchaudio"].startswith("SystemExit")
    assert errors["transformers"].startswith("SyntaxError")
    assert errors["accelerate"].startswith("KeyboardInterrupt")
    assert errors["peft"] == "ImportError: undefined symbol: x"
    assert errors["decord"] == "E: own"
    assert "longer than 3 s" in errors["tqdm"]
    assert errors["safetensors"] is None and errors["huggingface-hub"] is None
    assert "Traceback" not in done.err
    text = "\n".join(markdown(done.json))
    assert "| torch | " in text and "libfoo.so" in text


def test_known_bad_pairs_and_ranges_are_named() -> None:
    def said(**versions: str) -> str:
        wanted = {"torch": ">=2.11,<2.15", "torchaudio": ">=2.11,<2.12", "av": ">=17.1"}
        found = [Package(n, wanted[n], v) for n, v in versions.items()]
        return "\n".join(problems(found))

    assert said(torch="2.14.1+cu130", torchaudio="2.11.0", av="18.1") == ""
    newer = said(torch="2.15.0", torchaudio="2.11.0")
    assert "torch 2.15.0 is outside" in newer and "do not work together" in newer
    assert "do not work together" in said(torch="2.10.0", torchaudio="2.11.0")
    assert 'pip install "av>=17.1"' in said(av="14.4.0")


def test_different_cuda_builds_are_named() -> None:
    torch = Package("torch", "", "2.14.0", facts={"cuda": "13.2"})
    torchaudio = Package("torchaudio", "", "2.11.0", facts={"cuda": "13.0"})
    assert "CUDA 13.2 and torchaudio for CUDA 13.0" in problems([torch, torchaudio])[0]
    torchaudio.facts = {"cuda": "13.2"}
    assert problems([torch, torchaudio]) == []


def test_missing_packages() -> None:
    assert problems([Package("decord", "", None, optional=True)]) == []
    assert 'pip install "einops>=0.8"' in problems([Package("einops", ">=0.8", None)])[0]
    assert "not properly installed" in problems([])[0]


@pytest.mark.parametrize(
    ("version", "wanted", "holds"),
    [
        ("2.11.0+cu130", ">=2.11,<2.15", True),
        ("2.11.0rc1", ">=2.11", True),
        ("2.9", ">=2.11", False),
        ("2.15", "<2.15", False),
        ("2.15.0", "<2.15", False),
        ("2.14.9", "<2.15", True),
        ("5", ">=5.0", True),
        ("6.0", "<6", False),
        ("1.0", "", True),
        ("1.2", "==1.2.0", True),
        ("1.2", "!=1.2", False),
    ],
)
def test_ranges(version: str, wanted: str, holds: bool) -> None:
    assert in_range(version, wanted) is holds


def test_requirements_are_the_projects_own() -> None:
    names = {line.split(">")[0].split("<")[0].split(";")[0].strip() for line in requirements()}
    assert {"torch", "torchaudio", "transformers", "av", "decord", "typer"} <= names


def test_no_secret_is_shown(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@host")
    monkeypatch.setattr(doctor, "requirements", list)
    found = doctor.examine(1.0)
    assert found["environment"]["HF_TOKEN"] == "(set)"
    assert "secret" not in json.dumps(found) and "secret" not in "\n".join(markdown(found))


@pytest.mark.slow
def test_this_environment_is_sound() -> None:
    done = program("doctor", "--json")
    assert done.json["problems"] == [] and done.code == 0
    found = {p["name"]: p for p in done.json["packages"]}
    assert found["torch"]["error"] is None and found["torch"]["version"]
    assert found["av"]["facts"]["lacking_codecs"] == []
    assert any(d["device"] == "cpu" for d in done.json["devices"])
    assert done.json["python"] == sys.version.split()[0]
