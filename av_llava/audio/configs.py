"""Configurations of the audio towers.

Contract: no weights, no modules. Whisper's is transformers' own ``WhisperConfig``; BEATs
(Chen et al., 2022, arXiv:2212.09058) has none there, so its published fields are here.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig, WhisperConfig

from av_llava.errors import UsageError
from av_llava.geometry import HOP_SAMPLES, SAMPLE_RATE_HZ, whisper_geometry

# The published models use only these; other values change the network, so they are refused.
_BEATS_FIXED: dict[str, Any] = {
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "conv_bias": False,
}


class BeatsConfig(PreTrainedConfig):
    """BEATs with the published field names; the defaults are BEATs_iter3+ (90 M parameters).

    ``chunk_seconds`` is ours: the published module takes any length, its users feed 30 s.
    Fields of the published training (dropouts, layer drop, predictor) are kept but not used.
    """

    model_type = "beats"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "encoder_embed_dim",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_embed_dim",
    }

    def __init__(
        self,
        input_patch_size: int = 16,
        embed_dim: int = 512,
        num_mel_bins: int = 128,
        encoder_layers: int = 12,
        encoder_embed_dim: int = 768,
        encoder_ffn_embed_dim: int = 3072,
        encoder_attention_heads: int = 12,
        conv_pos: int = 128,
        conv_pos_groups: int = 16,
        num_buckets: int = 320,
        max_distance: int = 800,
        deep_norm: bool = True,
        chunk_seconds: float = 30.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        for name, wanted in _BEATS_FIXED.items():
            if kwargs.pop(name, wanted) != wanted:
                raise UsageError(
                    f"This BEATs has {name} other than {wanted!r}, which no published model has "
                    "and this implementation does not cover."
                )
        self.input_patch_size = input_patch_size
        self.embed_dim = embed_dim
        self.num_mel_bins = num_mel_bins
        self.encoder_layers = encoder_layers
        self.encoder_embed_dim = encoder_embed_dim
        self.encoder_ffn_embed_dim = encoder_ffn_embed_dim
        self.encoder_attention_heads = encoder_attention_heads
        self.conv_pos = conv_pos
        self.conv_pos_groups = conv_pos_groups
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.deep_norm = deep_norm
        self.chunk_seconds = chunk_seconds
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def chunk_samples(self) -> int:
        """Samples of a chunk, a whole number of 10 ms hops."""
        return round(self.chunk_seconds * SAMPLE_RATE_HZ / HOP_SAMPLES) * HOP_SAMPLES


class DualAudioConfig(PreTrainedConfig):
    """Whisper and BEATs side by side, their channels concatenated (Ola, arXiv:2502.04328).

    Both hear the same chunks, as long as Whisper's: BEATs' own ``chunk_seconds`` gives way.
    """

    model_type = "av_llava_dual_audio"
    sub_configs: ClassVar[dict[str, Any]] = {
        "whisper_config": WhisperConfig,
        "beats_config": BeatsConfig,
    }

    def __init__(
        self,
        whisper_config: WhisperConfig | dict[str, Any] | None = None,
        beats_config: BeatsConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(whisper_config, WhisperConfig):
            whisper = whisper_config
        else:
            whisper = WhisperConfig(**(whisper_config or {}))
        if isinstance(beats_config, BeatsConfig):
            beats_config = beats_config.to_dict()
        seconds = whisper_geometry(whisper.max_source_positions).chunk_seconds
        self.whisper_config = whisper
        self.beats_config = BeatsConfig(**{**(beats_config or {}), "chunk_seconds": seconds})
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels of both towers together."""
        return int(self.whisper_config.d_model + self.beats_config.encoder_embed_dim)
