"""The model's configuration: typed parts plus the configurations of the three networks.

Contract: everything needed to run is in ``config.json``. LLaVA's flat field names are read in
this file (:meth:`AVLlavaConfig.from_llava`) and nowhere else; the rest of the package sees the
typed settings of ``settings.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from av_llava import modalities
from av_llava.aggregators import settings_for
from av_llava.audio.configs import BeatsConfig, DualAudioConfig
from av_llava.errors import CheckpointError, unknown_name
from av_llava.geometry import parse_pinpoints
from av_llava.settings import (
    AUDIO_TOKEN_INDEX,
    IMAGE_TOKEN_INDEX,
    VIDEO_TOKEN_INDEX,
    AggregatorSettings,
    AudioSettings,
    ImageSettings,
    ProjectorSettings,
    SamplingSettings,
    SequenceSettings,
    Settings,
    VisionSettings,
)
from av_llava.vision import as_llava_stores_it, tower_kind

_OWN_AUDIO_CONFIGS = {c.model_type: c for c in (BeatsConfig, DualAudioConfig)}

# LLaVA's architectures, by the language model inside. Matched on the class name, in this order,
# because "LlavaQwen3..." also contains "Qwen".
_LANGUAGE_MODELS = (
    ("Qwen3Moe", "qwen3_moe"),
    ("Qwen3", "qwen3"),
    ("QwenMoe", "qwen2_moe"),
    ("Qwen", "qwen2"),
    ("Mixtral", "mixtral"),
    ("Mistral", "mistral"),
    ("Gemma3", "gemma3_text"),
    ("Gemma2", "gemma2"),
    ("Gemma", "gemma"),
    ("Mpt", "mpt"),
    ("Phi3", "phi3"),
    ("Phi", "phi"),
    ("StableLm", "stablelm"),
    ("Llama", "llama"),
)

# LLaVA's flat names of what is ours, with the part that holds it.
LLAVA_FIELDS = {
    "mm_vision_tower": "vision",
    "vision_tower": "vision",
    "mm_vision_select_layer": "vision",
    "mm_vision_select_feature": "vision",
    "s2": "vision",
    "s2_scales": "vision",
    "mm_projector_type": "projector",
    "image_aspect_ratio": "image",
    "image_grid_pinpoints": "image",
    "image_crop_resolution": "image",
    "image_split_resolution": "image",
    "mm_patch_merge_type": "image",
    "mm_spatial_pool_mode": "aggregator",
    "mm_spatial_pool_stride": "aggregator",
    "mm_spatial_pool_stage": "aggregator",
    "mm_newline_position": "aggregator",
    "add_faster_video": "aggregator",
    "faster_token_stride": "aggregator",
    "add_time_instruction": "sampling",
    "tokenizer_padding_side": "sequence",
    "tokenizer_model_max_length": "sequence",
    "use_pos_skipping": "sequence",
    "pos_skipping_range": "sequence",
    "mm_use_im_start_end": "sequence",
    "mm_use_im_patch_token": "sequence",
}
# What else stands in LLaVA's files and does not belong to the language model.
_NOT_TEXT = {
    "model_type",
    "architectures",
    "transformers_version",
    "force_sample",
    "torch_dtype",
    "_name_or_path",
    "auto_map",
}
_NOT_TEXT_PREFIX = re.compile(
    r"^(mm_|image_|tune_|freeze_|unfreeze_|use_mm|tokenizer_|vision_tower|s2)"
)

PARTS: dict[str, type[Settings]] = {
    "vision": VisionSettings,
    "projector": ProjectorSettings,
    "image": ImageSettings,
    "aggregator": AggregatorSettings,
    "sampling": SamplingSettings,
    "audio": AudioSettings,
    "sequence": SequenceSettings,
}


class AVLlavaConfig(PreTrainedConfig):
    """Configuration of :class:`av_llava.AVLlavaForConditionalGeneration`.

    Args:
        text_config: any causal language model of transformers (config, or dict with model_type).
        vision_config: a CLIP or SigLIP vision config, or None for a model without eyes.
        audio_config: a Whisper, BEATs or dual config, or None for a model without ears.
        vision, projector, image, aggregator, sampling, audio, sequence: the typed parts, as
            settings objects or as the dicts that ``to_dict`` gives.
        image_token_id, video_token_id, audio_token_id: ids on the rows of a medium in expanded
            ids; negative, so that they can never be a vocabulary id.
        extra_modalities: names of registered modalities (``av_llava.modalities``) of the model.
        au_token_ids: vocabulary ids of ``<au_start>`` and ``<au_end>``, or None without them.
    """

    model_type = "av_llava"
    sub_configs = {  # noqa: RUF012
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "audio_config": AutoConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        audio_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision: VisionSettings | dict[str, Any] | None = None,
        projector: ProjectorSettings | dict[str, Any] | None = None,
        image: ImageSettings | dict[str, Any] | None = None,
        aggregator: AggregatorSettings | dict[str, Any] | None = None,
        sampling: SamplingSettings | dict[str, Any] | None = None,
        audio: AudioSettings | dict[str, Any] | None = None,
        sequence: SequenceSettings | dict[str, Any] | None = None,
        image_token_id: int = IMAGE_TOKEN_INDEX,
        video_token_id: int = VIDEO_TOKEN_INDEX,
        audio_token_id: int = AUDIO_TOKEN_INDEX,
        au_token_ids: Sequence[int] | None = None,
        extra_modalities: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.text_config = _network_config(text_config or {"model_type": "llama"})
        self.vision_config = _network_config(vision_config)
        self.audio_config = _network_config(audio_config)
        given: dict[str, Any] = {
            "vision": vision,
            "projector": projector,
            "image": image,
            "aggregator": aggregator,
            "sampling": sampling,
            "audio": audio,
            "sequence": sequence,
        }
        for name, kind in PARTS.items():
            part = given[name]
            if not isinstance(part, Settings):
                part = kind.from_dict(part or {})
            setattr(self, name, part)
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.audio_token_id = audio_token_id
        self.extra_modalities = tuple(extra_modalities)
        self.au_token_ids = None if au_token_ids is None else tuple(au_token_ids)
        kwargs.setdefault(
            "tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False)
        )
        super().__init__(**kwargs)

    @property
    def media_token_ids(self) -> dict[str, int]:
        """Id on the rows of each kind of medium."""
        return {
            "image": self.image_token_id,
            "video": self.video_token_id,
            "audio": self.audio_token_id,
            **{name: modalities.token_id(name) for name in self.extra_modalities},
        }

    @property
    def owned_marks(self) -> tuple[str, ...]:
        """Names of the learned vectors that the model owns: newline, frame_end."""
        newline = ("newline",) if self.has_image_newline else ()
        return newline + (("frame_end",) if self.has_faster_token else ())

    @property
    def has_image_newline(self) -> bool:
        """Whether the model owns the learned newline vector."""
        return "unpad" in self.image.patch_merge_type or "newline" in self.sequence.media_tokens

    @property
    def has_faster_token(self) -> bool:
        """Whether the model owns the learned frame-end vector."""
        return "frame_end" in self.sequence.media_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        out = super().to_dict()
        for name in PARTS:
            out[name] = getattr(self, name).to_dict()
        return out

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the JSON data that :meth:`to_dict` gives.

        Raises:
            CheckpointError: it is of another kind, such as a LLaVA folder's.
        """
        kind = config_dict.get("model_type")
        if kind != cls.model_type:
            raise CheckpointError(
                f"A config.json of model_type {kind!r} is not av_llava's own. Load its folder with "
                f"av_llava.load or av_llava.load_pretrained_model, which look up its towers."
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_llava(
        cls,
        data: Mapping[str, Any],
        vision_config: PreTrainedConfig | None = None,
        audio_config: PreTrainedConfig | None = None,
        n_tower_layers: int | None = None,
    ) -> AVLlavaConfig:
        """Read a ``config.json`` of the LLaVA family (``model_type`` llava, llava_llama, ...).

        Args:
            data: the JSON data.
            vision_config: that of the vision tower, which LLaVA's file only names.
            audio_config: that of an audio tower, if the model is to have one.
            n_tower_layers: layers of the vision tower that the checkpoint holds, if it does.
        """
        vision = _vision_settings(data, vision_config)
        if vision_config is not None:
            vision_config, vision = as_llava_stores_it(vision_config, vision, n_tower_layers)
        unpad = "unpad" in str(data.get("mm_patch_merge_type") or "flat")
        faster = _whole(data, "faster_token_stride", 10) if data.get("add_faster_video") else None
        tokens = (["newline"] if unpad else []) + (["frame_end"] if faster else [])
        return cls(
            text_config=_text_config(data),
            vision_config=vision_config,
            audio_config=audio_config,
            vision=vision,
            projector=ProjectorSettings(kind=data.get("mm_projector_type") or "linear"),
            image=_image_settings(data, vision_config),
            aggregator=_aggregator_settings(data, unpad, faster),
            sampling=SamplingSettings(time_instruction=bool(data.get("add_time_instruction"))),
            sequence=SequenceSettings(
                padding_side=data.get("tokenizer_padding_side") or "right",
                max_length=_whole(data, "tokenizer_model_max_length", None),
                position_skipping=(
                    _whole(data, "pos_skipping_range", 4096)
                    if data.get("use_pos_skipping")
                    else None
                ),
                media_tokens=tuple(tokens),
                use_image_start_end=bool(data.get("mm_use_im_start_end")),
                use_image_patch_token=bool(data.get("mm_use_im_patch_token")),
            ),
            tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
            dtype=data.get("torch_dtype") or data.get("dtype"),
        )


def is_llava_config(data: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of the LLaVA family's own layout (not transformers')."""
    return "text_config" not in data and (
        "mm_vision_tower" in data or "vision_tower" in data or "mm_projector_type" in data
    )


def tower_name(data: Mapping[str, Any]) -> str | None:
    """The vision tower that a LLaVA ``config.json`` names."""
    name = data.get("mm_vision_tower") or data.get("vision_tower")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"mm_vision_tower must be a name or a folder, not {name!r}.")
    return name


def _network_config(data: PreTrainedConfig | Mapping[str, Any] | None) -> Any:
    """Build the configuration of a network from its JSON data."""
    if data is None or isinstance(data, PreTrainedConfig):
        return data
    fields = dict(data)
    kind = fields.pop("model_type", None)
    known = _OWN_AUDIO_CONFIGS.get(kind)
    if known is None:
        if kind not in CONFIG_MAPPING:
            raise unknown_name("model_type", kind, CONFIG_MAPPING.keys())
        known = CONFIG_MAPPING[kind]
    return _built(known, fields)


def _built(kind: type[PreTrainedConfig], fields: dict[str, Any]) -> PreTrainedConfig:
    """Make the configuration of a network; what its class objects to is an error of ours."""
    try:
        return kind(**fields)
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError) as error:
        # The hub's strict dataclasses say which field in their own text and why in the cause.
        why = error.__cause__ if isinstance(error, StrictDataclassError) else None
        raise CheckpointError(
            f"The configuration of the {kind.model_type} is wrong: {why or error}"
        ) from error


def language_model_type(data: Mapping[str, Any]) -> str:
    """``model_type`` of the language model: the architecture says it, else LLaVA's model_type."""
    named = data.get("architectures") or [""]
    if not isinstance(named, (list, tuple)):
        raise CheckpointError(f"architectures must be a list of names, not {named!r}.")
    architecture = str(named[0])
    name = architecture.lower()
    kind = next((k for part, k in _LANGUAGE_MODELS if part.lower() in name), None)
    if kind is None:
        suffix = str(data.get("model_type", "")).removeprefix("llava").strip("_")
        # The first LLaVA was a LLaMA; its model_type "llava" says no more.
        unnamed = "llama" if not architecture else ""
        kind = {"": unnamed, "qwen": "qwen2"}.get(suffix, suffix)
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"The language model of architecture {architecture!r} (model_type "
            f"{data.get('model_type')!r}) is not known to transformers."
        )
    return kind


