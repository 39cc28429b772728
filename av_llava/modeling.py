"""The model with its head: what is loaded, asked, trained and saved.

Contract: media come in one of three ways (the processor's plan, expanded ids, LLaVA's sentinels)
and all end in the backbone's ``prepare_inputs``. Stock generation code sees embeddings, and ids
without media ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from av_llava import llava_door
from av_llava.backbone import AVLlavaModel, AVLlavaPreTrainedModel, MediaTokens
from av_llava.config import AVLlavaConfig
from av_llava.expanded import ExpandedInputs, open_expanded
from av_llava.planning import MediaPlan

__all__ = [
    "AVLlavaForConditionalGeneration",
    "AVLlavaModel",
    "AVLlavaPreTrainedModel",
    "MediaTokens",
]


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
        if inputs_embeds is None:
            opened = media is None
            media, tensors = self._open(input_ids, attention_mask, labels, media, expanded)
            if opened and media is not None:
                labels = media.splice.labels()
        else:
            tensors = expanded.tensors
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

    def _open(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        media: MediaPlan | None,
        expanded: ExpandedInputs,
    ) -> tuple[MediaPlan | None, dict[str, Any]]:
        """The plan that was given, or one made of expanded ids; and what the encoders take."""
        if media is None and input_ids is not None and expanded:
            planner = self.model.planner
            return open_expanded(planner, input_ids, attention_mask, labels, expanded)
        return media, expanded.tensors

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
        media, tensors = self._open(ids, kwargs.get("attention_mask"), None, media, expanded)
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
