"""A stand-in for the library behind ``cli.engine``, for what a model cannot be made to do.

It answers with what it was asked, so that tests see what reached it; some prompts make it fail or
wait. Run as a program (``python cli_fake.py ask ...``) it is ``av-llava`` with this behind it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from av_llava.answers import Answer, MediumUse, Usage
from av_llava.cli import engine
from av_llava.errors import BudgetError


class FakeStream:
    def __init__(self, model: FakeModel, answer: Answer, slow: bool) -> None:
        self.answer: Answer | None = None
        self._model, self._final, self._slow = model, answer, slow

    def __iter__(self) -> Any:
        for word in self._final.text.split(" "):
            if self._slow:
                time.sleep(0.2)
            yield word + " "
        self._model.done(self._final)
        self.answer = self._final


class FakeSession:
    def __init__(self, model: FakeModel, media: list[str], options: dict[str, Any]) -> None:
        self.model, self.media, self.options = model, media, options
        self.history: list[tuple[str, str]] = []
        model.log(session=media)

    def stream(self, prompt: str, *, chat: bool = False) -> FakeStream:
        asked = {"history": list(self.history), "chat": chat}
        return self.model.make_stream(self.media, prompt, self.options, asked)


class FakeModel:
    """Behaves as the loaded model of ``av_llava.load``."""

    name, device, dtype = "fake", "cpu", "float32"
    processor = SimpleNamespace(config=SimpleNamespace(sampling=SimpleNamespace(frames=32)))

    def __init__(self) -> None:
        self.is_random = False
        self.calls: list[dict[str, Any]] = []
        self.model = SimpleNamespace(parameters=lambda: iter(()))

    def log(self, **call: Any) -> None:
        self.calls.append(call)
        if path := os.environ.get("FAKE_LOG"):
            with open(path, "a") as handle:
                handle.write(json.dumps(call) + "\n")

    def done(self, answer: Answer) -> None:
        self.log(done=answer.text)

    def ask(self, media: list[str], prompt: str, **options: Any) -> Answer:
        self.log(ask=prompt, media=media, options=options)
        return self._answer(media, prompt, options)

    def ask_many(self, media: list[str], prompts: list[str], **options: Any) -> list[Answer]:
        self.log(ask_many=prompts, media=media, options=options)
        return [self._answer(media, p, options) for p in prompts]

    def ask_batch(self, rows: list[dict[str, Any]], **options: Any) -> list[Answer]:
        self.log(ask_batch=rows, options=options)
        return [self._answer(r["media"], r["prompt"], options) for r in rows]

    def stream(self, media: list[str], prompt: str, **options: Any) -> FakeStream:
        return self.make_stream(media, prompt, options, {})

    def stream_messages(self, messages: list[dict[str, Any]], **options: Any) -> FakeStream:
        return self.make_stream([], messages[-1]["content"], options, {"messages": messages})

    def session(self, media: list[str], **options: Any) -> FakeSession:
        return FakeSession(self, list(media), options)

    def make_stream(
        self, media: list[str], prompt: str, options: dict[str, Any], more: dict[str, Any]
    ) -> FakeStream:
        self.log(stream=prompt, media=list(media), options=options, **more)
        return FakeStream(self, self._answer(media, prompt, options), "slow" in prompt)

    def _answer(self, media: list[str], prompt: str, options: dict[str, Any]) -> Answer:
        if "fail:budget" in prompt:
            raise BudgetError("The prompt needs 9000 tokens; the context holds 4096.")
        if "fail:bug" in prompt:
            raise ValueError("something odd\nwith a second line")
        if "fail:memory" in prompt:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        if "fail:interrupt" in prompt:
            raise KeyboardInterrupt
        if "wait" in prompt:
            time.sleep(30)
        words = 40 if "slow" in prompt else 2
        text = "\x1b[2Jevil" if "escape" in prompt else " ".join(["word"] * words)
        used = tuple(MediumUse("video", m, 10, (0.0, 1.0), 20) for m in media)
        return Answer(
            f"{text} <{prompt}>", "stop", Usage(5, 0, 10 * len(used), 0, 2), used, "cpu",
            "float32", "fake", warnings=("the file is odd",) if "odd" in prompt else (),
        )  # fmt: skip


def install(patch: Any = setattr) -> FakeModel:
    """Put the fake behind the commands."""
    model = FakeModel()
    patch(engine, "load", lambda loading: model)
    patch(engine, "plan", lambda *request: model.log(plan=True))
    patch(engine, "describe", lambda path, base=None: {"name": path, "parameters": 7})
    return model


if __name__ == "__main__":
    from av_llava.cli.main import run

    install()
    sys.exit(run())
