"""The model: towers, projectors, aggregation and splice around any causal language model.

Contract: ``prepare_inputs`` chooses which encoders run (none, audio, vision) and ends in the one
splice; towers and projectors see a whole batch at once; nothing names a device. In memory the
parts are ``model.{vision_tower, mm_projector, audio_tower, mm_audio_projector, media_tokens,
language_model}`` and ``lm_head``; on disk they have LLaVA's names (``weight_names.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from av_llava import llava_door, modalities, weight_names
from av_llava.aggregators import Aggregator
from av_llava.aggregators.image_layout import ImagePlan, merge_tiles
from av_llava.audio.placement import AudioPlan
from av_llava.audio.projector import AudioProjector, build_audio_projector
from av_llava.audio.towers import build_audio_tower
from av_llava.config import AVLlavaConfig
from av_llava.errors import UsageError
from av_llava.expanded import ExpandedInputs, open_expanded
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

    def forward(self) -> dict[str, Tensor]:
        """Return the vectors by the name of their mark."""
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
        """
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

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Tower only. [N, 3, H, W] to [N, P, D_vision]."""
        if self.vision_tower is None:
            raise UsageError("This model has no vision tower: it cannot take images or videos.")
        if pixels.is_floating_point():
            pixels = pixels.to(self.vision_tower.dtype)  # the tower answers in the type it is given
        return self.vision_tower(pixels)

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
        tiles = self.encode_images(_rows(pixel_values))
        parts = tiles.split([plan.n_tiles for plan in plans])
        newline = self.media_tokens().get("newline")
        merged = [merge_tiles(f, p, newline) for f, p in zip(parts, plans, strict=True)]
        return BaseModelOutputWithPooling(pooler_output=merged)

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
        before = aggregator.settings.stage == "pre"
        encode = self.encode_patches if before else self.encode_images
        videos = _rows(pixel_values_videos).split([plan.frames for plan in plans])
        marks = self.media_tokens()
        out = []
        for features, plan in zip(self._encoded(videos, encode), plans, strict=True):
            grids = (f.unflatten(1, _grid(plan, f.shape[1])) for f in features)
            reduced = aggregator.reduce_chunks(grids, plan)
            if before:
                reduced = reduced.map(self.mm_projector)
            out.append(aggregator.assemble(reduced, plan, marks).tokens)
        return BaseModelOutputWithPooling(pooler_output=out)

    def _encoded(
        self, videos: Sequence[Tensor], encode: Callable[[Tensor], Tensor]
    ) -> Iterator[Iterable[Tensor]]:
        """Features of each video in pieces of consecutive frames.

        What fits the tower at once is encoded at once, over all videos; long videos go piece by
        piece, so that only pooled patches are kept.
        """
        lengths = [len(video) for video in videos]
        limit = self.config.vision.max_batch
        if sum(lengths) <= limit:
            for features in encode(_rows(videos)).split(lengths):
                yield [features]
        else:
            for video in videos:
                yield (encode(piece) for piece in video.split(limit))

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
        if self.audio_tower is None:
            raise UsageError("This model has no audio tower: it cannot take sound.")
        tower = self.audio_tower
        lengths = torch.tensor([n for plan in plans for n in plan.chunk_lengths])
        frames, _ = tower(input_features, lengths)
        return BaseModelOutputWithPooling(pooler_output=self.mm_audio_projector(frames, plans))

    def prepare_inputs(
        self,
        media: MediaPlan,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        pixel_values_videos: Tensor | Sequence[Tensor] | None = None,
        input_features: Any = None,
        modality_inputs: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> Tensor:
        """Encode what the batch holds and splice it into the text embeddings. [B, L, D]

        Three branches: ``none`` runs no encoder, ``audio`` the audio tower, ``vision`` the
        vision tower and, for media with sound, the audio tower.
        """
        features: dict[str, list[Tensor]] = {}
        if media.branch == VISION:
            if media.images:
                features["image"] = self.get_image_features(
                    _given(pixel_values, "pixel_values", "images"), media.images
                ).pooler_output
            if media.videos:
                features["video"] = self.get_video_features(
                    _given(pixel_values_videos, "pixel_values_videos", "videos"),
                    media.videos,
                    media.aggregator,
                ).pooler_output
        if media.branch != NONE and media.audios:
            features["audio"] = self.get_audio_features(
                _given(input_features, "input_features", "sound"), media.audios
            ).pooler_output
        for name, items in (modality_inputs or {}).items():
            features[name] = self.modalities[name](list(items))
        if self.training:
            features |= self._absent(features)
        return splice(self.get_input_embeddings(), media.splice, features)

    def _absent(self, features: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Zero rows of every trainable part that this batch does not use.

        So all ranks of a distributed run have one graph.
        """
        rows = [vector[None][:0] for vector in self.media_tokens().values()]
        if self.vision_tower is not None and not features.keys() & {"image", "video"}:
            rows += self._dummy_vision()
        if self.audio_tower is not None and "audio" not in features:
            rows += self._dummy_audio()
        return {"absent": rows}

    def _dummy_vision(self) -> list[Tensor]:
        if not _trainable(self.vision_tower, self.mm_projector):
            return []
        size = self.vision_tower.input_size
        pixels = torch.zeros((1, 3, size, size), dtype=torch.uint8)
        return [self.encode_images(pixels).flatten(0, 1)[:0]]

    def _dummy_audio(self) -> list[Tensor]:
        if not _trainable(self.audio_tower, self.mm_audio_projector):
            return []
        if not _trainable(self.audio_tower):
            return [self.mm_audio_projector.dummy()]
        inputs = self.audio_tower.features([torch.zeros(self.config.audio.min_samples)])
        frames, _ = self.audio_tower(inputs.features, inputs.lengths)
        return [self.mm_audio_projector.dummy(frames)]

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
        **kwargs: Any,
    ) -> Any:
        """Run the headless language model; media are spliced in when a plan is given."""
        if inputs_embeds is None and media is not None:
            inputs_embeds = self.prepare_inputs(
                media, pixel_values, pixel_values_videos, input_features, modality_inputs
            )
            input_ids = None
            if attention_mask is None:
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


