"""Runs a task: plans what is left, asks, and keeps every answer as it comes.

Contract: the unit of work is a clip, whose media are opened once for all arms and questions while
the model works on the one before. A clip's answers in one arm are written together. What one sample
may raise becomes a failure of that sample; the same command again asks only what has no answer yet.
No torch here: the model is behind the :class:`Answerer`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from av_llava.errors import AVLlavaError, DataError, UsageError
from av_llava_eval.answerer import Answerer, Clip, KnowsFrames, Reply
from av_llava_eval.decode_ahead import read_ahead
from av_llava_eval.experiment import Arm, Donors
from av_llava_eval.failures import CATCHABLE, OK, kind_of, said
from av_llava_eval.locks import RunLock
from av_llava_eval.records import Answer, AnswerFile, Key, Manifest, RunFolder, sample_row
from av_llava_eval.sample import Sample
from av_llava_eval.sharding import Place, assign
from av_llava_eval.task import Task, problem_report

logger = logging.getLogger(__name__)

_SAME_ERRORS = 8
"""Clips in a row that may end in errors of no known kind; then something is broken."""
_VERSIONS = ("av-llava", "torch", "transformers", "av", "numpy")


@dataclass(frozen=True)
class RunSettings:
    """How a task is run."""

    split: str | None = None
    style: str | None = None
    """Prompt style; the task's first by default."""
    arms: tuple[Arm, ...] = (Arm("main"),)
    max_new_tokens: int | None = None
    """Longest answer; the task's own by default."""
    limit: int | None = None
    """Only so many samples, from the start, for a trial."""
    retry_failed: bool = True
    """Ask again what failed before."""
    skip_bad_rows: bool = False
    """Go on without annotation rows that cannot be used; they are counted."""
    workers: int = 2
    """Threads that read ahead; each has a decoding process of its own. 0 reads in line."""
    ahead: int = 4
    """Clips that may wait in memory."""


