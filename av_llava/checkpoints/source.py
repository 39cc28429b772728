"""A checkpoint folder that is to be converted: its tensors under LLaVA's names, unread.

Contract: nothing is changed and no weights are read. The language model's part needs no vision
tower at hand; :meth:`Source.complete` does. Layouts: our own, LLaVA's, and that of transformers'
LLaVA classes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from av_llava.checkpoints import hf_format
from av_llava.checkpoints.configuration import n_encoder_layers, read_config
from av_llava.checkpoints.convert import Report
from av_llava.checkpoints.folder import CheckpointFolder, refuse_delta
from av_llava.checkpoints.load import locate
from av_llava.checkpoints.needed import disk_shapes, empty_model, without_senses
from av_llava.checkpoints.quantize import stored_scheme
from av_llava.checkpoints.stored import StoredTensor, stored_tensors
from av_llava.checkpoints.tokenizers import load_tokenizer
from av_llava.checkpoints.towers import Tower
from av_llava.config import AVLlavaConfig, is_llava_config
from av_llava.errors import CheckpointError, UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.vision import tower_weights
from av_llava.weight_names import disk_name, ignored, memory_name

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
TIED = "tied to the embedding"
UNUSED = "hold nothing that is used"

MULTIMODAL = re.compile(
    r"^model\.(vision_tower|mm_projector|audio_tower|mm_audio_projector|modalities|"
    r"image_newline|faster_token|vision_resampler)\b"
)
"""Names of tensors that are not the language model's."""


@dataclass(frozen=True)
class Source:
    """An opened folder."""

    folder: CheckpointFolder
    tensors: Mapping[str, StoredTensor]
    """By LLaVA's name, in the order in which they lie in the files."""
    unused: tuple[str, ...]
    """Names of tensors that hold nothing a model uses (old buffers)."""

    @property
    def path(self) -> Path:
        """Of the folder."""
        return self.folder.path

    @property
    def is_hf(self) -> bool:
        """Whether the folder is of transformers' LLaVA classes."""
        return hf_format.is_hf_llava_config(self.folder.config)

    @property
    def is_flat(self) -> bool:
        """Whether the folder has LLaVA's own flat config.json."""
        return is_llava_config(self.folder.config)

    def light_config(self) -> AVLlavaConfig:
        """The configuration without that of a vision tower which LLaVA's file only names.

        Raises:
            CheckpointError: config.json is not of the LLaVA family, or wrong.
        """
        if not self.is_flat:
            return read_config(self.folder)[0]
        data = dict(self.folder.config)
        data.setdefault("tie_word_embeddings", HEAD not in self.tensors)
        try:
            return AVLlavaConfig.from_llava(data)
        except UsageError as error:
            raise CheckpointError(f"{self.path / 'config.json'}: {error}") from error

    def text_config(self) -> PreTrainedConfig:
        """The language model's configuration, cleaned of what LLaVA's files hold beside it."""
        config = self.light_config()
        text = clean_config(config.text_config)
        text.tie_word_embeddings = config.tie_word_embeddings
        text.dtype = config.dtype
        return text

    def complete(self) -> CompleteSource:
        """The whole model: configuration, and tensors of a tower beside the checkpoint, too.

        Raises:
            CheckpointError: the tower is not at hand or does not fit.
        """
        return self.assembled(*read_config(self.folder))

    def assembled(self, config: AVLlavaConfig, tower: Tower | None) -> CompleteSource:
        """As :meth:`complete`, with what :func:`read_config` gave."""
        model = empty_model(config)
        tensors = dict(self.tensors)
        if self.is_flat and tower is not None and not self.holds_vision_tower:
            tensors |= _beside(tower, model)
        return CompleteSource(self, config, tensors, disk_shapes(model))

    def language_model(self) -> CompleteSource:
        """The language model alone, for which no tower need be at hand."""
        config = self.light_config()
        expected = disk_shapes(empty_model(without_senses(config)))
        own = {name: t for name, t in self.tensors.items() if not MULTIMODAL.match(name)}
        expected = {name: shape for name, shape in expected.items() if not MULTIMODAL.match(name)}
        return CompleteSource(self, config, own, expected)

    @property
    def holds_vision_tower(self) -> bool:
        """Whether the vision tower's weights are among the tensors."""
        return any(name.startswith(TOWER_PREFIX) for name in self.tensors)

    def tokenizer(self, config: AVLlavaConfig) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        return load_tokenizer(self.folder, config)


