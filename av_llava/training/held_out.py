"""Held-out samples: read as training reads its own, and asked as they were read.

Contract: no sample takes the place of another, which would count twice. One whose media cannot be
read is named in the batch's ``info.bad``, and nothing of its row counts. A question about a sample
has the frames, sound and limits that the sample has in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from av_llava.chat import Message, TextPart
from av_llava.errors import DataError
from av_llava.prepared import BatchBuilder, Prepared
from av_llava.settings import IGNORE_INDEX
from av_llava.training.bad_media import BadMedium
from av_llava.training.dataset import Chosen, TrainingDataset
from av_llava.training.samples import Sample
from av_llava.training.unreadable import UnreadableError, sample_named

# Keeps the row of a sample that cannot be read, so that every rank has its batches.
_NOTHING = (Message("user", (TextPart("None."),)), Message("assistant", (TextPart("None."),)))


class HeldOut(TrainingDataset):
    """Samples to measure a model on; see :class:`TrainingDataset` for the arguments.

    Raises:
        DataError: also if none of them can be used.
    """

    replaces = False

    def _batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The batch of these samples; nothing is learned of those that cannot be read."""
        batch = super()._batch(indices)
        info = batch["info"]
        gone = {medium.index for medium in info.bad}
        read = [row not in gone for row in info.indices]
        for i, is_read in enumerate(read):
            if not is_read:
                batch["labels"][i] = IGNORE_INDEX
        supervised = tuple(n * r for n, r in zip(info.supervised, read, strict=True))
        return {**batch, "info": replace(info, supervised=supervised)}

    def prompt(self, row: int, decode: bool = True) -> tuple[Prepared, str] | BadMedium:
        """What the model is asked about a sample, and the right answer.

        Args:
            row: of the sample.
            decode: False reads only headers; what is asked is then as long, but has no tensors.

        Returns:
            A batch of one that ends where the sample's last answer begins, and that answer; or
            the medium that cannot be read.

        Raises:
            DataError: the sample cannot be asked about, or read, where ``bad_media`` says so.
        """
        builder = BatchBuilder(self.processor, self.planner, self.options, decode)
        try:
            sample, messages = self._opened(builder, row, self.epoch)
        except UnreadableError as error:
            if self.bad_media.policy == "error":
                raise DataError(
                    f"{error.source}: sample {error.sample!r} cannot be read: {error.reason} "
                    f"Repair the file, or have such samples left out (bad_media.policy: replace)."
                ) from error
            return error.medium(row, self.epoch)
        turns, reference = question_and_answer(messages)
        with sample_named(sample):
            builder.add(turns, True, False)
        return builder.finish("left", False), reference

    def unusable(self) -> list[BadMedium]:
        """The samples that the index knows to be unreadable."""
        return [self._known_bad(row).medium(row, self.epoch) for row in sorted(self.index.errors)]

    def _choose(
        self, builder: BatchBuilder, index: int, epoch: int, limit: int, bad: list[BadMedium]
    ) -> Chosen:
        """Open a sample, or note that it cannot be read."""
        if self.bad_media.policy == "error":
            return super()._choose(builder, index, epoch, limit, bad)
        try:
            return Chosen(index, *self._opened(builder, index, epoch))
        except UnreadableError as error:
            bad.append(error.medium(index, epoch))
            return Chosen(index, Sample(error.sample, _NOTHING, error.source), _NOTHING)

    def _check_index(self) -> None:
        super()._check_index()
        if not self.index.usable.any():
            first = next(iter(self.index.errors.values()), "there is no row.")
            raise DataError(
                f"None of the {len(self)} held-out samples can be used. The first one: {first} "
                f"See all with: av-llava data validate."
            )


def question_and_answer(messages: Sequence[Message]) -> tuple[tuple[Message, ...], str]:
    """The turns before the last answer, and that answer."""
    last = max(i for i, m in enumerate(messages) if m.role == "assistant")
    return tuple(messages[:last]), messages[last].text
