"""Whether a request fits the context, and the largest setting that would."""

from __future__ import annotations

import logging

from transformers import PreTrainedConfig

from av_llava.config import AVLlavaConfig
from av_llava.errors import BudgetError, UsageError
from av_llava.planning import MediaPlanner
from av_llava.processor import AVLlavaProcessor, Prepared

logger = logging.getLogger(__name__)

_DEFAULT_CONTEXT = 2048


def context_length(config: AVLlavaConfig) -> int:
    """Positions that the language model can take, rotary scaling included."""
    text = config.text_config
    for name in ("max_sequence_length", "max_position_embeddings"):
        value = getattr(text, name, None)
        if value:
            return int(value * _rope_factor(text))
    return config.sequence.max_length or _DEFAULT_CONTEXT


def _rope_factor(text: PreTrainedConfig) -> float:
    """How far rotary scaling stretches ``max_position_embeddings``.

    Only these two kinds stretch it; for the others (yarn, llama3, ...) the number in the
    configuration is that after stretching.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    stretches = rope.get("rope_type") in ("linear", "dynamic")
    return float(rope.get("factor") or 1.0) if stretches else 1.0


def frames_that_fit(config: AVLlavaConfig, most: int) -> int:
    """Frames of one video that leave a quarter of the context free; at least one."""
    room = context_length(config) * 3 // 4
    planner = MediaPlanner(config)
    return max((n for n in range(1, most + 1) if planner.video(n).n_tokens <= room), default=1)


def check_room(processor: AVLlavaProcessor, n_prompt: int, max_new_tokens: int) -> int:
    """New tokens that fit after a prompt; at least one, or BudgetError."""
    context = context_length(processor.config)
    if n_prompt >= context:
        raise BudgetError(
            f"The prompt has {n_prompt} tokens; the model's context holds {context}. Shorten it."
        )
    if n_prompt + max_new_tokens > context:
        logger.warning(
            "The answer is limited to %d tokens (not %d): the prompt fills %d of %d positions.",
            context - n_prompt,
            max_new_tokens,
            n_prompt,
            context,
        )
    return min(max_new_tokens, context - n_prompt)


def check_context(processor: AVLlavaProcessor, prepared: Prepared, max_new_tokens: int) -> int:
    """As :func:`check_room`, for a batch; the error names what would fit.

    Raises:
        BudgetError: a sample is longer than the context.
    """
    plan = prepared.media.splice
    context = context_length(processor.config)
    for i, n in enumerate(plan.lengths):
        if n >= context:
            raise BudgetError(
                f"The prompt needs {n} tokens ({_shares(prepared, i)}); the model's context holds "
                f"{context}. {_advice(processor, prepared, i, n - context + 1)}"
            )
    return check_room(processor, max(plan.lengths), max_new_tokens)


def _shares(prepared: Prepared, sample: int) -> str:
    usage = prepared.usage(sample)
    shares = [(n, getattr(usage, f"{n}_tokens")) for n in ("text", "image", "video", "audio")]
    return ", ".join(f"{count} {name}" for name, count in shares if count)


def _advice(processor: AVLlavaProcessor, prepared: Prepared, sample: int, excess: int) -> str:
    """The largest setting that would fit."""
    videos = [m for m in prepared.used[sample] if m.kind == "video"]
    if not videos:
        return "Use fewer or smaller media, or a shorter text."
    visual = sum(m.n_tokens for m in videos)
    if visual <= excess:
        return "Even without the video it does not fit: shorten the text or the sound."
    budget = (visual - excess) // len(videos)
    frames = _most_frames(processor, prepared, budget)
    some = f"at most {frames} frames (--frames {frames}), or " if frames else ""
    return f"It fits with {some}a budget of {budget} tokens a video (--max-visual-tokens {budget})."


def _most_frames(processor: AVLlavaProcessor, prepared: Prepared, budget: int) -> int:
    """Most frames whose tokens keep the budget, with the aggregator in use; 0 when none does."""
    planner = MediaPlanner(processor.config, prepared.media.aggregator)
    low, high = 0, max(p.frames for p in prepared.media.videos)
    while low < high:
        middle = (low + high + 1) // 2
        try:
            fits = planner.video(middle).n_tokens <= budget
        except (BudgetError, UsageError):
            fits = False
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
