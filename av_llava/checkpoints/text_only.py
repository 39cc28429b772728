"""The language model alone, as a plain checkpoint that ``AutoModelForCausalLM`` loads.

Contract: the language model's tensors are the same bits under the names of its own class; all else
is left out and counted. No vision tower needs to be at hand.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from av_llava.checkpoints.compare import check_memory, compare_text
from av_llava.checkpoints.configuration import generation_config
from av_llava.checkpoints.convert import ConvertOptions, Report
from av_llava.checkpoints.destination import Weights, make_folder, small_files, target_dtype
from av_llava.checkpoints.hf_processor import write_chat_template
from av_llava.checkpoints.needed import disk_shapes
from av_llava.checkpoints.shards import Transfer
from av_llava.checkpoints.source import HEAD, MULTIMODAL, TIED, UNUSED, account, open_source
from av_llava.errors import CheckpointError, UsageError
from av_llava.processor import AVLlavaProcessor
from av_llava.weight_names import memory_name

_MULTIMODAL = "towers, projectors and marks, which a language model does not have"
_IN_MEMORY = "model.language_model."


def to_text_only(
    source: str | Path, destination: str | Path | None, options: ConvertOptions
) -> Report:
    """Write the language model.

    Raises:
        CheckpointError: the source does not hold it completely.
    """
    opened = open_source(source)
    config, text = opened.light_config(), opened.text_config()
    dtype = target_dtype(options)
    expected, prefix, head = _plain_model(text)
    if text.tie_word_embeddings:
        expected.pop(head, None)
    dropped: dict[str, tuple[str, ...]] = {UNUSED: opened.unused} if opened.unused else {}
    others = tuple(name for name in opened.tensors if MULTIMODAL.match(name))
    if others:
        dropped[_MULTIMODAL] = others
    kept = {n: t for n, t in opened.tensors.items() if n not in others}
    if text.tie_word_embeddings and kept.pop(HEAD, None):
        dropped[TIED] = (HEAD,)
    named = {_plain_name(n, prefix, head): stored for n, stored in kept.items()}
    transfers = [Transfer(stored, name) for name, stored in named.items()]
    report = replace(account(named, expected), source=str(opened.path), dropped=dropped)
    if options.verify:
        check_memory(sum(t.n_bytes for t in opened.tensors.values()))
    with small_files() as prepared:
        if dtype is not None:
            text.dtype = dtype
        text.save_pretrained(prepared)
        tokenizer = opened.tokenizer(config)
        tokenizer.save_pretrained(prepared)
        generation_config(opened.folder, config).save_pretrained(prepared)
        notes = _prompt_format(prepared, AVLlavaProcessor(tokenizer, config))
        return make_folder(
            replace(report, notes=notes),
            opened.path,
            destination,
            [Weights(transfers)],
            options,
            prepared=prepared,
            compare=lambda made: compare_text(opened, made, dtype),
            tokenizer_from=[opened.path],
        )


def _plain_model(text: PreTrainedConfig) -> tuple[dict[str, tuple[int, ...]], str, str]:
    """Names and shapes of the plain model, the prefix of its body, and its head's weight.

    Also states the class in the configuration.
    """
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(text)
    except ValueError as error:
        raise CheckpointError(
            f"transformers has no plain language model of type {text.model_type!r}: {error}"
        ) from error
    output = model.get_output_embeddings()
    head = next(f"{name}.weight" for name, part in model.named_modules() if part is output)
    text.architectures = [type(model).__name__]
    return disk_shapes(model), f"{model.base_model_prefix}.", head


def _plain_name(name: str, prefix: str, head: str) -> str:
    """The name in a plain checkpoint of a tensor in LLaVA's names."""
    if name == HEAD:
        return head
    memory = memory_name(name)
    return prefix + memory.removeprefix(_IN_MEMORY) if memory.startswith(_IN_MEMORY) else name


def _prompt_format(folder: Path, processor: AVLlavaProcessor) -> tuple[str, ...]:
    """Give the tokenizer the prompt format that the model was tuned with."""
    try:
        name = processor.template.name
        write_chat_template(folder, processor)
    except UsageError as error:
        return (f"No prompt format was written. {error}",)
    return (f"The prompt format {name} is the tokenizer's chat template.",)
