"""What a training run is made of, as typed settings: model, data, batches, parts, evaluation.

Contract: no torch. Every key of a recipe is a field here (``training`` alone is handed to
transformers' ``TrainingArguments``); an unknown key is an error with a did-you-mean
(:mod:`av_llava.training.recipe` reads the files). Ranges and names are checked once, here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from av_llava.errors import UsageError, unknown_name
from av_llava.settings import Settings, check_choice, check_flag, check_range, check_whole
from av_llava.training.bad_media import BadMediaSettings
from av_llava.training.reserved import check_reserved

PARTS = (
    "vision_tower",
    "mm_projector",
    "audio_tower",
    "mm_audio_projector",
    "media_tokens",
    "audio_token_rows",
    "modalities",
    "language_model",
)
"""What can be trained or frozen; every parameter of a model belongs to exactly one."""

ENCODERS = ("vision_tower", "audio_tower")

# Learning rates of published recipes: projectors 1e-3 in alignment, LoRA ten times a full model's,
# towers a fifth of the language model's.
_LR = {
    "vision_tower": 2e-6,
    "mm_projector": 1e-3,
    "audio_tower": 2e-6,
    "mm_audio_projector": 1e-3,
    "media_tokens": 1e-3,
    "audio_token_rows": 1e-3,
    "modalities": 1e-3,
    "language_model": 1e-5,
}
LORA_LR = 2e-4


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The checkpoint that training starts from."""

    path: str | None = None
    """Folder or hub id: a whole checkpoint, an adapter, or an earlier run's output."""
    base: str | None = None
    """The language model or checkpoint below an adapter; None takes what the folder names."""
    dtype: str = "auto"
    """Type in which frozen weights are held: auto, float32, bfloat16. Trained weights are always
    float32. auto is bfloat16 for a language model that is frozen or gets a LoRA under
    ``training.bf16``, else float32."""
    attn_implementation: str | None = None
    """sdpa (default), eager, flash_attention_2."""
    quantize: str | None = None
    """4bit or 8bit: keep the language model's linear layers quantised (QLoRA)."""
    merge: bool | None = None
    """Add the LoRA of an adapter that training starts from to the weights. None keeps it apart, and
    trains it further, where ``trainable.language_model`` is lora."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Values of the checkpoint's ``config.json`` to change."""
    add_audio: Mapping[str, Any] | None = None
    """Give a model without ears some: {tower: NAME, projector: {...}}; see av_llava.add_audio."""

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        if self.quantize is not None:
            check_choice("model.quantize", self.quantize, ("4bit", "8bit"))
        if self.add_audio is not None:
            for key in self.add_audio:
                check_choice("key of model.add_audio", key, ("tower", "projector"))
            if "tower" not in self.add_audio:
                raise UsageError("model.add_audio must name a tower.")


@dataclass(frozen=True)
class DropoutSettings(Settings):
    """Modality dropout: the shares of videos with sound that lose one of their two halves."""

    sound: float = 0.0
    """Share of videos that are watched without their sound."""
    frames: float = 0.0
    """Share of videos that are only listened to."""

    def __post_init__(self) -> None:
        check_range("data.modality_dropout.sound", self.sound, 0, 1)
        check_range("data.modality_dropout.frames", self.frames, 0, 1)
        if self.sound + self.frames > 1:
            raise UsageError(
                f"data.modality_dropout takes the sound of {self.sound:g} and the frames of "
                f"{self.frames:g} of the videos, which is more than all."
            )


@dataclass(frozen=True)
class DataSettings(Settings):
    """What is learned from, and how its media are read."""

    train: str | None = None
    """File (JSON, JSONL, mixture YAML) or folder that av_llava.training.store reads."""
    eval: str | None = None
    """The same, held out."""
    format: str | None = None
    """Name of a reader; None recognises the format."""
    media_root: str | None = None
    """Folder that relative paths of media start from; None is the data file's own."""
    index: str | None = None
    """File of lengths for ``train``; None takes what av-llava data index keeps beside the data, if
    it is for this model and these settings, and else measures into the run's folder."""
    frames: int | None = None
    """Upper bound of frames a video; None is the model's own."""
    fps: float | None = None
    """Frames per second to sample, up to ``frames``."""
    source_fps: float | None = None
    """Frames per second of videos that are folders of pictures, where a row says nothing of it;
    None is one, or what the model was trained with."""
    audio: str = "auto"
    """The sound of videos: auto (if there is one), on (must be there), off."""
    time_instruction: bool | None = None
    """Tell the model duration and frame times in words; None is the model's own."""
    max_length: int | None = None
    """Longest sample in tokens, media included; None is what ``batch.max_tokens`` allows."""
    too_long: str = "error"
    """A longer sample is an error, or its videos lose frames until it fits (trim). Text is never
    cut."""
    max_decode_s: float = 60.0
    """Seconds that reading one medium may take."""
    bad_media: BadMediaSettings = field(default_factory=BadMediaSettings)
    """What happens to media that cannot be read."""
    modality_dropout: DropoutSettings = DropoutSettings()
    """Videos that lose their sound or their frames."""
    feature_cache: str | None = None
    """Folder in which the features of frozen towers are kept from one epoch to the next."""
    feature_cache_gib: float = 50.0
    """Size that this folder does not grow beyond."""

    def __post_init__(self) -> None:
        check_choice("data.too_long", self.too_long, ("error", "trim"))
        check_range("data.feature_cache_gib", self.feature_cache_gib, 0)
        check_choice("data.audio", self.audio, ("auto", "on", "off"))
        check_range("data.frames", self.frames, 1)
        check_range("data.fps", self.fps, 1e-6)
        check_range("data.source_fps", self.source_fps, 1e-6)
        check_range("data.max_length", self.max_length, 1)
        check_range("data.max_decode_s", self.max_decode_s, 0.1)


