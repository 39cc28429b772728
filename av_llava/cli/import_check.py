"""Run on its own by ``av-llava doctor``: import packages one by one and say how it went.

Contract: standard library only, and never imported by the package. A package whose import kills
the process is the last one that was announced. One JSON object a line: first ``{"begin": name}``,
then ``{"name": …, "error": …, "facts": {…}}``.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any


def torch_facts(torch: Any) -> dict[str, Any]:
    """What torch was built for, and the devices that it sees."""
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "name": found.name,
                    "memory_gib": round(found.total_memory / 2**30, 1),
                    "capability": f"{found.major}.{found.minor}",
                    "bfloat16": bool(torch.cuda.is_bf16_supported()),
                }
            )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps"})
    devices.append({"device": "cpu", "threads": torch.get_num_threads()})
    return {**facts, "devices": devices}


def torchaudio_facts(torchaudio: Any) -> dict[str, Any]:
    """What torchaudio was built for: the local part of its version says it, such as cu130."""
    tag = re.search(r"\+cu(\d+)(\d)$", torchaudio.__version__)
    return {"cuda": f"{tag[1]}.{tag[2]}" if tag else None}


def av_facts(av: Any) -> dict[str, Any]:
    """The FFmpeg libraries inside PyAV, and whether the commonest codecs are there."""
    libraries = {k: ".".join(map(str, v)) for k, v in av.library_versions.items()}
    wanted = ("h264", "hevc", "vp9", "av1", "aac", "opus", "mp3")
    lacking = [name for name in wanted if name not in av.codecs_available]
    return {"ffmpeg": libraries, "lacking_codecs": lacking}


FACTS = {"torch": torch_facts, "torchaudio": torchaudio_facts, "av": av_facts}


def check(name: str) -> dict[str, Any]:
    """Import one package and collect its facts."""
    try:
        module = importlib.import_module(name)
        facts = FACTS[name](module) if name in FACTS else {}
    except BaseException as error:  # a broken package can raise anything, SystemExit too
        lines = str(error).strip().splitlines()
        return {"name": name, "error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    return {"name": name, "error": None, "facts": facts}


def main(names: list[str]) -> None:
    """Check packages in order; what they print goes to stderr."""
    report, sys.stdout = sys.stdout, sys.stderr
    for name in names:
        print(json.dumps({"begin": name}), file=report, flush=True)
        print(json.dumps(check(name)), file=report, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
