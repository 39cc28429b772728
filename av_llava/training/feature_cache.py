"""Keeps what frozen towers gave for a medium, so that later epochs neither decode nor encode it.

Contract: an entry is used only for the file, the settings and the weights that it was made with:
its key holds the file's size, times and inode, everything that decides which frames and samples
are read, a digest of the tower's weights, their types, and the versions at work; the whole key is
kept in the entry and compared. Entries are safetensors files that appear complete or not at all,
several processes may share a folder, and it stops growing at its bound. What cannot be named by a
file on disk (addresses, bytes, arrays, folders of frames) is not kept. Off unless asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import av
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import av_llava
from av_llava.encoding import Streams, is_trained
from av_llava.errors import UsageError

logger = logging.getLogger(__name__)

GIB = 2**30
_SUFFIX = ".safetensors"
# A process counts the folder anew after so many entries, since others write, too.
_RECOUNT = 64


class Entry(NamedTuple):
    """What was kept of one medium."""

    meta: dict[str, Any]
    """What its file said: times, lengths, warnings."""
    outputs: Streams


class FeatureStore:
    """The files. Sent to another process, it becomes that process's own store of the folder.

    Args:
        folder: where entries stand.
        max_bytes: size that the folder does not grow beyond.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._held: int | None = None
        self._writes = 0
        self._full = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_store, (str(self.folder), self.max_bytes)

    def path_of(self, key: Mapping[str, Any]) -> Path:
        """Where the entry of a key stands."""
        digest = hashlib.sha256(_json(key).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}{_SUFFIX}"

    def read(self, key: Mapping[str, Any]) -> Entry | None:
        """The entry of a key; None if there is none that is whole."""
        path = self.path_of(key)
        try:
            with safe_open(path, framework="pt") as file:
                held = file.metadata() or {}
                if held.get("key") != _json(key):
                    return None
                names = sorted(file.keys(), key=int)
                return Entry(json.loads(held["meta"]), tuple(file.get_tensor(n) for n in names))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            logger.warning("The cached features %s are damaged and made anew: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def write(self, key: Mapping[str, Any], meta: Mapping[str, Any], outputs: Streams) -> bool:
        """Keep an entry; False when there is no room left for it."""
        path = self.path_of(key)
        tensors = {str(i): t.detach().to("cpu").contiguous() for i, t in enumerate(outputs)}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if path.exists() or not self._has_room(size):
            return False
        partial = path.with_name(f".{path.stem}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, {"key": _json(key), "meta": json.dumps(dict(meta))})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:  # training needs no cache to go on
            with contextlib.suppress(OSError):
                partial.unlink()
            logger.warning("Features are no longer cached: %s cannot be written: %s", path, error)
            self._full = True
            return False
        self._held = (self._held or 0) + size
        return True

    def _has_room(self, size: int) -> bool:
        if self._full:
            return False
        if self._held is None or self._writes % _RECOUNT == 0:
            self._held = sum(_sizes(self.folder))
        self._writes += 1
        if self._held + size <= self.max_bytes:
            return True
        self._full = True
        logger.warning(
            "The feature cache %s holds %.1f GiB and grows no further (max_gib); what is not in "
            "it is encoded in every epoch.",
            self.folder,
            self._held / GIB,
        )
        return False


_stores: dict[tuple[str, int], FeatureStore] = {}


def _own_store(folder: str, max_bytes: int) -> FeatureStore:
    """This process's store of a folder, which knows how full it is."""
    return _stores.setdefault((folder, max_bytes), FeatureStore(folder, max_bytes))


def _sizes(folder: Path) -> Iterable[int]:
    for path in folder.glob(f"*/*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            yield path.stat().st_size


@dataclass
class TowerKeys:
    """What the outputs of a model's frozen towers depend on, beside the media."""

    vision: dict[str, Any] | None
    """None when the tower trains, or there is none."""
    audio: dict[str, Any] | None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, *, precision: str = "") -> TowerKeys:
        """Digest the towers of a model whose parts are settled.

        Args:
            model: with or without head.
            precision: of automatic mixed precision in training (``bfloat16``), or "".

        Raises:
            UsageError: no tower is frozen.
        """
        inner = model.model if hasattr(model, "lm_head") else model
        config = inner.config
        vision = audio = None
        if inner.vision_tower is not None and not is_trained(inner.vision_tower):
            vision = {
                "tower": config.vision.to_dict(),
                "config": config.vision_config.to_dict(),
                "weights": digest_of(inner.vision_tower),
                "precision": precision,
            }
        if inner.audio_tower is not None and not is_trained(inner.audio_tower):
            audio = {
                "tower": config.audio.to_dict(),
                "config": config.audio_config.to_dict(),
                "weights": digest_of(inner.audio_tower),
                "precision": precision,
            }
        if vision is None and audio is None:
            raise UsageError(
                "A feature cache was asked for, but no tower is frozen: its features would change "
                "with every step. Leave data.feature_cache out, or freeze a tower."
            )
        made_with = (av_llava, torch, transformers, av)
        return cls(vision, audio, {m.__name__: m.__version__ for m in made_with})


def digest_of(module: nn.Module) -> str:
    """SHA-256 of all weights of a module, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):  # quantisation's own records
            digest.update(f"{name} {tensor!r}".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().to("cpu").contiguous()
        digest.update(data.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def identity_of(source: Any) -> dict[str, Any] | None:
    """What tells a file from every other, and from itself after a change; None for no file."""
    if not isinstance(source, (str, Path)) or "://" in str(source):
        return None
    path = Path(source).expanduser()
    try:
        stat = path.stat()
    except OSError:
        return None  # reading it will say why
    if not path.is_file():
        return None
    return {
        "path": str(path.resolve()),
        "size": stat.st_size,
        "changed_ns": [stat.st_mtime_ns, stat.st_ctime_ns],
        "inode": stat.st_ino,
    }


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, default=str)
