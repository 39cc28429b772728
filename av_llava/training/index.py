"""How long every sample is, in tokens, found from container headers alone.

Contract: lengths are those that training will see, media and chat template included: the same
processor plans them. What has been measured is kept in a file, line by line, so that an interrupted
or killed run goes on where it was. The file serves only the data, model configuration, tokenizer
and options it was made with, and only media whose size and time of change are still the same:
whatever differs is measured again. A row that cannot be measured is noted, and ends nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

import av_llava
from av_llava.errors import AVLlavaError, DataError, UsageError
from av_llava.media import is_remote
from av_llava.media_inputs import MediaOptions
from av_llava.planning import MediaPlanner
from av_llava.prepared import BatchBuilder
from av_llava.processor import AVLlavaProcessor
from av_llava.settings import IGNORE_INDEX
from av_llava.training.index_file import CHUNK_ROWS, IndexFile, Measured, stamp
from av_llava.training.samples import Sample
from av_llava.training.store import SampleStore

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the rows that are done and all rows."""

MODALITY_BITS: dict[str, int] = {"image": 1, "video": 2, "audio": 4}
"""Kind of medium → its bit in the code of a sample; other kinds share :data:`OTHER_BIT`."""

OTHER_BIT = 8
_PERHAPS_SOUND = 16  # in the file only: a video whose header cannot be read


