"""The base of an adapter, opened without loading it: its tensors by their names in memory.

Contract: values are read one tensor at a time. A few of them are written down with an adapter, so
that another base of the same shapes is recognised; they are compared within the rounding of
bfloat16, because a base may be stored in another type.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from av_llava.checkpoints import hf_format
from av_llava.checkpoints.audio_towers import encoder_tensors, read_audio_tower
from av_llava.checkpoints.folder import CheckpointFolder, load_bin, read_json, unreadable
from av_llava.checkpoints.stored import StoredTensor, TensorReader, stored_tensors
from av_llava.checkpoints.towers import cached, candidates
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.vision import tower_weights
from av_llava.weight_names import ignored, memory_name

EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
VISION = "model.vision_tower.vision_tower."
AUDIO = "model.audio_tower."

_PROBED_TENSORS, _PROBED_VALUES = 4, 8
_ROUNDING = 2**-7  # bfloat16 keeps 8 bits; twice its relative error
_LARGEST_PROBED_BYTES = 2**26


def named_tensors(folder: CheckpointFolder) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint or language model by their names in memory."""
    hf = hf_format.is_hf_llava_config(folder.config)
    rename = hf_format.memory_name if hf else memory_name
    return {rename(t.name): t for t in stored_tensors(folder) if not ignored(t.name)}


class BaseTensors:
    """What a base gives to a model: its own tensors, and those of towers that lie elsewhere.

    Args:
        folder: the base.
        model: the model on it; its configuration names the towers.
    """

    def __init__(self, folder: CheckpointFolder, model: AVLlavaForConditionalGeneration) -> None:
        self.folder = folder
        self.stored: dict[str, Any] = dict(named_tensors(folder))
        self.own = frozenset(self.stored)
        """Names of the base's own tensors."""
        self.towers: dict[str, list[str]] = {}
        """Places of towers beside the base by their prefix in memory."""
        self._reader = TensorReader()
        self._add_vision_tower(model)
        self._add_audio_tower(model)

    def __enter__(self) -> BaseTensors:
        return self

    def __exit__(self, *unused: Any) -> None:
        self._reader.close()

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.stored[name].shape)

    def read(self, name: str) -> Tensor:
        """A tensor, as it is stored."""
        found = self.stored[name]
        return found if isinstance(found, Tensor) else self._reader.read(found)

    def rows(self, name: str, ids: Sequence[int]) -> Tensor:
        """Some rows of a matrix, without reading all of it. [len(ids), D]"""
        found = self.stored[name]
        if isinstance(found, Tensor):
            return found[list(ids)]
        return read_rows(found, ids)

    def drop_tower(self, prefix: str) -> None:
        """Forget a tower beside the base, because the model's is another by now."""
        if self.towers.pop(prefix, None) is not None:
            self.stored = {k: v for k, v in self.stored.items() if not k.startswith(prefix)}

    def _add_vision_tower(self, model: AVLlavaForConditionalGeneration) -> None:
        name = model.config.vision.tower
        if model.model.vision_tower is None or name is None or self._has(VISION):
            return
        places = candidates(name, self.folder.path)
        found = next((p for p in places if (p / "config.json").is_file()), cached(name))
        if found is None:
            return
        self._add(VISION, [str(found)], model)

    def _add_audio_tower(self, model: AVLlavaForConditionalGeneration) -> None:
        """Ears that :func:`add_audio` attached, if their files are still where they were."""
        name = model.config.audio.tower
        if model.model.audio_tower is None or name is None or self._has(AUDIO):
            return
        given = [Path(part).expanduser() for part in name.split(" + ")]
        found = [p if p.exists() else cached(str(p)) for p in given]
        places = [str(p) for p in found if p is not None and _is_encoder(p)]
        if len(places) < len(found):
            return
        self._add(AUDIO, places, model)

    def _has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.stored)

    def _add(self, prefix: str, places: list[str], model: AVLlavaForConditionalGeneration) -> None:
        """Take a tower in, if it fits the model's."""
        found = tower_tensors(prefix, places, model)
        own = {k: v.shape for k, v in plain_names(model).items() if k.startswith(prefix)}
        if own == {name: torch.Size(value.shape) for name, value in found.items()}:
            self.stored |= found
            self.towers[prefix] = places


