"""Keys of the audio halves of published checkpoints, and what their shapes say.

Contract: names and shapes only; values are neither changed nor copied. Sizes that LLaVA-style
configurations do not hold (layers, heads, channels) follow from the tensors. A key that is not
known raises, so that nothing is lost in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, WhisperConfig

from av_llava.audio.configs import BeatsConfig, DualAudioConfig
from av_llava.audio.keys import convert_beats_keys, convert_openai_whisper_keys
from av_llava.audio.projector import build_audio_projector
from av_llava.audio.towers import build_audio_tower
from av_llava.checkpoints.audio_towers import read_audio_tower
from av_llava.errors import CheckpointError
from av_llava.settings import AudioSettings

_BEFORE = r"^(?:base_model\.model\.)?(?:model\.)*"
_WHISPER_HEAD = 64
"""Channels of an attention head in every size of Whisper."""

OLA_PROJECTOR = {
    "linear1.weight": "0.weight",
    "linear1.bias": "0.bias",
    "linear2.weight": "2.weight",
    "linear2.bias": "2.bias",
    "speech_newline": "audio_newline",
    "speech_begin": "audio_begin",
    "speech_end": "audio_end",
}
"""Ola's names of the projector's parts, and ours."""


@dataclass(frozen=True)
class PublicAudio:
    """An audio half under our names."""

    name: str
    """Of the folder."""
    family: str
    config: PreTrainedConfig
    settings: AudioSettings
    tower: Mapping[str, Tensor]
    """By the names of :class:`av_llava.audio.towers.AudioTower`."""
    projector: Mapping[str, Tensor]
    """By the names of :class:`av_llava.audio.projector.AudioProjector`."""

    @property
    def width(self) -> int:
        """Width of the language model that it was trained with."""
        return len(
            self.projector["2.bias"] if "2.bias" in self.projector else self.projector["0.bias"]
        )

    def check(self) -> PublicAudio:
        """Return this half, or raise when a tensor is missing, left over or of another shape.

        Raises:
            CheckpointError: see above.
        """
        with torch.device("meta"):
            tower = build_audio_tower(self.config, self.settings)
            projector = build_audio_projector(self.settings, tower.hidden_size, self.width)
        for what, module, state in (
            ("audio tower", tower, self.tower),
            ("audio projector", projector, self.projector),
        ):
            own = {k: tuple(v.shape) for k, v in module.state_dict().items()}
            missing = sorted(own.keys() - state.keys())
            unexpected = sorted(state.keys() - own.keys())
            wrong = [
                f"{k} (the file has {tuple(state[k].shape)}, {self.family} needs {shape})"
                for k, shape in own.items()
                if k in state and tuple(state[k].shape) != shape
            ]
            if missing or unexpected or wrong:
                raise CheckpointError(
                    f"The {what} in {self.name} is not {self.family}'s. Missing: {missing[:6]}. "
                    f"Unexpected: {unexpected[:6]}. Wrong shape: {wrong[:6]}."
                )
        return self


@dataclass(frozen=True)
class Family:
    """A family of published checkpoints."""

    name: str
    mark: re.Pattern[str]
    """Names of the tensors that only this family has: its audio projector's."""
    ears: re.Pattern[str]
    """Names of all tensors of the audio half."""
    eyes: re.Pattern[str]
    """Names of the vision half's tensors, which are left out."""
    unsupported: str
    """The vision half, in words."""
    read: Callable[[OpenedHalf], PublicAudio]


@dataclass(frozen=True)
class OpenedHalf:
    """A folder with the tensors of its audio half."""

    path: Path
    config: Mapping[str, Any]
    ears: Mapping[str, Tensor]
    """By names without what stands before ``speech_``, ``audio_tower.`` or ``mm_projector_a.``."""
    towers: Mapping[str, str | Path | None]
    """Files of towers that were given: whisper, beats."""

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under a prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.ears.items() if k.startswith(prefix)}


# ---------------------------------------------------------------- Ola


