"""One encoding, many questions: equal to full computation, for every kind of cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from clips import make_clip
from tiny import tiny

from av_llava.chat import MediaPart
from av_llava.errors import BudgetError, UsageError
from av_llava.inference import AVLlava
from av_llava.media_inputs import load_video

torch.set_num_threads(1)
RNG = np.random.default_rng(3)
FRAMES = RNG.integers(0, 255, (6, 40, 60, 3), dtype=np.uint8)
SOUND = (RNG.normal(size=40_000) * 0.1).astype(np.float32)
QUESTIONS = ["What?", "How many red balls are there in this video?", "Who rings the bell, and why?"]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]


@pytest.mark.parametrize("placement", ["block", "interleave"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_answers_equal_full_computation(kind, placement):
    model, processor = tiny(kind, placement=placement, text={"tie_word_embeddings": False})
    m = AVLlava(model, processor)
    full = [m.ask(FRAMES, q, audio=SOUND, max_new_tokens=8) for q in QUESTIONS]
    session = m.session(FRAMES, audio=SOUND)
    single = [session.ask(q, max_new_tokens=8) for q in QUESTIONS]
    batch = session.ask_many(QUESTIONS, max_new_tokens=8)
    assert [a.text for a in single] == [a.text for a in full] == [a.text for a in batch]
    assert [a.usage for a in single] == [a.usage for a in full] == [a.usage for a in batch]


def test_media_that_were_opened_ahead_give_the_same_answers(tmp_path):
    model, processor = tiny("llama", placement="interleave")
    m = AVLlava(model, processor)
    clip = str(make_clip(tmp_path / "clip.mp4", seconds=2))
    ears = processor.config.audio
    options = replace(processor.media_options(frames=5), isolate=True)
    opened = load_video(
        MediaPart("video", clip),
        processor.pixels,
        processor.config.vision,
        options,
        ears=ears,
        decode=True,
    )
    assert opened.span_s == (0.0, pytest.approx(2.0))
    ahead = m.ask(MediaPart("video", opened), QUESTIONS[1], max_new_tokens=8)
    alone = m.ask(clip, QUESTIONS[1], frames=5, max_new_tokens=8)
    assert ahead.text == alone.text
    assert ahead.media == alone.media and ahead.media[0].audio_tokens > 0


def test_logits_from_the_cache_equal_full_computation():
    import copy

    model, processor = tiny("llama")
    m = AVLlava(model, processor)
    session = m.session(FRAMES, audio=SOUND)
    suffix = torch.tensor([session._asking(QUESTIONS[1])])
    with torch.no_grad():
        cached = model(
            input_ids=suffix,
            attention_mask=torch.ones(1, session.n_prefix + suffix.shape[1]),
            past_key_values=copy.deepcopy(session._cache),
        ).logits
        from av_llava.options import Options, conversation

        prepared, _ = m.prepare([conversation(FRAMES, QUESTIONS[1])], Options(audio=SOUND))
        embeds = model.prepare_inputs(prepared.media, **prepared.tensors)
        full = model(inputs_embeds=embeds).logits[:, session.n_prefix :]
    torch.testing.assert_close(cached, full, atol=1e-5, rtol=1e-4)


def test_media_are_encoded_once():
    model, processor = tiny("llama")
    ran = []
    model.model.vision_tower.register_forward_hook(lambda *a: ran.append(1))
    session = AVLlava(model, processor).session(FRAMES)
    session.ask_many(QUESTIONS, max_new_tokens=2)
    session.ask(QUESTIONS[0], max_new_tokens=2)
    assert ran == [1]


def test_questions_do_not_see_each_other():
    model, processor = tiny("llama")
    session = AVLlava(model, processor).session(FRAMES)
    first = session.ask(QUESTIONS[0], max_new_tokens=6).text
    session.ask(QUESTIONS[1], max_new_tokens=6)
    assert session.ask(QUESTIONS[0], max_new_tokens=6).text == first


def test_a_sliding_window_shorter_than_the_video_gives_the_same_answers():
    text = {"sliding_window": 24, "tie_word_embeddings": False}
    model, processor = tiny("mistral", text=text)
    m = AVLlava(model, processor)
    session = m.session(FRAMES)
    assert session.n_prefix > 24
    full = [m.ask(FRAMES, q, max_new_tokens=6).text for q in QUESTIONS]
    assert [a.text for a in session.ask_many(QUESTIONS, max_new_tokens=6)] == full


def test_chat_in_a_session_equals_the_whole_conversation():
    model, processor = tiny("llama")
    m = AVLlava(model, processor)
    session = m.session(FRAMES)
    first = session.chat("What?", max_new_tokens=5)
    second = session.chat("And then?", max_new_tokens=5)
    assert session.history == [("What?", first.text), ("And then?", second.text)]
    from av_llava.chat import MediaPart, Message, TextPart

    talk = [
        Message("user", (MediaPart("video", FRAMES), TextPart("\nWhat?"))),
        Message("assistant", (TextPart(first.text),)),
        Message("user", (TextPart("And then?"),)),
    ]
    assert m.chat(talk, max_new_tokens=5).text == second.text


def test_streaming_from_a_session():
    model, processor = tiny("llama")
    session = AVLlava(model, processor).session(FRAMES)
    stream = session.stream("What?", max_new_tokens=6)
    text = "".join(stream)
    assert text.strip() == stream.answer.text == session.ask("What?", max_new_tokens=6).text


def test_time_instruction_and_system_prompt_are_part_of_the_session():
    model, processor = tiny("llama")
    m = AVLlava(model, processor)
    options = {"time_instruction": True, "system": "Be brief."}
    session = m.session(FRAMES, **options)
    assert (
        session.ask("What?", max_new_tokens=6).text
        == m.ask(FRAMES, "What?", max_new_tokens=6, **options).text
    )


def test_what_is_fixed_cannot_be_changed_by_a_question():
    model, processor = tiny("llama")
    session = AVLlava(model, processor).session(FRAMES)
    with pytest.raises(UsageError, match="'frames' is fixed when a session starts"):
        session.ask("What?", frames=3)
    with pytest.raises(UsageError, match="empty"):
        session.ask(" ")
    with pytest.raises(UsageError, match="at least one medium"):
        AVLlava(model, processor).session(None)


def test_a_question_beyond_the_context_is_an_error():
    model, processor = tiny("llama", text={"max_position_embeddings": 160})
    session = AVLlava(model, processor).session(FRAMES)
    with pytest.raises(BudgetError, match="context holds 160"):
        session.ask("Why? " * 100)


def test_ask_many_of_nothing_is_nothing():
    model, processor = tiny("llama")
    assert AVLlava(model, processor).session(FRAMES).ask_many([]) == []
