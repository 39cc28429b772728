"""Held-out data during training: the loss, and answers by generation with a score.

Contract: evaluation draws no random number and changes no weight. Samples are read as training
reads them; answers are generated the way that users get them. Each process measures its share, and
the sums of all are reported. Media that cannot be read end nothing: they are left out and counted.
"""

from __future__ import annotations

import importlib
import logging
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from av_llava.budgeting import check_context
from av_llava.errors import UsageError
from av_llava.inference import AVLlava, Options
from av_llava.prepared import Prepared
from av_llava.training.bad_media import BadMedium
from av_llava.training.batching import TokenBudgetBatchSampler
from av_llava.training.collate import as_is
from av_llava.training.held_out import HeldOut
from av_llava.training.loss import where_learned
from av_llava.training.settings import EvaluationSettings
from av_llava.training.told_apart import KindLosses
from av_llava.training.unreadable import sample_named
from av_llava.training.workers import batches_of, end_workers, start_worker

if TYPE_CHECKING:
    from av_llava.training.trainer import AVTrainer

logger = logging.getLogger(__name__)

_NAMED = 5
"""Files that a warning names."""

Scorer = Callable[[str, str], float]
"""(answer, reference) to a number, 1 for right."""


def exact(answer: str, reference: str) -> float:
    """1 if both are the same but for case, spaces and the punctuation around them."""
    return float(_plain(answer) == _plain(reference))


def contains(answer: str, reference: str) -> float:
    """1 if the answer holds the reference, as whole words."""
    return float(f" {_plain(reference)} " in f" {_plain(answer)} ")


SCORERS: dict[str, Scorer] = {"exact": exact, "contains": contains}


def scorer_named(name: str) -> Scorer:
    """A scorer of this module, or MODULE:FUNCTION.

    Raises:
        UsageError: there is none of this name.
    """
    if name in SCORERS:
        return SCORERS[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"The scorer {name!r} cannot be imported: {error}.") from error
    if not callable(found):
        raise UsageError(f"The scorer {name!r} cannot be called.")
    return found  # type: ignore[no-any-return]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().strip(string.punctuation + " ").casefold()


