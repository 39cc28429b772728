"""What a run is made of: the model in its types, what trains, samples and their batches.

Contract: rows, media and settings that cannot be trained on are refused here, before the first
step. Under torchrun the first process measures samples, and the others read what it wrote.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from av_llava.checkpoints.partial import load_any
from av_llava.errors import UsageError
from av_llava.inference import AVLlava, add_audio
from av_llava.media_inputs import MediaOptions
from av_llava.processor import AVLlavaProcessor
from av_llava.training.batching import TokenBudgetBatchSampler
from av_llava.training.cached_media import CachedMedia
from av_llava.training.callbacks import Say
from av_llava.training.data_checks import check_modalities, check_rows
from av_llava.training.dataset import TrainingDataset
from av_llava.training.feature_cache import GIB, FeatureStore, TowerKeys
from av_llava.training.held_out import HeldOut
from av_llava.training.index import LengthIndex, Measurer, build_index
from av_llava.training.index_file import beside, is_for
from av_llava.training.modality_dropout import ModalityDropout, plan_dropout
from av_llava.training.packing import check_packing
from av_llava.training.parts import PartsTable, apply_trainable
from av_llava.training.precision import modules_to_train
from av_llava.training.run_folder import LENGTHS, RunFolder
from av_llava.training.settings import TrainSettings
from av_llava.training.starting_point import starting_digest
from av_llava.training.store import SampleStore, open_store

logger = logging.getLogger(__name__)

MANY = 5000
"""Samples from which on several processes measure them."""


@dataclass(frozen=True)
class Hooks:
    """How a run talks to whoever started it."""

    say: Say = logger.info
    """Takes lines for people; of the first process only."""
    bar: bool = False
    """Show a bar that moves."""
    progress: Callable[[int, int], None] | None = None
    """While samples are measured."""


@dataclass
class Prepared:
    """Everything that a trainer is made of."""

    settings: TrainSettings
    args: TrainingArguments
    model: AVLlava
    table: PartsTable
    store: SampleStore
    index: LengthIndex
    dataset: TrainingDataset
    sampler: TokenBudgetBatchSampler
    start: str
    """Digest of the model before anything trained."""
    held_out: HeldOut | None = None


def prepare(
    settings: TrainSettings, args: TrainingArguments, folder: RunFolder, hooks: Hooks
) -> Prepared:
    """Load the model, settle what trains, open and measure the data.

    Args:
        settings: of the run.
        args: made of them.
        folder: of the run, for the index.
        hooks: see the class.
    """
    set_seed(settings.seed)
    data = settings.data
    store = _opened(settings, args, data.train or "")
    evaluates = str(settings.training.get("eval_strategy", "no")) != "no" and data.eval
    if data.eval and not evaluates and args.process_index == 0:
        logger.warning(
            "data.eval=%s is given, but nothing is evaluated: set training.eval_strategy (epoch or "
            "steps) as well.",
            data.eval,
        )
    held_out = _opened(settings, args, data.eval or "") if evaluates else None
    model = load_model(settings, args)
    start = starting_digest(model)
    options = media_options(settings, model)
    measure = functools.partial(measured, settings, args, model, options, folder, hooks)
    index = measure(store, data.train or "", data.index, "train.index")
    table = settle(settings, model)
    check_rows(Measurer(store, model.processor, options), index)
    check_modalities(table, index)
    with first_alone(args):
        dropout = plan_dropout(
            data.modality_dropout,
            store,
            model.processor,
            options,
            index,
            folder=folder.path / LENGTHS,
            workers=_measuring_workers(settings, store),
            progress=hooks.progress,
        )
    make = functools.partial(
        _dataset, settings=settings, processor=model.processor, options=options
    )
    if settings.batch.packing:
        check_packing(model.model)
    dataset = make(
        store,
        index,
        dropout=dropout,
        cache=feature_cache(settings, args, model),
        packing=settings.batch.packing,
    )
    sampler = _sampler(dataset, settings, args)
    other = None
    if held_out is not None:
        found = measure(held_out, data.eval or "", None, "eval.index")
        check_rows(Measurer(held_out, model.processor, options), found)
        made = make(held_out, found, kind=HeldOut)
        assert isinstance(made, HeldOut)
        other = made
    return Prepared(settings, args, model, table, store, index, dataset, sampler, start, other)


def _sampler(
    dataset: TrainingDataset, settings: TrainSettings, args: TrainingArguments
) -> TokenBudgetBatchSampler:
    """The batches of this process."""
    batch = settings.batch

    def made(lengths: Any, epochs: int = 1) -> TokenBudgetBatchSampler:
        return TokenBudgetBatchSampler(
            lengths,
            max_tokens=batch.max_tokens,
            max_samples=batch.max_samples,
            world_size=args.world_size,
            rank=args.process_index,
            seed=settings.seed,
            shuffle=batch.shuffle,
            buffer=batch.buffer,
            accumulation=args.gradient_accumulation_steps,
            too_long=batch.too_long,
            epochs=epochs,
        )

    first = made(dataset.lengths())
    if dataset.dropout is None:
        return first
    epochs = math.ceil(args.num_train_epochs)
    if args.max_steps > 0:
        epochs = math.ceil(args.max_steps * args.gradient_accumulation_steps / len(first))
    return made(dataset.lengths, max(1, epochs))


def _opened(settings: TrainSettings, args: TrainingArguments, path: str) -> SampleStore:
    data = settings.data
    with first_alone(args):
        return open_store(path, format=data.format, media_root=data.media_root, seed=settings.seed)


def _dataset(
    store: SampleStore,
    index: LengthIndex,
    *,
    settings: TrainSettings,
    processor: AVLlavaProcessor,
    options: MediaOptions,
    dropout: ModalityDropout | None = None,
    cache: CachedMedia | None = None,
    packing: bool = False,
    kind: type[TrainingDataset] = TrainingDataset,
) -> TrainingDataset:
    longest = settings.data.max_length
    if longest is None and settings.data.too_long == "trim":
        longest = settings.batch.max_tokens
    return kind(
        store,
        processor,
        options,
        index,
        settings.data.bad_media,
        settings.seed,
        max_length=longest,
        too_long=settings.data.too_long,
        dropout=dropout,
        cache=cache,
        packing=packing,
    )


def feature_cache(
    settings: TrainSettings, args: TrainingArguments, model: AVLlava
) -> CachedMedia | None:
    """What keeps the features of frozen towers, if the recipe asks for it.

    Args:
        settings, args: of the run.
        model: with its parts settled.
    """
    data = settings.data
    if data.feature_cache is None:
        return None
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else ""
    folder = Path(data.feature_cache).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"data.feature_cache: {folder} cannot be made a folder ({error.strerror})."
        ) from error
    store = FeatureStore(folder, int(data.feature_cache_gib * GIB))
    return CachedMedia(store, TowerKeys.of(model.model, precision=precision), precision)


def load_model(settings: TrainSettings, args: TrainingArguments) -> AVLlava:
    """Load what training starts from, in the types that it is trained in."""
    chosen = settings.model
    sharded = bool(args.fsdp) or args.deepspeed is not None
    mode = settings.trainable.language_model.train
    dtype = chosen.dtype
    if dtype == "bfloat16" and not (args.bf16 or args.fp16 or sharded):
        raise UsageError(
            "model.dtype=bfloat16 holds what is frozen in 16 bits and what trains in 32, which "
            "needs mixed precision: add training.bf16=true, or leave model.dtype out."
        )
    if dtype == "auto":
        small = args.bf16 and not sharded and mode in ("freeze", "lora")
        dtype = "bfloat16" if small else "float32"
    merge = chosen.merge
    if merge is None and chosen.quantize is None:
        merge = mode != "lora"
    assert chosen.path is not None
    loaded = load_any(
        chosen.path,
        chosen.base,
        device="cpu" if sharded else args.device,
        dtype=dtype,
        attn_implementation=chosen.attn_implementation,
        overwrite_config=chosen.config or None,
        quantize=chosen.quantize,
        merge=merge,
        # Master weights that were rounded once would stay so.
        float32=modules_to_train(settings.trainable) if dtype == "bfloat16" else (),
    )
    processor = AVLlavaProcessor(loaded.tokenizer, loaded.model.config)
    model = AVLlava(loaded.model, processor, chosen.path)
    if chosen.add_audio is not None:
        given = dict(chosen.add_audio)
        add_audio(model, given["tower"], given.get("projector"), seed=settings.seed)
    return model


def settle(settings: TrainSettings, model: AVLlava) -> PartsTable:
    """Make trainable what the recipe declares."""
    rate = settings.training.get("learning_rate")
    return apply_trainable(
        model.model,
        settings.trainable,
        settings.lora,
        learning_rate=None if rate is None else float(rate),
        weight_decay=float(settings.training.get("weight_decay", 0.0)),
    )


def media_options(settings: TrainSettings, model: AVLlava) -> MediaOptions:
    """How media are read; the model keeps the sampling that it was trained with."""
    data = settings.data
    options = model.processor.media_options(
        frames=data.frames,
        fps=data.fps,
        source_fps=data.source_fps,
        audio=data.audio,
        time_instruction=data.time_instruction,
    )
    limits = options.limits.replace(max_decode_s=data.max_decode_s)
    # The rate of folders is the data's, not the model's.
    given = model.processor.config.sampling.source_fps
    model.processor.config.sampling = options.sampling.replace(source_fps=given)
    return MediaOptions(options.sampling, audio=options.audio, limits=limits)


def measured(
    settings: TrainSettings,
    args: TrainingArguments,
    model: AVLlava,
    options: MediaOptions,
    folder: RunFolder,
    hooks: Hooks,
    store: SampleStore,
    data: str,
    given: str | None,
    name: str,
) -> LengthIndex:
    """The lengths of all samples; the first process measures, the others read its file.

    Args:
        settings, args, model, options, folder, hooks: of the run.
        store: the samples.
        data: file or folder that they are read from.
        given: file that keeps the lengths; None takes the one beside the data if it is for them and
            for this model, else one in the run's folder.
        name: of that one.
    """
    file = Path(given).expanduser() if given else folder.path / LENGTHS / name
    with first_alone(args):
        kept = beside(data)
        if not given and kept.is_file():  # mostly there is none, and no key is needed
            key = Measurer(store, model.processor, options).key()
            file = kept if is_for(kept, key, len(store)) else file
        return build_index(
            store,
            model.processor,
            options,
            file=file,
            workers=_measuring_workers(settings, store),
            progress=hooks.progress,
        )


def _measuring_workers(settings: TrainSettings, store: SampleStore) -> int:
    """Processes that measure samples: starting them takes longer than reading few headers."""
    return settings.batch.workers if len(store) >= MANY else 0


@contextmanager
def first_alone(args: TrainingArguments) -> Iterator[None]:
    """Let the first process through alone, then the others.

    Raises:
        UsageError: the first process failed, in each of the others, which would wait for ever.
    """
    if args.world_size <= 1:
        yield
        return
    if args.process_index > 0:
        if not _told(args, True):
            raise UsageError("The first process of this run failed; it says why.")
        yield
        return
    try:
        yield
    except KeyboardInterrupt:  # the others were interrupted, too
        raise
    except BaseException:
        _told(args, False)
        raise
    _told(args, True)


def _told(args: TrainingArguments, word: bool) -> bool:
    """The first process's word, in every process."""
    held = torch.tensor(int(word), device=args.device)
    torch.distributed.broadcast(held, 0)
    return bool(held.item())