def tower_tensors(
    prefix: str, places: Sequence[str], model: AVLlavaForConditionalGeneration
) -> dict[str, Any]:
    """Tensors of a tower that lies elsewhere, unread where possible, by their names in memory.

    Args:
        prefix: ``VISION`` or ``AUDIO``.
        places: its folder or file; of a dual audio tower both.
        model: says which of the tensors are used; may be on the meta device.
    """
    if prefix == VISION:
        held: dict[str, Any] = {
            t.name: t for t in stored_tensors(CheckpointFolder(Path(places[0])))
        }
        kept, _ = tower_weights(held, model.model.vision_tower)
        return {VISION + name: value for name, value in kept.items()}
    kinds = ("",) if len(places) == 1 else ("whisper.", "beats.")
    return {
        f"{AUDIO}{kind}audio_tower.{name}": value
        for kind, place in zip(kinds, places, strict=True)
        for name, value in _encoder(Path(place)).items()
    }


def _is_encoder(place: Path) -> bool:
    """Whether a place can hold an audio encoder alone: a Whisper folder or a file."""
    file = place / "config.json"
    return place.is_file() or (file.is_file() and read_json(file).get("model_type") == "whisper")


def _encoder(place: Path) -> dict[str, Any]:
    """Tensors of an audio encoder's folder, unread, or of its file, mapped."""
    if not place.is_dir():
        return read_audio_tower(place).state
    return encoder_tensors({t.name: t for t in stored_tensors(CheckpointFolder(place))})


def plain_names(model: AVLlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Tensors of a model's towers under their names without what PEFT adds to them."""
    return {
        name.replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }


def read_rows(stored: StoredTensor, ids: Sequence[int]) -> Tensor:
    """Some rows of a stored matrix. [len(ids), D]"""
    if stored.offset is None:
        table: Tensor = load_bin(stored.file)[stored.name]
        return table[list(ids)].clone()
    n_bytes = stored.n_bytes // stored.shape[0]
    try:
        with stored.file.open("rb") as handle:
            pieces = []
            for i in ids:
                handle.seek(stored.offset + i * n_bytes)
                pieces.append(handle.read(n_bytes))
    except OSError as error:
        raise unreadable(stored.file, error) from error
    data = b"".join(pieces)
    if len(data) != len(ids) * n_bytes:
        raise CheckpointError(f"{stored.file} ends within the data of {stored.name!r}.")
    flat = torch.frombuffer(bytearray(data), dtype=stored.dtype)
    return flat.view(len(ids), *stored.shape[1:])


# ---------------------------------------------------------------- recognising a base


def probe(tensors: Mapping[str, Any]) -> dict[str, list[float]]:
    """A few values of the language model, by the names of their tensors."""
    names = [
        name
        for name, stored in sorted(tensors.items())
        if isinstance(stored, StoredTensor) and _can_be_probed(name, stored)
    ]
    step = max(1, len(names) // _PROBED_TENSORS)
    with TensorReader() as reader:
        return {n: _samples(reader.read(tensors[n])) for n in names[::step][:_PROBED_TENSORS]}


def check_probe(
    written: Mapping[str, Sequence[float]], tensors: Mapping[str, Any], adapter: Path, base: Path
) -> None:
    """Compare a base with what an adapter wrote down about its own.

    Raises:
        CheckpointError: a value differs by more than rounding.
    """
    with TensorReader() as reader:
        for name, values in written.items():
            stored = tensors.get(name)
            if stored is None or not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
                continue  # a quantised base; what is missing is said elsewhere
            found = torch.tensor(_samples(reader.read(stored)))
            wanted = torch.tensor(list(values))
            if found.shape == wanted.shape:
                slack = _ROUNDING * torch.maximum(found.abs(), wanted.abs()) + 1e-6
                if ((found - wanted).abs() <= slack).all():
                    continue
            raise CheckpointError(
                f"{adapter} was trained on another base than {base}: the values of {stored.name!r} "
                f"(shape {stored.shape}) in {stored.file.name} differ from those that the adapter "
                f"knows. Give its own base as model_base (--base)."
            )


def _can_be_probed(name: str, stored: StoredTensor) -> bool:
    return (
        name.startswith("model.language_model.")
        and stored.dtype.is_floating_point
        and stored.dtype.itemsize >= 2
        and stored.n_bytes <= _LARGEST_PROBED_BYTES
        and len(stored.shape) == 2
    )


def _samples(tensor: Tensor) -> list[float]:
    flat = tensor.reshape(-1)
    step = max(1, flat.numel() // _PROBED_VALUES)
    values = flat[::step][:_PROBED_VALUES].tolist()
    return [float(f"{v:.6g}") for v in values]


def vocabulary_rows(tensors: Mapping[str, Any]) -> int | None:
    """Rows of the embedding matrix; None if there is none of a known name."""
    return int(tensors[EMBEDDING].shape[0]) if EMBEDDING in tensors else None


def with_rows(config: AVLlavaConfig, rows: int | None) -> AVLlavaConfig:
    """A copy of a configuration with so many rows in the vocabulary; None keeps them."""
    out = copy.deepcopy(config)
    if rows is not None:
        out.text_config.vocab_size = rows
    return out
