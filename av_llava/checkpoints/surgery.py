"""Takes projector and vision tower out of a checkpoint as files of their own, or puts them back.

Contract: the source is only read, and putting back makes a new folder. The projector's file has
LLaVA's keys, with the learned marks if there are any; the tower's folder is a checkpoint of
transformers' vision model that a LLaVA ``config.json`` can name. Parts that llama.cpp's surgery
script left beside a checkpoint (``llava.projector``, ``llava.clip``) can be put back, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from av_llava.checkpoints.configuration import read_config
from av_llava.checkpoints.convert import ConvertOptions, Report
from av_llava.checkpoints.destination import Weights, make_folder, target_dtype
from av_llava.checkpoints.hf_export import hf_name
from av_llava.checkpoints.shards import Transfer
from av_llava.checkpoints.source import TOWER_PREFIX, UNUSED, Source, clean_config, open_source
from av_llava.checkpoints.stored import StoredTensor, TensorReader, tensors_in
from av_llava.checkpoints.upgrade import copy_rest, dumped
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError, unknown_name
from av_llava.images import PixelSpec
from av_llava.weight_names import ignored

PROJECTOR = "mm_projector"
TOWER = "vision_tower"
_PROJECTOR_PREFIX = "model.mm_projector."
_MARKS = ("model.image_newline", "model.faster_token")
_KEPT = "stay in the checkpoint"
_REPLACED = "are replaced"
_PART_FILES = ("*.safetensors", "*.bin", "llava.projector", "llava.clip")
# How files of parts spell their keys, and LLaVA's names for them.
_SPELLINGS = (
    (r"^(?:base_model\.model\.)?(?:model\.)?mm_projector\.", _PROJECTOR_PREFIX),
    (r"^(?:base_model\.model\.)?(?:model\.)?(?=image_newline$|faster_token$)", "model."),
    (
        r"^(?:model\.)?(?:vision_tower\.)*(?:vision_model\.)?"
        r"(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm)\.)",
        TOWER_PREFIX,
    ),
)


def operate(source: str | Path, destination: str | Path | None, options: ConvertOptions) -> Report:
    """Take parts out, or put them back.

    Raises:
        CheckpointError: a part is not there, or does not fit.
    """
    opened = open_source(source)
    if options.extra["put_back"] is None:
        return _take_out(opened, destination, options)
    return _put_back(opened, Path(options.extra["put_back"]).expanduser(), destination, options)


# ---------------------------------------------------------------- out


def _take_out(opened: Source, destination: str | Path | None, options: ConvertOptions) -> Report:
    projector, tower, notes = _chosen(opened, options.extra["parts"])
    config = read_config(opened.folder)[0] if tower else None
    dtype = target_dtype(options)
    chosen = {**projector, **tower}
    weights = [
        Weights([Transfer(stored, name) for name, stored in projector.items()], PROJECTOR),
        Weights([Transfer(t, _plain(name)) for name, t in tower.items()], "model", TOWER),
    ]
    report = Report(
        converter="surgery",
        source=str(opened.path),
        destination=None,
        mapped=len(chosen),
        dropped={_KEPT: tuple(name for name in opened.tensors if name not in chosen)},
        notes=(*notes, *_depth_note(config)),
    )

    def describe(folder: Path) -> None:
        if config is not None:
            _describe_tower(config, folder / TOWER, dtype)

    return make_folder(
        report,
        opened.path,
        destination,
        weights,
        options,
        finish=describe,
        compare=lambda folder: _difference(chosen, _parts_of(folder), dtype),
    )


def _chosen(
    opened: Source, parts: str
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor], list[str]]:
    """The tensors of projector and tower that are asked for, and what to say about others."""
    if parts not in ("all", "projector", "tower"):
        raise unknown_name("part", parts, ("all", "projector", "tower"))
    named = opened.tensors.items()
    projector = {n: t for n, t in named if n.startswith(_PROJECTOR_PREFIX) or n in _MARKS}
    tower = {n: t for n, t in named if n.startswith(TOWER_PREFIX)}
    if parts != "tower" and not any(n.startswith(_PROJECTOR_PREFIX) for n in projector):
        raise CheckpointError(f"{opened.path} holds no projector (model.mm_projector.*).")
    notes = []
    if parts != "projector" and not tower:
        name = opened.folder.config.get("mm_vision_tower")
        notes.append(f"{opened.path} holds no vision tower; its config.json names {name!r}.")
        if parts == "tower":
            raise CheckpointError(f"{notes[0]} There is nothing to take out.")
    return (
        {} if parts == "tower" else projector,
        {} if parts == "projector" else tower,
        notes,
    )


def _plain(name: str) -> str:
    """The name of a tower's tensor in the tower's own folder."""
    return "vision_model." + name.removeprefix(TOWER_PREFIX)


def _complete_depth(config: AVLlavaConfig) -> int:
    """Layers of the tower as it was published.

    LLaVA leaves out SigLIP's last one and names the tower as if it were complete.
    """
    vision: Any = config.vision_config
    held: int = vision.num_hidden_layers
    siglip = config.vision.kind == "siglip"
    return held + config.vision.select_layer + 2 if siglip else held


def _depth_note(config: AVLlavaConfig | None) -> tuple[str, ...]:
    if config is None or _complete_depth(config) == config.vision_config.num_hidden_layers:
        return ()
    return (
        f"The tower's config.json says {_complete_depth(config)} layers, as LLaVA counts them; the "
        f"last one is not used by LLaVA and not in the checkpoint.",
    )


def _describe_tower(config: AVLlavaConfig, folder: Path, dtype: torch.dtype | None) -> None:
    """Write the tower's ``config.json`` and ``preprocessor_config.json``."""
    vision = clean_config(config.vision_config)
    data = vision.to_dict() | {"num_hidden_layers": _complete_depth(config)}
    data["architectures"] = [
        "SiglipVisionModel" if config.vision.kind == "siglip" else "CLIPVisionModel"
    ]
    if dtype is not None or config.dtype is not None:
        data["dtype"] = str(dtype or config.dtype).removeprefix("torch.")
    side = config.vision_config.image_size
    exact = config.vision.resize == "exact"
    pixels = PixelSpec(
        size=(side, side) if exact else side,
        crop=None if exact else (side, side),
        resample=config.vision.resample,
        mean=config.vision.image_mean,
        std=config.vision.image_std,
    )
    text = json.dumps(pixels.to_preprocessor_config(), indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(dumped(data), encoding="utf-8")


# ---------------------------------------------------------------- back


def _put_back(
    opened: Source, place: Path, destination: str | Path | None, options: ConvertOptions
) -> Report:
    parts = _parts_of(place)
    dtype = target_dtype(options)
    names = [*opened.tensors, *(n for n in parts if n not in opened.tensors)]
    transfers = [
        Transfer(parts.get(n) or opened.tensors[n], _stored_name(opened, n)) for n in names
    ]
    dropped = {_REPLACED: tuple(n for n in opened.tensors if n in parts)}
    if opened.unused:
        dropped[UNUSED] = opened.unused
    report = replace(
        _account_parts(opened, parts),
        source=str(opened.path),
        dropped=dropped,
        notes=(f"{len(parts)} tensor(s) come from {place}.",),
    )

    def compare(folder: Path) -> float:
        made = {t.name: t for t in tensors_in(sorted(folder.glob("*.safetensors")))}
        wanted = {t.name: t.stored for t in transfers}
        return _difference(wanted, made, dtype)

    return make_folder(
        report,
        opened.path,
        destination,
        [Weights(transfers)],
        options,
        finish=lambda folder: _copy_description(opened, folder),
        compare=compare,
    )


def _stored_name(opened: Source, name: str) -> str:
    """The name in the made folder, whose layout is that of the source."""
    if name in opened.tensors:
        return opened.tensors[name].name
    return hf_name(name) if opened.is_hf else name


def _copy_description(opened: Source, folder: Path) -> None:
    copy_rest(opened, folder)
    text = (opened.path / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text, encoding="utf-8")


def _parts_of(place: Path) -> dict[str, StoredTensor]:
    """The tensors of parts, by LLaVA's names.

    Raises:
        CheckpointError: there are none, or one is of neither projector nor tower.
    """
    if not place.exists():
        raise CheckpointError(f"{place} does not exist: name a file or folder with parts.")
    files = [place]
    if place.is_dir():
        places = [place, *([place / TOWER] if (place / TOWER).is_dir() else [])]
        files = sorted({f for p in places for pattern in _PART_FILES for f in p.glob(pattern)})
    if not files:
        raise CheckpointError(f"{place} holds no parts ({', '.join(_PART_FILES)}).")
    parts: dict[str, StoredTensor] = {}
    for stored in tensors_in(files):
        if ignored(stored.name):
            continue
        name = _llava_name(stored.name)
        if name is None or name in parts:
            raise CheckpointError(
                f"{stored.file}: {stored.name!r} "
                + ("is there twice." if name else "belongs to neither projector nor vision tower.")
            )
        parts[name] = stored
    return parts


def _llava_name(key: str) -> str | None:
    """LLaVA's name of a part's key; None for anything else."""
    for pattern, target in _SPELLINGS:
        renamed, count = re.subn(pattern, target, key)
        if count:
            return renamed
    return None


def _account_parts(opened: Source, parts: Mapping[str, StoredTensor]) -> Report:
    """Compare parts with those of the checkpoint: the same keys and shapes, or none at all."""
    missing, unexpected = [], []
    for prefix in (_PROJECTOR_PREFIX, TOWER_PREFIX):
        own, given = _under(prefix, opened.tensors), _under(prefix, parts)
        if own and given:
            missing += sorted(own - given)
            unexpected += sorted(given - own)
    mismatched = [
        f"{name} (the part has {stored.shape}, the checkpoint {opened.tensors[name].shape})"
        for name, stored in parts.items()
        if name in opened.tensors and opened.tensors[name].shape != stored.shape
    ]
    return Report(
        converter="surgery",
        source="",
        destination=None,
        mapped=len(opened.tensors.keys() | parts.keys()),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(sorted(mismatched)),
    )


def _under(prefix: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith(prefix)}


def _difference(
    wanted: Mapping[str, StoredTensor],
    made: Mapping[str, StoredTensor],
    dtype: torch.dtype | None,
) -> float:
    """Largest difference between tensors; infinite when their names or shapes differ."""
    if wanted.keys() != made.keys():
        return float("inf")
    largest = 0.0
    with TensorReader() as first, TensorReader() as second:
        for name, stored in wanted.items():
            a, b = first.read(stored), second.read(made[name])
            if a.shape != b.shape:
                return float("inf")
            if dtype is not None and a.is_floating_point():
                a = a.to(dtype)
            if not torch.equal(a, b):
                largest = max(largest, float((a.double() - b.double()).abs().max()))
    return largest