@dataclass
class LengthIndex:
    """Lengths of all samples of a store."""

    lengths: np.ndarray
    """int32 [n]: tokens, media and text; 0 where the row could not be measured."""
    supervised: np.ndarray
    """int32 [n]: tokens that are learned."""
    modality: np.ndarray
    """uint8 [n]: sum of ``MODALITY_BITS`` of what is used; 0 is text alone."""
    errors: dict[int, str] = field(default_factory=dict)
    """Row → why it could not be measured."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def usable(self) -> np.ndarray:
        """Bool [n]: which rows were measured."""
        usable = np.ones(len(self), bool)
        usable[list(self.errors)] = False
        return usable


def modality_name(code: int) -> str:
    """A code in words: ``text``, ``video``, ``video+audio``."""
    names = [name for name, bit in MODALITY_BITS.items() if code & bit]
    names += ["other"] if code & OTHER_BIT else []
    return "+".join(names) or "text"


def build_index(
    store: SampleStore,
    processor: AVLlavaProcessor,
    options: MediaOptions | None = None,
    *,
    file: str | Path | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    retry_errors: bool = False,
) -> LengthIndex:
    """Measure every sample, or read what was measured.

    Args:
        store: the samples.
        processor: of the model.
        options: how media are read; by default as the model's configuration says.
        file: keeps what was measured; None measures everything.
        workers: processes that measure; 0 measures here.
        progress: called now and then.
        retry_errors: measure rows again that could not be measured.

    Raises:
        UsageError: the file is another's, or is being written; options that no file can keep.
        DataError: the file cannot be written; a process died.
    """
    options = options or processor.media_options()
    if not isinstance(options.audio, str):
        raise UsageError("A sound given as an array cannot be used for an index; name a file.")
    measurer = Measurer(store, processor, options)
    index = _empty(len(store))
    kept = None
    if file is not None:
        kept = IndexFile(Path(file), measurer.key(), len(store), writes=retry_errors)
    try:
        done = 0
        missing = []
        for chunk in range(-(-len(store) // CHUNK_ROWS)):
            found = None if kept is None else kept.take(chunk)
            if found is None or (retry_errors and found.errors):
                missing.append(chunk)
            else:
                done += _put(index, found)
        # Closed at once when Ctrl-C comes, so that no process outlives this call.
        with closing(_measure(measurer, missing, workers)) as results:
            for measured in results:
                if kept is not None:
                    kept.append(measured)
                done += _put(index, measured)
                if progress is not None:
                    progress(done, len(store))
        if progress is not None and not missing:
            progress(done, len(store))
    finally:
        if kept is not None:
            kept.close()
    _settle(index)
    if index.errors:
        first = min(index.errors)
        logger.warning(
            "%d of %d samples cannot be used; the first: %s",
            len(index.errors),
            len(index),
            index.errors[first],
        )
    return index


def _empty(n: int) -> LengthIndex:
    return LengthIndex(np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, np.uint8))


def _put(index: LengthIndex, measured: Measured) -> int:
    """Write a chunk into the index; returns its number of rows."""
    start, n = measured.chunk * CHUNK_ROWS, measured.rows.shape[1]
    rows = slice(start, start + n)
    index.lengths[rows], index.supervised[rows], index.modality[rows] = measured.rows
    index.errors.update(measured.errors)
    return n


def _settle(index: LengthIndex) -> None:
    """Guess of videos that cannot be read whether they have sound: as most others do.

    Training puts a sample of the same modality in the place of one that cannot be read.
    """
    common = np.bincount(index.modality[index.usable], minlength=256)
    for row in index.errors:
        code = int(index.modality[row])
        if code & _PERHAPS_SOUND:
            code &= ~_PERHAPS_SOUND
            heard = code | MODALITY_BITS["audio"]
            index.modality[row] = heard if common[heard] > common[code] else code


class Length(NamedTuple):
    """What is measured of one sample."""

    n_tokens: int
    n_supervised: int
    modality: int


@dataclass
class Measurer:
    """Measures samples; can be sent to another process."""

    store: SampleStore
    processor: AVLlavaProcessor
    options: MediaOptions

    def key(self) -> dict[str, str]:
        """What lengths depend on, beside the media: name → digest."""
        tokenizer, template = self.processor.tokenizer, self.processor.template
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
        config = _bare(json.loads(self.processor.config.to_json_string(use_diff=False)))
        config["text_config"] = {}  # templates and tokens are digested by themselves
        limits = {k: v for k, v in self.options.limits.to_dict().items() if k not in _PATIENCE}
        how = [self.options.sampling, self.options.start_s, self.options.end_s, limits]
        return {
            "version": av_llava.__version__,
            "data": self.store.digest(),
            "model": _sha(json.dumps(config, sort_keys=True)),
            "tokenizer": _sha(f"{backend} {template.name} {tokenizer.chat_template}"),
            "options": _sha(repr([*how, self.options.audio])),
        }

    def chunk(self, chunk: int) -> Measured:
        """Measure one chunk of rows."""
        start = chunk * CHUNK_ROWS
        rows = range(start, min(start + CHUNK_ROWS, len(self.store)))
        measured = Measured(chunk, np.zeros((3, len(rows)), np.int32), {}, {})
        for column, row in enumerate(rows):
            with _Named(self.store, row):
                measured.rows[:, column] = self._row(row, measured)
        return measured

    def _row(self, row: int, measured: Measured) -> Length:
        try:
            sample = self.store[row]
        except AVLlavaError as error:  # which names the row
            measured.errors[row] = str(error)
            return Length(0, 0, 0)
        # Before it is opened: a file that changes meanwhile is measured again next time.
        measured.media.update((path, stamp(path)) for path in self._paths(sample))
        try:
            return self.length(sample)
        except (AVLlavaError, OSError) as error:
            measured.errors[row] = f"{self.store.where(row)}: {error}"
            return Length(0, 0, self._declared(sample))

    def _declared(self, sample: Sample) -> int:
        """The modality of a sample that cannot be opened, as far as its row says it."""
        code = sum({MODALITY_BITS.get(kind, OTHER_BIT) for kind in sample.modalities})
        silent = self.processor.config.audio_config is None or self.options.audio == "off"
        if silent or code & MODALITY_BITS["audio"] or not code & MODALITY_BITS["video"]:
            return code
        muted = all(part.audio == "off" for part in sample.media if part.kind == "video")
        return code if muted else code | _PERHAPS_SOUND

    def length(self, sample: Sample) -> Length:
        """Measure one sample.

        Raises:
            AVLlavaError: it cannot be used.
        """
        sample.check_learned()
        builder = BatchBuilder(
            self.processor, MediaPlanner(self.processor.config), self.options, decode=False
        )
        builder.add(sample.messages, False, True, sample.train_turns)
        prepared = builder.finish("right", True)
        plan = prepared.media.splice
        assert plan.text_labels is not None
        code = 0
        for use in prepared.used[0]:
            code |= MODALITY_BITS.get(use.kind, OTHER_BIT)
            code |= MODALITY_BITS["audio"] if use.audio_tokens else 0
        return Length(plan.lengths[0], int((plan.text_labels != IGNORE_INDEX).sum()), code)

    def _paths(self, sample: Sample) -> Iterator[str]:
        for path in sample.paths:
            yield path if is_remote(path) else os.path.abspath(path)
        # A file that stands in for the sound of every video.
        if self.options.audio not in ("auto", "on", "off"):
            yield os.path.abspath(self.options.audio)


_NO_MATTER = ("transformers_version", "dtype", "_name_or_path", "sampling")
# How long and in how much memory a file may be decoded; headers are read in no time.
_PATIENCE = ("max_decode_s", "max_stall_s", "max_download_s", "max_worker_bytes")


class _Named:
    """Names the row in errors that nobody foresaw."""

    def __init__(self, store: SampleStore, row: int) -> None:
        self.store, self.row = store, row

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(f"while measuring {self.store.where(self.row)}")


# ------------------------------------------------------------------ in several processes

_measurer: Measurer
_stop: Any


def _measure(measurer: Measurer, chunks: Sequence[int], workers: int) -> Generator[Measured]:
    """Measure chunks, here or in other processes; in any order."""
    if workers <= 0 or len(chunks) < 2:
        for chunk in chunks:
            yield measurer.chunk(chunk)
        return
    # A forked process could inherit a lock that a thread of torch or a tokenizer holds.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(
        min(workers, len(chunks)), context, initializer=_begin, initargs=(measurer, stop)
    )
    try:
        yield from _results(pool, chunks, 3 * workers)
    except BrokenProcessPool as error:
        raise DataError(
            "A process that measures samples died; perhaps memory ran out. What was measured is "
            "kept. Run it again with fewer workers, or with workers = 0 to see the cause."
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _results(pool: ProcessPoolExecutor, chunks: Sequence[int], most: int) -> Iterator[Measured]:
    """Results as they come, with at most so many chunks under way."""
    left = iter(chunks)
    running: set[Future[Measured]] = set()
    while True:
        for chunk in left:
            with _unheard():
                running.add(pool.submit(_chunk, chunk))
            if len(running) >= most:
                break
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


@contextmanager
def _unheard() -> Iterator[None]:
    """Start processes that do not hear Ctrl-C; here it is heard afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(measurer: Measurer, stop: Any) -> None:
    """Set a worker process up; Ctrl-C is for the one that waits for it, and it ends with that."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()

    global _measurer, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _measurer, _stop = measurer, stop


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, killed perhaps."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _chunk(chunk: int) -> Measured:
    if _stop.is_set():  # nobody waits for what was queued
        return Measured(chunk, np.zeros((3, 0), np.int32), {}, {})
    return _measurer.chunk(chunk)


def _bare(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what says nothing about lengths, at every depth."""
    return {
        k: _bare(v) if isinstance(v, dict) else v for k, v in config.items() if k not in _NO_MATTER
    }


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
