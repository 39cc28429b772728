"""A judge reads open answers: a function of yours, or a model behind an OpenAI-compatible address.

Contract: off unless asked for. Every verdict is kept in ``verdicts.jsonl`` of the run, with the
judge's name and the time, and is never asked for twice; another judge or another prompt has its own
verdicts. A verdict that cannot be had or read is a failure that is counted, never a zero, and the
means say over how many answers they are. The offline metrics stay what they are.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from av_llava.errors import AVLlavaError, DataError, UsageError
from av_llava_eval.failures import OK
from av_llava_eval.locks import RunLock
from av_llava_eval.records import AppendedFile
from av_llava_eval.scoring import Record, Scored
from av_llava_eval.sharding import Place

logger = logging.getLogger(__name__)

VERDICTS = "verdicts.jsonl"


class JudgeError(AVLlavaError):
    """A judge that did not answer."""


class Judge(Protocol):
    """Answers a prompt in words; called from several threads."""

    @property
    def name(self) -> str:
        """What identifies it, such as its model; verdicts are kept by this name."""

    def __call__(self, prompt: str) -> str:
        """The verdict.

        Raises:
            JudgeError: there is none.
        """


@dataclass(frozen=True)
class FunctionJudge:
    """A function of a prompt."""

    name: str
    function: Callable[[str], str]

    def __call__(self, prompt: str) -> str:
        """Call the function."""
        return self.function(prompt)


@dataclass(frozen=True)
class UrlJudge:
    """A chat model behind an OpenAI-compatible address.

    Args:
        url: up to ``/v1``; ``/chat/completions`` is added.
        model: as the server names it.
        key: sent as a bearer token; never written anywhere.
        timeout_s: of one request.
        attempts: for errors of the network and the server (429, 5xx), with growing pauses.
        pause_s: before the second attempt.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    attempts: int = 5
    pause_s: float = 1.0

    def __post_init__(self) -> None:
        if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise UsageError(
                f"A judge's address begins with http:// or https://, not {self.url!r}."
            )
        if not self.model:
            raise UsageError("A judge needs the name of its model.")

    @property
    def name(self) -> str:
        """The model and the host."""
        return f"{self.model} at {urllib.parse.urlsplit(self.url).netloc.rpartition('@')[2]}"

    def __call__(self, prompt: str) -> str:
        """Ask with temperature 0, and again when the server is busy."""
        data = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "seed": 0,
        }
        last: Exception = JudgeError("no attempt was made")
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause_s * 2 ** (attempt - 1))
            try:
                return self._once(json.dumps(data).encode())
            except urllib.error.HTTPError as error:
                last = error
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:
                last = error
        raise JudgeError(f"The judge {self.name} gives no verdict: {last}.")

    def _once(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, body, headers)
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            text = response.read()
        try:
            said = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeError(f"{address} gives no chat completion: {text[:200]!r}.") from error
        return str(said or "")


@dataclass(frozen=True)
class Judged:
    """A run with its verdicts."""

    scored: Scored
    """Its records carry the judge's scores among their ``metrics``."""
    judge: str
    asked: int
    """Verdicts that were asked for now."""
    kept: int
    """Verdicts that were there already."""
    unreadable: int
    """Verdicts that hold no score."""
    failed: int
    """Verdicts that could not be had."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data for the scores."""
        names = ("judge", "asked", "kept", "unreadable", "failed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Question:
    arm: str
    record: Record
    prompt: str

    def key(self, judge: str) -> str:
        return hashlib.sha256(f"{judge}\x00{self.prompt}".encode(errors="replace")).hexdigest()[:32]


def judge_run(
    scored: Scored,
    judge: Judge,
    *,
    workers: int = 4,
    on_verdict: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """Have the answers of a run judged, except those that were already.

    Args:
        scored: the run.
        judge: whom to ask.
        workers: questions that are asked at the same time.
        on_verdict: called with how many are done, and of how many.

    Raises:
        UsageError: the task needs no judge, or another process holds the run.
        DataError: the verdicts that are there cannot be read.
    """
    questions = _questions(scored)
    if not questions:
        raise UsageError(f"{scored.task.name} asks no judge: its answers are scored by rules.")
    with (
        RunLock(scored.folder, Place()),
        AppendedFile(scored.folder / VERDICTS, lambda row: "key" in row) as file,
    ):
        verdicts = {row["key"]: str(row["verdict"]) for row in _lines(scored.folder / VERDICTS)}
        new = {q.key(judge.name): q for q in questions}
        new = {key: q for key, q in new.items() if key not in verdicts}
        failed = 0
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            found = pool.map(lambda q: _ask(judge, q), new.values())
            for done, (key, verdict) in enumerate(zip(new, found, strict=True), 1):
                if isinstance(verdict, JudgeError):
                    logger.warning("%s: %s", new[key].record["id"], verdict)
                    failed += 1
                else:
                    file.append([_row(key, judge.name, new[key], verdict)])
                    verdicts[key] = verdict
                on_verdict(done, len(new))
    return _judged(scored, judge.name, questions, verdicts, len(new), failed)


def _questions(scored: Scored) -> list[_Question]:
    """What a judge is asked about every answer that there is."""
    samples = {s.id: s for s in scored.samples}
    out = []
    for arm, records in scored.arms.items():
        for record in records:
            if record["status"] == OK and record["labelled"]:
                prompt = scored.task.judge_prompt(samples[record["id"]], record["raw"])
                if prompt is not None:
                    out.append(_Question(arm, record, prompt))
    return out


def _ask(judge: Judge, question: _Question) -> str | JudgeError:
    try:
        return judge(question.prompt)
    except JudgeError as error:
        return error


def _row(key: str, judge: str, question: _Question, verdict: str) -> dict[str, Any]:
    return {
        "key": key,
        "judge": judge,
        "arm": question.arm,
        "id": question.record["id"],
        "prompt": question.prompt,
        "verdict": verdict,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _judged(
    scored: Scored,
    name: str,
    questions: Sequence[_Question],
    verdicts: Mapping[str, str],
    asked: int,
    failed: int,
) -> Judged:
    """Put the judge's scores into the records."""
    scores: dict[tuple[str, str], Mapping[str, float]] = {}
    unreadable = 0
    for question in questions:
        verdict = verdicts.get(question.key(name))
        if verdict is None:
            continue
        found = scored.task.read_verdict(verdict)
        if found is None:
            unreadable += 1
        else:
            scores[question.arm, question.record["id"]] = found
    arms = {
        arm: tuple(
            {**r, "metrics": {**r["metrics"], **scores.get((arm, r["id"]), {})}} for r in records
        )
        for arm, records in scored.arms.items()
    }
    kept = sum(q.key(name) in verdicts for q in questions) - (asked - failed)
    return Judged(replace(scored, arms=arms), name, asked, max(kept, 0), unreadable, failed)