@dataclass(frozen=True)
class CompleteSource:
    """A source with everything that its model needs."""

    source: Source
    config: AVLlavaConfig
    tensors: dict[str, StoredTensor]
    """By LLaVA's name; of the tower's own folder, too."""
    expected: dict[str, tuple[int, ...]]
    """Names and shapes that the model has."""

    def account(self, **known: Any) -> Report:
        """Compare what is there with what the model needs; fields of the report may be given."""
        expected, tensors = dict(self.expected), dict(self.tensors)
        dropped = {UNUSED: self.source.unused} if self.source.unused else {}
        if self.config.tie_word_embeddings:
            expected.pop(HEAD, None)
            if tensors.pop(HEAD, None):
                dropped[TIED] = (HEAD,)
        report = account(tensors, expected)
        merged = {**dropped, **known.pop("dropped", {})}
        return dataclasses.replace(report, source=str(self.source.path), dropped=merged, **known)

    def saved(self) -> list[tuple[str, StoredTensor]]:
        """What a saved model holds, by LLaVA's names and in order."""
        tied = self.config.tie_word_embeddings
        return [(n, t) for n, t in self.tensors.items() if not (tied and n == HEAD)]


def open_source(path: str | Path) -> Source:
    """Open a folder or hub id.

    Raises:
        CheckpointError: it cannot be read completely, or two tensors have one name.
    """
    folder = locate(path)
    refuse_delta(folder)
    folder.check_files()
    stored_in = stored_scheme(folder)
    if stored_in is not None:
        raise CheckpointError(
            f"{folder.path} is stored in {stored_in}. Only checkpoints in full precision are "
            f"converted: take the one that it was made from."
        )
    rename = hf_format.memory_name if hf_format.is_hf_llava_config(folder.config) else memory_name
    tensors: dict[str, StoredTensor] = {}
    unused = []
    for stored in stored_tensors(folder):
        name = disk_name(rename(stored.name))
        if ignored(stored.name):
            unused.append(stored.name)
        elif name in tensors:
            raise CheckpointError(
                f"{folder.path}: {stored.name!r} and {tensors[name].name!r} are both {name!r}."
            )
        else:
            tensors[name] = stored
    return Source(folder, tensors, tuple(unused))


def account(tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> Report:
    """Compare names and shapes of tensors with those that are needed."""
    mismatched = [
        f"{name} (the file has {tensors[name].shape}, the model needs {shape})"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return Report(
        converter="",
        source="",
        destination=None,
        mapped=len(tensors.keys() & expected.keys()),
        missing=tuple(sorted(expected.keys() - tensors.keys())),
        unexpected=tuple(sorted(tensors.keys() - expected.keys())),
        mismatched=tuple(sorted(mismatched)),
    )


_MORE_FIELDS = {"vision_use_head"}  # of SigLIP; not declared before transformers 5.18


def clean_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A network's configuration with the fields of its class only.

    LLaVA's flat files mix settings of generation and of training into it.
    """
    kind = type(config)
    names = {f.name for f in dataclasses.fields(kind)} | _MORE_FIELDS  # type: ignore[arg-type]
    data = {k: v for k, v in config.to_dict().items() if k in names}
    for passing in ("transformers_version", "architectures", "dtype"):
        data.pop(passing, None)
    return kind(**data)


def _beside(tower: Tower, model: AVLlavaForConditionalGeneration) -> dict[str, StoredTensor]:
    """Tensors of a tower's own folder under LLaVA's names."""
    if tower.folder is None:
        raise CheckpointError(f"The weights of the tower {tower.name!r} are not at hand.")
    held = {t.name: t for t in stored_tensors(CheckpointFolder(tower.folder))}
    depth = n_encoder_layers(held)
    if depth is not None and depth > tower.config.num_hidden_layers:
        raise CheckpointError(
            f"The tower {tower.folder} holds {depth} layers, but its config.json says "
            f"{tower.config.num_hidden_layers}."
        )
    found: Mapping[str, Any] = tower_weights(held, model.model.vision_tower)[0]  # type: ignore[arg-type]
    return {TOWER_PREFIX + name: stored for name, stored in found.items()}
