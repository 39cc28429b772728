"""What happens beside the training loop: the log file, the progress line, FSDP's entry points.

Contract: a callback never changes training. The log is one JSON object a line, written at once.
Progress is a bar where a person watches, and a line for each log step elsewhere.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm import tqdm
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

Say = Callable[[str], None]

ENTRY_POINTS = (
    "prepare_inputs",
    "get_image_features",
    "get_video_features",
    "get_audio_features",
    "generate",
)
"""Methods beside ``forward`` that use parameters, which FSDP must gather first."""


class RunLog(TrainerCallback):
    """Appends every log to a file of JSON lines."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write one line."""
        if not state.is_world_process_zero or logs is None:
            return
        row = {"step": state.global_step, **{k: _json(v) for k, v in logs.items()}}
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Progress(TrainerCallback):
    """Shows loss, tokens a second, the share of waiting for data, and bad media.

    Args:
        bar: show a bar that moves; else say a line at each log.
        say: where lines go.
    """

    def __init__(self, bar: bool, say: Say) -> None:
        self.bar, self.say = bar, say
        self._shown: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        if self.bar and state.is_world_process_zero:
            self._shown = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        if self._shown is not None:
            self._shown.update(state.global_step - self._shown.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the figures."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        words = shown(logs)
        if self._shown is not None and "loss" in logs:
            self._shown.set_postfix_str(words)
        elif self._shown is not None:
            self._shown.write(words)
        else:
            self.say(f"step {state.global_step}/{state.max_steps}  {words}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        if self._shown is not None:
            self._shown.close()
            self._shown = None


def shown(logs: dict[str, Any]) -> str:
    """A log in a few words."""
    if "loss" not in logs:
        return ", ".join(
            f"{k.removeprefix('eval_')} {v:.4g}"
            for k, v in logs.items()
            if isinstance(v, (int, float)) and k.startswith("eval_")
        )
    return (
        f"loss {logs['loss']:.4f}, {logs.get('tokens_per_s', 0):,.0f} tokens/s, "
        f"waits {logs.get('data_wait', 0):.0%}, bad {logs.get('bad_media', 0)}"
    )


class FsdpEntryPoints(TrainerCallback):
    """Tells FSDP of the methods beside ``forward``."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Register them."""
        if isinstance(model, FSDPModule):
            register_entry_points(model)


def register_entry_points(model: Any) -> None:
    """Register all methods of a sharded model that use parameters."""
    for module in (model, getattr(model, "model", None)):
        if isinstance(module, nn.Module) and isinstance(module, FSDPModule):
            for name in ENTRY_POINTS:
                if hasattr(module, name):
                    register_fsdp_forward_method(module, name)


def _json(value: Any) -> Any:
    """A number that JSON knows."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
