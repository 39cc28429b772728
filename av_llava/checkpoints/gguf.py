"""Two files for llama.cpp: the language model, and tower with projector (``mmproj``).

Contract: the original folder is only read and needs no editing. What llama.cpp computes from the
files is what this package computes, for text and for one view of an image; what llama.cpp cannot
express is refused, or left out and named in the report. The destination appears whole or not at
all, and memory is bounded by the largest tensor.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from av_llava.chat import JinjaTemplate, Template, template_for
from av_llava.checkpoints.convert import ConvertOptions, Report
from av_llava.checkpoints.gguf_chat import template_text
from av_llava.checkpoints.gguf_file import (
    FILE_TYPES,
    PlannedFile,
    import_gguf,
    verify_file,
    write_file,
)
from av_llava.checkpoints.gguf_mmproj import plan_mmproj
from av_llava.checkpoints.gguf_text import architecture_of, plan_text
from av_llava.checkpoints.gguf_vocabulary import plan_vocabulary
from av_llava.checkpoints.source import HEAD, MULTIMODAL, CompleteSource, Source, open_source
from av_llava.checkpoints.staging import check_destination, new_folder
from av_llava.checkpoints.stored import StoredTensor, TensorReader
from av_llava.config import AVLlavaConfig
from av_llava.errors import UsageError, unknown_name

logger = logging.getLogger(__name__)

PARTS = ("all", "text", "mmproj")
CLASS_TOKENS = ("first", "last")
_TYPES = {"float32": "f32", "float16": "f16"}


def export_gguf(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str = "f16",
    parts: str = "all",
    class_token: str = "first",
    options: ConvertOptions | None = None,
) -> Report:
    """Write the two files of a checkpoint into a new folder.

    Args:
        source: a full checkpoint, of any layout that loads; only read.
        destination: folder to make: ``<name>-<dtype>.gguf`` and ``mmproj-<name>-<dtype>.gguf``.
        dtype: of the matrices: f32, f16 or q8_0; vectors are always float32.
        parts: all, text (the language model, for which no tower need be at hand) or mmproj.
        class_token: first or last, see :func:`~av_llava.checkpoints.gguf_mmproj.plan_mmproj`; the
            report says when last is of use.
        options: ``dry_run``, ``progress`` and ``verify`` are heeded; to verify, every tensor is
            read back and must be what its type makes of the original.

    Returns:
        What was written, and in its notes what llama.cpp cannot express.

    Raises:
        UsageError: unknown dtype, part or place.
        CheckpointError: the checkpoint cannot be read, or llama.cpp cannot compute it, or there
            is no room.
        MissingExtraError: the package ``gguf`` is not installed.
    """
    _check("type of a GGUF file", dtype, FILE_TYPES)
    _check("part of a GGUF export", parts, PARTS)
    _check("place of the class token", class_token, CLASS_TOKENS)
    import_gguf()
    options = options or ConvertOptions()
    opened = open_source(source)
    target = check_destination(Path(destination), [opened.path])
    model = _model_of(opened, text_only=parts == "text")
    report = replace(
        model.account(), converter="gguf", destination=str(target), dry_run=options.dry_run
    )
    if report.problems and options.dry_run:
        return report
    report.check()
    shapes = {name: stored.shape for name, stored in model.saved()}
    name, files = _name_of(source, opened.path), {}
    if parts != "mmproj":
        tokenizer = opened.tokenizer(model.config)
        files[f"{name}-{dtype.upper()}.gguf"] = _plan_text(
            model.config, tokenizer, shapes, dtype=dtype, name=name
        )
    if parts != "text":
        files[f"mmproj-{name}-{dtype.upper()}.gguf"] = plan_mmproj(
            model.config, shapes, dtype=dtype, name=name, class_token=class_token
        )
    report = _completed(report, files, shapes)
    return report if options.dry_run else _write(report, files, model.tensors, opened, options)


def to_gguf(source: str | Path, destination: str | Path | None, options: ConvertOptions) -> Report:
    """The converter ``gguf``; its own options are those of :func:`export_gguf`."""
    own = dict(options.extra)
    dtype = own.pop("type")
    if options.dtype is not None:
        if options.dtype not in _TYPES:
            raise UsageError(
                f"GGUF files are not written in {options.dtype!r}: leave dtype out and give type "
                f"as one of {', '.join(FILE_TYPES)}."
            )
        dtype = _TYPES[options.dtype]
    assert destination is not None
    return export_gguf(source, destination, dtype=dtype, options=options, **own)


def _check(kind: str, value: str, known: Sequence[str] | Mapping[str, int]) -> None:
    if value not in known:
        raise unknown_name(kind, value, known)


def _model_of(opened: Source, *, text_only: bool) -> CompleteSource:
    """What there is and what the model needs."""
    if not text_only:
        return opened.complete()
    architecture_of(opened.text_config().to_dict())
    return opened.language_model()


def _name_of(source: str | Path, folder: Path) -> str:
    """A name for the files from that of the folder, or of the repository that it came from."""
    local = folder == Path(source).expanduser()
    name = folder.resolve().name if local else str(source).rsplit("/", 1)[-1]
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _plan_text(
    config: AVLlavaConfig,
    tokenizer: PreTrainedTokenizerBase,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str,
    name: str,
) -> PlannedFile:
    """Plan the language model's file with its tokenizer and chat template."""
    text = config.text_config
    vocabulary = plan_vocabulary(tokenizer, text.vocab_size, _end_tokens(text))
    chat = _chat_template(config, tokenizer)
    metadata = vocabulary.metadata | ({"tokenizer.chat_template": chat} if chat else {})
    own = {n: shape for n, shape in shapes.items() if not MULTIMODAL.match(n)}
    plan = plan_text(text, own, metadata, dtype=dtype, name=name)
    return replace(plan, left_out=(*plan.left_out, *vocabulary.left_out))


