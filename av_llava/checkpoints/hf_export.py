"""Writes a model for transformers' own LLaVA classes, where they can express it.

Contract: the made folder is read back as :mod:`hf_format` reads it, and every value that differs
from the original must be one that the class does not need, or one that is named in the report;
anything else is refused (:mod:`hf_features`). Tensors are the same bits under other names; the
placeholder tokens get rows where the vocabulary has none. ``convert llava`` makes the original
again (:mod:`hf_record`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AddedToken, PreTrainedConfig

from av_llava.checkpoints import hf_record
from av_llava.checkpoints.compare import check_memory, compare_hf
from av_llava.checkpoints.configuration import generation_config, read_config
from av_llava.checkpoints.convert import ConvertOptions, Report
from av_llava.checkpoints.destination import Weights, make_folder, small_files, target_dtype
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.hf_features import (
    CLASSES,
    IMAGE_ONLY,
    check_parts,
    choose_class,
    judge,
    pooled_before_projector,
    refused,
)
from av_llava.checkpoints.hf_processor import hf_pinpoints, strategy, write_processor
from av_llava.checkpoints.shards import Transfer
from av_llava.checkpoints.source import (
    EMBEDDING,
    HEAD,
    TOWER_PREFIX,
    CompleteSource,
    clean_config,
    open_source,
)
from av_llava.config import AVLlavaConfig
from av_llava.processor import AVLlavaProcessor
from av_llava.settings import IMAGE_TOKEN, VIDEO_TOKEN, AudioSettings
from av_llava.vision import select_states

_WITH_VIDEO = ("llava_next_video", "llava_onevision")
_AUDIO = ("model.audio_tower.", "model.mm_audio_projector.")
_MARKS = {"newline": "model.image_newline", "frame_end": "model.faster_token"}

# LLaVA's names and those of transformers' files; the first that fits. Files of transformers 4 have
# "vision_model." there, and 5 reads it, too.
_NAMES = (
    (TOWER_PREFIX, "vision_tower.vision_model."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)


def hf_name(name: str) -> str:
    """The name in transformers' files of a tensor in LLaVA's."""
    ours, theirs = next((o, t) for o, t in _NAMES if name.startswith(o))
    return theirs + name.removeprefix(ours)


@dataclass
class Placeholders:
    """The tokens that stand for media in a tokenizer, and the rows that they need."""

    tokenizer: Any
    tokens: dict[str, str] = field(default_factory=dict)
    """Kind to token."""
    ids: dict[str, int] = field(default_factory=dict)
    """Kind to id."""
    added: list[str] = field(default_factory=list)
    """Tokens that the tokenizer did not have."""
    rows: int = 0
    """Rows of the embedding afterwards."""
    n_used: int = 0
    """Rows that tokens had before."""

    @classmethod
    def make(cls, tokenizer: Any, config: AVLlavaConfig, kinds: Iterable[str]) -> Placeholders:
        """Find the placeholder of each kind, or add it to the tokenizer."""
        before = config.text_config.vocab_size
        out = cls(tokenizer, rows=before, n_used=min(before, len(tokenizer)))
        for kind in kinds:
            given = config.media_token_ids[kind]
            token = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}[kind]
            if given >= 0:
                token = tokenizer.convert_ids_to_tokens(given)
            elif token not in tokenizer.get_vocab():
                tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)])
                out.added.append(token)
            out.tokens[kind] = token
            out.ids[kind] = tokenizer.convert_tokens_to_ids(token)
        out.rows = max(before, *(i + 1 for i in out.ids.values()))
        return out


def to_hf(source: str | Path, destination: str | Path | None, options: ConvertOptions) -> Report:
    """Write a folder for transformers' own class.

    Raises:
        CheckpointError: the classes cannot express the model, and the message names the feature;
            or the source does not fit its configuration.
    """
    opened = open_source(source)
    whole = opened.complete()
    dtype = target_dtype(options)
    config = copy.deepcopy(whole.config)
    dropped = _drop_audio(config, whole) if options.extra["drop_audio"] else {}
    check_parts(config)
    kind = choose_class(config, options.extra["model_class"])
    dropped |= _drop_marks(config, whole, kind)
    tokenizer = opened.tokenizer(whole.config)
    places = Placeholders.make(tokenizer, config, ("image", "video")[: 1 + (kind in _WITH_VIDEO)])
    gone = {name for names in dropped.values() for name in names}
    transfers = [
        Transfer(
            stored,
            hf_name(name),
            rows=places.rows if name in (EMBEDDING, HEAD) else None,
            n_used=places.n_used,
        )
        for name, stored in whole.saved()
        if name not in gone
    ]
    if options.verify:
        check_memory(sum(t.stored.n_bytes for t in transfers))
    with small_files() as prepared:
        if dtype is not None:
            config.dtype = dtype
        notes = _write_small(prepared, kind, config, places)
        generation_config(opened.folder, config).save_pretrained(prepared)
        report = whole.account(dropped=dropped, notes=tuple(notes))
        return make_folder(
            dataclasses.replace(report, mapped=report.mapped - len(gone)),
            opened.path,
            destination,
            [Weights(transfers)],
            options,
            prepared=prepared,
            compare=lambda made: compare_hf(source, made, dtype),
            tokenizer_from=[opened.path],
        )


def _drop_audio(config: AVLlavaConfig, whole: CompleteSource) -> dict[str, tuple[str, ...]]:
    """Leave the ears out; returns the tensors by the reason."""
    names = tuple(n for n in whole.tensors if n.startswith(_AUDIO))
    config.audio_config, config.au_token_ids, config.audio = None, None, AudioSettings()
    return {"the audio tower and its projector, left out as asked": names} if names else {}


def _drop_marks(
    config: AVLlavaConfig, whole: CompleteSource, kind: str
) -> dict[str, tuple[str, ...]]:
    """Leave learned marks out that the class has no use for."""
    wanted = () if kind == "llava" else ("newline",)
    gone = [m for m in config.sequence.media_tokens if m not in wanted]
    kept = tuple(m for m in config.sequence.media_tokens if m in wanted)
    config.sequence = config.sequence.replace(media_tokens=kept)
    names = tuple(_MARKS[m] for m in gone if _MARKS[m] in whole.tensors)
    return {f"{CLASSES[kind]} has no use for them": names} if names else {}


def hf_config(kind: str, config: AVLlavaConfig, places: Placeholders) -> PreTrainedConfig:
    """The configuration of transformers' class."""
    text = clean_config(config.text_config)
    text.vocab_size = places.rows
    text.tie_word_embeddings = config.tie_word_embeddings
    vision: Any = config.vision_config
    grid = vision.image_size // vision.patch_size
    data: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "text_config": text.to_dict(),
        "vision_config": clean_config(vision).to_dict(),
        "image_token_index": places.ids["image"],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": _feature_layers(config),
        "vision_feature_select_strategy": strategy(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": config.dtype,
    }
    if kind != "llava_onevision":
        data["image_seq_length"] = grid**2 + ("cls" in config.vision.select_feature)
    if kind != "llava":
        data["image_grid_pinpoints"] = hf_pinpoints(config)
    if kind in _WITH_VIDEO:
        data["video_token_index"] = places.ids["video"]
    if kind == "llava_onevision":
        data["vision_aspect_ratio"] = config.image.aspect_ratio
    if kind == "llava_next_video":
        pool = pooled_before_projector(config.aggregator) or {"pool": "average", "stride": 2}
        data["spatial_pool_mode"] = pool["pool"]
        data["spatial_pool_stride"] = pool["stride"]
        data["video_seq_length"] = (grid // pool["stride"]) ** 2
    return CONFIG_MAPPING[kind].from_dict(data)


def _feature_layers(config: AVLlavaConfig) -> int | list[int]:
    """One hidden state, or several, counted as transformers does."""
    vision = config.vision
    n_states = config.vision_config.num_hidden_layers + 1
    states = select_states(vision.select_feature, vision.select_layer, n_states).states
    if len(states) == 1:
        return vision.select_layer
    return [state if state == 6 else state - n_states for state in states]


def _write_small(folder: Path, kind: str, config: AVLlavaConfig, places: Placeholders) -> list[str]:
    """Write tokenizer, processor and configuration, and read them back.

    Returns:
        Sentences on what differs.
    """
    processor = AVLlavaProcessor(places.tokenizer, config)
    before = hf_record.of_tokenizer(places.tokenizer)
    places.tokenizer.padding_side = "left"  # transformers' generation needs it
    places.tokenizer.init_kwargs["padding_side"] = "left"  # of which only this is saved
    places.tokenizer.save_pretrained(folder)
    notes = write_processor(folder, kind, processor, places.tokens)
    made = hf_config(kind, config, places)
    made.save_pretrained(folder)
    found, more = _read_back(folder, kind, config)
    made.update({hf_record.KEY: hf_record.record(found, places.added, before)})
    made.save_pretrained(folder)
    if kind in IMAGE_ONLY:
        notes.insert(0, f"{CLASSES[kind]} takes still images: videos are left to av_llava.")
    return [*notes, *more]


def _read_back(
    folder: Path, kind: str, config: AVLlavaConfig
) -> tuple[dict[str, list[Any]], list[str]]:
    """What the folder says otherwise than the original, and sentences on it.

    Raises:
        CheckpointError: something that the class cannot express.
    """
    again, _ = read_config(CheckpointFolder(folder))
    for part in ("text_config", "vision_config"):
        first, second = (clean_config(getattr(c, part)).to_dict() for c in (config, again))
        for name in first.keys() | second.keys():
            if (part, name) not in _NETWORK_DIFFERENCES and first.get(name) != second.get(name):
                raise refused(f"{part}.{name} {first.get(name)!r} (not {second.get(name)!r})")
    found = hf_record.differences(config, again)
    judged = dict(found)
    if kind != "llava" and hf_pinpoints(config) == hf_pinpoints(again):
        judged.pop("image.grid_pinpoints", None)  # LLaVA also writes them as text
    sentences = [judge(kind, name, values) for name, values in judged.items()]
    return found, [s for s in sentences if s is not None]


_NETWORK_DIFFERENCES = {("text_config", "vocab_size"), ("text_config", "tie_word_embeddings")}
