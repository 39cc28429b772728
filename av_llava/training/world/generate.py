"""Data sets of the synthetic world: media files and questions in LLaVA's format.

Contract: what a folder holds depends only on its setting (seed, split, size, form, ...), not on the
number of workers or interruptions. A run that was stopped, however rudely, is taken up where it
stopped: clips appear whole, and `<split>.json` is written last. ::

    out/clips/train-0-000000.mp4 ...    media
    out/train.json                      rows, as LLaVA's trainers read them
    out/train.world                     the setting
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from av_llava.errors import DataError, UsageError, unknown_name
from av_llava.training.world.folder import claimed, write_json
from av_llava.training.world.parts import WORLD_VERSION, Scene, SceneSettings
from av_llava.training.world.rows import CLIPS, FORMS, ask, clip_name
from av_llava.training.world.scene import sample_scene

__all__ = ["FORMS", "Progress", "ask", "synthesize"]

Progress = Callable[[int, int], None]
"""(clips that are there, clips wanted)"""

_CHUNK = 32
"""Clips that a process makes between two reports."""


@dataclass(frozen=True)
class _Clips:
    """Which clips are wanted, and where; goes to the processes that make them."""

    folder: Path
    n: int
    seed: int
    split: str
    settings: SceneSettings

    def scene(self, index: int) -> Scene:
        return sample_scene(self.seed, index, self.split, self.settings)

    def write(self, indices: range) -> int:
        """Write those of these clips that are missing; return how many there are now."""
        from av_llava.training.world.write import write_clip

        for index in indices:
            scene = self.scene(index)
            file = self.folder / clip_name(scene)
            if not file.exists():
                write_clip(scene, file)
        return len(indices)


def synthesize(
    out: str | Path,
    n: int,
    seed: int = 0,
    split: str = "train",
    workers: int = 1,
    progress: Progress | None = None,
    *,
    settings: SceneSettings | None = None,
    form: str = "conversation",
) -> Path:
    """Write clips and their questions, or what is missing of them.

    Args:
        out: folder; made if absent. Several splits may share one.
        n: number of clips. A finished data set can be made longer, not shorter.
        seed: seed of the data set. Splits never share a scene, whatever their seeds.
        split: name of the split and of the JSON file; letters, digits, "-" and "_".
        workers: processes that make clips; 1 works in this one.
        progress: called with (clips there, clips wanted).
        settings: size, length and frame rate of the clips.
        form: "conversation": one row per clip with all its questions; "question": one row each.

    Returns:
        The JSON file.

    Raises:
        UsageError: a number or a name is out of range, the folder cannot be written, or another
            process writes it.
        DataError: the folder holds something else, another setting, or more clips.
    """
    settings = settings or SceneSettings()
    _check(n, seed, split, workers, form)
    out = Path(out)
    setting = {"world": WORLD_VERSION, "seed": seed, "form": form, **asdict(settings)}
    clips = _Clips(out / CLIPS, n, seed, split, settings)
    with claimed(out, split, setting):
        _tidy(clips)
        try:
            for done in _run(clips, workers):
                if progress:
                    progress(done, n)
        except OSError as error:  # PyAV's errors of writing are OSErrors, too
            raise UsageError(
                f"A clip could not be written to {clips.folder}: {error.strerror or error}. The "
                f"clips so far are kept; the same call goes on from there."
            ) from error
        rows = [row for index in range(n) for row in FORMS[form](clips.scene(index))]
        return write_json(out / f"{split}.json", rows)


def _check(n: int, seed: int, split: str, workers: int, form: str) -> None:
    for name, value, least in (("n", n, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if value < least:
            raise UsageError(f"{name} is {value}, but must be at least {least}.")
    if not split or not all(c.isascii() and (c.isalnum() or c in "-_") for c in split):
        raise UsageError(
            f"The split {split!r} names files; use letters, digits, '-' and '_', as in 'train'."
        )
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)


def _tidy(clips: _Clips) -> None:
    """Remove what a killed run left unfinished; refuse clips that are not wanted.

    Raises:
        DataError: there are clips beyond the last.
    """
    name = re.compile(rf"(\.?){re.escape(clips.split)}-{clips.seed}-(\d+)\..*")
    last = -1
    for entry in os.scandir(clips.folder):
        match = name.fullmatch(entry.name)
        if match and match[1]:
            os.unlink(entry.path)
        elif match:
            last = max(last, int(match[2]))
    if last >= clips.n:
        raise DataError(
            f"{clips.folder} holds {last + 1} clips of the split {clips.split!r}, more than "
            f"n={clips.n}. Use n={last + 1} or more, or another folder."
        )


def _run(clips: _Clips, workers: int) -> Iterator[int]:
    """Write all that is missing; yield how many there are, now and then."""
    chunks = [range(i, min(i + _CHUNK, clips.n)) for i in range(0, clips.n, _CHUNK)]
    done = 0
    if min(workers, len(chunks)) == 1:
        for chunk in chunks:
            done += clips.write(chunk)
            yield done
        return
    # Fresh processes: the caller may hold threads (of a model, of a decoder) that a fork breaks.
    context = multiprocessing.get_context("spawn")
    number = min(workers, len(chunks))
    with ProcessPoolExecutor(number, mp_context=context, initializer=_begin_worker) as pool:
        futures = [pool.submit(clips.write, chunk) for chunk in chunks]
        try:
            for future in as_completed(futures):
                done += future.result()
                yield done
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
