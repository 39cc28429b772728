"""Attaches ears: turns a model that sees into one that hears, too.

Contract: the tower's weights are its own, the projector is fresh and must be trained, the start
and end tokens get mean rows; answers to text and to pictures stay the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers import PreTrainedConfig

from av_llava.audio.configs import DualAudioConfig
from av_llava.audio.projector import build_audio_projector
from av_llava.audio.towers import build_audio_tower, tower_class
from av_llava.checkpoints.audio_towers import read_audio_tower
from av_llava.checkpoints.tokens import add_tokens
from av_llava.errors import CheckpointError, UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor
from av_llava.settings import AU_END_TOKEN, AU_START_TOKEN, AudioSettings

TowerSource: TypeAlias = str | Path | PreTrainedConfig | tuple[str | Path, str | Path]
"""Where a tower comes from."""


def attach_audio(
    model: AVLlavaForConditionalGeneration,
    processor: AVLlavaProcessor,
    tower: TowerSource,
    projector: AudioSettings | Mapping[str, Any] | str | None = None,
    seed: int = 0,
) -> None:
    """Give a model an audio tower, a projector and the start and end tokens, in place.

    Args:
        model: without ears.
        processor: of the model; its tokenizer gets the tokens.
        tower: Whisper folder or hub id, OpenAI Whisper or BEATs ``.pt`` file, a pair of a Whisper
            and a BEATs for Ola's dual tower, or a configuration for a tower with random weights.
        projector: audio settings, a mapping of some of them, or the name of a projector.
        seed: of the projector's weights.

    Raises:
        UsageError: the model hears already, or the settings do not fit.
        CheckpointError: the tower cannot be read or is incomplete.
    """
    config = model.config
    if config.audio_config is not None:
        raise UsageError("This model has an audio tower already; load one that has none.")
    found = read_tower(tower)
    settings = _settings(projector, found).replace(tower=found.name)
    tower_class(found.config, settings)  # raises when kind and configuration do not fit
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new_tower = build_audio_tower(found.config, settings)
        new_projector = build_audio_projector(
            settings, new_tower.hidden_size, config.text_config.hidden_size
        )
    if found.state is not None:
        fill_tower(new_tower, found.state, found.name)
    place = {"device": model.device, "dtype": model.dtype}
    model.model.audio_tower = new_tower.to(**place).eval()
    model.model.mm_audio_projector = new_projector.to(**place)
    config.audio_config, config.audio = found.config, settings
    if settings.use_start_end and settings.token_mode == "tokens":
        start, end = add_tokens(model, processor.tokenizer, (AU_START_TOKEN, AU_END_TOKEN))
        config.au_token_ids = (start, end)


class FoundTower(NamedTuple):
    """A tower's name, kind, configuration, and weights under the names of ``AudioTower``."""

    name: str
    kind: str
    config: PreTrainedConfig
    state: dict[str, Any] | None


_KINDS = {"whisper": "whisper", "beats": "beats", "av_llava_dual_audio": "dual"}


def read_tower(tower: TowerSource) -> FoundTower:
    """Read a tower from where it comes from.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    if isinstance(tower, PreTrainedConfig):
        kind = _KINDS.get(tower.model_type, tower.model_type)
        return FoundTower("random", kind, tower, None)
    if isinstance(tower, (tuple, list)):
        first, second = (read_audio_tower(t) for t in tower)
        if (first.kind, second.kind) != ("whisper", "beats"):
            raise UsageError(
                f"A dual tower is Whisper and BEATs, in this order, not {first.kind} and "
                f"{second.kind}."
            )
        dual = DualAudioConfig(first.config.to_dict(), second.config.to_dict())
        parts = {"whisper.audio_tower.": first.state, "beats.audio_tower.": second.state}
        state = {prefix + k: v for prefix, part in parts.items() for k, v in part.items()}
        return FoundTower(f"{first.name} + {second.name}", "dual", dual, state)
    files = read_audio_tower(tower)
    state = {f"audio_tower.{k}": v for k, v in files.state.items()}
    return FoundTower(files.name, files.kind, files.config, state)


def _settings(
    projector: AudioSettings | Mapping[str, Any] | str | None, found: FoundTower
) -> AudioSettings:
    """Complete what was given; the kind follows from the tower."""
    if isinstance(projector, AudioSettings):
        return projector.replace(kind=found.kind)
    if isinstance(projector, str):
        pooled = "stack" if projector == "stack_mlp" else "average"
        return AudioSettings(kind=found.kind, projector=projector, pool_mode=pooled)
    return AudioSettings.from_dict({"kind": found.kind, **(projector or {})})


def fill_tower(tower: torch.nn.Module, state: dict[str, Any], name: str) -> None:
    """Copy a tower's weights, strictly."""
    own = tower.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    wrong = [
        f"{k}: the file has {tuple(state[k].shape)}, the tower needs {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(
            f"The audio tower {name} does not fit its configuration. Missing: {missing[:6]}. "
            f"Unexpected: {unexpected[:6]}. Wrong shape: {wrong[:6]}."
        )
    tower.load_state_dict(state)
