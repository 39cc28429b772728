"""The chat model that lmms-eval runs: all questions of a video are answered from one encoding.

Contract: ``generate_until`` is a generator in the order of the requests, so that lmms-eval's cache
stores every answer as soon as it is there; with a fixed run id (set here unless you set it), a run
that was killed continues where it stopped. A medium that cannot be read gives an empty answer,
which lmms-eval counts as wrong and does not cache, and is logged; ``on_error=raise`` stops instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

import av_llava
from av_llava.errors import AVLlavaError, BudgetError, MediaError, UsageError
from av_llava_eval.fingerprint import model_fingerprint
from av_llava_eval.lmms.requests import Talk, group_key, read_options, read_talk


class AVLlavaChat(lmms):
    """``--model av_llava --model_args pretrained=PATH,frames=32,audio=off``.

    Args:
        pretrained: checkpoint, as ``av_llava.load`` takes it.
        base: language model below a projector or adapter.
        device: where; by default the GPU of this process.
        dtype, attn_implementation, quantize: see ``av_llava.load``.
        audio: the sound of videos: auto (if there is one), on, off. No task says whether it wants
            the sound of its videos, so this does.
        frames, fps, aggregator, max_visual_tokens: see ``av_llava.Options``; by default the
            model's own.
        max_new_tokens: longest answer, where the task does not say.
        on_error: ``empty`` or ``raise``.
        batch_size: questions of one video that are answered at once; each holds a copy of the
            video's cache. ``auto`` is 4.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        base: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        quantize: str | None = None,
        audio: str | bool = "auto",
        frames: int | None = None,
        fps: float | None = None,
        aggregator: str | None = None,
        max_visual_tokens: int | None = None,
        max_new_tokens: int = 128,
        on_error: str = "empty",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if on_error not in ("empty", "raise"):
            raise UsageError(f"on_error is 'empty' or 'raise', not {on_error!r}.")
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        if device in (None, "cuda"):
            device = str(state.device)
        self.owner = av_llava.load(
            pretrained,
            device,
            dtype,
            base=base,
            attn_implementation=attn_implementation,
            quantize=quantize,
        )
        switch = {True: "on", False: "off"}
        self.media_options = {
            "audio": switch[audio] if isinstance(audio, bool) else audio,
            "frames": frames,
            "fps": fps,
            "aggregator": aggregator,
            "max_visual_tokens": max_visual_tokens,
        }
        self.max_new_tokens, self.on_error = max_new_tokens, on_error
        self.batch_size = 4 if batch_size == "auto" else int(batch_size)
        self.n_failed = 0
        # Read by lmms-eval's cache after the model is made: a restart finds its own answers.
        parts = model_fingerprint(self.owner)
        os.environ.setdefault("LMMS_CACHE_RUN_ID", "-".join(["av_llava", *parts.values()]))

    @property
    def device(self) -> Any:
        """Where the model is; lmms-eval gathers its counts there."""
        return self.owner.device

    def generate_until(self, requests: Sequence[Instance]) -> Iterator[str]:  # type: ignore[override]
        """Answer in the order of the requests, video by video."""
        plans = [self._plan(r) for r in requests]
        members: dict[str, list[int]] = {}
        for i, (key, _) in enumerate(plans):
            if key is not None:
                members.setdefault(key, []).append(i)
        answers: dict[int, str] = {}
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="av_llava")
        for i, request in enumerate(requests):
            if i not in answers:
                key, options = plans[i]
                # Each request is one pending answer, also when the same one is asked repeatedly.
                same = [i] if key is None else members[key]
                talks = [self._talk(requests[j]) for j in same]
                said = self._answer(talks, options, str(request.args[3]))
                answers.update(zip(same, said, strict=True))
            bar.update()
            yield answers.pop(i)
        bar.close()
        if self.n_failed:
            logger.warning(
                f"av_llava: {self.n_failed} of {len(requests)} answers are empty: errors."
            )

    def _plan(self, request: Instance) -> tuple[str | None, dict[str, Any]]:
        """Key of the request's group, and its options."""
        options = read_options(request.args[2], self.max_new_tokens)
        return group_key(self._talk(request), options), options

    def _talk(self, request: Instance) -> Talk:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return read_talk(doc_to_messages(self.task_dict[task][split][doc_id]))

    def _answer(self, talks: Sequence[Talk], options: dict[str, Any], doc: str) -> list[str]:
        """Answer requests that share their media, or a single one of any form."""
        try:
            found = [t.question for t in talks]
            if found[0] is None:
                answer = self.owner.chat(list(talks[0].messages), **self.media_options, **options)
                return [answer.text]
            media, _, system = found[0]
            session = self.owner.session(
                list(media), system=system, **self.media_options, **options
            )
            asked = [q[1] for q in found if q is not None]
            step = self.batch_size
            parts = [session.ask_many(asked[i : i + step]) for i in range(0, len(asked), step)]
            return [a.text for part in parts for a in part]
        except (MediaError, BudgetError, torch.OutOfMemoryError) as error:
            if self.on_error == "raise":
                raise
            self.n_failed += len(talks)
            logger.error(f"document {doc}: {error}")
            return [""] * len(talks)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: tasks of this kind compare the likelihoods of given answers."""
        raise AVLlavaError("av_llava answers generate_until tasks only, not loglikelihood ones.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: tasks of this kind ask again after seeing an answer."""
        raise AVLlavaError("av_llava answers generate_until tasks only, not multi-round ones.")
