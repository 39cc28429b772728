"""The chat template that a GGUF file carries."""

from __future__ import annotations

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from av_llava.chat import TEMPLATES, JinjaTemplate, normalize_messages, render
from av_llava.checkpoints.gguf_chat import jinja_of, template_text
from av_llava.demo_model import tiny_tokenizer

TURNS = [
    {"role": "user", "content": 'What "is" this?\nA {{ brace }}'},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "Sure?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("system", [False, True])
def test_it_renders_what_the_template_renders(name, system):
    jinja = ENVIRONMENT.from_string(jinja_of(TEMPLATES[name]))
    turns = [SYSTEM, *TURNS] if system else TURNS
    for n, prompt in ((len(turns), True), (len(turns) - 1, False), (len(turns) - 2, True)):
        part = turns[:n]
        wanted = render(name, normalize_messages(part), add_generation_prompt=prompt).text
        assert jinja.render(messages=part, add_generation_prompt=prompt) == wanted


def test_the_tokenizers_own_template_is_taken_as_it_is():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert template_text(JinjaTemplate(tokenizer)) == "{{ messages[0].content }}"
