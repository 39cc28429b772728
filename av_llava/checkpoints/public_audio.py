"""Audio halves of published audio-visual checkpoints: Ola's and VideoLLaMA2-AV's ears.

Contract: key names and shapes are theirs, the modules are ours; every tensor of an audio half is
used and has its shape, or the error names it. What a checkpoint is comes from its keys. Their
vision halves are not supported and never loaded: not Ola's Oryx ViT with its pooling, and not
VideoLLaMA2's spatio-temporal (STC) connector. So :func:`load_public_audio` makes a model
that listens and has no eyes, and :func:`add_public_audio` gives the ears to a model that sees.

Three things differ from the authors' programs: padding after the end of a sound costs no tokens
here, sound beyond 30 s is heard in consecutive chunks (VideoLLaMA2 hears a random 30 s of it), and
a video's sound stands after its frames where the prompt does not say otherwise.

Ola: arXiv:2502.04328. VideoLLaMA2: arXiv:2406.07476. Their names were read in their published code;
the published weights themselves have not been run.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from av_llava.checkpoints.configuration import generation_config
from av_llava.checkpoints.ears import attach_audio, fill_tower
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.load import Loaded, locate, materialise
from av_llava.checkpoints.public_audio_keys import FAMILIES, Family, OpenedHalf, PublicAudio
from av_llava.checkpoints.quantize import plan_weights
from av_llava.checkpoints.stored import StoredTensor, TensorReader, stored_tensors, tensors_in
from av_llava.checkpoints.target import resolve_device
from av_llava.checkpoints.tokenizers import load_tokenizer
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError, UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor
from av_llava.weight_names import ignored

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_PART_FILES = ("audio_tower.bin", "mm_projector_a.bin", "speech_projector.bin")


def public_family(folder: CheckpointFolder) -> Family | None:
    """The family of a published folder with ears, or None."""
    keys = set(folder.keys) if _holds_shards(folder) else set()
    for name in _PART_FILES:
        if folder.holds(name):
            keys |= {t.name for t in tensors_in([folder.path / name])}
    return next((f for f in FAMILIES.values() if any(map(f.mark.match, keys))), None)


def _holds_shards(folder: CheckpointFolder) -> bool:
    return any(folder.holds(n) or folder.holds(f"{n}.index.json") for n in _WHOLE)


def refuse_public(folder: CheckpointFolder) -> None:
    """Raise for a published audio-visual folder, which cannot be loaded as a whole.

    Raises:
        CheckpointError: it is one; the message names the part that is not supported.
    """
    family = public_family(folder)
    if family is not None:
        raise CheckpointError(
            f"{folder.path} is of {family.name}, whose vision half is not supported: "
            f"{family.unsupported}. Its language model and its ears are: "
            f"av_llava.checkpoints.public_audio.load_public_audio loads them without the eyes, "
            f"add_public_audio gives the ears to a model that sees."
        )


def _tensors(folder: CheckpointFolder) -> list[StoredTensor]:
    """Tensors of the shards, then those of the part files that the shards do not hold."""
    shards = stored_tensors(folder) if _holds_shards(folder) else []
    found = {t.name: t for t in shards}
    for name in _PART_FILES:
        if folder.holds(name):
            found = {**{t.name: t for t in tensors_in([folder.path / name])}, **found}
    return list(found.values())


def read_public_audio(
    path: str | Path, *, whisper: str | Path | None = None, beats: str | Path | None = None
) -> PublicAudio:
    """Read the audio half of a published checkpoint.

    Args:
        path: folder or hub id.
        whisper, beats: files of the towers, where the folder does not hold them (Ola's program
            reads them from OpenAI's and BEATs' own files).

    Raises:
        CheckpointError: no known family, or a half that is incomplete or has other shapes.
    """
    folder = locate(path)
    family = public_family(folder)
    if family is None:
        names = " or ".join(f.name for f in FAMILIES.values())
        raise CheckpointError(f"{folder.path} holds no audio half of {names}.")
    ears: dict[str, Tensor] = {}
    with TensorReader() as reader:
        for stored in _tensors(folder):
            match = family.ears.match(stored.name)
            if match is not None:
                ears[match["name"]] = reader.read(stored)
    opened = OpenedHalf(folder.path, folder.config, ears, {"whisper": whisper, "beats": beats})
    return family.read(opened).check()


def add_public_audio(
    model: AVLlavaForConditionalGeneration,
    processor: AVLlavaProcessor,
    path: str | Path,
    *,
    whisper: str | Path | None = None,
    beats: str | Path | None = None,
) -> None:
    """Give a model the ears of a published checkpoint, in place.

    Args:
        model: without ears, of the width that the projector was trained for.
        processor: of the model.
        path, whisper, beats: see :func:`read_public_audio`.

    Raises:
        UsageError: the model hears already.
        CheckpointError: see :func:`read_public_audio`, or the widths differ.
    """
    half = read_public_audio(path, whisper=whisper, beats=beats)
    width = model.config.text_config.hidden_size
    if half.width != width:
        raise CheckpointError(
            f"The audio projector in {half.name} was trained for a language model of width "
            f"{half.width}; this one has {width}."
        )
    attach_audio(model, processor, half.config, half.settings)
    model.config.audio = model.config.audio.replace(tower=half.settings.tower)
    fill_tower(model.model.audio_tower, dict(half.tower), half.name)
    fill_tower(model.model.mm_audio_projector, dict(half.projector), half.name)


def load_public_audio(
    path: str | Path,
    *,
    whisper: str | Path | None = None,
    beats: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = "auto",
    attn_implementation: str | None = None,
) -> Loaded:
    """Load language model and ears of a published checkpoint, without its eyes.

    Args:
        path, whisper, beats: see :func:`read_public_audio`.
        device, dtype, attn_implementation: as for other checkpoints.

    Returns:
        A model that takes text and sound; ``save_pretrained`` makes it a checkpoint of ours.

    Raises:
        CheckpointError: see :func:`read_public_audio`, or the language model is not complete.
    """
    folder = locate(path)
    half = read_public_audio(path, whisper=whisper, beats=beats)
    family = public_family(folder)
    assert family is not None
    config = _deaf_and_blind(folder)
    if config.text_config.hidden_size != half.width:
        raise CheckpointError(
            f"{folder.path}: the language model has width {config.text_config.hidden_size}, its "
            f"audio projector {half.width}."
        )
    config.audio_config, config.audio = half.config, half.settings
    target = resolve_device(device)
    plan = plan_weights(
        folder, None, dtype=dtype, own_dtype=config.dtype, device=target, device_map=None
    )
    model, report = materialise(folder, config, plan, attn_implementation=attn_implementation)
    fill_tower(model.model.audio_tower, dict(half.tower), half.name)
    fill_tower(model.model.mm_audio_projector, dict(half.projector), half.name)
    ears = ("model.audio_tower.", "model.mm_audio_projector.")
    missing = sorted(k for k in report["missing_keys"] if not k.startswith(ears))
    left = [k for k in report["unexpected_keys"] if not ignored(k)]
    unexpected = sorted(k for k in left if not family.eyes.match(k) and not family.ears.match(k))
    wrong = [str(m) for m in report["mismatched_keys"]]
    if missing or unexpected or wrong:
        raise CheckpointError(
            f"The language model in {folder.path} does not fit its config.json. Missing: "
            f"{missing[:6]}. Unexpected: {unexpected[:6]}. Wrong shape: {wrong[:6]}."
        )
    model.generation_config = generation_config(folder, config)
    return Loaded(model.to(target).eval(), load_tokenizer(folder, config), folder.path, None)


_NOT_TEXT = re.compile(
    r"^(mm_|speech_|music_|image_|tune_|freeze_|unfreeze_|use_mm|use_speech|vision_|num_frames|"
    r"hidden_size_a$)"
)


def _deaf_and_blind(folder: CheckpointFolder) -> AVLlavaConfig:
    """The configuration of the language model alone."""
    data = {k: v for k, v in folder.config.items() if not _NOT_TEXT.match(k)}
    data.setdefault("tie_word_embeddings", not folder.has("lm_head."))
    try:
        config = AVLlavaConfig.from_llava(data)
    except UsageError as error:
        raise CheckpointError(f"{folder.path / 'config.json'}: {error}") from error
    config.vision_config = None
    return config
