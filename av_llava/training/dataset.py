"""Samples as batches: media read, prompts rendered, labels made, all in the worker process.

Contract: ``__getitems__`` makes one batch that is ready for ``model.forward`` (use
``collate_fn=as_is``, and :func:`av_llava.training.workers.batches_of` over a loader with workers,
which give their errors in place of batches). What it gives is a function of (seed, epoch, indices)
and the files. Media are decoded in a process that can be killed, under the time limit of
``options.limits``. An answer is never cut: a sample longer than ``max_length`` is an error or loses
frames. Nothing grows from batch to batch, and everything pickles, so that workers may be spawned.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from av_llava.chat import MediaPart, Message
from av_llava.errors import AVLlavaError, DataError, MediaError
from av_llava.media_inputs import MediaOptions
from av_llava.planning import MediaPlanner
from av_llava.prepared import BatchBuilder, Prepared
from av_llava.processor import AVLlavaProcessor
from av_llava.settings import check_choice
from av_llava.sound_inputs import describe_source
from av_llava.training.bad_media import BadMediaSettings, BadMedium, Replacements
from av_llava.training.batching import PlannedBatch
from av_llava.training.cached_media import CachedMedia
from av_llava.training.collate import (
    BatchInfo,
    collate,
    counts_of,
    pad_token_id,
    resident_bytes,
)
from av_llava.training.fitting import with_fewer_frames
from av_llava.training.index import MODALITY_BITS, LengthIndex
from av_llava.training.modality_dropout import ModalityDropout, in_form, modality_in_form
from av_llava.training.packing import check_weights, packed
from av_llava.training.samples import Sample
from av_llava.training.store import SampleStore
from av_llava.training.unreadable import UnreadableError, sample_named
from av_llava.training.workers import Failed, failed

TOO_LONG = ("error", "trim")
_TRIMMED_FIRST = 1000
"""Samples that are tried before the first step: each costs the reading of its headers."""


@dataclass(frozen=True)
class Chosen:
    """A sample with its media opened."""

    index: int
    sample: Sample
    messages: tuple[Message, ...]


@dataclass(frozen=True, eq=False)
class _Epoch:
    """What is planned for one epoch."""

    number: int
    lengths: np.ndarray
    """int64 [n], tokens of each sample or of what takes its place."""
    replacements: Replacements


class TrainingDataset(Dataset[dict[str, Any]]):
    """Batches of samples.

    Args:
        store: the samples.
        processor: of the model.
        options: how media are read; ``limits`` hold for each medium.
        index: lengths of the samples, made with the same processor and options.
        bad_media: what happens to media that cannot be read.
        seed: of the run.
        epoch: for indices that do not carry one (see :class:`PlannedBatch`).
        max_length: longest sample in tokens; None is no limit.
        too_long: longer samples are an ``error`` at once, or ``trim``: their videos get fewer
            frames until they fit. Text is never cut.
        dropout: videos that lose their sound or their frames for an epoch.
        cache: what frozen towers gave for media earlier; None keeps nothing.
        packing: put the samples of a batch into one row (:mod:`av_llava.training.packing`).

    Raises:
        DataError: index and store differ, samples are too long, too many are unreadable, or one
            that is to be packed has a weight.
    """

    replaces = True
    """Whether other samples take the place of those that cannot be read."""

    def __init__(
        self,
        store: SampleStore,
        processor: AVLlavaProcessor,
        options: MediaOptions,
        index: LengthIndex,
        bad_media: BadMediaSettings | None = None,
        seed: int = 0,
        epoch: int = 0,
        *,
        max_length: int | None = None,
        too_long: str = "error",
        dropout: ModalityDropout | None = None,
        cache: CachedMedia | None = None,
        packing: bool = False,
    ) -> None:
        check_choice("answer to samples that are too long", too_long, TOO_LONG)
        self.store, self.processor, self.index = store, processor, index
        self.options = replace(
            options,
            isolate=True if options.isolate is None else options.isolate,
            decoder_threads=options.decoder_threads or 1,
        )
        self.bad_media = bad_media or BadMediaSettings()
        self.seed, self.epoch = seed, epoch
        self.max_length, self.too_long = max_length, too_long
        self.dropout, self.cache, self.packing = dropout, cache, packing
        self.planner = MediaPlanner(processor.config)
        self._unreadable: dict[int, tuple[str, str]] = {}
        self._epoch: _Epoch | None = None
        self._check_index()
        if packing:
            check_weights(store, index)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A batch of one sample."""
        return self._batch([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any] | Failed:
        """The batch of these samples; from a worker also what failed."""
        try:
            return self._batch(indices)
        except AVLlavaError as error:
            return failed(error)

    def _batch(self, indices: Sequence[int]) -> dict[str, Any]:
        started = time.perf_counter()
        epoch = indices.epoch if isinstance(indices, PlannedBatch) else self.epoch
        builder = BatchBuilder(self.processor, self.planner, self.options, decode=True)
        bad: list[BadMedium] = []
        limit = int(self._in(epoch).lengths[list(indices)].max())
        chosen = [self._choose(builder, int(i), epoch, limit, bad) for i in indices]
        for one in chosen:
            with sample_named(one.sample):
                builder.add(one.messages, False, True, one.sample.train_turns)
        prepared = builder.finish("right", True)
        self._check_lengths(prepared, chosen)
        info = self._info(prepared, chosen, epoch, tuple(bad), time.perf_counter() - started)
        pad = pad_token_id(self.processor.tokenizer)
        if self.packing:
            prepared = replace(prepared, media=packed(prepared.media))
            info = replace(info, padded=sum(info.lengths))
        batch = collate(prepared, self.processor.config, pad, info)
        if self.cache is not None:
            batch["tower_outputs"] = self.cache.outputs(builder)
        return batch

    def lengths(self, epoch: int = 0) -> np.ndarray:
        """Tokens of every sample in an epoch, for the sampler; an upper bound. int64 [n]

        A sample that is known to be unreadable has the length of what takes its place.
        """
        return self._in(epoch).lengths

    def _in(self, epoch: int) -> _Epoch:
        """What is planned for an epoch."""
        if self._epoch is None or self._epoch.number != epoch:
            self._epoch = self._planned(epoch)
        return self._epoch

    def _planned(self, epoch: int) -> _Epoch:
        lengths, modality = self.index.lengths.astype(np.int64), self.index.modality
        if self.dropout is not None:
            rows = np.arange(len(lengths))
            forms = self.dropout.forms(self.seed, epoch, rows)
            lengths = self.dropout.lengths[forms, rows].astype(np.int64)
            modality = modality_in_form(modality, forms)
        if self.max_length is not None:
            lengths = np.minimum(lengths, self.max_length)
        lengths[list(self.index.errors)] = 0
        replacements = Replacements(modality, lengths.copy(), self.seed, epoch)
        for i in self.index.errors if self.replaces else ():
            other = replacements.choose(i)
            if other is None:
                raise self._nothing_left(i)
            lengths[i] = lengths[other]
        return _Epoch(epoch, lengths, replacements)

    # ---------------------------------------------------------------- reading

    def _choose(
        self, builder: BatchBuilder, index: int, epoch: int, limit: int, bad: list[BadMedium]
    ) -> Chosen:
        """Open a sample, or another one in its place; note what could not be read."""
        failed: list[BadMedium] = []
        replacements = self._in(epoch).replacements
        for attempt in range(self.bad_media.max_tries + 1):
            number = index if not attempt else replacements.choose(index, attempt - 1, limit)
            if number is None:
                break
            try:
                sample, messages = self._opened(builder, number, epoch)
            except UnreadableError as error:
                failed.append(error.medium(number, epoch))
                if self.bad_media.policy == "error":
                    break
                continue
            bad += [replace(b, replacement=sample.id) for b in failed]
            return Chosen(number, sample, messages)
        if self.bad_media.policy == "error":
            raise DataError(
                f"{failed[0].source}: sample {failed[0].sample!r} cannot be read: "
                f"{failed[0].reason} Repair the file, or let another sample take its place "
                f"(bad_media.policy: replace)."
            )
        raise self._nothing_left(index, failed)

    def _opened(
        self, builder: BatchBuilder, number: int, epoch: int
    ) -> tuple[Sample, tuple[Message, ...]]:
        """A sample, and its messages with their media opened.

        Raises:
            UnreadableError: a medium cannot be read, now or earlier.
        """
        if number in self.index.errors:
            raise self._known_bad(number)
        sample = self.store[number]
        if number in self._unreadable:
            raise UnreadableError(*self._unreadable[number], sample.id, sample.source)
        length = int(self.index.lengths[number])
        if self.dropout is not None:
            form = int(self.dropout.forms(self.seed, epoch, number)[0])
            sample = in_form(sample, form, self.options)
            length = int(self.dropout.lengths[form, number])
        with sample_named(sample):
            try:
                messages = self._fitted(sample, length)
                n_images = sum(p.kind == "image" for m in messages for p in m.media)
                opened = tuple(self._opened_turn(builder, sample, m, n_images) for m in messages)
            except UnreadableError as error:
                self._unreadable[number] = error.file, error.reason
                raise
        return sample, opened

    def _known_bad(self, number: int) -> UnreadableError:
        """What the index says of a sample that could not be measured."""
        reason, where = self.index.errors[number], self.store.where(number)
        try:
            sample = self.store[number]
        except AVLlavaError:  # its row is no sample
            return UnreadableError(where, reason, where, where)
        files = [path for path in sample.paths if path in reason] or sample.paths
        return UnreadableError(", ".join(files) or where, reason, sample.id, sample.source)

    def _opened_turn(
        self, builder: BatchBuilder, sample: Sample, message: Message, n_images: int
    ) -> Message:
        parts: list[Any] = []
        opener = builder.open if self.cache is None else partial(self.cache.open, builder)
        for part in message.parts:
            if isinstance(part, MediaPart):
                try:
                    part = replace(part, source=opener(part, n_images))
                except MediaError as error:
                    file = describe_source(part.source)
                    raise UnreadableError(file, str(error), sample.id, sample.source) from error
            parts.append(part)
        return replace(message, parts=tuple(parts))

    def _fitted(self, sample: Sample, length: int) -> Sequence[Message]:
        """The messages, with fewer frames where they would be too long."""
        if self.max_length is None or length <= self.max_length:
            return sample.messages
        try:
            return with_fewer_frames(
                self.processor, self.planner, self.options, sample.messages, self.max_length
            )
        except MediaError as error:
            raise UnreadableError(
                ", ".join(sample.paths), str(error), sample.id, sample.source
            ) from error

    # ---------------------------------------------------------------- checks and account

    def _check_index(self) -> None:
        n, lengths = len(self.store), self.index.lengths
        if len(lengths) != n:
            raise DataError(
                f"The index holds {len(lengths)} samples, but the data {n}. Make the index again "
                f"(av-llava data index)."
            )
        settings, n_bad = self.bad_media, len(self.index.errors)
        if n_bad and (settings.policy == "error" or n_bad > settings.grace):
            share = 0.0 if settings.policy == "error" else settings.max_fraction
            if n_bad / n > share:
                first = min(self.index.errors)
                raise DataError(
                    f"{n_bad} of {n} samples cannot be used ({n_bad / n:.1%}; bad_media allows "
                    f"{share:.1%}). The first one: {self.index.errors[first]} See all with: "
                    f"av-llava data validate."
                )
        if self.max_length is None:
            return
        over = np.flatnonzero(lengths > self.max_length)
        if self.too_long == "trim":
            self._check_trimming(over)
        elif len(over):
            longest = int(lengths.argmax())
            raise DataError(
                f"{len(over)} of {n} samples are longer than max_length = {self.max_length:,}: "
                f"the longest, {self.store[longest].source}, has {lengths[longest]:,} tokens. "
                f"Raise max_length, use fewer frames, or let long videos lose frames "
                f"(too_long: trim)."
            )

    def _check_trimming(self, over: np.ndarray) -> None:
        """Refuse samples that fewer frames do not make short enough; of many, some are tried."""
        has_frames = self.index.modality[over] & MODALITY_BITS["video"]
        for row in (*over[has_frames == 0][:1].tolist(), *over[:_TRIMMED_FIRST].tolist()):
            sample = self.store[row]
            with suppress(UnreadableError), sample_named(sample):
                self._fitted(sample, int(self.index.lengths[row]))

    def _check_lengths(self, prepared: Prepared, chosen: Sequence[Chosen]) -> None:
        """Refuse a sample that came out longer than its header promised, and than allowed."""
        if self.max_length is None:
            return
        for one, length in zip(chosen, prepared.media.splice.lengths, strict=True):
            if length > self.max_length:
                raise DataError(
                    f"{one.sample.source}: sample {one.sample.id!r} has {length:,} tokens, more "
                    f"than max_length = {self.max_length:,}; its index says "
                    f"{self.index.lengths[one.index]:,}. Make the index again."
                )

    def _nothing_left(self, index: int, failed: Sequence[BadMedium] = ()) -> DataError:
        reasons = " ".join(f"{b.sample}: {b.reason}" for b in failed[-2:])
        return DataError(
            f"{self.store.where(index)}: the sample cannot be read, and nothing takes its place: "
            f"{max(0, len(failed) - 1)} others of its kind were tried. {reasons} Look at the data "
            f"with: av-llava data validate."
        )

    def _info(
        self,
        prepared: Prepared,
        chosen: Sequence[Chosen],
        epoch: int,
        bad: tuple[BadMedium, ...],
        seconds: float,
    ) -> BatchInfo:
        supervised, tokens = counts_of(prepared)
        shape = prepared.media.splice.shape
        return BatchInfo(
            ids=tuple(c.sample.id for c in chosen),
            sources=tuple(c.sample.source for c in chosen),
            indices=tuple(c.index for c in chosen),
            epoch=epoch,
            modalities=self._modalities(chosen, epoch),
            lengths=prepared.media.splice.lengths,
            padded=shape[0] * shape[1],
            supervised=supervised,
            tokens=tokens,
            weights=tuple(c.sample.weight for c in chosen),
            bad=bad,
            warnings=tuple(
                f"{use.source}: {note}"
                for uses in prepared.used
                for use in uses
                for note in use.warnings
            ),
            seconds=seconds,
            rss_bytes=resident_bytes(),
        )

    def _modalities(self, chosen: Sequence[Chosen], epoch: int) -> tuple[int, ...]:
        """Codes of what is left of each sample in an epoch."""
        rows = np.array([c.index for c in chosen])
        codes = self.index.modality[rows]
        if self.dropout is not None:
            codes = modality_in_form(codes, self.dropout.forms(self.seed, epoch, rows))
        return tuple(codes.tolist())
