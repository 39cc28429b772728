"""Folders that hold parts of a model: a projector, LLaVA's LoRA, or an adapter of our own.

Contract: nothing is loaded into a model here. All spellings of a name become LLaVA's name on disk;
the base is the one that is given, or the one that the folder names, looked for beside the folder
first, so that both can move together.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from av_llava.checkpoints.file_names import PART_FILES
from av_llava.checkpoints.folder import (
    CheckpointFolder,
    load_bin,
    read_json,
    safetensors_keys,
)
from av_llava.checkpoints.load import locate
from av_llava.checkpoints.stored import StoredTensor, TensorReader, tensors_in
from av_llava.errors import CheckpointError
from av_llava.weight_names import ignored

logger = logging.getLogger(__name__)

RECORD = "av_llava_adapter.json"
"""What our own adapters say about themselves: their base and its towers."""
RECORD_FORMAT = 1
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
MULTIMODAL = "multimodal.safetensors"
TOKEN_ROWS = "token_rows.safetensors"
# Files with weights that are neither the base's nor a LoRA's, in the order in which they win.
_PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
_OTHER_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin", MULTIMODAL)
_WHOLE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_EMBEDDING = "model.embed_tokens.weight"
_OWN_PARTS = (
    "mm_projector.",
    "image_newline",
    "faster_token",
    "vision_tower.",
    "audio_tower.",
    "mm_audio_projector.",
)


@dataclass(frozen=True)
class Reference:
    """Where something lies that a folder needs: as it was given, and from two points of view."""

    given: str
    relative: str | None = None
    """From the folder that refers to it."""
    absolute: str | None = None

    @classmethod
    def to(cls, target: str | Path, folder: Path) -> Reference:
        """Refer to a local path or a hub id from a folder."""
        local = Path(target).expanduser()
        if not local.exists():
            return cls(str(target))
        place = local.resolve()
        try:
            relative = Path(os.path.relpath(place, folder.resolve())).as_posix()
        except ValueError:  # another drive of Windows
            relative = None
        return cls(str(target), relative, place.as_posix())

    @classmethod
    def from_dict(cls, data: Any, where: Path) -> Reference:
        """Read what :meth:`to_dict` gave.

        Raises:
            CheckpointError: it is something else.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("given"), str):
            raise CheckpointError(f"{where} holds no place where there should be one: {data!r}.")
        return cls(data["given"], data.get("relative"), data.get("absolute"))

    def to_dict(self) -> dict[str, str]:
        """JSON-ready data."""
        fields = {"given": self.given, "relative": self.relative, "absolute": self.absolute}
        return {k: v for k, v in fields.items() if v is not None}

    def find(self, folder: Path) -> str:
        """The path that exists, else what was given (perhaps a hub id)."""
        places = [folder / self.relative] if self.relative else []
        places += [Path(self.absolute)] if self.absolute else []
        return next((str(p.resolve()) for p in places if p.exists()), self.given)


