"""Which template a checkpoint uses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from av_llava.chat import TEMPLATE_CHOICE, TEMPLATES, JinjaTemplate, template_for
from av_llava.errors import UsageError


def tokenizer(eos=None, chat_template=None):
    return SimpleNamespace(eos_token=eos, chat_template=chat_template)


@pytest.mark.parametrize(
    ("model_type", "eos", "expected"),
    [
        ("llama", "</s>", "vicuna_v1"),
        ("llama", None, "vicuna_v1"),
        ("llama", "<|eot_id|>", "llava_llama_3"),
        ("llama", "<|im_end|>", "chatml_direct"),
        ("mistral", "</s>", "mistral_instruct"),
        ("qwen2", "<|im_end|>", "qwen_1_5"),
        ("qwen3", "<|im_end|>", "qwen_1_5"),
        ("gemma2", "<eos>", "gemma_instruct"),
        ("mpt", "<|endoftext|>", "mpt"),
    ],
)
def test_choice_by_language_model(model_type, eos, expected):
    chosen = template_for(model_type=model_type, tokenizer=tokenizer(eos, "a template of its own"))
    assert chosen is TEMPLATES[expected]


def test_stored_name_decides():
    assert template_for("plain", model_type="qwen2") is TEMPLATES["plain"]
    own = tokenizer(chat_template="{{ messages }}")
    assert template_for("jinja", model_type="qwen2", tokenizer=own) == JinjaTemplate(own)


def test_own_template_of_an_unknown_language_model():
    own = tokenizer(chat_template="{{ messages }}")
    assert template_for(model_type="olmo2", tokenizer=own) == JinjaTemplate(own)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"stored": "vicuna"}, "Did you mean 'vicuna_v1'"),
        ({"stored": "jinja"}, "needs the tokenizer"),
        ({"stored": "jinja", "tokenizer": tokenizer()}, "no chat template of its own"),
        ({"model_type": "olmo2"}, "'olmo2'"),
        ({"model_type": "olmo2", "tokenizer": tokenizer()}, "Name one of"),
        ({}, "None"),
    ],
)
def test_nothing_to_choose_by(arguments, says):
    with pytest.raises(UsageError, match=says):
        template_for(**arguments)


def test_every_row_of_the_table_names_a_template():
    assert all(name in TEMPLATES for _, _, name in TEMPLATE_CHOICE)