class Evaluation:
    """Measures a model on held-out samples.

    Args:
        settings: what is measured.
        model: that is trained, to be asked.
        dataset: the held-out samples.
        max_tokens: of a batch.
        rows: samples to measure on; None takes all that can be used.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        model: AVLlava,
        dataset: HeldOut,
        max_tokens: int,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.settings, self.model, self.dataset = settings, model, dataset
        self.max_tokens = max_tokens
        self.scorer = scorer_named(settings.scorer)
        self.rows = np.flatnonzero(dataset.index.usable).tolist() if rows is None else list(rows)
        asked = spread(len(self.rows), min(settings.samples, len(self.rows)))
        self.asked = [self.rows[i] for i in asked]
        self._bad: dict[int, BadMedium] = {}
        self._told: set[int] = set()

    def check(self) -> None:
        """Refuse samples that cannot be asked about; only headers are read.

        Raises:
            DataError: a question does not fit the template, or leaves no room for an answer.
        """
        for row in self.asked:
            asked = self.dataset.prompt(row, decode=False)
            if not isinstance(asked, BadMedium):
                with sample_named(self.dataset.store[row]):
                    check_context(self.model.processor, asked[0], self.settings.max_new_tokens)

    def on_few(self) -> Evaluation:
        """The same on the longest sample of each modality, the longest of which is asked about."""
        lengths, codes = self.dataset.lengths(), self.dataset.index.modality
        ordered = sorted(self.rows, key=lambda row: int(lengths[row]))
        longest = {int(codes[row]): row for row in ordered}  # the last one stays
        rows = [row for row in reversed(ordered) if row in longest.values()]
        settings = self.settings.replace(samples=min(1, self.settings.samples))
        return Evaluation(settings, self.model, self.dataset, self.max_tokens, rows)

    def __call__(self, trainer: AVTrainer) -> dict[str, float]:
        """Measure; keys begin with ``eval_``."""
        metrics: dict[str, float] = {}
        known = self.dataset.unusable() if trainer.args.process_index == 0 else []
        self._bad = {medium.index: medium for medium in known}
        with torch.no_grad():
            if self.settings.loss:
                metrics |= self._loss(trainer)
            if self.settings.samples:
                metrics |= self._scores(trainer)
        return {**metrics, "eval_bad_media": self._count_bad(trainer)}

    def _loss(self, trainer: AVTrainer) -> dict[str, float]:
        """Mean over all learned tokens, and over those of samples that hold the same media."""
        args = trainer.args
        sampler = TokenBudgetBatchSampler(
            self.dataset.lengths()[self.rows],
            max_tokens=self.max_tokens,
            world_size=args.world_size,
            rank=args.process_index,
            shuffle=False,
            too_long="alone",
        )
        loader = DataLoader(
            Subset(self.dataset, self.rows),
            batch_sampler=sampler,
            collate_fn=as_is,
            num_workers=trainer.batch.workers,
            worker_init_fn=start_worker,
            generator=torch.Generator(),
        )
        total, kinds = torch.zeros(2, dtype=torch.float64), KindLosses()
        batches = iter(loader)
        try:
            for batch in batches_of(batches):
                info = batch.pop("info")
                self._bad.update((medium.index, medium) for medium in info.bad)
                count = sum(info.supervised)
                inputs = trainer._prepare_inputs(where_learned({**batch, "use_cache": False}))
                # Only here: media are read by the loader, in the precision of training.
                with trainer.accelerator.autocast():
                    outputs = trainer.model(**inputs, num_items_in_batch=max(1, count))
                total += torch.tensor([outputs.loss.item() * count, count], dtype=torch.float64)
                kinds.add(outputs.logits, inputs["labels"], info, inputs.get("logits_to_keep"))
        finally:
            end_workers(batches)
        summed = _summed(trainer, total)
        gather = trainer.gathered if args.world_size > 1 else None
        by_kind = {f"eval_{k}": v for k, v in kinds.take(args.device, gather).items()}
        return {"eval_loss": _mean(*summed.tolist()), **by_kind}

    def _scores(self, trainer: AVTrainer) -> dict[str, float]:
        """Mean score of answers, together and by the chosen key."""
        args = trainer.args
        # Sharded weights are gathered by all processes together, which then do the same.
        shared = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        own = self.asked if shared else self.asked[args.process_index :: args.world_size]
        groups = self._groups()
        sums = torch.zeros(len(groups) + 1, 2, dtype=torch.float64)
        for row in own:
            asked = self.dataset.prompt(row)
            if isinstance(asked, BadMedium):
                self._bad[row] = asked
            if not _can_answer(trainer, asked, shared) or isinstance(asked, BadMedium):
                continue
            score = self._score(trainer, *asked)
            for at in (0, 1 + groups.index(self._group(row))) if groups else (0,):
                sums[at] += torch.tensor([score, 1.0], dtype=torch.float64)
        if not shared:
            sums = _summed(trainer, sums)
        names = ["eval_score", *(f"eval_score/{group}" for group in groups)]
        return {name: _mean(*row) for name, row in zip(names, sums.tolist(), strict=True)}

    def _score(self, trainer: AVTrainer, prepared: Prepared, reference: str) -> float:
        options = Options(max_new_tokens=self.settings.max_new_tokens)
        room = check_context(self.model.processor, prepared, options.max_new_tokens)
        with trainer.accelerator.autocast():
            (answer,) = self.model.answer_prepared(prepared, room, options)
        try:
            return float(self.scorer(answer.text, reference))
        except Exception as error:  # somebody's function
            raise UsageError(
                f"evaluation.scorer={self.settings.scorer} failed on the answer {answer.text!r:.80}"
                f": {type(error).__name__}: {error}. It is called with an answer and the right "
                f"one, and returns a number."
            ) from error

    def _groups(self) -> list[str]:
        """Values of the key by which scores are told apart, the same in every process."""
        if self.settings.by is None:
            return []
        return sorted({self._group(row) for row in self.asked})

    def _group(self, row: int) -> str:
        return str(self.dataset.store[row].meta.get(self.settings.by or "", "none"))

    # ---------------------------------------------------------------- what cannot be read

    def _count_bad(self, trainer: AVTrainer) -> int:
        """Tell of what cannot be read; returns how many samples that are, on all ranks."""
        new = [self._bad[row] for row in sorted(self._bad.keys() - self._told)]
        if new:
            files = ", ".join(medium.file for medium in new[:_NAMED])
            more = f" and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
            logger.warning(
                "%d of %d held-out samples cannot be read and are left out of the evaluation: "
                "%s%s. The first one: %s",
                len(new), len(self.dataset), files, more, new[0].reason,
            )  # fmt: skip
            self._told.update(medium.index for medium in new)
            if trainer.bad_media is not None and trainer.bad_media.quarantine is not None:
                trainer.bad_media.quarantine.add(new)
        flags = torch.zeros(len(self.dataset), dtype=torch.float64)
        flags[list(self._bad)] = 1
        return int((_summed(trainer, flags) > 0).sum())


def spread(n: int, k: int) -> list[int]:
    """``k`` of ``n`` numbers, evenly spread."""
    return [i * n // k for i in range(k)]


def _mean(total: float, count: float) -> float:
    """A mean; that of nothing is no number."""
    return total / count if count else math.nan


def _can_answer(trainer: AVTrainer, asked: object, shared: bool) -> bool:
    """Whether a question could be read, in every process where all answer it together."""
    read = torch.tensor([[float(not isinstance(asked, BadMedium))]])
    if shared and trainer.args.world_size > 1:
        read = trainer.gathered(read)
    return bool(read.all())


def _summed(trainer: AVTrainer, values: torch.Tensor) -> torch.Tensor:
    """Sum over processes."""
    if trainer.args.world_size <= 1:
        return values
    return trainer.gathered(values.float()[None]).sum(0).double()
