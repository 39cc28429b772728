"""Around ``generate``: pieces of text as they come, cancelling, and a guard against overflow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)

from av_llava.answers import Answer
from av_llava.errors import AVLlavaError, UsageError

Run = Callable[..., Tensor]
"""Generates with the given hooks; returns new ids [n]."""
Finish = Callable[[Tensor, bool], Answer]
"""Makes the answer from new ids and whether it was interrupted."""

_KEPT_CRITERIA = 8


class AnswerStream:
    """Pieces of an answer as they come; ``answer`` is set when the iteration has ended."""

    def __init__(self, tokenizer: Any, run: Run, finish: Finish, stops: Sequence[str] = ()) -> None:
        self.answer: Answer | None = None
        self._finish = finish
        self._stops = [s for s in stops if s]
        self._cancelled = _Cancelled()
        self._streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
        self._result: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)

    def cancel(self) -> None:
        """End the answer after the token that is being made."""
        self._cancelled.event.set()

    def _run(self, run: Run) -> None:
        try:
            with torch.no_grad():
                self._result["ids"] = run(
                    streamer=_Collector(self._streamer),
                    stopping_criteria=StoppingCriteriaList([self._cancelled]),
                )
        except BaseException as error:  # handed to the thread that iterates
            self._result["error"] = error
        finally:
            self._streamer.end()

    def __iter__(self) -> Iterator[str]:
        if self._thread.ident is not None:
            raise UsageError("An answer can be streamed once; its text is in .answer afterwards.")
        self._thread.start()
        try:
            yield from without_stops(self._streamer, self._stops)
        finally:
            # Also when the caller leaves or is interrupted: what was said has an account.
            self.cancel()
            self._thread.join()
            if "ids" in self._result:
                self.answer = self._finish(self._result["ids"], self._cancelled.stopped)
        if "error" in self._result:
            raise self._result["error"]


def without_stops(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Pass text on up to the first stop text, holding back what may be the start of one."""
    held = ""
    longest = max(map(len, stops), default=1)
    for piece in pieces:
        held += piece
        found = [held.index(s) for s in stops if s in held]
        if found:
            if held[: min(found)]:
                yield held[: min(found)]
            return
        ready = len(held) - longest + 1
        if ready > 0:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held


class _Collector:
    """Passes new ids to the text streamer; generation with embeddings sends no prompt."""

    def __init__(self, streamer: TextIteratorStreamer) -> None:
        self.streamer = streamer

    def put(self, value: Tensor) -> None:
        """Take the next id(s)."""
        if value.numel():
            self.streamer.put(value)

    def end(self) -> None:
        """Do nothing: the thread ends the streamer, also after an error."""


class _Cancelled(StoppingCriteria):
    """Stops when its event is set, and remembers that it did."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.stopped = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Say for each row whether to stop. [K]"""
        done = self.stopped = self.event.is_set()
        return torch.full((input_ids.shape[0],), done, device=input_ids.device)


class StopTexts:
    """Criteria that end an answer at a text, made once for each set of texts.

    Making one looks at every token of the vocabulary, which takes a second for 150,000 of them;
    ``generate(stop_strings=...)`` would do so for every answer.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[StopStringCriteria, Any]] = {}

    def criteria(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], end_ids: Collection[int]
    ) -> list[StopStringCriteria]:
        """The criteria for some texts; one that is an end token needs none.

        Args:
            tokenizer: of the model.
            stops: the texts.
            end_ids: tokens at which ``generate`` ends by itself.
        """
        known = tokenizer.get_added_vocab()
        wanted = tuple(dict.fromkeys(s for s in stops if known.get(s) not in end_ids))
        if not wanted:
            return []
        key = (wanted, id(tokenizer), len(tokenizer))
        if key not in self._made:
            made = StopStringCriteria(tokenizer, list(wanted))
            self._made[key] = made, tokenizer  # which keeps the id from being given again
            if len(self._made) > _KEPT_CRITERIA:
                del self._made[next(iter(self._made))]
        return [self._made[key][0]]


class Finite(LogitsProcessor):
    """Raises when the model's outputs overflow, instead of answering with noise."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.first = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Check the logits and pass them on. [K, vocabulary]"""
        # bfloat16 and float32 cannot overflow half way through an answer in practice, so that
        # they are looked at once; float16 is looked at in every step.
        if (self.first or self.dtype is torch.float16) and bool(scores.isnan().any()):
            name = str(self.dtype).removeprefix("torch.")
            raise AVLlavaError(
                f"The model's outputs are not numbers (it runs in {name}). "
                + (
                    "float16 overflows with this model: load it with dtype='bfloat16' or 'float32'."
                    if self.dtype is torch.float16
                    else "Its weights or the given pixels and samples hold NaN."
                )
            )
        self.first = False
        return scores
