"""Finds an audio tower and reads its configuration and weights.

Contract: what a tower is comes from its content: a transformers Whisper folder (encoder alone or
the whole model), OpenAI's ``.pt`` file, or a published BEATs ``.pt`` file. Files are read as
tensors only, never as code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, WhisperConfig

from av_llava.audio.configs import BeatsConfig
from av_llava.audio.keys import convert_beats_keys, convert_openai_whisper_keys
from av_llava.checkpoints.folder import load_pickle, read_json
from av_llava.checkpoints.towers import fetch, read_tensors
from av_llava.errors import CheckpointError

logger = logging.getLogger(__name__)

_WHISPER_PREFIXES = ("model.encoder.", "encoder.")


@dataclass(frozen=True)
class AudioTowerFiles:
    """An audio tower that was found."""

    name: str
    kind: str
    """Key of ``audio.towers.AUDIO_TOWERS``."""
    config: PreTrainedConfig
    state: dict[str, Any]
    """Tensors under the encoder's own names."""


def read_audio_tower(name: str | Path) -> AudioTowerFiles:
    """Read a tower from a folder, a ``.pt`` file, or the hub.

    Raises:
        CheckpointError: it is nowhere, or it is no known tower.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _read_file(str(name), path)
    try:
        folder = path if path.is_dir() else fetch(str(name))
    except CheckpointError as error:
        raise CheckpointError(
            f"The audio tower {str(name)!r} is no file or folder here, and on the hub: {error} "
            f"Give a Whisper folder, an OpenAI Whisper .pt file or a BEATs .pt file."
        ) from error
    logger.info("Audio tower %s: using %s.", name, folder)
    return _read_folder(str(name), folder)


def _read_folder(name: str, folder: Path) -> AudioTowerFiles:
    data = dict(read_json(folder / "config.json"))
    kind = data.pop("model_type", None)
    if kind != "whisper":
        raise CheckpointError(
            f"{folder / 'config.json'} has model_type {kind!r}; audio towers in transformers' "
            f"format are Whisper models."
        )
    encoder = encoder_tensors(read_tensors(folder))
    return AudioTowerFiles(name, "whisper", CONFIG_MAPPING["whisper"](**data), encoder)


def encoder_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's part of a Whisper folder's tensors, under the encoder's own names."""
    prefix = next((p for p in _WHISPER_PREFIXES if any(k.startswith(p) for k in state)), "")
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _read_file(name: str, file: Path) -> AudioTowerFiles:
    data = load_pickle(file)
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{file} holds a {type(data).__name__}, not a tower's weights.")
    if "dims" in data and "model_state_dict" in data:
        state = convert_openai_whisper_keys(data)
        return AudioTowerFiles(name, "whisper", _openai_config(file, data["dims"], state), state)
    if "cfg" in data and "model" in data:
        fields = {k: v for k, v in dict(data["cfg"]).items() if k != "finetuned_model"}
        return AudioTowerFiles(name, "beats", BeatsConfig(**fields), convert_beats_keys(data))
    raise CheckpointError(
        f"{file} is no known audio tower: expected OpenAI Whisper's keys 'dims' and "
        f"'model_state_dict', or BEATs' 'cfg' and 'model'; it has {sorted(map(str, data))[:6]}."
    )


def _openai_config(
    file: Path, dims: Mapping[str, int], state: Mapping[str, Tensor]
) -> WhisperConfig:
    """OpenAI's dimensions as transformers' configuration (the decoder is not used)."""
    first = "layers.0.fc1.weight"
    if first not in state:
        raise CheckpointError(f"{file} holds no {first!r}: it is no complete Whisper encoder.")
    return WhisperConfig(
        num_mel_bins=dims["n_mels"],
        max_source_positions=dims["n_audio_ctx"],
        d_model=dims["n_audio_state"],
        encoder_attention_heads=dims["n_audio_head"],
        encoder_layers=dims["n_audio_layer"],
        encoder_ffn_dim=state[first].shape[0],
        decoder_layers=dims.get("n_text_layer", 1),
        decoder_attention_heads=dims.get("n_text_head", 1),
        decoder_ffn_dim=4 * dims.get("n_text_state", dims["n_audio_state"]),
        vocab_size=dims.get("n_vocab", 51865),
    )