@dataclass
class Progress:
    """How far this process is."""

    total: int
    """Answers that it is to give, those of earlier runs included."""
    kept: int = 0
    """Of these, from earlier runs."""
    done: int = 0
    """Of these, given now."""
    failures: Counter[str] = field(default_factory=Counter)
    """By kind, among those given now."""
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def per_s(self) -> float:
        """Answers a second."""
        return self.done / max(self.elapsed_s, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Seconds until the end at this rate; None before the first answer."""
        left = self.total - self.kept - self.done
        return None if not self.done else left / self.per_s


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    progress: Progress
    complete: bool
    """Whether all processes together have answered everything."""
    failed: int
    """Answers of the whole run that are failures."""
    answers: int
    """Answers of the whole run."""
    problems: int
    """Annotation rows that were left out."""

    @property
    def failed_share(self) -> float:
        """Share of failures among all answers."""
        return self.failed / self.answers if self.answers else 0.0


@dataclass(frozen=True)
class _Work:
    """What is left to be asked about one clip."""

    clip: Clip
    samples: Mapping[Arm, tuple[Sample, ...]]


def run(
    task: Task,
    data: str | Path,
    folder: str | Path,
    make_answerer: Callable[[], Answerer],
    settings: RunSettings | None = None,
    *,
    place: Place | None = None,
    about: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Run a task, or go on with it.

    Args:
        task: the benchmark.
        data: its folder.
        folder: of the run; is made or gone on with.
        make_answerer: called once, after everything that can be checked without a model is; not
            called when nothing is left to ask.
        settings: how.
        place: of this process among several.
        about: further facts for the manifest, such as the model's name; they identify nothing.
        on_progress: called after every clip.

    Raises:
        DataError: the annotations cannot be used, or the folder holds another run.
        UsageError: another process holds the folder, or it cannot be written.
    """
    settings, place = settings or RunSettings(), place or Place()
    root, runs = Path(data), RunFolder(folder)
    samples, problems = _samples(task, root, settings)
    with RunLock(runs.path, place):
        job = _Job(task, root, samples, settings)
        mine = job.mine(place)
        wanted = [(arm.name, s.id) for s in mine for arm in settings.arms]
        known = runs.manifest() is not None
        states = runs.states() if known else {}
        left = [k for k in wanted if _is_left(states.get(k), settings.retry_failed)]
        progress = Progress(len(wanted), kept=len(wanted) - len(left))
        if left or not known:
            answerer = make_answerer()
            identity = job.identity(answerer.fingerprint())
            facts = {**(about or {}), **_about(task, root, problems)}
            manifest = Manifest(identity, facts)
            runs.begin(manifest, (sample_row(s, root) for s in samples))
            with AnswerFile(runs.path, place) as file:
                if file.torn:
                    logger.warning("%s: an unfinished last line was taken out", file.path)
                job.ask(answerer, mine, set(left), file, progress, on_progress)
        else:
            job.check_same(runs)
        states = runs.states()
    n_all = len(samples) * len(settings.arms)
    failed = sum(state != OK for state in states.values())
    return Outcome(progress, len(states) == n_all, failed, n_all, problems)


def _samples(task: Task, root: Path, settings: RunSettings) -> tuple[list[Sample], int]:
    found = task.scan(root, settings.split)
    if found.problems:
        said_so = problem_report(task.name, found)
        if not settings.skip_bad_rows:
            raise DataError(f"{said_so} Mend them, or leave them out with --skip-bad-rows.")
        logger.warning("%s They are left out.", said_so)
    if settings.limit is not None and settings.limit < 1:
        raise UsageError(f"--limit must be at least 1, not {settings.limit}.")
    if not found.samples:
        raise DataError(f"{task.name} has no samples in {root}.")
    return list(found.samples[: settings.limit]), len(found.problems)


def _is_left(state: str | None, retry_failed: bool) -> bool:
    return state is None or (state != OK and retry_failed)


def _about(task: Task, root: Path, problems: int) -> dict[str, Any]:
    home = sys.modules[type(task).__module__]
    built_in = home.__name__.startswith("av_llava_eval.") or home.__file__ is None
    own_file = None if built_in else str(Path(home.__file__ or "").resolve())
    versions = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "data": str(root.resolve()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "bad_rows": problems,
        "task_file": own_file,
    }


class _Job:
    """One task with its samples and settings."""

    def __init__(
        self, task: Task, root: Path, samples: list[Sample], settings: RunSettings
    ) -> None:
        self.task, self.root, self.samples, self.settings = task, root, samples, settings
        self.style = settings.style or task.styles[0]
        if self.style not in task.styles:
            known = ", ".join(task.styles)
            raise UsageError(f"{task.name} has no prompt style {self.style!r}; it has {known}.")
        self.n_new = settings.max_new_tokens or task.max_new_tokens
        self._clips: dict[str, Clip] = {}
        for sample in samples:
            self._clips.setdefault(sample.group, Clip.of(sample))
        swaps = any(arm.sound == "swap" for arm in settings.arms)
        self._donors = Donors(self._clips) if swaps else None

    def prompt(self, sample: Sample) -> str:
        """The question as the model gets it."""
        return self.task.prompt(sample, self.style)

    def mine(self, place: Place) -> list[Sample]:
        """The samples of one process, those of a group together."""
        by_group: dict[str, list[Sample]] = {}
        for sample in self.samples:
            by_group.setdefault(sample.group, []).append(sample)
        ranks = assign({g: len(s) for g, s in by_group.items()}, place.world)
        return [s for g, some in by_group.items() if ranks[g] == place.rank for s in some]

    def identity(self, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that makes this run another one than others."""
        return {**self._own_identity(), **fingerprint}

    def check_same(self, runs: RunFolder) -> None:
        """Compare with a finished run, whose model need not be loaded for that."""
        there = runs.need()
        own = self._own_identity()
        rest = {k: v for k, v in there.identity.items() if k not in own}
        runs.begin(Manifest({**rest, **own}, there.about), ())

    def _own_identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for sample in self.samples:
            row = sample_row(sample, self.root)
            line = json.dumps([row, self.prompt(sample)], sort_keys=True, default=str)
            digest.update(line.encode("utf-8", "backslashreplace") + b"\n")
        return {
            "task": self.task.name,
            "version": self.task.version,
            "split": self.task.split(self.settings.split),
            "style": self.style,
            "samples": len(self.samples),
            "questions": digest.hexdigest()[:16],
            "arms": [arm.to_dict() for arm in self.settings.arms],
            "max_new_tokens": self.n_new,
        }

    def ask(
        self,
        answerer: Answerer,
        mine: Sequence[Sample],
        left: set[Key],
        file: AnswerFile,
        progress: Progress,
        on_progress: Callable[[Progress], None],
    ) -> None:
        """Ask what is left, clip by clip."""

        def read(work: _Work) -> Any:
            arms = list(work.samples)
            return answerer.open(work.clip, arms, lambda: self._lenders(work.clip.group))

        on_progress(progress)
        broken = 0
        for work, opened in read_ahead(
            self._works(mine, left),
            read,
            workers=self.settings.workers,
            depth=self.settings.ahead,
        ):
            kinds: set[str] = set()
            for arm, samples in work.samples.items():
                rows = self._rows(answerer, opened, arm, samples)
                file.append(rows)
                kinds.update(row["status"] for row in rows)
                progress.failures.update(r["status"] for r in rows if r["status"] != OK)
                progress.done += len(rows)
            on_progress(progress)
            broken = broken + 1 if kinds == {"error"} else 0
            if broken >= _SAME_ERRORS:
                raise AVLlavaError(
                    f"The last {broken} videos failed, so something is broken: "
                    f"{rows[-1]['error']} The same command goes on from here."
                )

    def _works(self, mine: Sequence[Sample], left: set[Key]) -> Iterator[_Work]:
        """What is left, a clip at a time; clips of a group follow each other."""
        by_clip: dict[Clip, list[Sample]] = {}
        group: str | None = None
        for sample in mine:
            if sample.group != group:
                yield from self._of_group(by_clip, left)
                by_clip, group = {}, sample.group
            by_clip.setdefault(Clip.of(sample), []).append(sample)
        yield from self._of_group(by_clip, left)

    def _of_group(self, clips: Mapping[Clip, list[Sample]], left: set[Key]) -> Iterator[_Work]:
        for clip, samples in clips.items():
            some = {
                arm: tuple(s for s in samples if (arm.name, s.id) in left)
                for arm in self.settings.arms
            }
            some = {arm: s for arm, s in some.items() if s}
            if some:
                yield _Work(clip, some)

    def _lenders(self, group: str) -> Iterable[Clip]:
        assert self._donors is not None
        return (self._clips[other] for other in self._donors.of(group))

    def _rows(
        self, answerer: Answerer, opened: Any, arm: Arm, samples: Sequence[Sample]
    ) -> list[Answer]:
        """Ask about one clip in one arm; if that fails, one by one, so that only the bad fail."""
        if isinstance(opened, BaseException):
            return [self._failure(arm, s, opened) for s in samples]
        try:
            prompts = self._prompts(answerer, opened, arm, samples)
            replies = answerer.answer(opened, arm, prompts, self.n_new)
        except CATCHABLE as error:
            if len(samples) == 1:
                return [self._failure(arm, samples[0], error)]
            if kind_of(error) not in ("context", "oom", "error"):
                return [self._failure(arm, s, error) for s in samples]
            return [row for s in samples for row in self._rows(answerer, opened, arm, [s])]
        return [self._answer(arm, s, r) for s, r in zip(samples, replies, strict=True)]

    def _prompts(
        self, answerer: Answerer, opened: Any, arm: Arm, samples: Sequence[Sample]
    ) -> list[str]:
        if self.style not in self.task.frame_styles:
            return [self.prompt(s) for s in samples]
        if not isinstance(answerer, KnowsFrames):
            raise TypeError(f"The style {self.style!r} needs an answerer with frame_times().")
        times_s = answerer.frame_times(opened, arm)
        return [self.task.prompt_of_frames(s, self.style, times_s) for s in samples]

    def _answer(self, arm: Arm, sample: Sample, reply: Reply) -> Answer:
        return {
            **self._head(arm, sample),
            "status": OK,
            "raw": reply.text,
            "used": dict(reply.used),
            "timing_s": dict(reply.timing_s),
        }

    def _failure(self, arm: Arm, sample: Sample, error: BaseException) -> Answer:
        kind = kind_of(error)
        logger.info("%s, %s: %s: %s", sample.id, arm.name, kind, error)
        return {**self._head(arm, sample), "status": kind, "error": said(error)}

    def _head(self, arm: Arm, sample: Sample) -> Answer:
        return {"arm": arm.name, "id": sample.id, "group": sample.group}
