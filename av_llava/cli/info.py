"""``av-llava info``: what a media file or a checkpoint holds."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from av_llava.answers import SCHEMA
from av_llava.cli import engine, inputs
from av_llava.cli import options as o
from av_llava.cli.output import Output, configure_logging
from av_llava.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from av_llava.media import MediaInfo

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def command(
    target: Annotated[str | None, typer.Argument(hidden=True)] = None,
    base: o.Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: o.Verbose = 0,
) -> int:
    """Say what a media file or a checkpoint holds.

    \b
    av-llava info clip.mp4
    av-llava info checkpoints/my-model
    av-llava info checkpoints/my-lora --base checkpoints/vicuna-7b

    TARGET is a medium (file, folder of frames, http address) or a checkpoint (folder, hub id). Of a
    file only the header is read; of a checkpoint, no weights are loaded. The exit code is 4 if
    something stands in the way of loading it.
    """
    output = Output(as_json)
    configure_logging(verbose, output)
    if target is None:
        raise UsageError("Name a medium or a checkpoint: av-llava info clip.mp4")
    if is_model(target):
        engine.check_model(target)
        data = {"kind": "model", **engine.describe(target, base)}
    elif base is not None:
        raise UsageError(f"--base goes with a checkpoint, and {target!r} is none.")
    else:
        data = of_media(target)
    if as_json:
        output.data({"schema": SCHEMA, **data})
    else:
        output.answer("\n".join(table(data)))
    return CheckpointError.exit_code if data.get("problems") else 0


def is_model(target: str) -> bool:
    """Whether a word means a checkpoint rather than a medium.

    Raises:
        CheckpointError: a folder with weights but without a config.
    """
    path = Path(target).expanduser()
    if path.is_dir():
        if engine.holds_model(path):
            return True
        if any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
            raise CheckpointError(f"The folder {target!r} holds weights but no config.json.")
        return False
    if path.exists() or inputs.is_address(target) or inputs.names_medium(target):
        return False
    return re.fullmatch(r"[\w.-]+/[\w.-]+", target) is not None and not target.startswith(".")


def of_media(target: str) -> dict[str, Any]:
    """Describe a medium from its header, without torch."""
    from av_llava.media import probe

    info: MediaInfo = probe(target)
    return asdict(info)


def table(data: dict[str, Any], indent: str = "") -> list[str]:
    """Lay out nested data as aligned lines of name and value; what is unknown is left out."""
    hidden = [k for k in _SENTENCES if not data.get(k)]
    shown = {k: v for k, v in data.items() if v is not None and v != {} and k not in hidden}
    width = max((len(_title(k)) for k in shown), default=0)
    lines = []
    for key, value in shown.items():
        if isinstance(value, dict):
            lines += [f"{indent}{_title(key)}", *table(value, indent + "  ")]
        elif key in _SENTENCES:
            lines += [f"{indent}{_title(key)}", *(f"{indent}  {sentence}" for sentence in value)]
        elif isinstance(value, (list, tuple)) and any(isinstance(v, dict) for v in value):
            lines.append(f"{indent}{_title(key)}")
            for item in value:
                lines += table(item, indent + "  ")
        else:
            lines.append(f"{indent}{_title(key).ljust(width)}  {_value(key, value)}")
    return lines


_SENTENCES = ("problems", "notes")
_UNITS = {"_s": "s", "_hz": "Hz", "_bytes": "bytes"}


def _title(key: str) -> str:
    for ending in _UNITS:
        key = key.removesuffix(ending)
    return key.removeprefix("n_").replace("_", " ")


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(v) for v in value) or "none"
    unit = next((u for ending, u in _UNITS.items() if key.endswith(ending)), "")
    if isinstance(value, float):
        text = f"{value:,.3f}".rstrip("0").rstrip(".")
    else:
        text = f"{value:,}" if isinstance(value, int) else str(value)
    return f"{text} {unit}".rstrip()