def _read_ola(opened: OpenedHalf) -> PublicAudio:
    """Whisper and BEATs side by side, ten frames a token, ReLU, learned marks."""
    whisper, heard = _whisper(opened)
    beats, sensed = _beats(opened, "speech_encoder.beats_model.", "beats", "music_encoder")
    config = DualAudioConfig(whisper.to_dict(), beats.to_dict())
    state = {f"whisper.audio_tower.{k}": v for k, v in heard.items()}
    state |= {f"beats.audio_tower.{k}": v for k, v in sensed.items()}
    projector = _renamed(opened, "speech_projector.", OLA_PROJECTOR)
    first = _needed(projector, "0.weight", opened, "speech_projector.linear1.weight")
    stride = opened.config.get("speech_encoder_ds_rate") or first.shape[1] // config.hidden_size
    if first.shape[1] != stride * config.hidden_size:
        raise CheckpointError(
            f"{opened.path}: speech_projector.linear1.weight has shape {tuple(first.shape)}, which "
            f"is not {stride} frames (speech_encoder_ds_rate) of {config.hidden_size} channels of "
            f"both towers."
        )
    bounds = {"audio_begin", "audio_end"} <= projector.keys()
    settings = AudioSettings(
        tower=str(opened.path),
        kind="dual",
        projector="stack_mlp",
        pool_mode="stack",
        pool_stride=int(stride),
        projector_hidden_size=first.shape[0],
        projector_activation="relu",
        chunk_newline="audio_newline" in projector,
        use_start_end=bounds,
        token_mode="param" if bounds else "tokens",
    )
    return PublicAudio(str(opened.path), "Ola", config, settings, state, projector)


