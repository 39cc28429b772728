"""The Python API: load a model, ask it about media, stream, batch, and keep a session.

Contract: one request is messages plus options; everything that an option can be wrong about is
checked before weights or media are touched. Every answer carries an account of what was used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from av_llava.answers import Answer, MediumUse, Usage
from av_llava.budgeting import check_context
from av_llava.chat import Message, normalize_messages
from av_llava.checkpoints.adapters import save_adapter
from av_llava.checkpoints.ears import TowerSource, attach_audio
from av_llava.checkpoints.lora import has_lora
from av_llava.checkpoints.partial import load_any
from av_llava.checkpoints.quiet import without_bars
from av_llava.checkpoints.target import resolve_device, resolve_dtype
from av_llava.demo_model import SHIPPED, build_tiny, shipped
from av_llava.errors import UsageError, unknown_name
from av_llava.generation import AnswerStream, Finite, StopTexts
from av_llava.inspection import RequestPlan, describe, plan
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.options import Options, as_media, conversation, with_system
from av_llava.processor import AVLlavaProcessor, Prepared
from av_llava.settings import AudioSettings

__all__ = [
    "AVLlava",
    "Answer",
    "AnswerStream",
    "Options",
    "RequestPlan",
    "add_audio",
    "as_media",
    "describe",
    "load",
    "plan",
]


class AVLlava:
    """A model with its processor, ready to be asked.

    Example:
        >>> m = av_llava.load("path/to/checkpoint")
        >>> print(m.ask("clip.mp4", "What happens after the bell?"))
    """

    def __init__(
        self,
        model: AVLlavaForConditionalGeneration,
        processor: AVLlavaProcessor,
        name: str = "",
        is_random: bool = False,
    ) -> None:
        self.model, self.processor = model, processor
        self.name, self.is_random = name, is_random
        self._stop_texts = StopTexts()

    def __repr__(self) -> str:
        return f"AVLlava({self.name!r}, {self.device}, {self.dtype})"

    @property
    def device(self) -> torch.device:
        """Where the embeddings are; where they are computed, if they are offloaded."""
        device: torch.device = self.model.get_input_embeddings().weight.device  # type: ignore
        if device.type == "meta":
            return torch.device(self.model._hf_hook.execution_device)
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the language model's weights."""
        return self.model.dtype

    def ask(self, media: Any, prompt: str, **options: Any) -> Answer:
        """Answer one question.

        Args:
            media: see :func:`as_media`.
            prompt: the question; ``<image>``, ``<video>`` and ``<audio>`` in it place the media,
                which otherwise stand before it.
            options: see :class:`Options`.
        """
        chosen = Options.of(options)
        return self._answer([conversation(media, prompt, chosen.system)], chosen)[0]

    def chat(self, messages: Any, **options: Any) -> Answer:
        """Answer the last turn of a conversation (Hugging Face, OpenAI or LLaVA spelling)."""
        chosen = Options.of(options)
        turns = with_system(normalize_messages(messages), chosen.system)
        return self._answer([turns], chosen)[0]

    def ask_many(self, media: Any, prompts: Sequence[str], **options: Any) -> list[Answer]:
        """Answer several questions about the same media, which are encoded once."""
        chosen = Options.of(options)
        if isinstance(prompts, str):
            raise UsageError("prompts is one string; give a list of questions, or use ask.")
        if not as_media(media):
            return self.ask_batch([{"prompt": p} for p in prompts], **options)
        return self.session(media, **options).ask_many(
            prompts, max_new_tokens=chosen.max_new_tokens
        )

    def ask_batch(
        self, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 4, **options: Any
    ) -> list[Answer]:
        """Answer rows of ``{"media": ..., "prompt": ...}`` in batches, in their order."""
        chosen = Options.of(options)
        if isinstance(rows, Mapping):
            raise UsageError("rows is one mapping; give a list of rows, or use ask.")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}.")
        talks = []
        for i, row in enumerate(rows):
            for key in row:
                if key not in ("id", "media", "prompt"):
                    raise unknown_name(f"key of row {i}", key, ("id", "media", "prompt"))
            talks.append(conversation(row.get("media"), row.get("prompt", ""), chosen.system))
        answers: list[Answer] = []
        for at in range(0, len(talks), batch_size):
            answers += self._answer(talks[at : at + batch_size], chosen)
        return answers

    def stream(self, media: Any, prompt: str, **options: Any) -> AnswerStream:
        """Answer one question piece by piece; ``.answer`` of the result holds the whole."""
        chosen = Options.of(options)
        return self._stream(conversation(media, prompt, chosen.system), chosen)

    def stream_messages(self, messages: Any, **options: Any) -> AnswerStream:
        """As :meth:`chat`, piece by piece."""
        chosen = Options.of(options)
        return self._stream(with_system(normalize_messages(messages), chosen.system), chosen)

    def session(self, media: Any, **options: Any) -> Any:
        """Encode media once for several questions; see :class:`av_llava.sessions.Session`."""
        from av_llava.sessions import Session

        return Session(self, media, Options.of(options))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, configuration and tokenizer to one self-contained folder.

        A model that carries a LoRA apart becomes an adapter folder on the same base.
        """
        if has_lora(self.model):
            self.save_adapter(folder)
        else:
            with without_bars():
                self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)

    def save_adapter(self, folder: str | Path, base: str | Path | None = None) -> None:
        """Write only what the base has not, as a new folder that loads alone.

        Args:
            folder: to make.
            base: the checkpoint or language model below; None takes what this one was loaded from.
        """
        save_adapter(self.model, self.processor, folder, base=base)

    # ---------------------------------------------------------------- inside

    def prepare(self, talks: Sequence[Sequence[Message]], options: Options) -> tuple[Prepared, int]:
        """The batch, and how many new tokens fit the context after it."""
        prepared = self.processor.prepare(
            talks,
            options.media(self.processor),
            aggregator=options.aggregator,
            max_visual_tokens=options.max_visual_tokens,
        )
        room = check_context(self.processor, prepared, options.max_new_tokens)
        return prepared, room

    def on_device(self, prepared: Prepared) -> dict[str, Any]:
        """The tensors of a batch where the model is."""
        return send_to_device(prepared.tensors, self.device, non_blocking=True)

    def _answer(self, talks: Sequence[Sequence[Message]], options: Options) -> list[Answer]:
        started = time.perf_counter()
        prepared, room = self.prepare(talks, options)
        return self.answer_prepared(prepared, room, options, time.perf_counter() - started)

    @torch.no_grad()
    def answer_prepared(
        self, prepared: Prepared, room: int, options: Options, media_s: float = 0.0
    ) -> list[Answer]:
        """Answer a batch that is on the host already, with at most ``room`` new tokens."""
        started = time.perf_counter()
        embeds = self.model.prepare_inputs(prepared.media, **self.on_device(prepared))
        mask = prepared.media.splice.attention_mask().to(embeds.device)
        encoded = time.perf_counter()
        ids = self.generate(options, room, inputs_embeds=embeds, attention_mask=mask)
        generated = time.perf_counter() - encoded
        timing = {"media": media_s, "encode": encoded - started, "generate": generated}
        return [
            self.answer(row, room, prepared.usage(i), prepared.used[i], timing, options)
            for i, row in enumerate(ids)
        ]

    def stops(self, options: Options) -> list[str]:
        """Texts that end an answer."""
        return [s for s in (self.processor.template.stop, *options.stop) if s]

    def generate(
        self,
        options: Options,
        room: int,
        stopping_criteria: Sequence[StoppingCriteria] = (),
        **inputs: Any,
    ) -> Tensor:
        """Run ``generate`` with the options; returns what it returns."""
        tokenizer = self.processor.tokenizer
        stops = self._stop_texts.criteria(tokenizer, self.stops(options), _end_ids(self.model))
        sampled = options.temperature > 0
        drawing: dict[str, Any] = (
            {"temperature": options.temperature, "top_p": options.top_p} if sampled else {}
        )
        with torch.random.fork_rng(enabled=options.seed is not None):
            if options.seed is not None:
                torch.manual_seed(options.seed)
            return self.model.generate(
                max_new_tokens=room,
                do_sample=sampled,
                stopping_criteria=StoppingCriteriaList([*stopping_criteria, *stops]),
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([Finite(self.dtype)]),
                **{k: v for k, v in drawing.items() if v is not None},
                **inputs,
            )

    def answer(
        self,
        ids: Tensor,
        room: int,
        usage: Usage,
        used: Sequence[MediumUse],
        timing: Mapping[str, float],
        options: Options,
        interrupted: bool = False,
    ) -> Answer:
        """Make the answer from new ids."""
        tokenizer = self.processor.tokenizer
        new = ids.tolist()
        ends = _end_ids(self.model)
        cut = next((i for i, t in enumerate(new) if t in ends), None)
        kept = new if cut is None else new[:cut]
        text = tokenizer.decode(kept, skip_special_tokens=True)
        stopped = cut is not None
        for stop in self.stops(options):
            if stop in text:
                text, stopped = text[: text.index(stop)], True
        n_new = len(new) if cut is None else cut + 1
        reason = "interrupted" if interrupted else "stop" if stopped or n_new < room else "length"
        return Answer(
            text=text.strip(),
            finish_reason=reason,
            usage=replace(usage, completion_tokens=n_new),
            media=tuple(used),
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            model=self.name,
            timing_s={k: round(v, 4) for k, v in timing.items()},
            warnings=(
                *(w for m in used for w in m.warnings),
                *options.without_effect([m.kind for m in used]),
            ),
        )

    def _stream(self, messages: Sequence[Message], options: Options) -> AnswerStream:
        started = time.perf_counter()
        prepared, room = self.prepare([messages], options)
        loaded = time.perf_counter()

        def run(**hooks: Any) -> Tensor:
            embeds = self.model.prepare_inputs(prepared.media, **self.on_device(prepared))
            mask = prepared.media.splice.attention_mask().to(embeds.device)
            return self.generate(options, room, inputs_embeds=embeds, attention_mask=mask, **hooks)[
                0
            ]

        def finish(ids: Tensor, interrupted: bool) -> Answer:
            timing = {"media": loaded - started, "generate": time.perf_counter() - loaded}
            return self.answer(
                ids,
                room,
                prepared.usage(0),
                prepared.used[0],
                timing,
                options,
                interrupted,
            )

        return AnswerStream(self.processor.tokenizer, run, finish, self.stops(options))


def _end_ids(model: AVLlavaForConditionalGeneration) -> set[int]:
    eos = model.generation_config.eos_token_id
    return set() if eos is None else set(eos) if isinstance(eos, (list, tuple)) else {eos}


def load(
    path: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = "auto",
    *,
    base: str | Path | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    overwrite_config: Mapping[str, Any] | None = None,
    quantize: str | None = None,
    merge: bool | None = None,
) -> AVLlava:
    """Load a checkpoint of the LLaVA family.

    Args:
        path: folder or hub id; None loads the small model that ships, which knows one synthetic
            world (docs/tiny.md); where it is missing, a random one (``.is_random`` says so).
        base: the language model or checkpoint that an adapter, a LoRA or a projector-only folder
            stands on; None takes what the folder names.
        device: auto, cpu, cuda, cuda:1, mps.
        dtype: auto, float32, bfloat16, float16.
        attn_implementation: sdpa (default), eager, flash_attention_2.
        device_map: of accelerate, to spread or offload the model.
        overwrite_config: values of the folder's ``config.json`` to change.
        quantize: "4bit" or "8bit" (bitsandbytes) or "int8" (torchao) for the language model's
            linear layers; None keeps the folder's precision.
        merge: add an adapter's LoRA to the weights, which is faster and rounds them; False keeps
            it apart. None merges LLaVA's LoRA folders and keeps our own adapters apart, so that
            they answer exactly as when they were saved.
    """
    name = str(path)
    if path is None:
        given = {
            "base": base,
            "device_map": device_map,
            "overwrite_config": overwrite_config,
            "quantize": quantize,
            "merge": merge,
        }
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"{name} goes with a path; the default model takes none.")
        if attn_implementation not in (None, "sdpa", "eager"):
            raise UsageError(
                f"The default model runs with attn_implementation 'sdpa' or 'eager', not "
                f"{attn_implementation!r}."
            )
        name, path = SHIPPED.name, shipped()
        if path is None:
            model, processor = build_tiny(attn_implementation=attn_implementation)
            target = resolve_device(device)
            model = model.to(target, resolve_dtype(dtype, "float32", target)).eval()
            return AVLlava(model, processor, "av-llava tiny (random weights)", is_random=True)
    loaded = load_any(
        path,
        base,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        device_map=device_map,
        overwrite_config=overwrite_config,
        quantize=quantize,
        merge=merge,
    )
    processor = AVLlavaProcessor(loaded.tokenizer, loaded.model.config)
    return AVLlava(loaded.model, processor, name)


def add_audio(
    model: AVLlava,
    tower: TowerSource,
    projector: AudioSettings | Mapping[str, Any] | str | None = None,
    seed: int = 0,
) -> AVLlava:
    """Give a model that sees ears, in place; see :func:`checkpoints.ears.attach_audio`.

    The projector is fresh: train it before the sound means anything.

    Example:
        >>> m = av_llava.add_audio(av_llava.load("llava-video"), tower="openai/whisper-large-v3")
        >>> m.save_pretrained("llava-video-with-ears")
    """
    attach_audio(model.model, model.processor, tower, projector, seed)
    return model