def _text_config(data: Mapping[str, Any]) -> PreTrainedConfig:
    """The language model's configuration inside LLaVA's flat one."""
    kind = language_model_type(data)
    fields = {
        k: v
        for k, v in data.items()
        if k not in LLAVA_FIELDS and k not in _NOT_TEXT and not _NOT_TEXT_PREFIX.match(k)
    }
    fields["tie_word_embeddings"] = bool(data.get("tie_word_embeddings", False))
    if (fields.get("pad_token_id") or 0) < 0:  # the first LLaMA files say -1 for none
        fields["pad_token_id"] = None
    return _built(CONFIG_MAPPING[kind], fields)


def _vision_settings(
    data: Mapping[str, Any], vision_config: PreTrainedConfig | None
) -> VisionSettings:
    s2 = bool(data.get("s2"))
    kind = "clip" if vision_config is None else tower_kind(vision_config, s2)
    half = (0.5, 0.5, 0.5)
    siglip: dict[str, Any] = {"image_mean": half, "image_std": half, "resize": "exact"}
    pixels = siglip if kind.startswith("siglip") else {}
    return VisionSettings(
        tower=tower_name(data),
        kind=kind,
        select_layer=_whole(data, "mm_vision_select_layer", -2),
        select_feature=data.get("mm_vision_select_feature") or "patch",
        s2_scales=_s2_scales(data) if s2 else (),
        **pixels,
    )


