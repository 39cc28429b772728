"""Held-out data during training: the loss, and answers by generation with a score.

Contract: evaluation draws no random number and changes no weight. Answers come the way that users
get them (``AVLlava.chat``). Each process measures its share, and the sums of all are reported.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from av_llava.chat import Message
from av_llava.errors import UsageError
from av_llava.inference import AVLlava
from av_llava.training.batching import TokenBudgetBatchSampler
from av_llava.training.collate import as_is
from av_llava.training.dataset import TrainingDataset
from av_llava.training.loss import where_learned
from av_llava.training.samples import Sample
from av_llava.training.settings import EvaluationSettings
from av_llava.training.told_apart import KindLosses

if TYPE_CHECKING:
    from av_llava.training.trainer import AVTrainer

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
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        model: AVLlava,
        dataset: TrainingDataset,
        max_tokens: int,
    ) -> None:
        self.settings, self.model, self.dataset = settings, model, dataset
        self.max_tokens = max_tokens
        self.scorer = scorer_named(settings.scorer)

    def __call__(self, trainer: AVTrainer) -> dict[str, float]:
        """Measure; keys begin with ``eval_``."""
        metrics: dict[str, float] = {}
        with torch.no_grad(), trainer.accelerator.autocast():
            if self.settings.loss:
                metrics |= self._loss(trainer)
            if self.settings.samples:
                metrics |= self._scores(trainer)
        return metrics

    def _loss(self, trainer: AVTrainer) -> dict[str, float]:
        """Mean over all learned tokens, and over those of samples that hold the same media."""
        args = trainer.args
        sampler = TokenBudgetBatchSampler(
            self.dataset.lengths(),
            max_tokens=self.max_tokens,
            world_size=args.world_size,
            rank=args.process_index,
            shuffle=False,
            too_long="alone",
        )
        workers = trainer.batch.workers
        loader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            collate_fn=as_is,
            num_workers=workers,
            generator=torch.Generator(),
        )
        total, kinds = torch.zeros(2, dtype=torch.float64), KindLosses()
        for batch in loader:
            info = batch.pop("info")
            count = sum(info.supervised)
            inputs = trainer._prepare_inputs(where_learned({**batch, "use_cache": False}))
            outputs = trainer.model(**inputs, num_items_in_batch=count)
            total += torch.tensor([outputs.loss.item() * count, count], dtype=torch.float64)
            kinds.add(outputs.logits, inputs["labels"], info, inputs.get("logits_to_keep"))
        summed = _summed(trainer, total)
        gather = trainer.gathered if args.world_size > 1 else None
        by_kind = {f"eval_{k}": v for k, v in kinds.take(args.device, gather).items()}
        return {"eval_loss": float(summed[0] / summed[1].clamp(min=1)), **by_kind}

    def _scores(self, trainer: AVTrainer) -> dict[str, float]:
        """Mean score of answers, together and by the chosen key."""
        args, n = trainer.args, min(self.settings.samples, len(self.dataset))
        # Sharded weights are gathered by all processes together, which then do the same.
        shared = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        rows = spread(len(self.dataset), n)
        own = rows if shared else rows[args.process_index :: args.world_size]
        groups = self._groups(rows)
        sums = torch.zeros(len(groups) + 1, 2, dtype=torch.float64)
        for row in own:
            sample = self.dataset.store[row]
            if row in self.dataset.index.errors:
                continue
            score = self._score(sample)
            for at in (0, 1 + groups.index(self._group(sample))) if groups else (0,):
                sums[at] += torch.tensor([score, 1.0], dtype=torch.float64)
        if not shared:
            sums = _summed(trainer, sums)
        means = {"eval_score": float(sums[0, 0] / sums[0, 1].clamp(min=1))}
        for name, (score, count) in zip(groups, sums[1:].tolist(), strict=True):
            means[f"eval_score/{name}"] = score / max(count, 1)
        return means

    def _score(self, sample: Sample) -> float:
        turns, reference = question_and_answer(sample)
        answer = self.model.chat(
            list(turns),
            max_new_tokens=self.settings.max_new_tokens,
            audio=self.dataset.options.audio,
        )
        return self.scorer(answer.text, reference)

    def _groups(self, rows: list[int]) -> list[str]:
        """Values of the key by which scores are told apart, the same in every process."""
        if self.settings.by is None:
            return []
        counts: dict[str, int] = defaultdict(int)
        for row in rows:
            counts[self._group(self.dataset.store[row])] += 1
        return sorted(counts)

    def _group(self, sample: Sample) -> str:
        return str(sample.meta.get(self.settings.by or "", "none"))


def question_and_answer(sample: Sample) -> tuple[tuple[Message, ...], str]:
    """The turns before the last answer, and that answer."""
    last = max(i for i, m in enumerate(sample.messages) if m.role == "assistant")
    return sample.messages[:last], sample.messages[last].text


def spread(n: int, k: int) -> list[int]:
    """``k`` of ``n`` numbers, evenly spread."""
    return [i * n // k for i in range(k)]


def _summed(trainer: AVTrainer, values: torch.Tensor) -> torch.Tensor:
    """Sum over processes."""
    if trainer.args.world_size <= 1:
        return values
    return trainer.gathered(values.float()[None]).sum(0).double()
