"""Any checkpoint that loads, as one self-contained folder in LLaVA's tensor names.

Contract: what ``save_pretrained`` of the loaded model and its processor would write, shard by shard
and without loading it; tensors keep their own type. A folder that :mod:`hf_export` made gets back
what transformers' classes could not say (:mod:`hf_record`).
"""

from __future__ import annotations

from pathlib import Path

from av_llava.checkpoints import hf_record
from av_llava.checkpoints.compare import check_memory, compare_ours
from av_llava.checkpoints.configuration import generation_config
from av_llava.checkpoints.convert import ConvertOptions, Report
from av_llava.checkpoints.destination import Weights, make_folder, small_files, target_dtype
from av_llava.checkpoints.shards import Transfer
from av_llava.checkpoints.source import EMBEDDING, HEAD, open_source
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor


def to_llava(source: str | Path, destination: str | Path | None, options: ConvertOptions) -> Report:
    """Write a folder in LLaVA's names.

    Raises:
        CheckpointError: the source does not fit its configuration, or the destination cannot be
            written.
    """
    opened = open_source(source)
    whole = opened.complete()
    dtype = target_dtype(options)
    restored = hf_record.restore(whole.config, opened.folder.config)
    transfers = [
        Transfer(stored, name, rows=restored.rows if name in (EMBEDDING, HEAD) else None)
        for name, stored in whole.saved()
    ]
    report = whole.account(notes=restored.notes)
    if options.verify:
        check_memory(sum(t.stored.n_bytes for t in transfers))
    with small_files() as prepared:
        tokenizer = opened.tokenizer(whole.config)
        hf_record.restore_tokenizer(tokenizer, restored.tokenizer)
        config = restored.config
        config.architectures = [AVLlavaForConditionalGeneration.__name__]
        config.dtype = dtype if dtype is not None else config.dtype
        config.save_pretrained(prepared)
        AVLlavaProcessor(tokenizer, config).save_pretrained(prepared)
        hf_record.remove_tokens(prepared, restored.tokens)
        generation_config(opened.folder, config).save_pretrained(prepared)
        return make_folder(
            report,
            opened.path,
            destination,
            [Weights(transfers)],
            options,
            prepared=prepared,
            compare=lambda made: compare_ours(source, made, dtype),
            tokenizer_from=[opened.path],
        )
