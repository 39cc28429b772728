"""``--check``: everything that a run does, once, with nothing left behind.

Contract: samples are measured, parts settled, memory estimated, and one step is taken on the batch
with the most tokens, which is the one that would run out of memory. Where the run evaluates, a few
held-out samples are measured and one is asked about. The output folder is not made.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from av_llava.checkpoints.staging import size
from av_llava.training.arguments import training_arguments
from av_llava.training.batching import PlannedBatch, TokenBudgetBatchSampler
from av_llava.training.estimate import estimate, learned_share, peak_bytes
from av_llava.training.evaluation import Evaluation
from av_llava.training.prepare import Hooks, Prepared, prepare
from av_llava.training.run import make_trainer, memory_named, needed
from av_llava.training.run_folder import RunFolder
from av_llava.training.settings import TrainSettings
from av_llava.training.trainer import AVTrainer

_ONE_STEP = {
    "max_steps": 1,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "logging_steps": 1,
    "report_to": [],
}
# What the trainer is not told: its one step is not followed by a whole evaluation.
_NO_EVALUATION = {"eval_strategy": "no", "eval_on_start": False}


class LargestBatch(TokenBudgetBatchSampler):
    """Only the batch with the most padded tokens, again and again."""

    def __len__(self) -> int:
        return 1

    def batches(self, first: int) -> Iterator[list[int]]:
        """That batch."""
        plan = self.plan
        largest = int(np.argmax(plan.padded))
        rows = plan.order[plan.starts[largest] : plan.starts[largest + 1]].tolist()
        yield PlannedBatch(rows, self.epoch, 0)


def check_run(settings: TrainSettings, hooks: Hooks) -> dict[str, Any]:
    """Try a run out.

    Returns:
        The figures: samples, tokens, steps, estimated and measured memory, seconds of the step,
        and what an evaluation of a few samples gave, where the run evaluates.

    Raises:
        AVLlavaError: what would end the run.
    """
    needed(settings)
    listed_here = settings.data.bad_media.replace(quarantine=None)
    once = settings.replace(
        data=settings.data.replace(bad_media=listed_here),
        training={**settings.training, **_ONE_STEP},
    )
    with tempfile.TemporaryDirectory(prefix="av_llava_check_") as name:
        output = Path(name)
        quiet = once.replace(training={**once.training, **_NO_EVALUATION})
        args = training_arguments(quiet, output)
        with memory_named(settings):
            prepared = prepare(once, args, RunFolder(output), hooks)
        figures = _figures(settings, prepared)
        # The sampler of the run has told how many batches there are; one is taken.
        prepared.sampler.__class__ = LargestBatch
        trainer = make_trainer(prepared, RunFolder(output), hooks)
        _tell(figures, prepared, hooks)
        started = time.perf_counter()
        with memory_named(settings, figures["longest"]):
            trainer.train()
        figures["step_seconds"] = round(time.perf_counter() - started, 2)
        figures["measured_bytes"] = peak_bytes(args.device)
        _tell_step(figures, args.device, hooks)
        if isinstance(trainer.evaluate_with, Evaluation):
            with memory_named(settings, figures["longest"]):
                _evaluate_few(trainer, trainer.evaluate_with, figures, hooks)
    return figures


def _tell_step(figures: dict[str, Any], device: torch.device, hooks: Hooks) -> None:
    where = "of this process, libraries included" if device.type == "cpu" else "of the device"
    hooks.say(
        f"One step on the largest batch took {figures['step_seconds']:.2f} s, reading of media "
        f"included, and {size(figures['measured_bytes'])} {where}."
    )


def _evaluate_few(
    trainer: AVTrainer, evaluation: Evaluation, figures: dict[str, Any], hooks: Hooks
) -> None:
    """Try the evaluation out, so that one that cannot work does not end a run in its middle."""
    few = evaluation.on_few()
    trainer.evaluate_with = few
    started = time.perf_counter()
    found = trainer.evaluate()
    seconds = figures["evaluation_seconds"] = round(time.perf_counter() - started, 2)
    figures["evaluation"] = {k: v for k, v in found.items() if math.isfinite(v)}
    hooks.say(
        f"Evaluation of {len(few.rows)} of the {len(evaluation.rows)} held-out samples took "
        f"{seconds:.2f} s; a whole one also asks about {len(evaluation.asked)} samples."
    )


def _figures(settings: TrainSettings, prepared: Prepared) -> dict[str, Any]:
    index, sampler = prepared.index, prepared.sampler
    steps = -(-len(sampler) // int(settings.training.get("gradient_accumulation_steps", 1)))
    share = learned_share(index.supervised, index.lengths)
    largest = int(sampler.plan.padded.max())
    found = estimate(
        prepared.model.model,
        prepared.table,
        settings,
        prepared.args,
        tokens=largest,
        learned_share=share,
    )
    return {
        "samples": len(index),
        "unusable": len(index.errors),
        "tokens": int(index.lengths.sum()),
        "longest": int(index.lengths.max(initial=0)),
        "steps_per_epoch": steps,
        "padding": round(sampler.plan.padding, 4),
        "largest_batch_tokens": largest,
        "trained_parameters": prepared.table.n_trained,
        "estimated_bytes": found.together,
        "estimate": {
            "weights": found.weights,
            "gradients": found.gradients,
            "optimizer": found.optimizer,
            "activations": found.activations,
            "logits": found.logits,
        },
        "lines": found.lines(),
    }


def _tell(figures: dict[str, Any], prepared: Prepared, hooks: Hooks) -> None:
    hooks.say("")
    for line in figures.pop("lines"):
        hooks.say(line)
    hooks.say("")
    hooks.say(
        f"{figures['samples']:,} samples, {figures['unusable']} of them unusable; "
        f"{figures['tokens']:,} tokens, the longest has {figures['longest']:,}; "
        f"{figures['steps_per_epoch']:,} steps an epoch, {figures['padding']:.1%} padding."
    )
    for row, why in list(prepared.index.errors.items())[:5]:
        hooks.say(f"unusable: {why if why else row}")
