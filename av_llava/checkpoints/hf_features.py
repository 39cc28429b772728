"""What transformers' LLaVA classes can and cannot say about a model.

Contract: every refusal is a :class:`CheckpointError` that names the feature, and, where there is
one, the way to leave it out. What a class does not need, or does a little differently, is listed
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from av_llava.aggregators import settings_for, settings_of
from av_llava.checkpoints.hf_record import VOCABULARY
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError, unknown_name
from av_llava.geometry import anyres_max_tiles
from av_llava.settings import AggregatorSettings, PoolSettings

CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
IMAGE_ONLY = ("llava", "llava_next")

# Values that a class has no need of; the folder remembers them.
_NOT_NEEDED = (
    "vision.tower",
    "vision.video_preprocess",
    "vision.max_batch",
    "image.crop_resolution",
    "image.split_resolution",
    "sampling.",
    "audio.",
    "sequence.padding_side",
    "sequence.max_length",
    "sequence.position_skipping",
    "sequence.template",
    "sequence.use_image_patch_token",
    "sequence.use_image_start_end",
    "image_token_id",
    "video_token_id",
    "audio_token_id",
    VOCABULARY,
)
_FEATURES = {
    "image.aspect_ratio": "cutting images by image_aspect_ratio",
    "image.patch_merge_type": "merging tiles by mm_patch_merge_type",
    "image.several": "cutting several images of one prompt by the rule",
    "image.grid_pinpoints": "the canvas sizes of image_grid_pinpoints",
    "projector.kind": "the projector",
    "vision.kind": "the vision tower",
    "vision.s2_scales": "images on several scales (S2)",
    "sequence.media_tokens": "the learned marks",
}


def refused(what: str, instead: str = "") -> CheckpointError:
    """Make the error for a feature that no class, or not the chosen one, has."""
    more = f" {instead}" if instead else ""
    return CheckpointError(f"transformers' LLaVA classes cannot express {what}.{more}")


def check_parts(config: AVLlavaConfig) -> None:
    """Refuse parts that none of the classes has.

    Raises:
        CheckpointError: the first of them.
    """
    if config.vision_config is None:
        raise refused("a model without a vision tower", "For its language model use text-only.")
    if config.audio_config is not None:
        raise refused("the audio tower", "Leave it out with drop_audio (--drop-audio).")
    if config.extra_modalities:
        raise refused(f"the added modalities {', '.join(config.extra_modalities)}")
    if config.vision.s2_scales or config.vision.kind.endswith("_s2"):
        raise refused(f"images on several scales (S2, {config.vision.s2_scales})")
    if config.projector.kind != "mlp2x_gelu":
        raise refused(f"the projector {config.projector.kind!r}; they have mlp2x_gelu only")
    if config.vision.select_feature.startswith("slicefour"):
        raise refused(f"the vision features {config.vision.select_feature!r}")
    cap = config.text_config.to_dict().get("final_logit_softcapping")
    if cap is not None:
        raise refused(f"squashed logits (final_logit_softcapping {cap})")


def choose_class(config: AVLlavaConfig, asked: str = "auto") -> str:
    """The model type to make.

    Args:
        config: of the model.
        asked: a model type, or auto.

    Raises:
        UsageError: an unknown model type.
        CheckpointError: images or videos are laid out as in none of the classes.
    """
    if asked != "auto" and asked not in CLASSES:
        raise unknown_name("model class", asked, ["auto", *CLASSES])
    possible = _classes_for(config)
    if asked != "auto":
        if asked not in possible:
            raise refused(
                f"this model as {asked}",
                f"Its images (image_aspect_ratio {config.image.aspect_ratio!r}) are those of "
                f"{' or '.join(possible)}.",
            )
        return asked
    if "llava_next" in possible and pooled_before_projector(config.aggregator) is not None:
        return "llava_next_video"
    if possible[0] in IMAGE_ONLY:
        _check_videos(config.aggregator, possible[0])
    return possible[0]


def _classes_for(config: AVLlavaConfig) -> tuple[str, ...]:
    """The model types whose images are laid out as this model's are."""
    aspect, merge = config.image.aspect_ratio, config.image.patch_merge_type
    if merge == "flat" and aspect in ("square", "pad"):
        return ("llava",)
    if merge == "spatial_unpad" and aspect == "anyres":
        return ("llava_next", "llava_next_video")
    if merge == "spatial_unpad" and anyres_max_tiles(aspect) is not None:
        return ("llava_onevision",)
    raise refused(
        f"images with image_aspect_ratio {aspect!r} and mm_patch_merge_type {merge!r}",
        "They have pad or square with flat, and anyres or anyres_max_N with spatial_unpad.",
    )