@dataclass(frozen=True)
class BatchSettings(Settings):
    """How samples become batches: by their true length in tokens, media included."""

    max_tokens: int = 8192
    """Tokens of one batch on one device, padding included: it bounds the memory."""
    max_samples: int | None = None
    """Samples of one batch on one device; None leaves that to ``max_tokens``."""
    too_long: str = "error"
    """A sample longer than ``max_tokens`` is an error, or gets a batch alone."""
    buffer: int = 50
    """Optimiser steps whose samples are sorted by length together: more waste less padding, and
    mix less."""
    shuffle: bool = True
    """Another order every epoch; false keeps the file's."""
    packing: bool = False
    """Put the samples of a batch into one row, kept apart by their positions; the language model
    must be able to."""
    workers: int = 2
    """Processes that read media, per device; 0 reads in the training process."""
    prefetch: int = 2
    """Batches that each of them prepares ahead."""

    def __post_init__(self) -> None:
        check_whole("batch.max_tokens", self.max_tokens, 1)
        if self.max_samples is not None:
            check_whole("batch.max_samples", self.max_samples, 1)
        check_choice("batch.too_long", self.too_long, ("error", "alone"))
        check_whole("batch.buffer", self.buffer, 1)
        check_flag("batch.shuffle", self.shuffle)
        check_flag("batch.packing", self.packing)
        check_whole("batch.workers", self.workers, 0)
        check_whole("batch.prefetch", self.prefetch, 1)


@dataclass(frozen=True)
class PartSettings(Settings):
    """How one part trains."""

    train: str = "freeze"
    """freeze or full; of the language model also lora and last:N (its last N layers)."""
    lr: float | None = None
    """Peak learning rate; None takes the part's default, or ``training.learning_rate``."""
    weight_decay: float | None = None
    """Of its matrices; None takes ``training.weight_decay``."""

    def __post_init__(self) -> None:
        check_range("lr", self.lr, 0)
        check_range("weight_decay", self.weight_decay, 0)

    @property
    def is_trained(self) -> bool:
        """Whether anything of the part trains."""
        return self.train != "freeze"

    @property
    def last_layers(self) -> int | None:
        """N of last:N, else None."""
        match = re.fullmatch(r"last:([1-9]\d*)", self.train)
        return int(match[1]) if match else None


_FULL = PartSettings("full")


@dataclass(frozen=True)
class TrainableSettings(Settings):
    """What trains, part by part. A part may be written as its word alone (``full``)."""

    vision_tower: PartSettings = PartSettings()
    mm_projector: PartSettings = _FULL
    audio_tower: PartSettings = PartSettings()
    mm_audio_projector: PartSettings = _FULL
    media_tokens: PartSettings = _FULL
    """The learned newline and frame end."""
    audio_token_rows: PartSettings = _FULL
    """The two rows of the embedding for <au_start> and <au_end>, and no other row."""
    modalities: PartSettings = _FULL
    """Projectors of modalities that were registered from outside."""
    language_model: PartSettings = PartSettings()

    def __post_init__(self) -> None:
        for name in PARTS:
            part = getattr(self, name)
            if name == "language_model" and part.last_layers is not None:
                continue
            words = ("freeze", "full", "lora") if name == "language_model" else ("freeze", "full")
            if part.train not in words:
                known = (*words, "last:N") if name == "language_model" else words
                raise unknown_name(f"way of training {name}", part.train, known)
        if not any(getattr(self, name).is_trained for name in PARTS):
            raise UsageError("trainable freezes every part: nothing would be trained.")

    def learning_rate(self, name: str, default: float | None) -> float:
        """The peak learning rate of a part.

        Args:
            name: of the part.
            default: ``training.learning_rate``, if it was given.
        """
        part: PartSettings = getattr(self, name)
        if part.lr is not None:
            return part.lr
        if default is not None:
            return default
        return LORA_LR if part.train == "lora" else _LR[name]