def _s2_scales(data: Mapping[str, Any]) -> tuple[int, ...]:
    scales = str(data.get("s2_scales") or "336,672,1008").split(",")
    return tuple(_whole({"Each of s2_scales": s}, "Each of s2_scales", None) for s in scales)


def _whole(data: Mapping[str, Any], key: str, default: int | None) -> Any:
    """A whole number of LLaVA's file, also written as a string; ``default`` for null or none."""
    value = data.get(key)
    if value is None:
        return default
    try:
        number = None if isinstance(value, bool) else int(value)
    except (TypeError, ValueError):
        number = None
    if number is None or (isinstance(value, float) and number != value):
        raise CheckpointError(f"{key} must be a whole number, not {value!r}.")
    return number


def _image_settings(data: Mapping[str, Any], vision_config: Any) -> ImageSettings:
    aspect = data.get("image_aspect_ratio") or "square"
    pinpoints = data.get("image_grid_pinpoints") or ()
    if isinstance(pinpoints, Sequence) and not isinstance(pinpoints, str):
        pinpoints = tuple(tuple(p) if isinstance(p, (list, tuple)) else p for p in pinpoints)
    if str(aspect).startswith("anyres") and vision_config is not None:
        parse_pinpoints(pinpoints, vision_config.image_size)  # wrong ones are found at loading
    return ImageSettings(
        aspect_ratio=aspect,
        patch_merge_type=data.get("mm_patch_merge_type") or "flat",
        grid_pinpoints=pinpoints,
        crop_resolution=_whole(data, "image_crop_resolution", None),
        split_resolution=_whole(data, "image_split_resolution", None),
    )


def _aggregator_settings(
    data: Mapping[str, Any], unpad: bool, faster: int | None
) -> AggregatorSettings:
    """LLaVA's pooling keys. A folder without them (1.5, 1.6) pools 2x2, the reference's default."""
    return settings_for(
        pool_mode=data.get("mm_spatial_pool_mode") or "average",
        stride=_whole(data, "mm_spatial_pool_stride", 2),
        newline_position=data.get("mm_newline_position") or "one_token",
        faster_stride=faster,
        unpad=unpad,
        stage=data.get("mm_spatial_pool_stage") or "post",
        flat=not str(data.get("mm_patch_merge_type") or "flat").startswith("spatial"),
    )