@dataclass(frozen=True)
class PartialFolder(CheckpointFolder):
    """A folder with its base: the keys are those of both."""

    base: CheckpointFolder | None = None

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """Whole weights of the folder itself, unread, under names on disk.

        Raises:
            CheckpointError: PEFT's rows of tokens by id, which say nothing without the tokenizer
                and the resizing that they were made with.
        """
        found: dict[str, StoredTensor] = {}
        for name in (*ADAPTER_FILES, *_PROJECTOR_FILES, *_OTHER_FILES):
            if not self.holds(name):
                continue
            here = {disk_key(t.name): t for t in tensors_in([self.path / name])}
            if name in _PROJECTOR_FILES:
                here.pop(_EMBEDDING, None)
            found |= {k: t for k, t in here.items() if not is_lora_key(k) and not ignored(k)}
        rows = [t for k, t in found.items() if "trainable_tokens" in k]
        if rows:
            raise CheckpointError(
                f"{rows[0].file} holds rows of tokens by their ids ({rows[0].name!r}). Save the "
                f"adapter with av_llava, which names the tokens, or merge it with PEFT first."
            )
        return found

    def read_stored(self) -> dict[str, Tensor]:
        """The same, read."""
        with TensorReader() as reader:
            return {name: reader.read(stored) for name, stored in self.stored.items()}

    @cached_property
    def stage_one_rows(self) -> Tensor | None:
        """Embeddings in a projector's file: of the start and end tokens, or the whole matrix.

        LLaVA's first stage saves them with ``mm_use_im_start_end``; its second takes only the rows
        of the two tokens from there.
        """
        for name in _PROJECTOR_FILES:
            if self.holds(name):
                for key, value in read_tensors(self.path / name).items():
                    if disk_key(key) == _EMBEDDING:
                        return value
        return None

    @cached_property
    def token_rows(self) -> dict[str, Tensor]:
        """Rows of tokens: ``input.<token>`` and ``output.<token>``, each [D]."""
        return read_tensors(self.path / TOKEN_ROWS) if self.holds(TOKEN_ROWS) else {}

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """What an adapter of our own says about itself; None for other folders.

        Raises:
            CheckpointError: it was written by a later release, or a file of it is gone.
        """
        if not self.holds(RECORD):
            return None
        data = read_json(self.path / RECORD)
        if data.get("format") != RECORD_FORMAT:
            raise CheckpointError(
                f"{self.path / RECORD} has format {data.get('format')!r}; this release reads "
                f"{RECORD_FORMAT}. Load it with the release that wrote it, or a later one."
            )
        gone = [name for name in data.get("files", []) if not self.holds(name)]
        if gone:
            raise CheckpointError(
                f"{self.path} holds no {gone[0]}, which belongs to it ({RECORD}). The copy is "
                f"incomplete."
            )
        return data

    @cached_property
    def keys(self) -> frozenset[str]:  # type: ignore[override]
        """Names on disk of all tensors of the folder and its base."""
        base = frozenset() if self.base is None else self.base.keys
        return base | frozenset(self.stored)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a LoRA."""
        return self.holds(ADAPTER_CONFIG)


def is_partial(folder: CheckpointFolder) -> bool:
    """Whether a folder needs a base: it holds parts, but no whole model."""
    return any(map(folder.holds, PART_FILES)) and not any(map(folder.holds, _WHOLE))


def is_lora_key(key: str) -> bool:
    """Whether a key of an adapter's file is a part of a LoRA, not a whole weight."""
    return "lora_" in key


def disk_key(key: str) -> str:
    """A key without what PEFT and LLaVA's training scripts put before it.

    ``base_model.model.model.mm_projector.0.weight``, ``model.model.mm_projector.0.weight`` and
    ``mm_projector.0.weight`` are one.
    """
    key = key.removeprefix("base_model.model.").removeprefix("base_model.")
    key = key.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
    while key.startswith("model.model."):
        key = key.removeprefix("model.")
    return f"model.{key}" if key.startswith(_OWN_PARTS) else key


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a pickle.

    Raises:
        CheckpointError: it is damaged, or holds anything else.
    """
    if file.suffix != ".safetensors":
        return load_bin(file)
    from safetensors.torch import load_file

    safetensors_keys(file)  # raises for a damaged file
    return load_file(file)


def base_of(parts: PartialFolder, base: str | Path | None) -> tuple[str, CheckpointFolder]:
    """The base that was given, or the one that the folder names; its name and its folder.

    Raises:
        CheckpointError: none is known, it cannot be found, or it is itself only parts of a model.
    """
    name = str(base) if base is not None else named_base(parts)
    if name is None:
        raise CheckpointError(
            f"{parts.path} holds only parts of a model (an adapter or a projector) and names no "
            f"base. Give the language model or checkpoint that it was trained on as model_base "
            f"(--base)."
        )
    try:
        folder = locate(name)
    except CheckpointError as error:
        if base is not None:
            raise
        raise CheckpointError(
            f"{parts.path} stands on the base {name!r}, which cannot be found. Give its place as "
            f"model_base (--base). {error}"
        ) from error
    if is_partial(folder):
        raise CheckpointError(
            f"The base {folder.path} holds only parts of a model itself. Put it on its own base "
            f"first: av-llava convert merge-lora {folder.path} DESTINATION."
        )
    return name, folder


def named_base(parts: PartialFolder) -> str | None:
    """The base that a folder names, as a path that exists, if there is one."""
    if parts.record is not None:
        where = parts.path / RECORD
        return Reference.from_dict(parts.record.get("base"), where).find(parts.path)
    if not parts.holds(ADAPTER_CONFIG):
        return None
    name = read_json(parts.path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        return None
    beside = parts.path / str(name)
    return str(beside) if beside.is_dir() else str(name)
