"""Audio towers: from waveforms to frames of features.

Contract: a tower is made from its configuration alone, without weights, also on the meta device.
It takes the chunks of all clips of a batch in one tensor and never loops over clips. It gives one
length for every chunk; what lies beyond is padding, which the projector drops.

N chunks, F features, T input frames, L output frames, D channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from av_llava.audio.beats import BeatsEncoder
from av_llava.audio.configs import BeatsConfig, DualAudioConfig
from av_llava.audio.features import (
    AudioFeatures,
    DualFeatures,
    FeatureExtractor,
    KaldiFbank,
    LogMel,
)
from av_llava.audio.placement import AudioPlan
from av_llava.audio.waveform import Waveform
from av_llava.errors import UsageError, unknown_name
from av_llava.geometry import AudioGeometry, beats_geometry, whisper_geometry
from av_llava.settings import AudioSettings

# BEATs' attention bias takes 4 * 12 * 1496 ** 2 bytes for each chunk: 0.1 GB in float32.
_BEATS_CHUNKS_AT_ONCE = 8


class AudioTower(nn.Module, ABC):
    """Base of all audio towers.

    Subclasses name their configuration class and implement :meth:`geometry_of`,
    :meth:`features_of` and :meth:`encode`; then they can be added to :data:`AUDIO_TOWERS`.
    """

    config_class: type[PreTrainedConfig]
    hidden_size: int
    """Channels D of the output."""

    def __init__(self, config: PreTrainedConfig, settings: AudioSettings) -> None:
        super().__init__()
        self.config, self.settings = config, settings
        self.geometry = self.geometry_of(config, settings)
        self.feature_extractor = self.features_of(config, settings)

    @classmethod
    @abstractmethod
    def geometry_of(cls, config: Any, settings: AudioSettings) -> AudioGeometry:
        """Return how such a tower turns samples into frames."""

    @classmethod
    @abstractmethod
    def features_of(cls, config: Any, settings: AudioSettings) -> FeatureExtractor:
        """Make what turns waveforms into the input of such a tower."""

    @abstractmethod
    def encode(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Encode [N, F, T], of which ``lengths`` [N] frames hold sound, to [N, L, D]."""

    @property
    def frames_per_chunk(self) -> int:
        """Output frames of a whole chunk, L."""
        return self.geometry.frames_per_chunk

    @property
    def chunk_seconds(self) -> float:
        """Length of a chunk in seconds."""
        return self.geometry.chunk_seconds

    @property
    def frame_rate_hz(self) -> float:
        """Output frames per second."""
        return self.geometry.frame_rate_hz

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def features(
        self, waveforms: Sequence[Waveform], plans: Sequence[AudioPlan] | None = None
    ) -> AudioFeatures:
        """Compute the tower's input for some clips; see :func:`clip_features`."""
        return clip_features(self.feature_extractor, waveforms, plans)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode chunks.

        Args:
            features: [N, F, T] as :meth:`features` gives them, any float type and device.
            lengths: [N] integers, input frames that hold sound.

        Returns:
            Frames [N, L, D] and how many of each chunk hold sound, [N]. A tower without trainable
            parameters builds no graph.
        """
        wanted = (self.feature_extractor.n_features, self.feature_extractor.n_frames)
        if tuple(features.shape[1:]) != wanted or len(lengths) != len(features):
            raise UsageError(
                f"This audio tower takes features [chunks, {wanted[0]}, {wanted[1]}] and one "
                f"length per chunk, not {list(features.shape)} and {len(lengths)} lengths; make "
                "them with the features() of the same tower."
            )
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(trains):
            frames = self.encode(self._at_weights(features).to(self.dtype), lengths)
        return frames, self.out_lengths(lengths)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Output frames that hold sound, for ``lengths`` [N] input frames that do."""
        return _out_lengths(lengths, self.geometry)

    def _at_weights(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the weights; weights that are offloaded come to the tensor instead."""
        device = self.device
        return tensor if device.type == "meta" else tensor.to(device, non_blocking=True)

    def _valid(self, lengths: Tensor, geometry: AudioGeometry | None = None) -> Tensor | None:
        """True at output frames that hold sound, [N, L]; None when padding is attended to."""
        if not self.settings.mask_padding:
            return None
        geometry = geometry or self.geometry
        valid = self._at_weights(_out_lengths(lengths, geometry))
        return torch.arange(geometry.frames_per_chunk, device=valid.device) < valid[:, None]


def _out_lengths(lengths: Tensor, geometry: AudioGeometry) -> Tensor:
    """``AudioGeometry.frames`` for a tensor."""
    up = geometry.inputs_per_hop - 1 if geometry.partial else 0
    hops = torch.div(lengths + up, geometry.inputs_per_hop, rounding_mode="floor")
    return hops.clamp(min=1) * geometry.frames_per_hop


class WhisperTower(AudioTower):
    """The encoder of Whisper (arXiv:2212.04356), any size; 50 frames a second.

    Takes the configuration of a whole Whisper model and builds its encoder.
    """

    config_class = WhisperConfig

    def __init__(self, config: WhisperConfig, settings: AudioSettings) -> None:
        super().__init__(config, settings)
        self.hidden_size = config.d_model
        self.audio_tower = WhisperEncoder(config)

    @classmethod
    def geometry_of(cls, config: WhisperConfig, settings: AudioSettings) -> AudioGeometry:
        """Two mel frames make one frame."""
        return whisper_geometry(config.max_source_positions)

    @classmethod
    def features_of(cls, config: WhisperConfig, settings: AudioSettings) -> LogMel:
        """Log-mel with the bins and the length of the encoder."""
        frames = 2 * config.max_source_positions
        return LogMel(config.num_mel_bins, frames, settings.min_samples)

    def encode(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Run the encoder; with ``mask_padding``, layer by layer with a key mask."""
        valid = self._valid(lengths)
        if valid is None:
            return self.audio_tower(features).last_hidden_state
        return self._encode_masked(features, valid)

    def _encode_masked(self, features: Tensor, valid: Tensor) -> Tensor:
        """Do as ``WhisperEncoder.forward`` does, but hide padding: that one ignores its mask."""
        encoder = self.audio_tower
        x = F.gelu(encoder.conv1(features))
        x = F.gelu(encoder.conv2(x)).transpose(1, 2)
        x = x + encoder.embed_positions(torch.arange(x.shape[1], device=x.device))
        x = F.dropout(x, encoder.dropout, self.training)
        mask = _key_mask(valid, x.dtype, encoder.config._attn_implementation)
        for layer in encoder.layers:
            if self.training and encoder.layerdrop and torch.rand([]) < encoder.layerdrop:
                continue
            x = layer(x, mask)
        return encoder.layer_norm(x)


def _key_mask(valid: Tensor, dtype: torch.dtype, implementation: str | None) -> Tensor:
    """Turn valid keys [N, L] into the mask that an attention function of transformers expects."""
    if implementation in ("eager", "sdpa"):
        mask = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
        mask = mask.masked_fill(~valid, torch.finfo(dtype).min)
        return mask[:, None, None, :].expand(-1, 1, valid.shape[1], -1)
    if implementation and implementation.startswith("flash_attention"):
        return valid
    raise UsageError(
        f"mask_padding does not work with the attention implementation {implementation!r}; use "
        "sdpa, eager or flash_attention_2 for the audio tower."
    )


class BeatsTower(AudioTower):
    """BEATs (arXiv:2212.09058): 8 frames, one per frequency band, each 160 ms; or their mean."""

    config_class = BeatsConfig

    def __init__(self, config: BeatsConfig, settings: AudioSettings) -> None:
        super().__init__(config, settings)
        self.hidden_size = config.encoder_embed_dim
        self.audio_tower = BeatsEncoder(config)
        self._patches = beats_geometry(
            config.chunk_samples, config.input_patch_size, config.num_mel_bins
        )

    @classmethod
    def geometry_of(cls, config: BeatsConfig, settings: AudioSettings) -> AudioGeometry:
        """A patch is 16 filterbank frames by 16 bands."""
        return beats_geometry(
            config.chunk_samples, config.input_patch_size, config.num_mel_bins, settings.freq_pool
        )

    @classmethod
    def features_of(cls, config: BeatsConfig, settings: AudioSettings) -> KaldiFbank:
        """Normalised filterbanks of a chunk."""
        return KaldiFbank(config.chunk_samples, config.num_mel_bins, settings.min_samples)

    def encode(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Run BEATs on a few chunks at a time, and average the bands if asked to."""
        valid = self._valid(lengths, self._patches)
        parts = features.split(_BEATS_CHUNKS_AT_ONCE)
        masks = [None] * len(parts) if valid is None else valid.split(_BEATS_CHUNKS_AT_ONCE)
        x = torch.cat([self.audio_tower(f, m) for f, m in zip(parts, masks, strict=True)])
        if self.settings.freq_pool == "mean":
            x = x.unflatten(1, (-1, self._patches.frames_per_hop)).mean(2)
        return x


class DualTower(AudioTower):
    """Whisper and BEATs side by side, as Ola (arXiv:2502.04328) joins them.

    BEATs' frames are padded with zeros to Whisper's and concatenated index by index: both come at
    50 a second, although one of BEATs' is a band of 160 ms.
    """

    config_class = DualAudioConfig

    def __init__(self, config: DualAudioConfig, settings: AudioSettings) -> None:
        super().__init__(config, settings)
        self.hidden_size = config.hidden_size
        self.whisper = WhisperTower(config.whisper_config, settings)
        self.beats = BeatsTower(config.beats_config, settings)

    @classmethod
    def geometry_of(cls, config: DualAudioConfig, settings: AudioSettings) -> AudioGeometry:
        """Whisper's geometry."""
        if settings.freq_pool != "flatten":
            raise UsageError(
                "The dual audio tower joins 50 frames a second of Whisper and of BEATs, so it "
                f"needs freq_pool 'flatten', not {settings.freq_pool!r}."
            )
        return WhisperTower.geometry_of(config.whisper_config, settings)

    @classmethod
    def features_of(cls, config: DualAudioConfig, settings: AudioSettings) -> DualFeatures:
        """Log-mel above filterbank."""
        mel = WhisperTower.features_of(config.whisper_config, settings)
        return DualFeatures(mel, BeatsTower.features_of(config.beats_config, settings))

    def encode(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Encode with both."""
        extractor = cast(DualFeatures, self.feature_extractor)
        mel, fbank = features.split([extractor.mel.n_features, extractor.fbank.n_features], dim=1)
        # A filterbank frame needs 25 ms of sound, a mel frame counts with its first sample.
        shorter = (lengths - 2).clamp(min=1)
        heard = self.whisper.encode(mel, lengths)
        sensed = self.beats.encode(fbank[:, :, : extractor.fbank.n_frames], shorter)
        missing = heard.shape[1] - sensed.shape[1]
        return torch.cat([heard, F.pad(sensed, (0, 0, 0, missing))], dim=-1)


AUDIO_TOWERS: dict[str, type[AudioTower]] = {
    "whisper": WhisperTower,
    "beats": BeatsTower,
    "dual": DualTower,
}
"""Towers by the name that ``AudioSettings.kind`` gives; add your own here."""


def tower_class(config: PreTrainedConfig, settings: AudioSettings) -> type[AudioTower]:
    """Return the class of the tower that the settings name, checked against the configuration.

    Raises:
        UsageError: an unknown kind, or a configuration of another tower.
    """
    if settings.kind not in AUDIO_TOWERS:
        raise unknown_name("audio tower", settings.kind, AUDIO_TOWERS)
    cls = AUDIO_TOWERS[settings.kind]
    if not isinstance(config, cls.config_class):
        fitting = [k for k, c in AUDIO_TOWERS.items() if isinstance(config, c.config_class)]
        hint = f" Set the audio kind to {fitting[0]!r}." if fitting else ""
        raise UsageError(
            f"An audio tower of kind {settings.kind!r} needs a {cls.config_class.__name__}, but "
            f"the audio configuration is a {type(config).__name__}.{hint}"
        )
    return cls


def build_audio_tower(config: PreTrainedConfig, settings: AudioSettings) -> AudioTower:
    """Make an audio tower with random weights (none under the meta device).

    Args:
        config: ``WhisperConfig``, ``BeatsConfig`` or ``DualAudioConfig``.
        settings: names the kind and how padding and bands are treated.
    """
    return tower_class(config, settings)(config, settings)


def audio_geometry(config: PreTrainedConfig, settings: AudioSettings) -> AudioGeometry:
    """Return a tower's geometry without making it; what ``placement.plan_audio`` needs."""
    return tower_class(config, settings).geometry_of(config, settings)


def build_feature_extractor(config: PreTrainedConfig, settings: AudioSettings) -> FeatureExtractor:
    """Make what turns waveforms into a tower's input, without making the tower."""
    return tower_class(config, settings).features_of(config, settings)


def clip_features(
    extractor: FeatureExtractor,
    waveforms: Sequence[Waveform],
    plans: Sequence[AudioPlan] | None = None,
) -> AudioFeatures:
    """Compute a tower's input for some clips.

    Args:
        extractor: of the tower.
        waveforms: float samples [S] at 16 kHz, one per clip.
        plans: one per clip; without them each clip is cut into consecutive chunks.

    Raises:
        UsageError: a clip that is not as long as its plan says.
    """
    if plans is None:
        return extractor(list(waveforms))
    for number, (waveform, plan) in enumerate(zip(waveforms, plans, strict=True)):
        if max(waveform.shape[0], extractor.min_samples) != plan.n_samples:
            raise UsageError(
                f"Clip {number} has {waveform.shape[0]} samples, but {plan.n_samples} were "
                "planned; plan it again."
            )
    return extractor(list(waveforms), [plan.chunks for plan in plans])
