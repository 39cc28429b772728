"""What a benchmark is: its files, its prompt, how an answer is read and scored, its groupings.

Contract: one small file per benchmark in ``tasks/``, which needs no model and no network. A task
subclasses :class:`Task`, says its facts as class attributes, and writes at least :meth:`Task.docs`
and :meth:`Task.sample`; what follows from these is inherited. Reading and scoring are pure
functions of the annotation and the text, so that scores can be made again without a model.

The default rule never guesses and never drops: an answer that cannot be read has no score (None),
counts as wrong in the headline, and is counted as ``unparsed``. Under ``compat`` ("lmms") a task
reproduces what lmms-eval gives, quirks included; where that draws at random, ``how`` is ``random``
and the score is the expectation of the draw.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from av_llava.errors import AVLlavaError, DataError, UsageError, unknown_name
from av_llava_eval.points import Record, group_scores, headline, means
from av_llava_eval.sample import Prediction, Sample

COMPAT = ("lmms",)
"""Rules of other harnesses that can be reproduced."""

Doc = Mapping[str, Any]
"""One row of a benchmark's annotations, as it is on disk."""


@dataclass(frozen=True)
class Problem:
    """An annotation row that is no question."""

    where: str
    """Row, and id where there is one."""
    what: str
    """What is wrong with it."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Scan:
    """All rows of a split: the questions, and what is wrong with the others."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]


