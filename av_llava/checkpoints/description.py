"""What a checkpoint is, what is missing from it, and why: for ``av-llava info``.

Contract: only configurations, headers and a few values are read, nothing is fetched that is known
by name, and no weights are loaded. What stands under ``problems`` is what loading would refuse;
``notes`` say what a user has to know or to give. Parts of a model are described with their base,
where that is at hand (:mod:`description_parts`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from av_llava.budgeting import context_length
from av_llava.checkpoints import delta
from av_llava.checkpoints.configuration import blamed_on, memory_keys, read_config
from av_llava.checkpoints.convert import Report
from av_llava.checkpoints.description_parts import (
    Found,
    account_of_names,
    describe_delta,
    describe_parts,
)
from av_llava.checkpoints.file_names import DELTA_RECORD
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.load import locate
from av_llava.checkpoints.needed import empty_model
from av_llava.checkpoints.parts import PartialFolder, is_partial
from av_llava.checkpoints.public_audio import refuse_public
from av_llava.checkpoints.quantize import stored_scheme
from av_llava.checkpoints.source import Source, open_source
from av_llava.checkpoints.tokenizers import load_tokenizer
from av_llava.checkpoints.tokens import complete_tokenizer, tokens_of
from av_llava.checkpoints.towers import Tower, cached
from av_llava.config import AVLlavaConfig
from av_llava.errors import AVLlavaError, CheckpointError, UsageError
from av_llava.planning import MediaPlanner
from av_llava.processor import AVLlavaProcessor
from av_llava.weight_names import disk_name

_VISION = "model.vision_tower."


def describe(path: str | Path, base: str | Path | None = None) -> dict[str, Any]:
    """Describe a folder or hub id.

    Args:
        path: a whole model, a projector, a LoRA, an adapter or a delta.
        base: of parts or a delta; None takes what the folder names.

    Returns:
        JSON-ready data. ``holds`` says what kind of folder it is; ``missing``, ``unexpected`` and
        ``mismatched`` name tensors as LLaVA does; ``problems`` and ``notes`` are sentences.

    Raises:
        CheckpointError: it is of no known kind, or its configuration cannot be read.
    """
    folder = locate(path)
    found: dict[str, Any] = {"name": str(path), "folder": str(folder.path)}
    if is_partial(folder):
        parts = describe_parts(PartialFolder(folder.path), base)
    elif folder.holds(DELTA_RECORD) or (base is not None and delta.looks_like_delta(folder)):
        parts = describe_delta(folder, base)
    elif base is not None:
        raise CheckpointError(f"{folder.path} holds a whole model, so it stands on no base.")
    else:
        parts = _whole(folder)
    if parts.config is not None:
        with blamed_on(folder, None):
            found |= parts.data | describe_model(parts.config)
        if parts.tower is not None and "vision_tower" in found:
            found["vision_tower"] |= parts.tower
    else:
        found |= parts.data
    if parts.tokenizer is not None and parts.config is not None:
        found["tokenizer"] = _tokenizer(parts)
    if parts.account is not None:
        account = parts.account
        found |= {
            "missing": list(account.missing),
            "unexpected": list(account.unexpected),
            "mismatched": list(account.mismatched),
        }
        parts.problems += [f"{problem}." for problem in account.problems]
    return {**found, "problems": parts.problems, "notes": parts.notes}


def describe_model(config: AVLlavaConfig) -> dict[str, Any]:
    """Sizes and counts of a model's parts."""
    model = empty_model(config)
    out: dict[str, Any] = {
        "parameters": _count(model),
        "dtype": str(config.dtype).removeprefix("torch."),
        "context_length": context_length(config),
        "language_model": {
            "type": config.text_config.model_type,
            "layers": config.text_config.num_hidden_layers,
            "width": config.text_config.hidden_size,
            "vocabulary": config.text_config.vocab_size,
            "tied_head": bool(config.tie_word_embeddings),
            "parameters": _count(model.model.language_model),
        },
    }
    planner = MediaPlanner(config)
    if config.vision_config is not None:
        out["vision_tower"] = {
            "kind": config.vision.kind,
            "name": config.vision.tower,
            "image_size": config.vision_config.image_size,
            "parameters": _count(model.model.vision_tower),
        }
        out["projector"] = config.projector.kind
        out["marks"] = list(config.sequence.media_tokens)
        out["images"] = config.image.aspect_ratio
        out["video_tokens"] = {str(n): planner.video(n).n_tokens for n in (1, 8, 32, 64)}
    if config.audio_config is not None:
        out["audio_tower"] = {
            "kind": config.audio.kind,
            "name": config.audio.tower,
            "parameters": _count(model.model.audio_tower),
            "projector": config.audio.projector,
            "placement": config.audio.placement,
            "tokens_per_minute": planner.audio(60 * 16_000).n_tokens,
        }
    return out


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _tokenizer(parts: Found) -> dict[str, Any]:
    """Size, prompt format, and the tokens that the configuration speaks of."""
    assert parts.config is not None and parts.tokenizer is not None
    processor = AVLlavaProcessor(parts.tokenizer, parts.config)
    found: dict[str, Any] = {"size": len(parts.tokenizer)}
    try:
        found["template"] = processor.template.name
    except UsageError as error:
        parts.notes.append(str(error))
    names = tokens_of(parts.config)
    found["tokens"] = dict(zip(names, parts.token_ids, strict=True))
    return found


