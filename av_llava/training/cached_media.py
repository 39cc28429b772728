"""Opens the media of a batch through the feature cache.

Contract: what is opened plans like what the file itself gives, with the same times and lengths;
media that are known have no pixels or samples. What is not known is decoded, encoded in the
training process, and kept there (:class:`CachedOutputs` travels with the batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from av_llava.chat import MediaPart
from av_llava.encoding import Streams, TowerOutputs
from av_llava.media_inputs import (
    AUDIO_MODES,
    LoadedImage,
    LoadedVideo,
    MediaOptions,
    sound_of,
)
from av_llava.prepared import BatchBuilder, Loaded
from av_llava.sound_inputs import LoadedSound, seconds_needed
from av_llava.training.feature_cache import FeatureStore, TowerKeys, identity_of

Key = dict[str, Any]
Span = tuple[float, float]


@dataclass
class CachedOutputs(TowerOutputs):
    """What is known of a batch's media, and where to keep what is encoded for the others."""

    store: FeatureStore | None = None
    pending: dict[tuple[str, int], tuple[Key, dict[str, Any]]] = field(default_factory=dict)
    precision: str = ""

    def __post_init__(self) -> None:
        self.keep = self.kept if self.pending else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "keep": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def kept(self, kind: str, item: int, outputs: Streams) -> None:
        """Write what a tower gave."""
        if (kind, item) not in self.pending or self.store is None:
            return
        if _precision(outputs[0].device.type) == self.precision:
            key, meta = self.pending.pop((kind, item))
            self.store.write(key, meta, outputs)


def _precision(device: str) -> str:
    """The type of automatic mixed precision at work, or ""."""
    if not torch.is_autocast_enabled(device):
        return ""
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")


