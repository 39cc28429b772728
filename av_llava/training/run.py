"""One run from a recipe: folder, model, data, trainer, result.

Contract: what can be wrong is said before anything is trained, and before anything is loaded where
that is possible. Under torchrun every process calls the same functions; the first one writes. The
run's folder says afterwards what was run: the resolved recipe, versions, and a digest of the data.
"""

from __future__ import annotations

import functools
import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

import av_llava
from av_llava.checkpoints.staging import new_folder
from av_llava.errors import (
    AVLlavaError,
    BudgetError,
    CheckpointError,
    DataError,
    UsageError,
    is_out_of_memory,
)
from av_llava.inference import AVLlava
from av_llava.training import recipe
from av_llava.training.arguments import training_arguments
from av_llava.training.artefacts import Artefacts
from av_llava.training.bad_media import BadMediaWatch
from av_llava.training.callbacks import FsdpEntryPoints, Progress, RunLog, Say
from av_llava.training.collate import BatchInfo
from av_llava.training.estimate import advice
from av_llava.training.evaluation import Evaluation
from av_llava.training.full_disk import full_disk_named
from av_llava.training.prepare import Hooks, Prepared, first_alone, prepare
from av_llava.training.preview import CLOSE, OPEN, preview
from av_llava.training.run_folder import QUARANTINE, RECIPE, RunFolder
from av_llava.training.settings import TrainSettings
from av_llava.training.termination import Termination
from av_llava.training.trainer import AVTrainer

logger = logging.getLogger(__name__)

_PACKAGES = (
    "av-llava",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "av",
    "tokenizers",
    "safetensors",
    "numpy",
)


def train(settings: TrainSettings, *, resume: bool = False, hooks: Hooks | None = None) -> Path:
    """Train as one recipe without stages says.

    Args:
        settings: of the run.
        resume: go on from the last checkpoint of the output folder.
        hooks: see the class.

    Returns:
        The folder of the result, which loads alone.

    Raises:
        UsageError: settings that do not fit, a folder that is taken.
        DataError: data that cannot be trained on, or a loss that is no number.
        BudgetError: memory that does not suffice.
    """
    hooks = hooks or Hooks()
    output = needed(settings)
    folder = RunFolder(output)
    args = training_arguments(settings, output)
    main = args.process_index == 0
    with first_alone(args):
        if main:
            folder.claim(resume)
    try:
        return _train(settings, args, folder, resume, hooks if main else Hooks())
    except BaseException as error:
        folder.note_failure(error)  # of the process that holds the folder
        raise
    finally:
        folder.release()


def needed(settings: TrainSettings) -> Path:
    """Say what a recipe lacks; return its output folder.

    Raises:
        UsageError: it lacks something.
    """
    for name, value in (
        ("output", settings.output),
        ("model.path", settings.model.path),
        ("data.train", settings.data.train),
    ):
        if not value:
            raise UsageError(f"The recipe names no {name}: add {name}=... to the command.")
    evaluates = str(settings.training.get("eval_strategy", "no")) != "no"
    if evaluates and settings.data.eval is None:
        raise UsageError("training.eval_strategy asks for evaluation, but data.eval is not given.")
    assert settings.output is not None
    return Path(settings.output).expanduser()


def _train(
    settings: TrainSettings, args: TrainingArguments, folder: RunFolder, resume: bool, hooks: Hooks
) -> Path:
    main = args.process_index == 0
    if folder.is_finished:
        with first_alone(args):
            if main:
                _same_recipe(settings, folder)
        hooks.say(f"{folder.path} is finished.")
        return folder.final
    checkpoint = folder.last_checkpoint() if resume else None
    with first_alone(args):
        if main:
            _begin(folder, settings, checkpoint, hooks)
    with memory_named(settings):
        prepared = prepare(settings, args, folder, hooks)
    if checkpoint is not None:
        _same_data(folder, prepared)
        _same_start(folder, prepared)
    trainer = make_trainer(prepared, folder, hooks)
    if main:
        folder.update_record(**_account(prepared))
    started = time.time()
    termination = Termination()
    trainer.add_callback(termination)
    longest = int(prepared.index.lengths.max(initial=0))
    with memory_named(settings, longest), termination.listening():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.losses.check()
    if main and termination.stopped_at is not None:
        folder.update_record(status="terminated", steps=termination.stopped_at)
    termination.check(folder.path)
    _finish(trainer, prepared, folder)
    if main:
        folder.update_record(
            status="finished", steps=trainer.state.global_step, seconds=round(time.time() - started)
        )
        hooks.say(f"The result is {folder.final}.")
    return folder.final


