"""Conversations: from any spelling to one rendering, its token ids and its labels.

``normalize_messages`` → ``render`` → ``tokenize_with_media`` or ``tokenize_supervised``. No
torch and no transformers here; a tokenizer is passed in. All registries (templates, kinds of
media and their placeholders, readers of content parts) are plain dicts to add to.
"""

from av_llava.chat.jinja import JinjaTemplate
from av_llava.chat.messages import (
    Message,
    lead_with_media,
    media_of,
    media_only,
    normalize_messages,
    wrap_media,
)
from av_llava.chat.parts import (
    MEDIA_TOKENS,
    PART_READERS,
    PLACEHOLDER_ALIASES,
    MediaPart,
    Part,
    TextPart,
    read_medium,
)
from av_llava.chat.registry import (
    TEMPLATE_CHOICE,
    TEMPLATES,
    render,
    template_for,
    template_named,
)
from av_llava.chat.templates import ChatTemplate, MediaSpan, Rendered, Span, Template
from av_llava.chat.tokens import (
    MEDIA_IDS,
    tokenize_supervised,
    tokenize_with_media,
    tokenizer_image_token,
)

__all__ = [
    "MEDIA_IDS",
    "MEDIA_TOKENS",
    "PART_READERS",
    "PLACEHOLDER_ALIASES",
    "TEMPLATES",
    "TEMPLATE_CHOICE",
    "ChatTemplate",
    "JinjaTemplate",
    "MediaPart",
    "MediaSpan",
    "Message",
    "Part",
    "Rendered",
    "Span",
    "Template",
    "TextPart",
    "lead_with_media",
    "media_of",
    "media_only",
    "normalize_messages",
    "read_medium",
    "render",
    "template_for",
    "template_named",
    "tokenize_supervised",
    "tokenize_with_media",
    "tokenizer_image_token",
    "wrap_media",
]
