"""A chat template as the Jinja text that a GGUF file carries.

Contract: rendering gives what :meth:`av_llava.chat.templates.Template.render` gives for turns whose
content is text, so that llama.cpp's chat asks as this package does.
"""

from __future__ import annotations

import json

from av_llava.chat import JinjaTemplate, Template


def template_text(template: Template | JinjaTemplate) -> str | None:
    """The Jinja text of a template; the tokenizer's own if that is what is used."""
    if isinstance(template, JinjaTemplate):
        own = template.tokenizer.chat_template
        return own if isinstance(own, str) else None
    return jinja_of(template)


def jinja_of(template: Template) -> str:
    """Write a template in Jinja."""
    block = f"{_text(template.system_start)} + system + {_text(template.system_end)}"
    shown = f"({block} if system else '')"
    start = _text(template.user_start)
    if template.system_in_user:
        first = "loop.first" if not template.examples else "false"
        start += f" + ({shown} if {first} else '')"
    answer = (template.assistant_start + template.answer_start, template.answer_end)
    between = _text(template.between)
    if not template.examples:
        between = f"('' if loop.first else {between})"
    pieces = [
        "{%- if messages and messages[0]['role'] == 'system' -%}",
        "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}",
        "{%- else -%}",
        f"{{%- set system = {_text(template.system)} -%}}{{%- set turns = messages -%}}",
        "{%- endif -%}",
        "" if template.system_in_user else f"{{{{ {shown} }}}}",
        _examples(template, shown),
        "{%- for turn in turns -%}{%- if turn['role'] == 'user' -%}",
        f"{{{{ {between} + {start} + turn['content'] + {_text(template.user_end)} }}}}",
        "{%- else -%}",
        f"{{{{ {_text(answer[0])} + turn['content'] + "
        f"{_text(answer[1] + template.after_answer)} }}}}",
        "{%- endif -%}{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{ {_text(template.assistant_start)} }}}}"
        "{%- endif -%}",
    ]
    return "".join(pieces)


def _examples(template: Template, shown: str) -> str:
    """The questions and answers that stand before the conversation."""
    out = []
    for i, (question, answer) in enumerate(template.examples):
        system = f"{shown} + " if template.system_in_user and i == 0 else ""
        lead = (template.between if i else "") + template.user_start
        rest = (
            question
            + template.user_end
            + template.assistant_start
            + template.answer_start
            + answer
            + template.answer_end
            + template.after_answer
        )
        out.append(f"{{{{ {_text(lead)} + {system}{_text(rest)} }}}}")
    return "".join(out)


def _text(text: str) -> str:
    """A string as Jinja writes it."""
    return json.dumps(text, ensure_ascii=False)
