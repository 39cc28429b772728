"""The Jinja source of a template renders what the template renders."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from golden_data import golden
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from av_llava.chat import TEMPLATES, normalize_messages
from av_llava.chat.messages import wrap_media
from av_llava.chat.templates import Template
from av_llava.checkpoints.chat_source import jinja_source
from av_llava.demo_model import tiny_tokenizer

TEXT = st.text(alphabet="ab \n{}%'\"\\é", max_size=6)
PART = st.one_of(
    TEXT.map(lambda t: {"type": "text", "text": t}),
    st.sampled_from([{"type": "image"}, {"type": "video"}]),
)
CONTENT = st.one_of(
    TEXT,
    st.sampled_from(["<image>", "<image>\nWhat?", "<video><image>"]),
    st.lists(PART, max_size=4),
)


@st.composite
def conversations(draw):
    turns = [
        {"role": "assistant" if i % 2 else "user", "content": draw(TEXT if i % 2 else CONTENT)}
        for i in range(draw(st.integers(1, 5)))
    ]
    if draw(st.booleans()):
        turns.insert(0, {"role": "system", "content": draw(TEXT)})
    return turns


@functools.cache
def tokenizer():
    return tiny_tokenizer()


def rendered_by_transformers(source, turns, opened, tok=None):
    return (tok or tokenizer()).apply_chat_template(
        turns, chat_template=source, tokenize=False, add_generation_prompt=opened
    )


# Several names share one format.
FORMATS = {replace(template, name=""): name for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("name", sorted(FORMATS.values()))
@given(turns=conversations())
def test_both_render_the_same(name, turns):
    template = TEMPLATES[name]
    opened = turns[-1]["role"] == "user"
    wanted = template.render(normalize_messages(turns), opened).text
    source = jinja_source(template, adds_bos=False)
    assert rendered_by_transformers(source, turns, opened) == wanted


@given(turns=conversations())
def test_text_around_media(turns):
    template = TEMPLATES["vicuna_v1"]
    messages = wrap_media(normalize_messages(turns), "<im_start>", "<im_end>")
    wanted = template.render(messages, turns[-1]["role"] == "user").text
    source = jinja_source(template, adds_bos=False, around_media=("<im_start>", "<im_end>"))
    assert rendered_by_transformers(source, turns, turns[-1]["role"] == "user") == wanted


def test_other_placeholders():
    source = jinja_source(TEMPLATES["qwen_1_5"], adds_bos=False, tokens={"image": "<|pic|>"})
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert "user\n<|pic|>\nWhat?<|im_end|>" in rendered_by_transformers(source, turns, True)


def test_the_first_token_is_written_once():
    tok = AutoTokenizer.from_pretrained(golden("llava/_families/tokenizer_bos"))
    source = jinja_source(TEMPLATES["vicuna_v1"], adds_bos=True)
    turns = [{"role": "user", "content": "What?"}]
    text = rendered_by_transformers(source, turns, True, tok)
    assert text.startswith(tok.bos_token) and text.count(tok.bos_token) == 1
    ids = tok.apply_chat_template(turns, chat_template=source, add_generation_prompt=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    plain = TEMPLATES["vicuna_v1"].render(normalize_messages(turns), True).text
    assert ids == tok(plain).input_ids


def test_transformers_finds_the_answers_in_it():
    source = jinja_source(TEMPLATES["vicuna_v1"], adds_bos=False)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A bell."}]
    out = tokenizer().apply_chat_template(
        turns, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    chosen = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer().decode(chosen) == " A bell.</s>"


def test_a_template_added_from_outside():
    template = Template(
        "mine",
        system="S",
        system_start="[",
        system_end="]",
        user_start="U:",
        user_end=";",
        assistant_start="A:",
        answer_end=".",
        examples=(("q", "a"),),
    )
    source = jinja_source(template, adds_bos=False)
    turns = [{"role": "user", "content": "x"}]
    wanted = template.render(normalize_messages(turns), True).text
    assert rendered_by_transformers(source, turns, True) == wanted == "[S]U:q;A:a.U:x;A:"
