"""In which type what trains is loaded: a weight that was rounded once would stay so.

Contract: beside a language model in bfloat16, modules that train are read in float32. The
embedding is, too, for the rows that train, and is small again once they are taken out.
"""

from __future__ import annotations

import torch

from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.training.settings import PARTS, TrainableSettings


def modules_to_train(trainable: TrainableSettings) -> tuple[str, ...]:
    """Names in memory of the modules that hold what trains, to be loaded in float32.

    The last layers alone have none: how many there are is not known before loading.
    """
    names = []
    for part in PARTS:
        mode = getattr(trainable, part).train
        if part == "audio_token_rows" and mode == "full":
            names.append("model.language_model.embed_tokens")  # small again once they are taken out
        elif mode == "full":
            names += [f"model.{part}"] + ["lm_head"] * (part == "language_model")
    return tuple(names)


def shrink_embedding(model: AVLlavaForConditionalGeneration) -> None:
    """Bring a frozen embedding, loaded in float32 for few rows, into the language model's type."""
    body = model.model.language_model
    table = next(  # PEFT's layer around it shows another weight, with the rows in it
        parameter
        for name, parameter in body.get_input_embeddings().named_parameters()
        if name.endswith("weight") and "lora_" not in name
    )
    others = [p for p in body.parameters() if p is not table and p.is_floating_point()]
    frozen = [p for p in others if not p.requires_grad]
    dtype = max(frozen, key=torch.Tensor.numel, default=table).dtype
    if not table.requires_grad and dtype is not table.dtype:
        table.data = table.data.to(dtype)