def _whisper(opened: OpenedHalf) -> tuple[WhisperConfig, dict[str, Tensor]]:
    state = opened.part("speech_encoder.whisper_model.")
    if not state:
        return _given_tower(opened, "whisper", "speech_encoder")
    found = convert_openai_whisper_keys(state)
    conv = _needed(found, "conv1.weight", opened, "speech_encoder.whisper_model.conv1.weight")
    first = _needed(found, "layers.0.fc1.weight", opened, "whisper_model.blocks.0.mlp.0.weight")
    places = _needed(found, "embed_positions.weight", opened, "whisper_model.positional_embedding")
    width = conv.shape[0]
    config = WhisperConfig(
        num_mel_bins=conv.shape[1],
        d_model=width,
        max_source_positions=places.shape[0],
        encoder_layers=_depth(found),
        encoder_attention_heads=max(1, width // _WHISPER_HEAD),
        encoder_ffn_dim=first.shape[0],
        decoder_layers=1,
        decoder_attention_heads=max(1, width // _WHISPER_HEAD),
        decoder_ffn_dim=first.shape[0],
    )
    return config, found


# ---------------------------------------------------------------- VideoLLaMA2-AV


def _read_videollama2(opened: OpenedHalf) -> PublicAudio:
    """BEATs, every patch a token, two layers with GELU; no marks."""
    kind = opened.config.get("mm_projector_a_type") or "mlp2x_gelu"
    if not re.fullmatch(r"linear|mlp[1-9]\d*x_gelu", str(kind)):
        raise CheckpointError(
            f"{opened.path / 'config.json'}: the audio projector mm_projector_a_type={kind!r} is "
            f"not supported; linear and mlpNx_gelu are."
        )
    config, tower = _beats(opened, "audio_tower.", "beats", "mm_audio_tower")
    projector = opened.part("mm_projector_a.")
    if set(projector) == {"weight", "bias"}:  # LLaVA's linear projector is a bare layer
        projector = {f"0.{k}": v for k, v in projector.items()}
    _needed(projector, "0.weight", opened, "mm_projector_a.0.weight")
    settings = AudioSettings(
        tower=str(opened.path),
        kind="beats",
        projector=str(kind),
        pool_mode="none",
        pool_stride=1,
        use_start_end=False,
    )
    state = {f"audio_tower.{k}": v for k, v in tower.items()}
    return PublicAudio(str(opened.path), "VideoLLaMA2", config, settings, state, projector)


def _beats(
    opened: OpenedHalf, prefix: str, kind: str, field: str
) -> tuple[BeatsConfig, dict[str, Tensor]]:
    state = opened.part(prefix)
    if not state:
        return _given_tower(opened, kind, field)
    found = convert_beats_keys(state)
    patch = _needed(found, "patch_embedding.weight", opened, f"{prefix}patch_embedding.weight")
    widen = _needed(found, "post_extract_proj.weight", opened, f"{prefix}post_extract_proj.weight")
    conv = _needed(found, "encoder.pos_conv.0.weight_v", opened, f"{prefix}encoder.pos_conv.0")
    first = _needed(found, "encoder.layers.0.fc1.weight", opened, f"{prefix}encoder.layers.0.fc1")
    table = "encoder.layers.0.self_attn.relative_attention_bias.weight"
    buckets, heads = _needed(found, table, opened, f"{prefix}{table}").shape
    config = BeatsConfig(
        input_patch_size=patch.shape[-1],
        embed_dim=patch.shape[0],
        encoder_layers=_depth(found),
        encoder_embed_dim=widen.shape[0],
        encoder_ffn_embed_dim=first.shape[0],
        encoder_attention_heads=heads,
        conv_pos=conv.shape[2],
        conv_pos_groups=conv.shape[0] // conv.shape[1],
        num_buckets=buckets,
    )
    return config, found


# ---------------------------------------------------------------- both


def _depth(state: Iterable[str]) -> int:
    found = [re.search(r"(?:^|\.)layers\.(\d+)\.", key) for key in state]
    return max((int(m[1]) + 1 for m in found if m), default=0)


def _needed(state: Mapping[str, Tensor], key: str, opened: OpenedHalf, shown: str) -> Tensor:
    if key not in state:
        raise CheckpointError(f"{opened.path} holds no {shown}: its audio half is not complete.")
    return state[key]


def _renamed(opened: OpenedHalf, prefix: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    state = opened.part(prefix)
    unknown = sorted(set(state) - set(names))
    if unknown:
        raise CheckpointError(f"{opened.path} holds {prefix}{unknown[0]}, which is not known.")
    return {names[k]: v for k, v in state.items()}


def _given_tower(opened: OpenedHalf, kind: str, field: str) -> tuple[Any, dict[str, Tensor]]:
    """A tower from a file of its own: given, or named by the configuration and in the folder."""
    place = opened.towers.get(kind)
    named = opened.config.get(field)
    if place is None and isinstance(named, str):
        beside = [folder / Path(named).name for folder in (opened.path, opened.path.parent)]
        place = next((p for p in beside if p.is_file()), None)
    if place is None:
        raise CheckpointError(
            f"{opened.path} holds no {kind} weights, and the file that its config.json names "
            f"({field}: {named!r}) does not lie in it or beside it. Give the file as {kind}=."
        )
    files = read_audio_tower(place)
    if files.kind != kind:
        raise CheckpointError(f"{place} holds a {files.kind} tower; {kind} is needed.")
    return files.config, dict(files.state)


FAMILIES: dict[str, Family] = {
    "ola": Family(
        "Ola",
        re.compile(_BEFORE + r"(?P<name>speech_projector\..+)$"),
        re.compile(_BEFORE + r"(?P<name>speech_(?:projector|encoder)\..+)$"),
        re.compile(_BEFORE + r"(?:vision_tower|vision_resampler|mm_projector|image_newline)\b"),
        "the Oryx ViT with its resampler",
        _read_ola,
    ),
    "videollama2": Family(
        "VideoLLaMA2-AV",
        re.compile(_BEFORE + r"(?P<name>mm_projector_a\..+)$"),
        re.compile(_BEFORE + r"(?P<name>(?:mm_projector_a|audio_tower)\..+)$"),
        re.compile(_BEFORE + r"(?:vision_tower|mm_projector)\b"),
        "the spatio-temporal convolution (STC) connector",
        _read_videollama2,
    ),
}
"""Families by name."""