class Task:
    """One benchmark. Subclass, decorate with :func:`register`, and fill in."""

    name: ClassVar[str] = ""
    """Name on the command line: letters, digits, ``_``."""
    version: ClassVar[str] = "1"
    """Changes with every change of prompts, extraction or scores."""
    title: ClassVar[str] = ""
    """The benchmark's own name."""
    size: ClassVar[str] = ""
    """How many questions and videos the benchmark has, for tables; empty where not confirmed."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What must lie on disk, relative to the folder of ``--data``; shown by ``eval list``."""
    splits: ClassVar[tuple[str, ...]] = ("test",)
    """The first is the default."""
    groupings: ClassVar[tuple[str, ...]] = ()
    """Keys of ``Sample.meta`` by which scores are also given."""
    headline: ClassVar[str] = "micro"
    """``micro`` (mean over questions) or ``macro:FIELD`` (mean over the groups of a grouping)."""
    metric: ClassVar[str] = "accuracy"
    """Name of the score, for tables."""
    max_new_tokens: ClassVar[int] = 16
    """Longest answer in tokens."""
    styles: ClassVar[tuple[str, ...]] = ("default",)
    """Prompt styles; the first is the default. ``lmms`` is the wording of lmms-eval."""
    frame_styles: ClassVar[tuple[str, ...]] = ()
    """Of the styles those whose prompts depend on the frames that the model sees."""
    hears: ClassVar[bool] = False
    """Whether the benchmark is about sound."""

    # ---------------------------------------------------------------- to be written

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the annotations, as they are on disk.

        Raises:
            DataError: a file is missing or unreadable.
        """
        raise NotImplementedError

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """One row as a sample.

        A missing field may simply raise KeyError; other mistakes of a row are DataError. ``root``
        only places media: scoring calls this with a folder that need not exist.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- to be changed where needed

    def prompt(self, sample: Sample, style: str = "default") -> str:
        """The text of the question, without media: these stand before it."""
        if not sample.options:
            return f"{sample.question}\nAnswer with a single word or a short phrase."
        lines = [f"{a}. {text}" for a, text in zip(sample.letters, sample.options, strict=True)]
        ending = "Answer with the letter of the right option only."
        return "\n".join([sample.question, *lines, ending])

    def prompt_of_frames(self, sample: Sample, style: str, times_s: Sequence[float]) -> str:
        """The prompt in one of :attr:`frame_styles`.

        Args:
            sample: the question.
            style: of the prompt.
            times_s: of the frames that the model sees; empty where it sees none.
        """
        return self.prompt(sample, style)

    def extract(self, text: str, sample: Sample, compat: str | None = None) -> Prediction:
        """Read an answer. Options: the letter; open questions: the text in lower case."""
        if sample.options:
            from av_llava_eval import mcq

            return mcq.extract(text, sample.options)
        said = " ".join(text.lower().split()).strip(" .!")
        return Prediction(said, "text") if said else Prediction(None, "empty")

    def score(
        self, prediction: Prediction, sample: Sample, compat: str | None = None
    ) -> float | None:
        """Score what was read, 0 to 1; None where nothing could be read."""
        if not prediction.parsed:
            return None
        expected = sample.answer
        if isinstance(expected, str) and not sample.options:
            expected = " ".join(expected.lower().split()).strip(" .!")
        return float(prediction.extracted == expected)

    def extra_metrics(self, text: str, sample: Sample) -> dict[str, float]:
        """Further scores of one answer, by name, each 0 to 1; their means are reported."""
        return {}

    def judge_prompt(self, sample: Sample, text: str) -> str | None:
        """What a judge is asked about one answer; None: the task needs no judge."""
        return None

    def read_verdict(self, verdict: str) -> Mapping[str, float] | None:
        """Scores by name from a judge's words; None if they cannot be read, which is a failure."""
        return None

    def compat_metrics(self, records: Sequence[Record], compat: str) -> dict[str, Any]:
        """The metrics of another harness, by its names, from records scored by its rule."""
        return {}

    def submission(self, answers: Sequence[tuple[Sample, Prediction]]) -> tuple[str, str] | None:
        """Name and content of a file for the benchmark's own server; None if it has none."""
        return None

    def chance(self, sample: Sample) -> float | None:
        """Expected score of guessing; None where it makes no sense."""
        return 1 / len(sample.options) if sample.options else None

    # ---------------------------------------------------------------- inherited

    def scan(self, root: str | Path, split: str | None = None) -> Scan:
        """Read all rows; rows that cannot be used are listed, not raised.

        Raises:
            DataError: the annotations cannot be read at all, or hold no rows.
        """
        root = Path(root)
        split = self.split(split)
        samples: list[Sample] = []
        problems: list[Problem] = []
        seen: dict[str, int] = {}
        index = -1
        for index, doc in enumerate(self.docs(root, split)):
            found = self._read(doc, index, root)
            if isinstance(found, Sample) and found.id in seen:
                said = f"its id {found.id!r} is also that of row {seen[found.id]}"
                found = Problem(f"row {index}", said)
            if isinstance(found, Problem):
                problems.append(found)
            else:
                seen[found.id] = index
                samples.append(found)
        if index < 0:
            raise DataError(f"The annotations of {self.name} in {root} ({split}) hold no rows.")
        return Scan(tuple(samples), tuple(problems))

    def load(self, root: str | Path, split: str | None = None) -> Iterator[Sample]:
        """All samples of a split.

        Raises:
            DataError: a row cannot be used; :meth:`scan` lists all of them.
        """
        found = self.scan(root, split)
        if found.problems:
            raise DataError(problem_report(self.name, found))
        yield from found.samples

    def split(self, wanted: str | None) -> str:
        """The split's name, the default one for None."""
        if wanted is None:
            return self.splits[0]
        if wanted not in self.splits:
            raise unknown_name(f"split of {self.name}", wanted, self.splits)
        return wanted

    def check(self, root: str | Path, split: str | None = None) -> list[str]:
        """What is missing on disk or wrong with the annotations, as sentences; empty if nothing."""
        try:
            found = self.scan(root, split)
        except AVLlavaError as error:
            return [str(error)]
        out = [problem_report(self.name, found)] if found.problems else []
        files = dict.fromkeys(f for s in found.samples for f in s.files)
        missing = [f for f in files if not f.exists()]
        if missing:
            out.append(
                f"{len(missing)} of {len(files)} media files are missing, such as {missing[0]}."
            )
        return out

    def score_record(self, doc: Doc, prediction: str, compat: str | None = None) -> dict[str, Any]:
        """Score one answer to one row.

        Args:
            doc: row of the annotations.
            prediction: text of the answer.
            compat: None for the default rule, ``"lmms"`` for lmms-eval's.

        Returns:
            ``extracted`` and ``score`` (None where unparsed), ``how``, ``random_fallback`` (the
            other harness draws here; the score is the expectation), and what
            :meth:`aggregate` needs.
        """
        return self.score_sample(self.sample(doc, 0, Path()), prediction, compat)

    def score_sample(self, sample: Sample, text: str, compat: str | None = None) -> dict[str, Any]:
        """As :meth:`score_record`, from the sample."""
        check_compat(compat)
        read = self.extract(text, sample, compat)
        labelled = sample.answer is not None
        return {
            **self.outline(sample),
            "raw": text,
            "extracted": read.extracted,
            "how": read.how,
            "random_fallback": read.how == "random",
            "score": self.score(read, sample, compat) if labelled else None,
            "labelled": labelled,
            "compat": compat,
            "metrics": self.extra_metrics(text, sample) if labelled and compat is None else {},
        }

    def outline(self, sample: Sample) -> dict[str, Any]:
        """What of a sample its record carries."""
        return {
            "id": sample.id,
            "group": sample.group,
            "answer": sample.answer,
            "meta": dict(sample.meta),
        }

    def aggregate(self, records: Iterable[Record], compat: str | None = None) -> dict[str, Any]:
        """Join records into scores.

        Args:
            records: as :meth:`score_record` gives them, or rows that hold ``doc`` and ``score``.
            compat: None takes the rule by which the records were scored.

        Returns:
            ``headline`` (None without labels), ``n``, ``unparsed``, ``metrics`` (means of further
            metrics), ``groups`` ({grouping: {value: {"score", "n"}}}); by another harness's rule
            also its metrics under its own names.
        """
        check_compat(compat)
        rows = [self._whole(r) for r in records]
        out: dict[str, Any] = {
            "headline": headline(rows, self.headline),
            "metric": self.metric,
            "n": len(rows),
            "unparsed": sum(r.get("score") is None and r.get("labelled", True) for r in rows),
            "metrics": means(r.get("metrics") or {} for r in rows),
            "groups": {g: group_scores(rows, g) for g in self.groupings},
        }
        rules = {r.get("compat", "lmms") for r in rows} if compat is None else {compat}
        rule = next(iter(rules)) if len(rules) == 1 else None
        return {**out, **self.compat_metrics(rows, rule)} if rule is not None else out

    def _whole(self, record: Record) -> Record:
        """A record with what aggregation needs, for rows that hold only ``doc`` and ``score``."""
        if "meta" in record or "doc" not in record:
            return record
        return {**self.outline(self.sample(record["doc"], 0, Path())), **record}

    def _read(self, doc: Doc, index: int, root: Path) -> Sample | Problem:
        where = f"row {index}"
        try:
            found = self.sample(doc, index, root)
        except KeyError as error:
            return Problem(where, f"the field {error} is missing")
        except DataError as error:
            return Problem(where, str(error))
        except (TypeError, ValueError, AttributeError) as error:
            return Problem(where, f"a field has the wrong form ({error})")
        if wrong := found.not_text():
            return Problem(where, wrong)
        where = f"{where} ({found.id})"
        choices = None if found.options is None else tuple(found.letters)
        if choices is not None and found.answer is not None and found.answer not in choices:
            said = f"the answer {found.answer!r} is none of {len(choices)} options"
            return Problem(where, said)
        if not found.question.strip():
            return Problem(where, "the question is empty")
        return found


