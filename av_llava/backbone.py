"""The headless model: towers, projectors, media tokens, and any language model of transformers.

Contract: ``prepare_inputs`` chooses which encoders run (none, audio, vision) and ends in the one
splice; towers and projectors see a whole batch at once; nothing names a device. In memory the
parts are ``{vision_tower, mm_projector, audio_tower, mm_audio_projector, media_tokens,
language_model}``; on disk they have LLaVA's names (``weight_names.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from av_llava import modalities, weight_names
from av_llava.aggregators import Aggregator
from av_llava.aggregators.image_layout import ImagePlan
from av_llava.audio.placement import AudioPlan
from av_llava.audio.projector import AudioProjector, build_audio_projector
from av_llava.audio.towers import build_audio_tower
from av_llava.config import AVLlavaConfig
from av_llava.encoding import (
    TowerOutputs,
    absent_parts,
    absent_sight,
    absent_sound,
    audio_features,
    visual_features,
)
from av_llava.errors import UsageError
from av_llava.planning import MediaPlan, MediaPlanner, TokenPlan
from av_llava.projectors import build_projector
from av_llava.splice import splice
from av_llava.vision import build_vision_tower

weight_names.register()

VISION, AUDIO, NONE = "vision", "audio", "none"


class MediaTokens(nn.Module):
    """The learned vectors that stand between media rows: newline and frame end. Each [D].

    Read through ``forward()``, so that PEFT's wrappers and offload hooks see the access.
    """

    def __init__(self, width: int, newline: bool, frame_end: bool) -> None:
        super().__init__()
        self.width = width
        self.image_newline = nn.Parameter(torch.empty(width)) if newline else None
        self.faster_token = nn.Parameter(torch.empty(width)) if frame_end else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 1/sqrt(width), as LLaVA does."""
        for vector in self.parameters():
            init.normal_(vector, mean=0.0, std=1 / math.sqrt(self.width))

    def forward(self, unused: None = None) -> dict[str, Tensor]:
        """Return the vectors by the name of their mark.

        Args:
            unused: wrappers of older PEFT (0.18) pass on one argument at least.
        """
        marks = {"newline": self.image_newline, "frame_end": self.faster_token}
        return {name: vector for name, vector in marks.items() if vector is not None}


