"""transformers' Trainer with our batches, our optimiser's groups, and our checkpoints.

Contract: the training loop is the library's. Replaced are the data loader (batches by true length,
made by their workers), the optimiser's groups, what a checkpoint is made of and how it appears,
evaluation, and what is logged. A checkpoint is complete or not there; a run that goes on from one
sees the same batches, the same random numbers and the same losses.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from av_llava.checkpoints.staging import make_durable
from av_llava.errors import CheckpointError, UsageError
from av_llava.training.artefacts import Artefacts
from av_llava.training.bad_media import BadMediaWatch
from av_llava.training.batching import TokenBudgetBatchSampler
from av_llava.training.collate import BatchInfo, as_is
from av_llava.training.dataset import TrainingDataset
from av_llava.training.full_disk import full_disk_named
from av_llava.training.loss import weighted_loss, where_learned
from av_llava.training.meters import LossWatch, Meters, check_supervised
from av_llava.training.optimizer import build_optimizer
from av_llava.training.parts import PartsTable
from av_llava.training.run_folder import STATE
from av_llava.training.settings import BatchSettings
from av_llava.training.told_apart import KindLosses, part_norms
from av_llava.training.workers import batches_of, deaths_named, end_workers, start_worker

logger = logging.getLogger(__name__)

SAMPLER = "batches.json"
"""What makes the batches; a run that goes on must make the same."""

Evaluate = Callable[["AVTrainer"], dict[str, float]]


class AVTrainer(Trainer):
    """Trains a model whose parts are settled.

    Args:
        model: with its parts settled (:func:`av_llava.training.parts.apply_trainable`).
        args: of transformers; its output folder is the run's.
        table: what ``apply_trainable`` returned.
        dataset: makes the batches.
        sampler: chooses their samples.
        batch: workers and prefetching.
        artefacts: writes and reads weights.
        bad_media: counts media that could not be read.
        held_out: data for evaluation.
        evaluate_with: measures on held-out data, if there are any.
        callbacks: of transformers.
    """

    # Of the library, which says nothing of their types.
    optimizer: Any
    control: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        table: PartsTable,
        dataset: TrainingDataset,
        sampler: TokenBudgetBatchSampler,
        batch: BatchSettings,
        artefacts: Artefacts,
        bad_media: BadMediaWatch | None = None,
        held_out: TrainingDataset | None = None,
        evaluate_with: Evaluate | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        own = dict(vars(model.config))
        super().__init__(
            model, args, train_dataset=dataset, eval_dataset=held_out, callbacks=callbacks
        )
        # The Trainer turns the cache off in the configuration, which checkpoints would keep.
        vars(model.config).pop("use_cache", None)
        vars(model.config).update({k: v for k, v in own.items() if k == "use_cache"})
        for callback in (PrinterCallback, ProgressCallback):  # callbacks.py has its own
            self.remove_callback(callback)
        # The model divides by the tokens of the whole step that it is given.
        self.model_accepts_loss_kwargs = True
        self.table, self.sampler, self.batch = table, sampler, batch
        self.artefacts, self.bad_media = artefacts, bad_media
        self.evaluate_with = evaluate_with
        self.on_first_batch: Callable[[dict[str, Any], BatchInfo], None] | None = None
        self.meters, self.kinds = Meters(), KindLosses()
        self._info: BatchInfo | None = None
        self._batches: Any = None
        self._of_step: dict[str, Any] = {}
        self.losses = LossWatch(at_once=args.device.type == "cpu")
        self._n_counted = sum(p.numel() for p in model.parameters())

    # ---------------------------------------------------------------- data

    def get_train_dataloader(self) -> DataLoader:
        """The loader of this rank's batches; nothing shards it again."""
        workers = self.batch.workers
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.sampler,
            collate_fn=as_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=self.batch.prefetch if workers else None,
            pin_memory=self.args.device.type == "cuda",
            worker_init_fn=start_worker,
            # Its own, so that reading draws nothing from the numbers that training uses.
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """Take batches, and note how long that took."""
        self._batches = epoch_iterator
        started = time.perf_counter()
        batches = super().get_batch_samples(batches_of(epoch_iterator), *args, **kwargs)
        self.meters.wait_s += time.perf_counter() - started
        return batches

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; nothing that reads media goes on afterwards, whatever happens."""
        try:
            with deaths_named():
                return super().train(*args, **kwargs)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CheckpointError(
                f"{self.args.output_dir} could not be written to: {error}. Make room, then go on "
                f"with --resume."
            ) from error
        finally:
            end_workers(self._batches)
            self._batches = None

    # ---------------------------------------------------------------- one step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser over the parts' groups."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(model or self.model, self.table, self.args)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Make the schedule; a share of few steps is none, lest the only step has no rate."""
        if self.args.warmup_steps * num_training_steps < 1:
            self.args.warmup_steps = 0
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (TypeError, ValueError) as error:
            given = self.args.lr_scheduler_kwargs
            raise UsageError(
                f"training.lr_scheduler_type={self.args.lr_scheduler_type} cannot be made with "
                f"training.lr_scheduler_kwargs={given}: {error}."
            ) from error

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One batch forward and backward."""
        info: BatchInfo = inputs.pop("info")
        check_supervised(info)
        if self.on_first_batch is not None:
            self.on_first_batch(inputs, info)
            self.on_first_batch = None
        self.meters.add(info)
        if self.bad_media is not None:
            self.bad_media.update(len(info.ids), info.bad)
        self._info = info
        with self._named_in_errors(info):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.add(loss, info, self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Watch the norm, too: one that is no number spoils the weights in this very step."""
        norm = super()._get_grad_norm(*args, **kwargs)
        step = self.state.global_step + 1
        if self.accelerator.scaler is None:  # fp16's skips such steps, and lowers its scale
            self.losses.add_norm(norm, step)
        # The log of an epoch may come after any step.
        by_epoch = self.args.logging_strategy == "epoch"
        first = step == 1 and self.args.logging_first_step
        if by_epoch or first or step % self.state.logging_steps == 0:
            self._of_step = self._told_by_part(norm)
        return norm

    def _told_by_part(self, norm: Any) -> dict[str, Any]:
        """Rates and gradient norms of this step's parts, where there are several."""
        groups = self.optimizer.param_groups
        rates = {g["name"].removesuffix(" (no decay)"): g["lr"] for g in groups if "name" in g}
        if len(rates) <= 1:
            return {}
        norms = part_norms(self.model, norm, self.args.max_grad_norm)
        return {f"lr/{part}": rate for part, rate in rates.items()} | {
            f"grad_norm/{part}": value for part, value in norms.items()
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's loss; samples with a weight of their own are weighted here."""
        inputs = where_learned({**inputs, "use_cache": False})
        labels, info = inputs["labels"], self._info
        if info is None or set(info.weights) <= {1.0}:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            outputs = model(**inputs)
            loss = weighted_loss(outputs.logits, labels, info.weights, num_items_in_batch)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
        if info is not None:
            self.kinds.add(outputs.logits, labels, info, inputs.get("logits_to_keep"))
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """An estimate that does not walk through the model in every step."""
        return 6 * inputs["input_ids"].numel() * self._n_counted

    @contextmanager
    def _named_in_errors(self, info: BatchInfo) -> Iterator[None]:
        """Remember the batch that memory ran out for."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            error.batch_info = info  # type: ignore[union-attr]  # run.py makes advice of it
            raise

    # ---------------------------------------------------------------- log and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our figures to those of a step."""
        if "loss" in logs:
            self.losses.check()
            gather = self.gathered if self.args.world_size > 1 else None
            logs |= self.meters.take(gather)
            if self.bad_media is not None and gather is not None:
                seen = torch.tensor(
                    [[float(self.bad_media.n_samples), float(self.bad_media.n_bad)]]
                )
                self.bad_media.judge(*(round(n) for n in gather(seen).sum(0).tolist()))
            logs |= self.kinds.take(self.args.device, gather)
            logs |= {k: v.item() if isinstance(v, Tensor) else v for k, v in self._of_step.items()}
            self._of_step = {}
        super().log(logs, start_time)

    def gathered(self, rows: Tensor) -> Tensor:
        """Rows of all processes on the host; every process must call it. [n, m] → [ranks * n, m]"""
        return self.accelerator.gather(rows.to(self.args.device)).cpu()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure on held-out data."""
        if self.evaluate_with is None:
            return {}
        was_training = self.model.training
        self.model.eval()
        metrics = self.evaluate_with(self)
        self.model.train(was_training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # ---------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, and rename it when it is complete."""
        self.losses.check()  # nothing of a loss that is no number is kept
        self.store_flos()
        run = Path(self.args.output_dir)
        target = run / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(target)
        partial = run / f".{target.name}.partial-0000"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            with full_disk_named(target):
                self._write_checkpoint(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            make_durable(partial)
            if target.exists():  # of a run that went on from an older checkpoint
                shutil.rmtree(target)
            partial.rename(target)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def _write_checkpoint(self, folder: Path) -> None:
        place = str(folder)
        self.save_model(place, _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(place)
            self._save_scaler(place)
            self._save_rng_state(place)
        read = self._read_so_far()
        if self.args.should_save:
            state = {**self.sampler.state_dict(), "world_size": self.args.world_size, **read}
            (folder / SAMPLER).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            self.state.save_to_json(str(folder / STATE))

    def _read_so_far(self) -> dict[str, int]:
        """What all processes have read since the run began, and could not; each must call it."""
        watch = self.bad_media
        own = [0, 0] if watch is None else [watch.n_samples, watch.n_bad]
        sums = torch.tensor([[*own, self.meters.bad]], dtype=torch.float64)
        if self.args.world_size > 1:
            sums = self.gathered(sums)
        samples, replaced, bad = (round(n) for n in sums.sum(0).tolist())
        return {"samples": samples, "replaced": replaced, "bad_media": self.meters.n_bad + bad}

    def _goes_on_counting(self, state: Mapping[str, Any]) -> None:
        """Take the counts of a checkpoint; the first process holds those of all."""
        self.meters.n_bad = state.get("bad_media", 0)
        if self.bad_media is not None and self.args.process_index == 0:
            self.bad_media.n_samples = state.get("samples", 0)
            self.bad_media.n_bad = state.get("replaced", 0)

    def _save(
        self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the weights: a folder that loads, and what resuming needs."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.artefacts.write(folder, state_dict)
        self.artefacts.write_trained(folder, state_dict)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Put a checkpoint's trained weights into the model."""
        folder = Path(resume_from_checkpoint)
        state = json.loads((folder / SAMPLER).read_text(encoding="utf-8"))
        self.sampler.load_state_dict(state)
        self._goes_on_counting(state)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not sharded and not (folder / OPTIMIZER_NAME).is_file():
            raise UsageError(
                f"{folder} holds no state of the optimiser (training.save_only_model), so its run "
                f"cannot go on. Start another run from its weights (model.path={folder})."
            )
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.artefacts.read(folder)

    def _load_best_model(self) -> None:
        """Go back to the weights of the best checkpoint (``training.load_best_model_at_end``)."""
        best = self.state.best_model_checkpoint
        if best is not None and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            self.artefacts.read(Path(best))
        elif best is not None:
            raise UsageError(
                "training.load_best_model_at_end cannot gather sharded weights: take the best "
                f"checkpoint, {best}."
            )