def pooled_before_projector(settings: AggregatorSettings) -> Mapping[str, Any] | None:
    """Pooling mode and stride of LlavaNextVideo, or None if videos are treated otherwise."""
    pool = settings.slow.pool if settings.slow is not None else PoolSettings()
    if pool.kind not in ("average", "max"):
        return None
    choice = {"pool": pool.kind, "stride": pool.stride, "stage": "pre"}
    return choice if settings == settings_of("llava_next_video", choice) else None


def _check_videos(settings: AggregatorSettings, kind: str) -> None:
    """Refuse videos that were laid out on purpose, for a class that has none.

    A still-image checkpoint has LLaVA's default here.
    """
    flat = kind == "llava"
    if settings != settings_for("average", 2, "one_token", unpad=not flat, flat=flat):
        raise refused(
            f"videos with {video_feature(settings)}",
            f"For still images alone, choose model_class {kind} (--model-class {kind}).",
        )


def video_feature(settings: AggregatorSettings) -> str:
    """What about an aggregator none of the classes has, in words."""
    if settings.kind != "streams":
        return f"the aggregator {settings.kind!r}"
    if settings.layout != "single":
        return f"slow and fast streams (layout {settings.layout})"
    if settings.newline in ("row", "frame"):
        return f"a newline after each {settings.newline} (mm_newline_position)"
    assert settings.slow is not None
    if settings.slow.select.kind != "all" or settings.slow.temporal.kind != "none":
        return "frames that are selected or averaged over time"
    where = "after" if settings.stage == "post" else "before"
    end = "" if settings.newline == "none" else " and a newline at the end"
    pool = settings.slow.pool
    return f"{pool.kind} pooling by {pool.stride} {where} the projector{end}"


def judge(kind: str, name: str, values: list[Any]) -> str | None:
    """Say what a value that differs in the made folder means.

    Args:
        kind: model type that is made.
        name: dotted name of the value.
        values: the original one, and that of the folder.

    Returns:
        A sentence for the user, or None when the class does not need the value.

    Raises:
        CheckpointError: the class cannot express it.
    """
    if name.startswith(_NOT_NEEDED):
        return None
    tiled = kind != "llava"
    if name == "aggregator" and kind in IMAGE_ONLY:
        return None
    if name in ("image.several", "image.unpad_rounding", "image.grid_pinpoints") and not tiled:
        return None
    if name == "image.unpad_rounding":
        return (
            "transformers rounds otherwise where padding is cut off: images of a few sizes keep "
            "one row of patches more."
        )
    if name == "image.several" and kind != "llava_onevision":
        return (
            f"Of several images in one prompt each is tiled; this model was made for the rule "
            f"{values[0]!r}."
        )
    if name == "aggregator":
        settings = AggregatorSettings.from_dict(values[0])
        raise refused(
            f"videos with {video_feature(settings)} ({CLASSES[kind]} has "
            f"{video_feature(AggregatorSettings.from_dict(values[1]))})",
            "For still images alone, choose model_class llava_next where image_aspect_ratio is "
            "anyres."
            if kind == "llava_next_video"
            else "",
        )
    feature = _FEATURES.get(name, name)
    raise refused(f"{feature} {values[0]!r} ({CLASSES[kind]} has {values[1]!r})")
