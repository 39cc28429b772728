"""``av-llava doctor``: is everything there, does it fit together, and what would an issue need?

Contract: works whatever is broken. Versions come from the installed packages' metadata; imports
are tried in a process of their own, so that neither an exception, nor a crash, nor a hang of one
of them ends the report. No secret is shown.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

import av_llava
from av_llava.answers import SCHEMA
from av_llava.cli import options as o
from av_llava.cli.output import Output, configure_logging
from av_llava.errors import MissingExtraError

IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}
SHOWN_VARIABLES = (
    "AV_LLAVA_MODEL",
    "AV_LLAVA_DEBUG",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "NO_COLOR",
)
HIDDEN_VARIABLES = ("HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY")
"""Variables of which only is said that they are set: their values can hold secrets."""


@dataclass(frozen=True)
class Pair:
    """Two packages that are known not to work together."""

    first: str
    first_range: str
    second: str
    second_range: str
    reason: str


KNOWN_BAD = (
    Pair(
        "torch",
        ">=2.15",
        "torchaudio",
        "<2.12",
        "torchaudio 2.11 is its last release and is built against the CUDA of torch up to 2.14; "
        "with a newer torch its import fails, and with it that of peft. "
        'Install a fitting torch: pip install "torch<2.15"',
    ),
    Pair(
        "torch",
        "<2.11",
        "torchaudio",
        ">=2.11",
        "torchaudio 2.11 needs the torch that it was built with or a newer one. "
        'Install both anew: pip install "torch>=2.11,<2.15" "torchaudio>=2.11,<2.12"',
    ),
)


@dataclass
class Package:
    """One package that av_llava uses."""

    name: str
    required: str
    version: str | None = None
    optional: bool = False
    """Not required on every platform."""
    error: str | None = None
    """Why its import fails, or None."""
    facts: dict[str, Any] = field(default_factory=dict)


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", min=1.0, metavar="SECONDS", help="Longest time for importing packages."
        ),
    ] = 180.0,
    quiet: o.Quiet = False,
) -> int:
    """Check versions, devices, codecs and caches.

    Prints a Markdown block to paste into an issue. The exit code is 0 if no problem was found and
    6 otherwise.
    """
    output = Output(as_json, quiet)
    configure_logging(0, output)
    output.note("importing every package, which can take a minute …")
    found = examine(timeout)
    if as_json:
        output.data({"schema": SCHEMA, **found})
    else:
        output.answer("\n".join(markdown(found)))
    return MissingExtraError.exit_code if found["problems"] else 0


def examine(timeout_s: float) -> dict[str, Any]:
    """Collect everything, as JSON-ready data."""
    packages = [_package(r) for r in requirements()]
    _try_imports(packages, timeout_s)
    facts = {p.name: p.facts for p in packages}
    return {
        "av_llava": av_llava.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": _machine(),
        "devices": facts.get("torch", {}).get("devices", []),
        "packages": [asdict(p) for p in packages],
        "caches": _caches(),
        "environment": _environment(),
        "problems": problems(packages),
    }


def requirements() -> list[str]:
    """Requirements of av_llava as written in its metadata, or in the source tree's project file."""
    try:
        lines = importlib.metadata.requires("av-llava") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(av_llava.__file__).parents[1] / "pyproject.toml"
        try:
            lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
        except (OSError, ValueError, KeyError):
            lines = []
    return [line for line in lines if "extra ==" not in line]


def _package(requirement: str) -> Package:
    """Read one requirement, such as ``torch<2.15,>=2.11; sys_platform == "linux"``."""
    wanted, _, marker = requirement.partition(";")
    match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(.*)", wanted)
    name, required = (match[1], match[2].strip(" ()")) if match else (wanted.strip(), "")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return Package(name, required, version, optional=bool(marker.strip()))


def _try_imports(packages: list[Package], timeout_s: float) -> None:
    """Import the packages that are there, in processes of their own."""
    by_module = {IMPORT_NAMES.get(p.name, p.name.replace("-", "_")): p for p in packages}
    left = [module for module, p in by_module.items() if p.version is not None]
    while left:
        lines, ended = _run_check(left, timeout_s)
        done = {line["name"]: line for line in lines if "name" in line}
        for module, line in done.items():
            package = by_module[module]
            package.error, package.facts = line["error"], line.get("facts", {})
        begun = [line["begin"] for line in lines if "begin" in line]
        left = left[len(begun) :]
        if begun and begun[-1] not in done:
            by_module[begun[-1]].error = ended
        elif not begun and left:
            by_module[left.pop(0)].error = ended


