"""The tokenizer's own template: the same spans as ours, or a clear refusal."""

from __future__ import annotations

import copy

import pytest

from av_llava.chat import (
    TEMPLATES,
    JinjaTemplate,
    MediaPart,
    normalize_messages,
    render,
    tokenize_supervised,
)
from av_llava.errors import UsageError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system text here') }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "<video>\nWhat?"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "Colour?"},
    {"role": "assistant", "content": ""},
]


@pytest.fixture
def with_template(nobos_tokenizer, bos_tokenizer):
    def make(source, bos=False):
        tokenizer = copy.deepcopy(bos_tokenizer if bos else nobos_tokenizer)
        tokenizer.chat_template = source
        return JinjaTemplate(tokenizer)

    return make


def test_agrees_with_our_own_chatml(with_template):
    system = [{"role": "system", "content": TEMPLATES["qwen_1_5"].system}]
    messages = normalize_messages(system + CHAT)
    theirs, ours = with_template(CHATML).render(messages), render("qwen_1_5", messages)
    assert (theirs.text, theirs.spans, theirs.media) == (ours.text, ours.spans, ours.media)
    opened = with_template(CHATML).render(messages[:-1], add_generation_prompt=True)
    assert opened.text == render("qwen_1_5", messages[:-1], True).text
    assert opened.spans == ()


def test_first_token_is_not_doubled(with_template):
    template = with_template(LLAMA_2, bos=True)
    rendered = template.render(normalize_messages(CHAT[:2]))
    assert rendered.text == "<s>[INST] <video>\nWhat? [/INST] A dog.</s>"
    assert [rendered.text[s:e] for s, e in rendered.spans] == [" A dog.</s>"]
    ids, labels = tokenize_supervised(rendered, template.tokenizer)
    assert ids.count(template.tokenizer.bos_token_id) == 1
    assert template.tokenizer.decode([i for i in labels if i != -100]) == " A dog.</s>"
    assert (template.name, template.stop) == ("jinja", "</s>")


def test_trimmed_answers_are_found(with_template):
    chat = [CHAT[0], {"role": "assistant", "content": " A dog. \n"}]
    rendered = with_template(LLAMA_2, bos=True).render(normalize_messages(chat))
    assert [rendered.text[s:e] for s, e in rendered.spans] == [" A dog.</s>"]


def test_refusal_of_the_template_itself(with_template):
    messages = normalize_messages([{"role": "system", "content": "s"}, *CHAT])
    with pytest.raises(UsageError, match="no system text here"):
        with_template(LLAMA_2, bos=True).render(messages)


def test_rewriting_earlier_answers_is_refused_for_labels_only(with_template):
    forgetful = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '…' }}")
    messages = normalize_messages([{"role": "user", "content": "Q"}, *CHAT[1:]])
    with pytest.raises(UsageError, match="turn 1 differently"):
        with_template(forgetful).render(messages)
    assert with_template(forgetful).render(messages[:-1], True).text.endswith("assistant\n")


def test_a_template_without_header_is_refused(with_template):
    headless = CHATML.split("{% if")[0]
    with pytest.raises(UsageError, match="right after its header"):
        with_template(headless).render(normalize_messages(CHAT))


def test_lost_media_are_refused(with_template):
    lossy = CHATML.replace("m['content']", "m['content'] | replace('<video>', '')")
    with pytest.raises(UsageError, match="0 placeholders for 1 media"):
        with_template(lossy).render(normalize_messages(CHAT), False)


def test_shared_checks(with_template, nobos_tokenizer):
    template = with_template(CHATML)
    with pytest.raises(UsageError, match="ends with an answer"):
        template.render(normalize_messages(CHAT), True)
    with pytest.raises(UsageError, match="no user turn"):
        template.render([], True)
    with pytest.raises(UsageError, match="no chat template"):
        JinjaTemplate(nobos_tokenizer)
    video = MediaPart("video", "v")
    assert template.render(normalize_messages("Q", [video]), True).media[0].part is video
