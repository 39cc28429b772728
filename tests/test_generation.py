"""Stop texts never show in a stream, however the pieces fall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava import generation
from av_llava.demo_model import build_tiny, tiny_tokenizer
from av_llava.generation import StopTexts, without_stops
from av_llava.inference import AVLlava


@given(
    st.text("ab#<>", max_size=30),
    st.lists(st.integers(1, 4), max_size=30),
    st.lists(st.text("ab#<>", min_size=1, max_size=4), max_size=3),
)
def test_pieces_join_to_the_text_before_the_first_stop(text, cuts, stops):
    pieces, at = [], 0
    for n in [*cuts, len(text)]:
        pieces.append(text[at : at + n])
        at += n
    found = [text.index(s) for s in stops if s in text]
    assert "".join(without_stops(pieces, stops)) == (text[: min(found)] if found else text)


def test_nothing_is_held_back_without_stops():
    assert list(without_stops(iter(["a", "b"]), [])) == ["a", "b"]


@pytest.fixture
def made(monkeypatch):
    """The sets of texts that criteria are made for."""
    made = []

    class Counted(generation.StopStringCriteria):
        def __init__(self, tokenizer, stop_strings):
            made.append(stop_strings)
            super().__init__(tokenizer, stop_strings)

    monkeypatch.setattr(generation, "StopStringCriteria", Counted)
    return made


def test_asking_again_and_again_reads_the_vocabulary_once(made):
    m = AVLlava(*build_tiny())
    free = m.ask(None, "Tell me", max_new_tokens=12)
    assert made == []  # the template's stop text is the end token
    stop = free.text[3:5]
    answers = [m.ask(None, "Tell me", max_new_tokens=12, stop=[stop]) for _ in range(3)]
    stream = m.stream(None, "Tell me", max_new_tokens=12, stop=[stop])
    assert "".join(stream).strip() == answers[0].text == free.text[: free.text.index(stop)].strip()
    assert len(made) == 1 and stop in made[0]
    assert answers[0].usage.completion_tokens < free.usage.completion_tokens


def test_criteria_are_made_once_for_each_set_of_stop_texts(made):
    tokenizer, texts = tiny_tokenizer(), StopTexts()
    first = texts.criteria(tokenizer, ["ball", "bell", "ball"], ())
    assert texts.criteria(tokenizer, ["ball", "bell"], ()) == first and len(first) == 1
    assert made == [["ball", "bell"]]
    tokenizer.add_tokens(["bellow"])
    assert texts.criteria(tokenizer, ["ball", "bell"], ()) != first and len(made) == 2
    for i in range(20):
        texts.criteria(tokenizer, [str(i)], ())
    assert len(made) == 22 and len(texts._made) == generation._KEPT_CRITERIA


def test_a_stop_text_that_is_an_end_token_needs_no_criterion():
    tokenizer, texts = tiny_tokenizer(), StopTexts()
    end = tokenizer.eos_token_id
    assert texts.criteria(tokenizer, ["<|im_end|>"], {end}) == []
    (other,) = texts.criteria(tokenizer, ["<|im_end|>", "ball"], {end})
    assert other.stop_strings == ("ball",)
    (both,) = texts.criteria(tokenizer, ["<|im_end|>"], ())
    ids = tokenizer("a red ball<|im_end|>", return_tensors="pt").input_ids
    assert both(ids, None).tolist() == [True] and both(ids[:, :-1], None).tolist() == [False]
