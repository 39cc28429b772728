"""The files that docs/data.md shows: each block of JSON or YAML stands under its file's name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
_EXAMPLE = re.compile(r"^`([\w.]+)`\n\n```(?:json|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> dict[str, str]:
    """Name of a file → its content."""
    return dict(_EXAMPLE.findall(PAGE.read_text(encoding="utf-8")))


def write_examples(folder: Path) -> None:
    """Write them beside the media that they name: clip, silent clip, sound, photo, frames."""
    for name, content in examples().items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "frames").mkdir()
    for i in range(3):
        shutil.copy(folder / "photo.jpg", folder / "frames" / f"{i}.jpg")