@dataclass(frozen=True)
class LoraSettings(Settings):
    """The low-rank adapter of a language model that trains as ``lora``."""

    rank: int = 64
    alpha: float | None = None
    """None is twice the rank."""
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    """Last names of linear layers (q_proj, v_proj, ...); None takes all of every layer."""
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        check_whole("lora.rank", self.rank, 1)
        check_range("lora.alpha", self.alpha, 1e-9)
        check_range("lora.dropout", self.dropout, 0)
        if self.dropout >= 1:
            raise UsageError(f"lora.dropout must be below 1, not {self.dropout!r}.")
        check_flag("lora.use_rslora", self.use_rslora)
        check_flag("lora.use_dora", self.use_dora)


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """What ``training.eval_strategy`` measures on ``data.eval``."""

    loss: bool = True
    """Loss over the held-out samples."""
    samples: int = 32
    """Held-out samples that are also answered by generation and scored; 0 leaves that out."""
    scorer: str = "exact"
    """exact, contains, or MODULE:FUNCTION of (answer, reference) -> number."""
    max_new_tokens: int = 32
    """Longest answer."""
    by: str | None = None
    """Key of a sample's ``meta`` by whose values the score is also told apart."""

    def __post_init__(self) -> None:
        check_whole("evaluation.samples", self.samples, 0)
        check_whole("evaluation.max_new_tokens", self.max_new_tokens, 1)
        check_flag("evaluation.loss", self.loss)
        if ":" not in self.scorer:
            check_choice("evaluation.scorer", self.scorer, ("exact", "contains"))


@dataclass(frozen=True)
class StageSettings(Settings):
    """One stage of a recipe: its name, and what differs from the recipe."""

    name: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the stage, laid over the recipe's own."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise UsageError(
                f"A stage needs a name that can be a folder's (letters, digits, _ . -), not "
                f"{self.name!r}."
            )


@dataclass(frozen=True)
class TrainSettings(Settings):
    """A whole recipe."""

    output: str | None = None
    """Folder of the run: checkpoints, logs, the resolved recipe, and the result in ``final``."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    trainable: TrainableSettings = TrainableSettings()
    lora: LoraSettings = LoraSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of transformers' ``TrainingArguments``, under their own names."""
    gradient_checkpointing: bool = False
    """Compute activations twice rather than keep them."""
    compile: bool = False
    """torch.compile for the language model."""
    seed: int = 42
    """Of everything: new weights, order of samples, dropout."""
    save_dtype: str = "float32"
    """Type of a whole model in ``final``: float32 or bfloat16. Checkpoints are as they train."""
    save: str = "auto"
    """full (a whole checkpoint), adapter (what differs from the base), auto: full if the whole
    language model trains."""
    stages: tuple[StageSettings, ...] = ()
    """Stages in their order, each starting from the result of the one before."""

    def __post_init__(self) -> None:
        check_choice("save", self.save, ("auto", "full", "adapter"))
        check_choice("save_dtype", self.save_dtype, ("float32", "bfloat16"))
        check_flag("gradient_checkpointing", self.gradient_checkpointing)
        check_flag("compile", self.compile)
        check_whole("seed", self.seed, 0)
        if self.seed >= 2**32:  # numpy's bound
            raise UsageError(f"seed must be between 0 and {2**32 - 1}, not {self.seed}.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise UsageError(f"Two stages have the same name: {', '.join(names)}.")
        check_reserved(self.training)
        if self.model.quantize and self.trainable.language_model.train not in ("lora", "freeze"):
            raise UsageError(
                f"model.quantize={self.model.quantize} keeps the language model's layers in "
                f"{self.model.quantize}, which cannot train themselves: set "
                f"trainable.language_model=lora (QLoRA), or leave quantize out."
            )
        if self.save == "full" and self.trainable.language_model.train == "lora":
            raise UsageError(
                "save=full cannot hold a LoRA apart from its weights: leave save out, and merge "
                "the result with av-llava convert merge-lora."
            )

    @property
    def saves_whole(self) -> bool:
        """Whether checkpoints hold all weights rather than what differs from the base."""
        if self.save == "auto":
            return self.trainable.language_model.train == "full"
        return self.save == "full"


def field_names(settings: type[Settings]) -> list[str]:
    """Names of the fields of some settings."""
    return [f.name for f in fields(settings)]
