"""Checks the scorers against published ones, on a folder of records that those have scored.

Contract: a folder holds ``<task>.jsonl`` files whose lines have ``doc``, ``prediction`` and what
the original made of them (``extracted``, ``score``, ``random_fallback``, the prompt's hash). Where
the original draws at random, only that it does is compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from av_llava.errors import DataError
from av_llava_eval.task import Task, get_task, task_names

SHOWN = 5


@dataclass(frozen=True)
class Verified:
    """One task's records."""

    task: str
    records: int
    scores: int
    """Records whose extracted answer and score agree."""
    prompts: int
    """Records whose prompt agrees."""
    with_prompt: int
    """Records that say what the prompt was."""
    differences: tuple[str, ...]
    """The first few that do not agree."""

    @property
    def agrees(self) -> bool:
        """Whether everything does."""
        return self.scores == self.records and self.prompts == self.with_prompt


def verify(folder: str | Path) -> list[Verified]:
    """Compare every file of a folder that is named like a task.

    Raises:
        DataError: no file is, or one cannot be read.
    """
    known = set(task_names())
    files = [f for f in sorted(Path(folder).glob("*.jsonl")) if f.stem in known]
    if not files:
        raise DataError(
            f"{folder} holds no file that is named like a task, such as videomme.jsonl."
        )
    return [_verify(get_task(file.stem), list(_rows(file))) for file in files]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict) or not {"doc", "prediction"} <= row.keys():
                    raise DataError(f"{file}, line {number}: a record has doc and prediction.")
                yield row
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read: {error}.") from error


def _verify(task: Task, rows: list[dict[str, Any]]) -> Verified:
    scores = prompts = with_prompt = 0
    differences: list[str] = []
    for row in rows:
        wrong = list(_score_differences(task, row))
        scores += not wrong
        expected = row.get("reference_prompt_sha256")
        if expected is not None:
            with_prompt += 1
            text = task.prompt(task.sample(row["doc"], 0, Path()), "lmms")
            same = hashlib.sha256(text.encode()).hexdigest() == expected
            prompts += same
            wrong += [] if same else ["the prompt differs"]
        if wrong and len(differences) < SHOWN:
            differences.append(f"{row['prediction'][:60]!r}: {'; '.join(wrong)}")
    return Verified(task.name, len(rows), scores, prompts, with_prompt, tuple(differences))


def _score_differences(task: Task, row: Mapping[str, Any]) -> Iterator[str]:
    ours = task.score_record(row["doc"], row["prediction"], compat="lmms")
    drawn = bool(row.get("random_fallback", False))
    if (ours["how"] == "random") != drawn:
        yield f"the original {'draws' if drawn else 'does not draw'} at random"
    elif not drawn:
        for name in ("extracted", "score"):
            if name in row and ours[name] != row[name]:
                yield f"{name} is {ours[name]!r}, there {row[name]!r}"