def _end_tokens(text: Any) -> Sequence[int]:
    """Ids that end an answer; transformers has none, one, or several."""
    end = text.eos_token_id
    if end is None:
        return ()
    return (end,) if isinstance(end, int) else tuple(end)


def _chat_template(config: AVLlavaConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that this package would ask with; none if it knows none."""
    try:
        chosen = template_for(
            config.sequence.template,
            model_type=config.text_config.model_type,
            tokenizer=tokenizer,
        )
    except UsageError as error:
        logger.warning("No chat template is written: %s", error)
        return None
    assert isinstance(chosen, Template | JinjaTemplate)
    return template_text(chosen)


def _completed(
    report: Report, files: Mapping[str, PlannedFile], shapes: Mapping[str, tuple[int, ...]]
) -> Report:
    """The report with what the files hold and what they do not."""
    planned = [tensor for plan in files.values() for tensor in plan.tensors]
    used = {tensor.source: tensor for tensor in planned if isinstance(tensor.source, str)}
    dropped: dict[str, tuple[str, ...]] = dict(report.dropped)
    for name in shapes:
        if name not in used:
            dropped[_reason(name)] = (*dropped.get(_reason(name), ()), name)
    return replace(
        report,
        mapped=len(used),
        reshaped=tuple(
            f"{name} {shapes[name]} to {tensor.shape}"
            for name, tensor in used.items()
            if shapes[name] != tensor.shape
        ),
        dropped=dropped,
        files=tuple(files),
        n_bytes=sum(plan.n_bytes for plan in files.values()),
        notes=tuple(sentence for plan in files.values() for sentence in plan.left_out),
    )


def _reason(name: str) -> str:
    """Why a tensor is in no file."""
    if name == HEAD or not MULTIMODAL.match(name):
        return "of the language model, which was not asked for"
    if name.startswith("model.vision_tower."):
        return "of the vision tower, after the features that are used"
    return "of parts that llama.cpp has no place for"


def _write(
    report: Report,
    files: Mapping[str, PlannedFile],
    tensors: Mapping[str, StoredTensor],
    opened: Source,
    options: ConvertOptions,
) -> Report:
    assert report.destination is not None
    done, largest = 0, 0.0

    def told(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if options.progress is not None:
            options.progress(done, report.n_bytes)

    folder = new_folder(Path(report.destination), [opened.path], report.n_bytes)
    with TensorReader() as reader, folder as staged:
        for file, plan in files.items():
            write_file(staged / file, plan, lambda name: reader.read(tensors[name]), told)
            logger.info("%s: %s", file, plan.kinds)
        if options.verify:
            for file, plan in files.items():
                difference = verify_file(
                    staged / file, plan, lambda name: reader.read(tensors[name])
                )
                largest = max(largest, difference)
    if not options.verify:
        return report
    rounding = f"Rounding: no number in the files is more than {largest:.3g} from the original."
    return replace(report, difference=0.0, notes=(*report.notes, rounding))
