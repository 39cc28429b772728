"""The way from the commands to the library: the one place that imports torch.

Contract: commands call :func:`load`, :func:`plan` and :func:`describe` as attributes of this
module, so that tests can put something else there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from av_llava.checkpoints.file_names import PART_FILES
from av_llava.cli.memory import Memory, advice
from av_llava.cli.options import ATTENTION, DTYPES, Loading, Request
from av_llava.errors import BudgetError, CheckpointError, is_out_of_memory

if TYPE_CHECKING:
    from av_llava.inference import AVLlava, RequestPlan
    from av_llava.media import MediaInfo

RANDOM = (
    "this model is random: the small trained model that ships is missing from this installation, "
    "so its answers mean nothing. Name a checkpoint with --model."
)


def check_model(model: str | None) -> None:
    """Raise CheckpointError for a local folder that is not there or has no config.json.

    A name that could be a hub id is left to the library.
    """
    if model is None:
        return
    path = Path(model).expanduser()
    if path.is_file():
        raise CheckpointError(f"{model!r} is a file. Name the checkpoint's folder.")
    if path.is_dir():
        if not holds_model(path):
            raise CheckpointError(
                f"The folder {model!r} holds no config.json, so it is not a checkpoint. "
                "Name the folder that has it."
            )
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith(("./", "../")):
        raise CheckpointError(
            f"There is no folder {model!r}, and it is not a hub id of the form owner/name."
        )


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model, or parts of one."""
    return any((folder / name).is_file() for name in ("config.json", *PART_FILES))


def load(loading: Loading) -> AVLlava:
    """Load the model."""
    from av_llava import inference

    return inference.load(
        _model(loading.model),
        device=loading.device,
        dtype=DTYPES[loading.dtype],
        attn_implementation=ATTENTION[loading.attn],
        quantize=loading.quantize,
        base=_model(loading.base),
    )


def plan(loading: Loading, media: Sequence[str], prompt: str, request: Request) -> RequestPlan:
    """Plan a request from config, tokenizer and headers, without weights."""
    from av_llava import inference

    model, base = _model(loading.model), _model(loading.base)
    return inference.plan(model, list(media), prompt, base=base, **request.given())


def describe(model: str, base: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint without loading it."""
    from av_llava import inference

    return inference.describe(os.path.expanduser(model), _model(base))


def _model(model: str | None) -> str | None:
    return None if model is None else os.path.expanduser(model)


@contextmanager
def memory_guard(model: AVLlava, request: Request, found: Iterable[MediaInfo]) -> Iterator[None]:
    """Turn an exhausted memory into a BudgetError that says what would likely fit.

    Args:
        model: that was asked.
        request: what it was asked with.
        found: the files' headers; a file cannot give more frames than it has.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = request.frames or model.processor.config.sampling.frames
        held = [i.video.n_frames for i in found if i.video is not None and i.video.n_frames]
        frames = min([n for n in (asked, max(held, default=None)) if n], default=None)
        raise BudgetError(advice(str(error), _memory_of(model), frames, request)) from error


def _memory_of(model: AVLlava) -> Memory | None:
    """What the model's GPU held when it ran out; None on other devices."""
    import torch

    device = torch.device(model.device)
    if device.type != "cuda":
        return None
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters())
    peak = torch.cuda.max_memory_allocated(device)
    return Memory(torch.cuda.mem_get_info(device)[1], weights, peak)