class AVLlavaForConditionalGeneration(AVLlavaPreTrainedModel, GenerationMixin):
    """:class:`AVLlavaModel` with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: AVLlavaConfig) -> None:
        super().__init__(config)
        self.model = AVLlavaModel(config)
        text = config.text_config
        self.lm_head: nn.Module = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding module."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embedding module."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language-modelling head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language-modelling head."""
        self.lm_head = value

    def get_decoder(self) -> nn.Module:
        """The headless language model."""
        return self.model.get_decoder()

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See :meth:`AVLlavaModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def get_video_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See :meth:`AVLlavaModel.get_video_features`."""
        return self.model.get_video_features(*args, **kwargs)

    def get_audio_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See :meth:`AVLlavaModel.get_audio_features`."""
        return self.model.get_audio_features(*args, **kwargs)

    def prepare_inputs(self, media: MediaPlan, **tensors: Any) -> Tensor:
        """See :meth:`AVLlavaModel.prepare_inputs`."""
        return self.model.prepare_inputs(media, **tensors)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Any,
        modalities: str | Sequence[str] = ("image",),
        image_sizes: Sequence[tuple[int, int]] | None = None,
        audios: Sequence[Tensor] | None = None,
        audio_lengths: Sequence[int] | None = None,
    ) -> tuple[Any, ...]:
        """LLaVA's door: see :func:`av_llava.llava_door.prepare`."""
        return llava_door.prepare(
            self,
            input_ids,
            position_ids,
            attention_mask,
            past_key_values,
            labels,
            llava_door.Media(images, modalities, image_sizes, audios, audio_lengths),
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        media: MediaPlan | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        pixel_values_videos: Tensor | Sequence[Tensor] | None = None,
        input_features: Any = None,
        modality_inputs: Mapping[str, Sequence[Tensor]] | None = None,
        images: Any = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        modalities: str | Sequence[str] = ("image",),
        audios: Sequence[Tensor] | None = None,
        audio_lengths: Sequence[int] | None = None,
        batch_num_images: Tensor | Sequence[int] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss when labels are given.

        Media come in one of three ways: as the processor makes them (``media`` with
        ``pixel_values``, ``pixel_values_videos``, ``input_features``); transformers' way, the same
        without ``media`` but with expanded ids, ``image_sizes`` as (height, width) and
        ``audio_lengths`` (see :class:`av_llava.expanded.ExpandedInputs`); or LLaVA's way
        (``images``, ``image_sizes`` as (width, height), ``modalities``, ``audios``, with sentinels
        in ``input_ids``).
        """
        given = images is not None or audios is not None
        if input_ids is not None and inputs_embeds is None and given:
            doored = self.prepare_inputs_labels_for_multimodal(
                input_ids,
                position_ids,
                attention_mask,
                past_key_values,
                labels,
                images,
                modalities,
                image_sizes,
                audios,
                audio_lengths,
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = doored
        expanded = ExpandedInputs(
            pixel_values,
            image_sizes,
            batch_num_images,
            pixel_values_videos,
            input_features,
            audio_lengths,
            modality_inputs,
        )
        tensors = expanded.tensors
        if media is None and input_ids is not None and inputs_embeds is None and expanded:
            media, tensors = open_expanded(
                self.model.planner, input_ids, attention_mask, labels, expanded
            )
            labels = media.splice.labels()
        if media is not None and labels is None:
            labels = media.splice.labels()
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            media=media,
            **tensors,
            **{k: v for k, v in kwargs.items() if k != "num_items_in_batch"},
        )
        hidden = out.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._soft_capped(self.lm_head(hidden[:, keep, :]))
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(
                logits,
                labels.to(logits.device),
                vocab_size=logits.shape[-1],
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def _soft_capped(self, logits: Tensor) -> Tensor:
        """Squash logits for the language models that are trained so (Gemma 2)."""
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        media: MediaPlan | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        pixel_values_videos: Tensor | Sequence[Tensor] | None = None,
        input_features: Any = None,
        modality_inputs: Mapping[str, Sequence[Tensor]] | None = None,
        images: Any = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        modalities: str | Sequence[str] = ("image",),
        audios: Sequence[Tensor] | None = None,
        audio_lengths: Sequence[int] | None = None,
        batch_num_images: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate; media come in the three ways of :meth:`forward`.

        With LLaVA's arguments (sentinels in ``inputs``) only new ids are returned; with expanded
        ids, prompt and new ids, the prompt's negative media ids shown as the pad id.
        """
        ids = kwargs.pop("input_ids", inputs)
        if images is not None or audios is not None:
            kwargs.pop("position_ids", None)
            door = llava_door.Media(images, modalities, image_sizes, audios, audio_lengths)
            embeds, mask = llava_door.prompt(self, ids, kwargs.pop("attention_mask", None), door)
            return super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)
        expanded = ExpandedInputs(
            pixel_values,
            image_sizes,
            batch_num_images,
            pixel_values_videos,
            input_features,
            audio_lengths,
            modality_inputs,
        )
        tensors = expanded.tensors
        if media is None and ids is not None and expanded:
            media, tensors = open_expanded(
                self.model.planner, ids, kwargs.get("attention_mask"), None, expanded
            )
        if media is None:
            return super().generate(ids, **kwargs)
        embeds = self.model.prepare_inputs(media, **tensors)
        kwargs.setdefault("attention_mask", media.splice.attention_mask().to(embeds.device))
        return super().generate(
            input_ids=self.without_media_ids(ids).to(embeds.device), inputs_embeds=embeds, **kwargs
        )

    def without_media_ids(self, input_ids: Tensor) -> Tensor:
        """Expanded ids with the pad id on media rows, fit for stock generation code. [B, L]"""
        text = self.config.text_config
        pad = text.pad_token_id if text.pad_token_id is not None else 0
        return input_ids.where(input_ids >= 0, pad)


def _rows(pixels: Tensor | Sequence[Tensor]) -> Tensor:
    """All tiles or frames in one tensor. [N, 3, H, W]"""
    if isinstance(pixels, Tensor):
        return pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    return torch.cat(list(pixels)) if len(pixels) > 1 else pixels[0]


def _grid(plan: TokenPlan, n_patches: int) -> tuple[int, int]:
    """The plan's grid, checked against the patches that came."""
    if plan.height * plan.width != n_patches:
        raise UsageError(
            f"The video was planned for a grid of {plan.height}x{plan.width} patches, but the "
            f"tower gave {n_patches} a frame. Videos need the select feature 'patch' (no CLS)."
        )
    return plan.height, plan.width


def _given(value: Any, name: str, what: str) -> Any:
    if value is None:
        raise UsageError(f"The prompt holds {what}, but {name} was not given.")
    return value


def _trainable(*modules: nn.Module) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())
