"""Finds the vision or audio tower that a checkpoint names.

Contract: a name is looked up inside the checkpoint folder, then beside it, then as given, then on
the hub; the choice is logged. What a tower is comes from its ``config.json`` or, for published
names, from the built-in configurations; never from words in its path.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedConfig

from av_llava.checkpoints.folder import CheckpointFolder, load_pickle, read_json
from av_llava.errors import CheckpointError, UsageError
from av_llava.vision import find_published, vision_config_from

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tower:
    """A tower that was found.

    ``folder`` is None when only its configuration is known (a published name, offline).
    """

    name: str
    folder: Path | None
    config: PreTrainedConfig
    preprocessor: dict[str, Any] | None


def candidates(name: str, checkpoint: Path) -> list[Path]:
    """Local folders where a tower may be, in order."""
    base = Path(name).name
    found = [checkpoint / name, checkpoint / base, checkpoint.parent / name]
    found += [checkpoint.parent / base, Path(name).expanduser()]
    return list(dict.fromkeys(found))


def find_tower(name: str, checkpoint: Path, *, weights: bool) -> Tower:
    """Look a tower up.

    Args:
        name: as the checkpoint's config gives it.
        checkpoint: the checkpoint folder.
        weights: whether its weights are needed too, or only its configuration.

    Raises:
        CheckpointError: it is nowhere; the message lists where it was looked for.
    """
    looked = candidates(name, checkpoint)
    for folder in looked:
        if (folder / "config.json").is_file():
            logger.info("Tower %s: using %s.", name, folder)
            return _read(name, folder)
    published = find_published(name)
    if published is not None and not weights:
        logger.info("Tower %s: using its built-in configuration.", name)
        config = vision_config_from(published["vision_config"])
        return Tower(name, None, config, published["preprocessor_config"])
    fetched = hub_folder(name)
    if fetched is None:
        places = ", ".join(str(p) for p in looked)
        raise CheckpointError(
            f"The tower {name!r} was not found. Looked in: {places}, and on the hub. Put its "
            f"folder beside the checkpoint, or connect to the hub once to fetch it."
        )
    logger.info("Tower %s: using %s from the hub.", name, fetched)
    return _read(name, fetched)


def hub_folder(name: str) -> Path | None:
    """A snapshot from the hub's cache or the hub; None when neither has it."""
    try:
        return Path(snapshot_download(name))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None


def _read(name: str, folder: Path) -> Tower:
    try:
        config = vision_config_from(read_json(folder / "config.json"))
    except UsageError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    preprocessor = folder / "preprocessor_config.json"
    data = read_json(preprocessor) if preprocessor.exists() else None
    return Tower(name, folder, config, data)


def read_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a tower's own folder."""
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for file in CheckpointFolder(folder).weight_files:
        state |= load_file(file) if file.suffix == ".safetensors" else load_pickle(file)
    return state
