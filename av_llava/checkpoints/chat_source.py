"""Our chat templates as Jinja source, for tokenizers and processors of transformers.

Contract: for every conversation that a template renders, the source gives the same text, behind the
tokenizer's first token if the tokenizer adds one. Media stand where they are written; a newline
separates the parts of a turn unless one side of the seam is white space, as in
:func:`av_llava.chat.normalize_messages`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from av_llava.chat import MEDIA_TOKENS
from av_llava.chat.templates import Template

# Writes a turn's content: a string, or parts.
_CONTENT = """\
{%- macro content_of(content) -%}
{%- if content is string -%}{{ content%(wrapped)s }}{%- else -%}
{%- set ns = namespace(some=false, spaced=false) -%}
{%- for part in content -%}
{%- if part['type'] == 'text' -%}
{%- if part['text'] -%}
{%- if ns.some and not ns.spaced and not part['text'][:1].isspace() -%}{{ '\\n' }}{%- endif -%}
{{ part['text']%(wrapped)s }}
{%- set ns.some = true -%}{%- set ns.spaced = part['text'][-1:].isspace() -%}
{%- endif -%}
{%- else -%}
{%- if ns.some and not ns.spaced -%}{{ '\\n' }}{%- endif -%}
{{ %(written)s[part['type']] }}
{%- set ns.some = true -%}{%- set ns.spaced = false -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

# Whether a turn is nothing but media; some formats end such a turn without a separator.
_ALONE = """\
{%- macro media_alone(content) -%}
{%- set text = content_of(content) -%}
{{- 'yes' if text and not text%(removed)s else '' -}}
{%- endmacro -%}
"""

_TURNS = """\
{{ %(bos)s }}
{%%- if messages and messages[0]['role'] == 'system' -%%}
{%%- set system = content_of(messages[0]['content']) -%%}{%%- set turns = messages[1:] -%%}
{%%- else -%%}
{%%- set system = %(system)s -%%}{%%- set turns = messages -%%}
{%%- endif -%%}
{%%- set opening = %(system_start)s + system + %(system_end)s if system else '' -%%}
{{ %(outer)s }}
{%%- for turn in turns -%%}
{%%- if turn['role'] == 'user' -%%}
{%%- if not loop.first or %(has_examples)s -%%}{{ %(between)s }}{%%- endif -%%}
{{ %(user_start)s }}
{%%- if loop.first -%%}{{ %(inner)s }}{%%- endif -%%}
{{ content_of(turn['content']) }}
{%%- if not (%(bare_media)s and media_alone(turn['content'])) -%%}{{ %(user_end)s }}{%%- endif -%%}
{%%- else -%%}
{{ %(assistant_start)s }}\
{%%- generation -%%}{{ %(answer_start)s + content_of(turn['content']) + %(answer_end)s }}\
{%%- endgeneration -%%}\
{{ %(after_answer)s }}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if add_generation_prompt -%%}{{ %(assistant_start)s }}{%%- endif -%%}
"""


def jinja_source(
    template: Template,
    *,
    adds_bos: bool,
    tokens: Mapping[str, str] = MEDIA_TOKENS,
    around_media: tuple[str, str] = ("", ""),
) -> str:
    """Write a template as Jinja.

    Args:
        template: one of ``av_llava.chat.TEMPLATES``.
        adds_bos: whether the tokenizer puts its first token before a text; the source then holds
            it, because transformers adds none to rendered conversations.
        tokens: placeholder by the type of a content part.
        around_media: text before and after each medium (LLaVA's ``<im_start>``, ``<im_end>``).
    """
    before, after = around_media
    wrapped = {token: before + token + after for token in tokens.values()}
    content = _CONTENT.replace("%(wrapped)s", _replacing(wrapped if before + after else {}))
    written = {kind: wrapped[token] for kind, token in tokens.items()}
    content = content.replace("%(written)s", _quoted(written))
    alone = _ALONE.replace("%(removed)s", _replacing(dict.fromkeys(tokens.values(), "")))
    examples = _examples(template)
    inside = template.system_in_user
    values: dict[str, Any] = {
        "bos": "bos_token" if adds_bos else "''",
        "outer": _quoted(examples) if inside else f"opening + {_quoted(examples)}",
        "inner": "opening" if inside else "''",
        "has_examples": "true" if template.examples else "false",
        "bare_media": "true" if template.bare_media else "false",
    }
    for name in (
        "system",
        "system_start",
        "system_end",
        "user_start",
        "user_end",
        "between",
        "assistant_start",
        "answer_start",
        "answer_end",
        "after_answer",
    ):
        values[name] = _quoted(getattr(template, name))
    return content + alone + _TURNS % values


def _replacing(texts: Mapping[str, str]) -> str:
    """Calls of ``replace``, to stand after an expression."""
    return "".join(f".replace({_quoted(old)}, {_quoted(new)})" for old, new in texts.items())


def _examples(template: Template) -> str:
    """The fixed turns before the conversation."""
    text = ""
    for i, (question, answer) in enumerate(template.examples):
        text += (template.between if i else "") + template.user_start + question
        text += template.user_end + template.assistant_start + template.answer_start + answer
        text += template.answer_end + template.after_answer
    return text


def _quoted(value: Any) -> str:
    """A Jinja literal of a text or of texts by name."""
    return json.dumps(value, ensure_ascii=False)
