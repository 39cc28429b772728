"""Several questions about one film: the second against the first.

A model of about 100 million random weights in float32 sees 64 frames of the five-minute film and
answers with eight tokens. The first question pays for decoding, encoding and prefilling; a session
keeps the cache, so that the second costs its own tokens only. All threads.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers import Qwen2Config, SiglipVisionConfig

from av_llava.demo_model import tiny_config, tiny_tokenizer
from av_llava.inference import AVLlava
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor
from bench.measure import Row, check, race, rows_of
from bench.video import film

TITLE = "Second question on the same film"
RATIO = "× as fast as the first"
FIRST, SECOND, MANY = "first question", "second question", "four at once, each"
BOUND = 5.0
QUESTIONS = (
    "What happens at the beginning?",
    "How many people are there?",
    "What colour is the car that comes from the left?",
    "And then?",
)
NEW_TOKENS = 8


def build_model(quick: bool) -> AVLlava:
    """A deaf model with random weights: vision 21 M, language 78 M; tiny when quick."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    config.audio_config = config.au_token_ids = None
    if not quick:
        config.vision_config = SiglipVisionConfig(
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=224,
            patch_size=16,
            vision_use_head=False,
        )
        config.text_config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=9,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=16_384,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    torch.manual_seed(0)
    model = AVLlavaForConditionalGeneration(config).eval()
    # Random weights could end an answer at once; every contestant is to make as many tokens.
    model.generation_config.eos_token_id = None
    return AVLlava(model, AVLlavaProcessor(tokenizer, config), "random", is_random=True)


def run(quick: bool) -> list[Row]:
    """All rows."""
    path, m = film(quick), build_model(quick)
    options = {"frames": 4 if quick else 64, "max_new_tokens": NEW_TOKENS}
    session = m.session(path, **options)
    contestants = {
        FIRST: partial(m.ask, path, QUESTIONS[1], **options),
        SECOND: partial(session.ask, QUESTIONS[1]),
        MANY: partial(session.ask_many, QUESTIONS),
    }
    alone, answer = contestants[FIRST](), contestants[SECOND]()
    check(answer.text == alone.text, f"{answer.text!r} in a session, {alone.text!r} without")
    check(answer.usage == alone.usage, f"{answer.usage} in a session, {alone.usage} without")
    check(answer.usage.completion_tokens == NEW_TOKENS, f"{answer.usage} new tokens")
    texts = [a.text for a in contestants[MANY]()]
    check(texts == [session.ask(q).text for q in QUESTIONS], f"{texts} as a batch")
    timings = race(contestants, rounds=2 if quick else 5, seconds=2, min_rounds=2, warm_up=False)
    timings[MANY] = timings[MANY].divided(len(QUESTIONS))
    size = sum(p.numel() for p in m.model.parameters()) / 1e6
    case = f"{options['frames']} frames, {answer.usage.prompt_tokens} tokens, {size:.0f} M weights"
    return rows_of(case, timings, FIRST, "speedup", {SECOND: BOUND})
