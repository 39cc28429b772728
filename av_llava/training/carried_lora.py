"""A LoRA that a model carries and that trains further, against the recipe's section ``lora``.

Contract: that section makes new LoRAs. What it asks for beyond its defaults must be what the
carried one has, so that nothing in a recipe is passed over in silence.
"""

from __future__ import annotations

from typing import Any

from av_llava.errors import UsageError
from av_llava.training.settings import LoraSettings


def check_carried(model: Any, lora: LoraSettings) -> None:
    """Compare the two.

    Args:
        model: with the LoRA.
        lora: the section.

    Raises:
        UsageError: they differ; it names the first setting that does.
    """
    config = model.peft_config["default"]
    ends = sorted({str(name).rpartition(".")[2] for name in config.target_modules})
    carried = {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "targets": tuple(ends),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    default = LoraSettings()
    for name, own in carried.items():
        wanted = getattr(lora, name)
        if wanted == getattr(default, name):
            continue
        if isinstance(wanted, tuple):
            wanted = tuple(sorted(set(wanted)))
        if wanted != own:
            raise UsageError(
                f"lora.{name} = {_shown(wanted)} is not that of the LoRA that model.path carries "
                f"({_shown(own)}), which trains further as it is: leave lora out or give "
                f"what it has, or set model.merge=true for a new LoRA."
            )


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