class CachedMedia:
    """Opens media, from the cache where it can; can be sent to a worker.

    Args:
        store: the files.
        keys: of the model's towers.
        precision: of automatic mixed precision in training, or "".
    """

    def __init__(self, store: FeatureStore, keys: TowerKeys, precision: str = "") -> None:
        self.store, self.keys, self.precision = store, keys, precision
        self._known: dict[int, tuple[Loaded, Streams]] = {}
        self._pending: dict[int, tuple[Loaded, Key, dict[str, Any]]] = {}

    def open(self, builder: BatchBuilder, part: MediaPart, n_images: int) -> Loaded:
        """Open one medium as ``builder.open`` does."""
        options = builder.options.for_part(part)
        if part.kind == "video":
            return self._video(builder, part, options)
        if part.kind == "image":
            key = self._image_key(builder, part, n_images)
        elif part.kind == "audio":
            key = self._sound_key(builder, part.source, (options.start_s, options.end_s), options)
        else:
            key = None
        entry = None if key is None else self.store.read(key)
        if entry is not None:
            made = _image if part.kind == "image" else _sound
            return self._found(made(entry.meta), entry.outputs)
        return self._new(builder.open(part, n_images), key)

    def outputs(self, builder: BatchBuilder) -> CachedOutputs:
        """What is known of the batch that was built, and what is to be kept of it."""
        known: dict[tuple[str, int], Streams] = {}
        pending: dict[tuple[str, int], tuple[Key, dict[str, Any]]] = {}
        groups: dict[str, Sequence[Loaded]] = {
            "image": builder.images,
            "video": builder.videos,
            "audio": builder.sounds,
        }
        for kind, items in groups.items():
            for number, item in enumerate(items):
                if id(item) in self._known:
                    known[kind, number] = self._known[id(item)][1]
                elif id(item) in self._pending:
                    pending[kind, number] = self._pending[id(item)][1:]
        self._known, self._pending = {}, {}
        return CachedOutputs(known, None, self.store, pending, self.precision)

    def _video(self, builder: BatchBuilder, part: MediaPart, options: MediaOptions) -> LoadedVideo:
        """A video, whose sound has an entry of its own."""
        key = self._video_key(builder, part, options)
        entry = None if key is None else self.store.read(key)
        if entry is None:
            loaded = builder.open(part, 0)
            assert isinstance(loaded, LoadedVideo)
            if loaded.sound is not None:  # decoded with the frames, but perhaps encoded earlier
                sound_key = self._own_sound_key(builder, part, options, loaded.span_s)
                heard = None if sound_key is None else self.store.read(sound_key)
                if heard is None:
                    self._new(loaded.sound, sound_key)
                else:
                    found = self._found(_sound(heard.meta), heard.outputs)
                    assert isinstance(found, LoadedSound)
                    loaded = replace(loaded, sound=found)
            self._new(loaded, key)
            return loaded
        video = _video(entry.meta)
        sound, reason = self._own_sound(builder, part, options, video.span_s)
        warnings = video.warnings + (() if sound is None else sound.warnings)
        video = replace(video, sound=sound, no_sound=reason, warnings=warnings)
        self._found(video, entry.outputs)
        return video

    def _own_sound(
        self, builder: BatchBuilder, part: MediaPart, options: MediaOptions, span_s: Span
    ) -> tuple[LoadedSound | None, str | None]:
        """The sound of a video whose frames are known."""
        key = self._own_sound_key(builder, part, options, span_s)
        entry = None if key is None else self.store.read(key)
        if entry is not None:
            found = _sound(entry.meta)
            self._found(found, entry.outputs)
            return found, None
        config = builder.processor.config
        ears = config.audio if config.audio_config is not None else None
        sound, reason = sound_of(part.source, span_s, options, ears, decode=True)
        if sound is not None:
            self._new(sound, key)
        return sound, reason

    # ---------------------------------------------------------------- keys

    def _image_key(self, builder: BatchBuilder, part: MediaPart, n_images: int) -> Key | None:
        settings = builder.processor.config.image.for_count(n_images)
        how = {"tiling": settings.to_dict(), "pixels": builder.processor.pixels}
        return self._key("image", self.keys.vision, part.source, how)

    def _video_key(
        self, builder: BatchBuilder, part: MediaPart, options: MediaOptions
    ) -> Key | None:
        aggregator = builder.planner.aggregator.settings
        how = {
            "sampling": options.sampling.to_dict(),
            "window": [options.start_s, options.end_s],
            "pixels": builder.processor.pixels,
            # Pooled before the projector, features are kept pooled; else they are patches.
            "pooled": aggregator.to_dict() if aggregator.stage == "pre" else None,
        }
        return self._key("video", self.keys.vision, part.source, how)

    def _own_sound_key(
        self, builder: BatchBuilder, part: MediaPart, options: MediaOptions, span_s: Span
    ) -> Key | None:
        if options.audio == "off":  # an entry may be there of a sample that heard it
            return None
        source = part.source if options.audio in AUDIO_MODES else options.audio
        return self._sound_key(builder, source, span_s, options)

    def _sound_key(
        self,
        builder: BatchBuilder,
        source: Any,
        window_s: tuple[float | None, float | None],
        options: MediaOptions,
    ) -> Key | None:
        config = builder.processor.config
        if config.audio_config is None:
            return None
        how = {"window": list(window_s), "longest": seconds_needed(config.audio)}
        return self._key("audio", self.keys.audio, source, how)

    def _key(self, kind: str, tower: Key | None, source: Any, how: Key) -> Key | None:
        """The whole key of a medium; None where nothing can be kept."""
        identity = identity_of(source)
        if tower is None or identity is None:
            return None
        own = {k: repr(v) if k == "pixels" else v for k, v in how.items()}
        return {"kind": kind, "file": identity, "tower": tower, **own, **self.keys.versions}

    # ---------------------------------------------------------------- notes

    def _found(self, loaded: Loaded, outputs: Streams) -> Loaded:
        self._known[id(loaded)] = loaded, outputs
        return loaded

    def _new(self, loaded: Loaded, key: Key | None) -> Loaded:
        if key is not None:
            self._pending[id(loaded)] = loaded, key, _meta(loaded)
        return loaded


def _meta(loaded: Loaded) -> dict[str, Any]:
    """Everything of an opened medium but its pixels or samples, and the sound of a video."""
    left_out = ("frames", "tiles", "waveform", "sound", "no_sound")
    meta = {f.name: getattr(loaded, f.name) for f in fields(loaded) if f.name not in left_out}
    if isinstance(loaded, LoadedVideo) and loaded.sound is not None:
        own = len(loaded.warnings) - len(loaded.sound.warnings)
        meta["warnings"] = loaded.warnings[:own]
    return meta


def _image(meta: dict[str, Any]) -> LoadedImage:
    return LoadedImage(**{**meta, "size": tuple(meta["size"]), "tiles": None})


def _video(meta: dict[str, Any]) -> LoadedVideo:
    tuples = {k: tuple(meta[k]) for k in ("pts_s", "span_s", "warnings")}
    return LoadedVideo(**{**meta, **tuples, "frames": None})


def _sound(meta: dict[str, Any]) -> LoadedSound:
    return LoadedSound(**{**meta, "warnings": tuple(meta["warnings"]), "waveform": None})
