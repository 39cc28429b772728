"""Makes the folder that a converter ends in: weights, small files, comparison, and the report.

Contract: with ``dry_run`` nothing is written; a source that does not fit is refused before anything
is written; a comparison that fails leaves nothing. ``config.json`` is written last, so that no
unfinished folder is taken for a checkpoint.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from av_llava.checkpoints.convert import ConvertOptions, Report
from av_llava.checkpoints.shards import Transfer, copy_tensors, slot_of
from av_llava.checkpoints.staging import check_destination, new_folder
from av_llava.checkpoints.target import DTYPES, named_dtype
from av_llava.errors import CheckpointError, unknown_name

Compare = Callable[[Path], float]
"""Loads the finished folder and gives the largest difference from the source."""

SENTENCEPIECE = "tokenizer.model"
_LAST = "config.json"


def target_dtype(options: ConvertOptions) -> torch.dtype | None:
    """The type to convert weights to, or None.

    Raises:
        UsageError: an unknown name.
    """
    if options.dtype is None:
        return None
    found = named_dtype(options.dtype)
    if found is None:
        raise unknown_name("dtype", options.dtype, DTYPES)
    return found


@contextmanager
def small_files() -> Iterator[Path]:
    """A temporary folder for what is written before the weights: configurations, tokenizer."""
    with tempfile.TemporaryDirectory(prefix="av_llava_convert_") as name:
        yield Path(name)


@dataclass(frozen=True)
class Weights:
    """Tensors that go into one set of shards."""

    transfers: Sequence[Transfer]
    stem: str = "model"
    """First part of the files' names."""
    folder: str = ""
    """Folder inside the destination."""


def make_folder(
    report: Report,
    source: Path,
    destination: str | Path | None,
    weights: Sequence[Weights],
    options: ConvertOptions,
    *,
    prepared: Path | None = None,
    finish: Callable[[Path], None] | None = None,
    compare: Compare | None = None,
    tokenizer_from: Sequence[Path] = (),
) -> Report:
    """Write a folder, unless it is only to be reported.

    Args:
        report: the account of the tensors.
        source: folder that is read.
        destination: folder to make.
        weights: what to write.
        options: of the conversion.
        prepared: folder of small files to copy.
        finish: writes what else belongs into the folder.
        compare: for ``verify``.
        tokenizer_from: folders that may hold ``tokenizer.model``; the first one is carried over.

    Raises:
        CheckpointError: the report has problems, the folder cannot be written, or the comparison
            exceeds the tolerance.
    """
    assert destination is not None
    dtype = target_dtype(options)
    every = [t for group in weights for t in group.transfers]
    report = replace(
        report,
        destination=str(destination),
        n_bytes=sum(slot_of(t, dtype).n_bytes for t in every),
        reshaped=tuple(f"{t.name} {t.stored.shape} to {t.shape}" for t in every if t.reshaped),
        dry_run=options.dry_run,
    )
    target = check_destination(Path(destination), [source])
    if options.dry_run:
        return report
    report.check()
    difference = None
    with new_folder(target, [source], report.n_bytes) as folder:
        _write_weights(weights, folder, options, dtype, report.n_bytes)
        if finish is not None:
            finish(folder)
        if prepared is not None:
            _copy_small(prepared, folder)
        _carry_sentencepiece(tokenizer_from, folder)
        if options.verify and compare is not None:
            difference = compare(folder)
            check_difference(difference, options.tolerance, str(source))
        files = tuple(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
    return replace(report, files=files, difference=difference)


def _write_weights(
    weights: Sequence[Weights],
    folder: Path,
    options: ConvertOptions,
    dtype: torch.dtype | None,
    total: int,
) -> None:
    done = 0
    for group in weights:
        if not group.transfers:
            continue
        place = folder / group.folder
        place.mkdir(exist_ok=True)
        before = done

        def progress(n_bytes: int, _: int, before: int = before) -> None:
            if options.progress is not None:
                options.progress(before + n_bytes, total)

        copy_tensors(group.transfers, place, options.shard_bytes, dtype, progress, group.stem)
        done += sum(slot_of(t, dtype).n_bytes for t in group.transfers)


def check_difference(difference: float, tolerance: float, source: str) -> None:
    """Raise when two sides differ by more than is allowed, or by something that is no number."""
    if not difference <= tolerance:
        raise CheckpointError(
            f"The converted checkpoint differs from {source} by {difference:.3g}, where at most "
            f"{tolerance:.3g} is allowed. Nothing was kept of it."
        )


def _carry_sentencepiece(sources: Sequence[Path], folder: Path) -> None:
    """Copy SentencePiece's own file, which transformers 5 reads and does not write.

    Other programs (llama.cpp's scripts, slow tokenizers) ask for it.
    """
    found = next((p / SENTENCEPIECE for p in sources if (p / SENTENCEPIECE).is_file()), None)
    if found is not None and not (folder / SENTENCEPIECE).exists():
        shutil.copyfile(found, folder / SENTENCEPIECE)


def _copy_small(prepared: Path, folder: Path) -> None:
    """Copy small files; the one that makes a folder a checkpoint comes last."""
    for file in sorted(prepared.iterdir(), key=lambda p: (p.name == _LAST, p.name)):
        shutil.copyfile(file, folder / file.name)