@contextmanager
def memory_named(settings: TrainSettings, longest: int = 0) -> Iterator[None]:
    """Turn an exhausted memory into a BudgetError that says which setting would fit.

    Args:
        settings: of the run.
        longest: tokens of the longest sample.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        info: BatchInfo | None = getattr(error, "batch_info", None)
        padded = None if info is None else info.padded
        raise BudgetError(advice(error, settings, padded, longest)) from error


def _begin(
    folder: RunFolder, settings: TrainSettings, checkpoint: Path | None, hooks: Hooks
) -> None:
    """Write what is run, or check that it is what was run."""
    if folder.is_used:
        _same_recipe(settings, folder)
        if checkpoint is None:
            hooks.say(f"{folder.path} holds no checkpoint yet: the run begins anew.")
            folder.cut_log(-1)
        else:
            hooks.say(f"Going on from {checkpoint}.")
            folder.cut_log(int(checkpoint.name.rpartition("-")[2]))
    folder.write(RECIPE, recipe.to_yaml(settings))
    folder.update_record(
        status="running",
        command=sys.argv,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: v for name in _PACKAGES if (v := _version(name))},
    )


_FREE = (
    "batch.workers",
    "batch.prefetch",
    "evaluation.",
    "training.logging_",
    "training.save_",
    "training.eval_",
    "training.report_to",
    "data.index",
    "data.feature_cache",
)
"""What may differ when a run is resumed, because no step depends on it."""


def _same_recipe(now: TrainSettings, folder: RunFolder) -> None:
    before = recipe.settings_from(recipe.read_yaml(folder.recipe))
    old, new = _flat(recipe.to_data(before)), _flat(recipe.to_data(now))
    differing = sorted(
        key
        for key in old.keys() | new.keys()
        if old.get(key) != new.get(key) and not key.startswith(_FREE) and key != "output"
    )
    if differing:
        key = differing[0]
        raise UsageError(
            f"The run in {folder.path} was begun with {key} = {old.get(key)!r}, not "
            f"{new.get(key)!r}{f' (and {len(differing) - 1} more differ)' if differing[1:] else ''}"
            f". Resume it with its own recipe ({folder.recipe}), or start another run from its "
            f"last checkpoint (model.path=...)."
        )


def _same_data(folder: RunFolder, prepared: Prepared) -> None:
    before, now = folder.record().get("data", {}).get("digest"), prepared.store.digest()
    if before is not None and before != now:
        raise DataError(
            f"The data ({', '.join(prepared.store.sources)}) are not those that the run in "
            f"{folder.path} was begun with: their digest is {now[:12]}, not {before[:12]}. Resume "
            f"with the same data, or start another run from its last checkpoint (model.path=...)."
        )


def _same_start(folder: RunFolder, prepared: Prepared) -> None:
    before = folder.record().get("start")
    if before is not None and before != prepared.start:
        raise CheckpointError(
            f"The model {prepared.settings.model.path} is no longer the one that the run in "
            f"{folder.path} was begun with: its weights or its tokenizer have changed. Resume with "
            f"the same model, or start another run."
        )


def _flat(data: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {path: data}
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= _flat(value, f"{path}.{key}" if path else str(key))
    return out


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return av_llava.__version__ if package == "av-llava" else None


# ---------------------------------------------------------------- trainer and result


def make_trainer(prepared: Prepared, folder: RunFolder, hooks: Hooks) -> AVTrainer:
    """Put the trainer together.

    Raises:
        UsageError: transformers refuses a field, or the list of bad media cannot be written.
    """
    settings, args, model = prepared.settings, prepared.args, prepared.model
    main = args.process_index == 0
    artefacts = Artefacts(model.model, model.processor, whole=settings.saves_whole, main=main)
    bad = settings.data.bad_media
    if bad.quarantine is None:
        bad = bad.replace(quarantine=str(folder.path / QUARANTINE))
    callbacks: list[TrainerCallback] = [FsdpEntryPoints()]
    if main:
        callbacks += [RunLog(folder.log), Progress(hooks.bar, hooks.say)]
        for line in prepared.table.lines():
            hooks.say(line)
    if settings.compile:
        model.model.model.language_model.compile(dynamic=True)
    watch, evaluation = BadMediaWatch(bad, alone=args.world_size <= 1), _evaluation(prepared)
    try:
        trainer = AVTrainer(
            model.model,
            args,
            table=prepared.table,
            dataset=prepared.dataset,
            sampler=prepared.sampler,
            batch=settings.batch,
            artefacts=artefacts,
            bad_media=watch,
            held_out=prepared.held_out,
            evaluate_with=evaluation,
            callbacks=callbacks,
        )
    except AVLlavaError:
        raise
    except (ValueError, ImportError) as error:  # save_strategy=best without a metric
        said = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"transformers' Trainer refuses the section training: {said}. Change or leave out the "
            f"field that it names."
        ) from error
    if main:
        trainer.on_first_batch = functools.partial(_show_first, model, hooks.say)
    return trainer


def _evaluation(prepared: Prepared) -> Evaluation | None:
    if prepared.held_out is None:
        return None
    settings = prepared.settings
    evaluation = Evaluation(
        settings.evaluation, prepared.model, prepared.held_out, settings.batch.max_tokens
    )
    evaluation.check()
    return evaluation


def _show_first(model: AVLlava, say: Say, inputs: dict[str, Any], info: BatchInfo) -> None:
    """Show the first sample, with what is learned marked."""
    ids, labels, mask = (inputs[k][0] for k in ("input_ids", "labels", "attention_mask"))
    config, tokenizer = model.processor.config, model.processor.tokenizer
    say(f"The first sample, {info.ids[0]} ({info.sources[0]}); {OPEN}what is learned{CLOSE}:")
    say(preview(ids, labels, mask, tokenizer, config.media_token_ids))


def _account(prepared: Prepared) -> dict[str, Any]:
    """What the run's folder says of model and data."""
    index = prepared.index
    return {
        "model": str(prepared.settings.model.path),
        "start": prepared.start,
        "data": {
            "sources": list(prepared.store.sources),
            "digest": prepared.store.digest(),
            "samples": len(index),
            "tokens": int(index.lengths.sum()),
            "supervised_tokens": int(index.supervised.sum()),
            "unusable": len(index.errors),
        },
        "world_size": prepared.args.world_size,
        "batches_per_epoch": len(prepared.sampler),
        "trained_parameters": prepared.table.n_trained,
        "parameters": prepared.table.n_total,
    }


def _finish(trainer: AVTrainer, prepared: Prepared, folder: RunFolder) -> None:
    """Write the result."""
    state = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if prepared.args.process_index == 0:
        low = prepared.settings.save_dtype == "bfloat16"
        with full_disk_named(folder.final), new_folder(folder.final) as place:
            trainer.artefacts.write(place, state, dtype=torch.bfloat16 if low else None)
    trainer.accelerator.wait_for_everyone()