class AVLlavaPreTrainedModel(PreTrainedModel):
    """What both classes share: flags of the transformers library and initialisation."""

    config_class = AVLlavaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save under LLaVA's names (safetensors).

        transformers remembers the renamings that loading used, and reverses only those; a tower
        from its own folder used none.

        Raises:
            UsageError: the model carries a LoRA apart, which a checkpoint cannot hold.
        """
        if any(".lora_" in name for name, _ in self.named_parameters()):
            raise UsageError(
                "This model carries an adapter (LoRA) that is not merged into its weights: save it "
                "as an adapter folder with save_adapter, or merge it first."
            )
        self._weight_conversions = None
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MediaTokens):
            module.reset_parameters()
        elif isinstance(module, AudioProjector):
            module.init_marks()
        else:
            super()._init_weights(module)


class AVLlavaModel(AVLlavaPreTrainedModel):
    """Towers, projectors, media tokens and the headless language model."""

    def __init__(self, config: AVLlavaConfig) -> None:
        super().__init__(config)
        MediaPlanner(config)  # raises now, not in the first forward, when a mark is missing
        width = config.text_config.hidden_size
        self.vision_tower: Any = None
        self.mm_projector: Any = None
        self.audio_tower: Any = None
        self.mm_audio_projector: Any = None
        if config.vision_config is not None:
            self.vision_tower = build_vision_tower(config.vision_config, config.vision)
            self.mm_projector = build_projector(
                config.projector.kind, self.vision_tower.hidden_size, width, self.vision_tower.grid
            )
        if config.audio_config is not None:
            self.audio_tower = build_audio_tower(config.audio_config, config.audio)
            self.mm_audio_projector = build_audio_projector(
                config.audio, self.audio_tower.hidden_size, width
            )
        self.media_tokens = MediaTokens(width, config.has_image_newline, config.has_faster_token)
        self.modalities = nn.ModuleDict(
            {name: modalities.get(name).build(width) for name in config.extra_modalities}
        )
        self.language_model: Any = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding module."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embedding module."""
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The headless language model."""
        return self.language_model

    @property
    def planner(self) -> MediaPlanner:
        """Plans media for the present configuration."""
        return MediaPlanner(self.config)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Tower and projector over tiles or frames.

        Args:
            pixels: uint8 levels, or floats already normalised. [N, 3, H, W]

        Returns:
            Projected patch features. [N, P, D]
        """
        return self.mm_projector(self.encode_patches(pixels))

    def encode_patches(self, pixels: Tensor, max_batch: int | None = None) -> Tensor:
        """Tower only, ``max_batch`` at a time. [N, 3, H, W] to [N, P, D_vision]."""
        if self.vision_tower is None:
            raise UsageError("This model has no vision tower: it cannot take images or videos.")
        if pixels.is_floating_point():
            pixels = pixels.to(self.vision_tower.dtype)  # the tower answers in the type it is given
        return self.vision_tower(pixels, max_batch)

    def get_image_features(
        self, pixel_values: Tensor | Sequence[Tensor], plans: Sequence[ImagePlan]
    ) -> BaseModelOutputWithPooling:
        """Features of still images, merged from their tiles.

        Args:
            pixel_values: the tiles of all images, together [N, 3, H, W] or one tensor an image.
            plans: one plan an image.

        Returns:
            ``.pooler_output`` is a list of [n_tokens, D], one an image.
        """
        stills, _ = visual_features(self, (pixel_values, plans), (None, ()), None)
        return BaseModelOutputWithPooling(pooler_output=stills)

    def get_video_features(
        self,
        pixel_values_videos: Tensor | Sequence[Tensor],
        plans: Sequence[TokenPlan],
        aggregator: Aggregator,
    ) -> BaseModelOutputWithPooling:
        """Features of videos, pooled and ordered by the aggregator that made their plans.

        Args:
            pixel_values_videos: frames of all videos [T_1 + T_2 + ..., 3, H, W], or a list of
                [T_i, 3, H, W].
            plans: one plan a video.
            aggregator: executes the plans.

        Returns:
            ``.pooler_output`` is a list of [n_tokens, D], one a video.
        """
        videos = (pixel_values_videos, plans)
        _, films = visual_features(self, (None, ()), videos, aggregator)
        return BaseModelOutputWithPooling(pooler_output=films)

    def get_audio_features(
        self, input_features: Any, plans: Sequence[AudioPlan]
    ) -> BaseModelOutputWithPooling:
        """Features of sound, trimmed of padding.

        Args:
            input_features: the chunks of all clips, as ``audio_tower.features`` gives them.
            plans: one plan a clip.

        Returns:
            ``.pooler_output`` is a list of [n_tokens, D], one a clip.
        """
        heard = audio_features(self, input_features, plans)
        return BaseModelOutputWithPooling(pooler_output=heard)

    def prepare_inputs(
        self,
        media: MediaPlan,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        pixel_values_videos: Tensor | Sequence[Tensor] | None = None,
        input_features: Any = None,
        modality_inputs: Mapping[str, Sequence[Tensor]] | None = None,
        tower_outputs: TowerOutputs | None = None,
    ) -> Tensor:
        """Encode what the batch holds and splice it into the text embeddings. [B, L, D]

        Three branches: ``none`` runs no encoder, ``audio`` the audio tower, ``vision`` the
        vision tower and, for media with sound, the audio tower. Media that ``tower_outputs`` knows
        have no pixels and samples.
        """
        features: dict[str, list[Tensor]] = {}
        absent = self._marks()
        if media.branch == VISION:
            images, videos = (pixel_values, media.images), (pixel_values_videos, media.videos)
            stills, films = visual_features(self, images, videos, media.aggregator, tower_outputs)
            features |= {k: v for k, v in (("image", stills), ("video", films)) if v}
        else:
            absent += absent_sight(self)
        if media.audios:
            features["audio"] = audio_features(self, input_features, media.audios, tower_outputs)
        else:
            absent += absent_sound(self)
        for name, module in self.modalities.items():
            items = (modality_inputs or {}).get(name)
            if items is not None:
                features[name] = module(list(items))
            else:
                absent += absent_parts(self, module)
        if absent:
            features["absent"] = absent
        return splice(self.get_input_embeddings(), media.splice, features)

    def _marks(self) -> list[Tensor]:
        """In training, zero rows of every mark, so that all are in the graph. [0, D]"""
        if not self.training:
            return []
        return [vector[None][:0] for vector in self.media_tokens(None).values()]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        media: MediaPlan | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        pixel_values_videos: Tensor | Sequence[Tensor] | None = None,
        input_features: Any = None,
        modality_inputs: Mapping[str, Sequence[Tensor]] | None = None,
        tower_outputs: TowerOutputs | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the headless language model; media are spliced in when a plan is given."""
        if inputs_embeds is None and media is not None:
            inputs_embeds = self.prepare_inputs(
                media,
                pixel_values,
                pixel_values_videos,
                input_features,
                modality_inputs,
                tower_outputs,
            )
            input_ids = None
            if media.splice.packed is not None:
                # Without mask and cache, transformers keeps apart what restarts its positions.
                attention_mask, past_key_values, use_cache = None, None, False
                position_ids = media.splice.position_ids().to(inputs_embeds.device)
            elif attention_mask is None:
                attention_mask = media.splice.attention_mask().to(inputs_embeds.device)
        elif inputs_embeds is None and any(
            given is not None for given in (pixel_values, pixel_values_videos, input_features)
        ):
            raise UsageError(
                "Pixels or sound were given without a plan (media). "
                "AVLlavaForConditionalGeneration makes one of expanded ids."
            )
        return self.language_model(
            input_ids=input_ids if inputs_embeds is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