def problem_report(name: str, found: Scan, shown: int = 3) -> str:
    """One sentence about the rows that cannot be used."""
    total = len(found.samples) + len(found.problems)
    first = "; ".join(map(str, found.problems[:shown]))
    more = len(found.problems) - shown
    return f"{len(found.problems)} of {total} annotation rows of {name} cannot be used: {first}" + (
        f"; and {more} more." if more > 0 else "."
    )


def check_compat(compat: str | None) -> None:
    """Refuse a rule that is not known."""
    if compat is not None and compat not in COMPAT:
        raise unknown_name("compat", compat, COMPAT)


# -------------------------------------------------------------------- registry

TASKS: dict[str, Task] = {}
"""Name → task; filled by :func:`register`."""

T = TypeVar("T", bound=type[Task])


def register(task: T) -> T:
    """Make a task known by its name; for use as a decorator.

    Raises:
        UsageError: it has no name, or another task has it.
    """
    if not task.name.isidentifier():
        raise UsageError(f"{task.__name__} needs a name of letters, digits and _: {task.name!r}.")
    known = TASKS.get(task.name)
    if known is not None and type(known).__module__ != task.__module__:
        raise UsageError(f"There is a task {task.name!r} already: {type(known).__module__}.")
    TASKS[task.name] = task()
    return task


def task_names() -> list[str]:
    """The names of all tasks, sorted."""
    _import_all()
    return sorted(TASKS)


def get_task(name: str) -> Task:
    """The task of a name; or the one that a Python file of your own registers.

    Args:
        name: as ``eval list`` shows it, or the path of a ``.py`` file.

    Raises:
        UsageError: there is no such task; the message holds the known ones.
    """
    if name.endswith(".py"):
        return _task_of_file(Path(name))
    _import_all()
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]


def _import_all() -> None:
    from av_llava_eval import tasks

    for module in pkgutil.iter_modules(tasks.__path__, f"{tasks.__name__}."):
        importlib.import_module(module.name)


_OF_A_FILE = (SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError, OSError)
"""What a file with a mistake in it may raise."""


def _task_of_file(path: Path) -> Task:
    if not path.is_file():
        raise UsageError(f"There is no task file {str(path)!r}.")
    _import_all()
    name = f"av_llava_eval_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except _OF_A_FILE as error:
        said = f"{type(error).__name__}: {error}"
        raise UsageError(f"The task file {path} cannot be imported: {said}.") from error
    own = [t for t in TASKS.values() if type(t).__module__ == name]
    if len(own) != 1:
        raise UsageError(f"{path} registers {len(own)} tasks; a task file registers one.")
    return own[0]
