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
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from transformers import PreTrainedConfig

from av_llava.checkpoints.folder import CheckpointFolder, load_bin, read_json
from av_llava.errors import CheckpointError, UsageError
from av_llava.vision import PUBLISHED_TOWERS, find_published, vision_config_from

logger = logging.getLogger(__name__)

# Weights of other frameworks, which repositories of towers hold beside those for torch.
_OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.tflite", "*.npz")
# The bases of the hub's error are those of its transport, which changed between its versions; a
# ValueError is what the page of a captive portal ends in.
_HUB_ERRORS: tuple[Any, ...] = (
    LocalEntryNotFoundError,
    HfHubHTTPError,
    *HfHubHTTPError.__bases__,
    OSError,
    ValueError,
)


@dataclass(frozen=True)
class Tower:
    """A tower that was found.

    ``folder`` is None when only its configuration is known (a published name, offline).
    """

    name: str
    folder: Path | None
    config: PreTrainedConfig
    preprocessor: dict[str, Any] | None

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return self.name if self.folder is None else str(self.folder)


def candidates(name: str, checkpoint: Path) -> list[Path]:
    """Local folders where a tower may be, in order."""
    last = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    given = _home(name)
    named = [] if last in ("", ".", "..") else [last]
    if named and not given.is_absolute():
        named.insert(0, name)
    places = [place / n for place in (checkpoint, checkpoint.parent) for n in named]
    return list(dict.fromkeys([*places, given]))


def find_tower(name: str, checkpoint: Path, *, weights: bool) -> Tower:
    """Look a tower up.

    Args:
        name: as the checkpoint's config gives it.
        checkpoint: the checkpoint folder.
        weights: whether its weights are needed too, or only its configuration.

    Raises:
        CheckpointError: it is nowhere, and the message lists where it was looked for; or it is
            damaged.
    """
    looked = []
    for folder in candidates(name, checkpoint):
        try:
            found = (folder / "config.json").is_file()
            looked.append(str(folder))
        except OSError as error:
            found = False
            looked.append(f"{folder} ({error.strerror})")
        if found:
            logger.info("Tower %s: using %s.", name, folder)
            return _read(name, folder, weights)
    published = find_published(name)
    if published is not None and not weights:
        logger.info("Tower %s: using its built-in configuration.", name)
        config = vision_config_from(published["vision_config"])
        return Tower(name, None, config, published["preprocessor_config"])
    repository = next((k for k, tower in PUBLISHED_TOWERS.items() if tower is published), name)
    try:
        fetched = fetch(repository)
    except CheckpointError as error:
        raise CheckpointError(
            f"The tower {name!r} was not found. Looked in: {', '.join(looked)}, and on the hub: "
            f"{error} Put its folder beside the checkpoint, or connect to the hub once to fetch it."
        ) from error
    logger.info("Tower %s: using %s from the hub.", name, fetched)
    return _read(name, fetched, weights)


def fetch(name: str) -> Path:
    """A snapshot from the hub's cache or the hub.

    Raises:
        CheckpointError: neither has it; the message says why.
    """
    try:
        return Path(snapshot_download(name, ignore_patterns=list(_OTHER_WEIGHTS)))
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is not the name of a repository.") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name!r} needs permission: accept its terms on the hub and log in (hf auth login)."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no repository {name!r}, or it is private.") from error
    except _HUB_ERRORS as error:
        raise CheckpointError(
            f"{name!r} is not in the cache, and the hub cannot be reached ({type(error).__name__})."
        ) from error


def cached(name: str) -> Path | None:
    """A repository in the hub's cache; nothing is fetched."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _home(name: str) -> Path:
    """A path that begins with ``~``; as it is when there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _read(name: str, folder: Path, weights: bool) -> Tower:
    try:
        config = vision_config_from(read_json(folder / "config.json"))
    except (UsageError, StrictDataclassError, ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    if weights:
        CheckpointFolder(folder).check_files()
    file = "preprocessor_config.json"
    data = read_json(folder / file) if CheckpointFolder(folder).holds(file) else None
    return Tower(name, folder, config, data)


def read_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a tower's own folder."""
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for file in CheckpointFolder(folder).weight_files:
        state |= load_file(file) if file.suffix == ".safetensors" else load_bin(file)
    return state