# ---------------------------------------------------------------- whole models


def _whole(folder: CheckpointFolder) -> Found:
    """A checkpoint that stands alone."""
    refuse_public(folder)
    found = Found(
        {
            "holds": "a whole model",
            "layout": folder.config.get("model_type"),
            "architecture": (folder.config.get("architectures") or [None])[0],
        }
    )
    tower = None
    try:
        found.config, tower = read_config(folder, need_tower=False)
    except CheckpointError as error:  # the tower may be what is missing
        found.config = _without_tower_named(folder, error)
        found.problems.append(str(error))
    found.data["quantization"] = scheme = stored_scheme(folder)
    try:
        if scheme is None:
            _account(open_source(folder.path), found, tower)
        else:
            names = set(map(disk_name, memory_keys(folder)))
            found.account = account_of_names(names, found.config)
            found.tower = {"weights": "inside the checkpoint"}
    except CheckpointError as error:
        found.problems.append(str(error))
    try:
        found.tokenizer = load_tokenizer(folder, found.config)
        found.token_ids = _completed(found, found.tokenizer)
    except AVLlavaError as error:
        found.problems.append(str(error))
    return found


def _without_tower_named(folder: CheckpointFolder, why: CheckpointError) -> AVLlavaConfig:
    """The language model's configuration, where that of the whole cannot be had.

    Raises:
        CheckpointError: that cannot be read either; the first reason is given.
    """
    try:
        return open_source(folder.path).language_model().config
    except CheckpointError:
        raise why from None


def _account(source: Source, found: Found, tower: Tower | None) -> None:
    """Compare the tensors of a folder, and of a tower beside it, with what its model needs."""
    assert found.config is not None
    tensors = source.tensors
    found.data["weights"] = {
        "tensors": len(tensors),
        "stored_as": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "files": len(source.folder.weight_files),
        "n_bytes": sum(t.n_bytes for t in tensors.values()),
    }
    if delta.looks_like_delta(source.folder):
        found.notes.append(
            "The weights of the last norm are near zero, where a model's are near one: this may be "
            "a delta. av-llava convert apply-delta makes the checkpoint of it and its base."
        )
    if found.problems:  # the tower is nowhere, so that only the language model is known
        found.account = source.language_model().account()
    elif tower is None or source.holds_vision_tower:
        found.tower = {"weights": "inside the checkpoint"}
        found.account = source.assembled(found.config, None).account()
    else:
        place = tower.folder or cached(tower.name)
        found.tower = {"weights": "not here" if place is None else str(place)}
        if place is None:
            found.notes.append(
                f"The weights of the tower {tower.name!r} are not at hand; loading fetches them "
                f"from the hub."
            )
            found.account = _without_tower(source.assembled(found.config, None).account())
        else:
            here = Tower(tower.name, place, tower.config, tower.preprocessor)
            found.account = source.assembled(found.config, here).account()


def _without_tower(account: Report) -> Report:
    kept = tuple(name for name in account.missing if not name.startswith(_VISION))
    return replace(account, missing=kept)


def _completed(found: Found, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Add the tokens and rows that loading adds; ids of the tokens that the config speaks of."""
    assert found.config is not None
    before = len(tokenizer)
    ids = complete_tokenizer(tokenizer, found.config)
    if len(tokenizer) > before:
        found.notes.append(
            f"{len(tokenizer) - before} token(s) that config.json speaks of are not in the "
            f"tokenizer; loading adds them."
        )
    text = found.config.text_config
    text.vocab_size = max([text.vocab_size, *(i + 1 for i in ids)])
    return ids