def _run_check(modules: list[str], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """Run ``import_check``; returns what it said, and how it ended if it did not get through."""
    script = Path(__file__).with_name("import_check.py")
    # -P keeps the script's folder, which is full of our own module names, off the import path.
    words = [sys.executable, "-P", str(script), *modules]
    try:
        done = subprocess.run(words, capture_output=True, timeout=timeout_s, check=False)
        out, ended = done.stdout, f"its import ended the process (exit code {done.returncode})"
    except subprocess.TimeoutExpired as error:
        out, ended = error.stdout or b"", f"its import took longer than {timeout_s:g} s"
    lines = []
    for line in out.decode("utf-8", "replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # cut off by the end of the process
    return [line for line in lines if isinstance(line, dict)], ended


def problems(packages: list[Package]) -> list[str]:
    """Say in sentences what is wrong."""
    found = []
    if not packages:
        found.append("The requirements of av-llava are not known: it is not properly installed.")
    for p in packages:
        if p.version is None and not p.optional:
            found.append(f'{p.name} is missing. Install it: pip install "{p.name}{p.required}"')
        elif p.version is not None and not in_range(p.version, p.required):
            found.append(
                f"{p.name} {p.version} is outside {p.required}. "
                f'Install another: pip install "{p.name}{p.required}"'
            )
        if p.error is not None:
            found.append(f"{p.name} {p.version} cannot be used: {p.error}")
        for codec in p.facts.get("lacking_codecs", ()):
            found.append(f"{p.name} {p.version} cannot decode {codec}.")
    return found + _pair_problems({p.name: p for p in packages})


def _pair_problems(packages: dict[str, Package]) -> list[str]:
    found = []
    for pair in KNOWN_BAD:
        first, second = packages.get(pair.first), packages.get(pair.second)
        if first is None or second is None or first.version is None or second.version is None:
            continue
        if in_range(first.version, pair.first_range) and in_range(
            second.version, pair.second_range
        ):
            found.append(
                f"{first.name} {first.version} and {second.name} {second.version} do not work "
                f"together: {pair.reason}"
            )
    torch, torchaudio = packages.get("torch"), packages.get("torchaudio")
    if torch is not None and torchaudio is not None:
        built = [p.facts.get("cuda") for p in (torch, torchaudio)]
        if None not in built and built[0] != built[1]:
            found.append(
                f"torch is built for CUDA {built[0]} and torchaudio for CUDA {built[1]}. Install "
                "both from the same index."
            )
    return found


def in_range(version: str, wanted: str) -> bool:
    """Whether a version lies in a range such as ``>=2.11,<2.15``.

    Local parts (``+cu130``) and what follows the numbers (``rc1``) are not looked at.
    """
    have = _numbers(version)
    for part in filter(None, (p.strip() for p in wanted.split(","))):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>)\s*([\w.*+!-]+)", part)
        if match is None:
            continue  # a form that our own requirements do not use
        limit = _numbers(match[2])
        length = max(len(have), len(limit))
        a, b = (n + (0,) * (length - len(n)) for n in (have, limit))
        holds = {
            ">=": a >= b,
            "<=": a <= b,
            "==": a == b,
            "!=": a != b,
            "<": a < b,
            ">": a > b,
        }
        if not holds[match[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in match[0].split(".")) if match else ()


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {"cpus": os.cpu_count()}
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        machine["memory_gib"] = round(size / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        machine["memory_gib"] = None
    return machine


def _caches() -> list[dict[str, Any]]:
    """The folder where hub downloads are kept."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    hub = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    there = next((p for p in (hub, *hub.parents) if p.exists()), None)
    return [
        {
            "name": "models from the hub",
            "path": _short(str(hub)),
            "exists": hub.is_dir(),
            "writable": there is not None and os.access(there, os.W_OK),
            "free_gib": round(shutil.disk_usage(there).free / 2**30, 1) if there else None,
        }
    ]


def _environment() -> dict[str, str]:
    shown = {n: _short(os.environ[n]) for n in SHOWN_VARIABLES if os.environ.get(n)}
    return shown | {n: "(set)" for n in HIDDEN_VARIABLES if os.environ.get(n)}


def _short(path: str) -> str:
    """A path without the user's name."""
    home = os.path.expanduser("~")
    return "~" + path[len(home) :] if path.startswith(home + os.sep) else path


def markdown(found: dict[str, Any]) -> list[str]:
    """Lay out the report as Markdown."""
    machine = found["machine"]
    lines = [
        "### av-llava doctor",
        "",
        f"- av-llava {found['av_llava']}, Python {found['python']}, {found['platform']}",
        f"- {machine['cpus']} CPUs, {machine['memory_gib']} GiB of memory",
    ]
    for device in found["devices"]:
        facts = ", ".join(f"{k} {v}" for k, v in device.items() if k != "device")
        lines.append(f"- device {device['device']}" + (f": {facts}" if facts else ""))
    for cache in found["caches"]:
        state = "exists" if cache["exists"] else "does not exist yet"
        state += "" if cache["writable"] else ", cannot be written"
        lines.append(
            f"- {cache['name']}: `{cache['path']}` ({state}, {cache['free_gib']} GiB free)"
        )
    lines += [f"- `{name}={value}`" for name, value in found["environment"].items()]
    lines += ["", "| package | version | wanted | import | built with |", "|---|---|---|---|---|"]
    for p in found["packages"]:
        state = "-" if p["version"] is None else "failed" if p["error"] else "ok"
        built = [f"CUDA {p['facts']['cuda']}"] if p["facts"].get("cuda") else []
        built += [f"{k} {v}" for k, v in p["facts"].get("ffmpeg", {}).items()]
        version = p["version"] or ("not needed here" if p["optional"] else "missing")
        lines.append(
            f"| {p['name']} | {version} | {p['required'] or 'any'} | {state} | {', '.join(built)} |"
        )
    lines += ["", f"Problems: {len(found['problems']) or 'none'}"]
    return lines + [f"- {problem}" for problem in found["problems"]]
