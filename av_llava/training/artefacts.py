"""What a run leaves behind: checkpoints that load alone, and what resuming needs beside them.

Contract: every checkpoint is a folder that ``av_llava.load`` takes: a whole model, or an adapter
with everything that differs from its base (LoRA, projectors, marks, token rows, trained towers).
Trained weights are written as they are (float32), so that resuming changes no bit of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from av_llava.checkpoints.adapters import changed_names, write_adapter
from av_llava.checkpoints.model_state import split, unwrapped
from av_llava.errors import CheckpointError
from av_llava.processor import AVLlavaProcessor
from av_llava.training.parts import plain_name
from av_llava.weight_names import disk_name

TRAINED = "trained_weights.safetensors"
"""Trained weights by their names in memory; only where other files hold them in another form."""
_HEAD = "lm_head.weight"


class Artefacts:
    """Writes and reads the weights of one run.

    Args:
        model: with its trainable parts settled.
        processor: of the model.
        whole: write all weights rather than what differs from the base.
        base: the checkpoint that an adapter stands on; None takes what the model was loaded from.
        main: whether this process writes.
    """

    def __init__(
        self,
        model: Any,
        processor: AVLlavaProcessor,
        *,
        whole: bool,
        base: str | None = None,
        main: bool = True,
    ) -> None:
        self.model, self.processor = model, processor
        self.whole, self.base = whole, base
        self.changed: frozenset[str] | None = None
        if main and not whole:
            self.changed = changed_names(model, processor, base=base)

    def write(
        self,
        folder: Path,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write a loadable checkpoint into a folder that exists.

        Args:
            folder: to write into.
            state_dict: of the model, where its parameters are spread over processes.
            dtype: of a whole model's weights; None keeps each as it is.
        """
        if not self.whole:
            write_adapter(
                self.model,
                self.processor,
                folder,
                base=self.base,
                changed=self.changed,
                state_dict=state_dict,
            )
            return
        inner = unwrapped(self.model)
        state = _whole_state(self.model, state_dict)
        if dtype is not None:
            state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        with _without_adapter(inner):
            inner.save_pretrained(folder, state_dict=state)
            self.processor.save_pretrained(folder)
        if dtype is not None:
            _name_dtype(folder / "config.json", dtype)

    def write_trained(self, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write what resuming needs beside :meth:`write`."""
        names = [name for name, _ in trained(self.model)]
        if self.whole and not any(".trainable_tokens_" in name for name in names):
            return  # all of it is in the model's own files
        given = {plain_name(k): v for k, v in (state_dict or {}).items()}
        tensors = {n: given.get(n, p).detach().contiguous() for n, p in trained(self.model)}
        save_file(tensors, folder / TRAINED, metadata={"format": "pt"})

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Put the trained weights of a checkpoint into the model.

        Raises:
            CheckpointError: one is missing or has another shape.
        """
        own = folder / TRAINED
        files = [own] if own.is_file() else sorted(folder.glob("model*.safetensors"))
        held: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "pt") as reader:
                held |= dict.fromkeys(reader.keys(), file)
        rename = (lambda name: name) if own.is_file() else disk_name
        wanted = {rename(name): parameter for name, parameter in trained(self.model)}
        missing = sorted(wanted.keys() - held.keys())
        if missing:
            raise CheckpointError(
                f"The checkpoint {folder} does not hold {len(missing)} of the weights that the "
                f"recipe trains ({missing[0]}): it was written by a run that trained other parts."
            )
        for file in files:
            with safe_open(file, "pt") as reader:
                for key in [k for k, f in held.items() if f == file and k in wanted]:
                    value = reader.get_tensor(key)
                    if value.shape != wanted[key].shape:
                        raise CheckpointError(
                            f"{file} holds {key} of shape {tuple(value.shape)}, the recipe trains "
                            f"{tuple(wanted[key].shape)}."
                        )
                    wanted[key].copy_(value)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that train, by their names without wrappers."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield plain_name(name), parameter


def _whole_state(model: Any, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """All weights, with rows that train beside the embedding put into it."""
    parts = split(model, state_dict)
    weights = dict(parts.weights)
    for table, (ids, rows) in parts.rows.items():
        weights[table] = weights[table].detach().clone()
        weights[table][ids] = rows.detach().to(weights[table])
    if unwrapped(model).config.tie_word_embeddings:
        weights.pop(_HEAD, None)
    return weights


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """Have transformers save the weights, not only the adapter that it was told of."""
    marked = model.__dict__.pop("_hf_peft_config_loaded", None)
    try:
        yield
    finally:
        if marked is not None:
            model._hf_peft_config_loaded = marked


def _name_dtype(file: Path, dtype: torch.dtype) -> None:
    """Have a configuration name the type that was written; transformers names the model's."""
    name = str(dtype).removeprefix("torch.")

    def named(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: name if k == "dtype" and v else named(v) for k, v in value.items()}

    data = named(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
