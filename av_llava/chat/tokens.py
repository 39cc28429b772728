"""Token ids of a prompt with media, and its labels.

Contract: text is cut at the placeholders, each stretch is tokenised once, and a placeholder
becomes one negative id (LLaVA's ``tokenizer_image_token``, generalised). Labels come from the
characters of that one tokenisation: a token is supervised if it holds a character of a
supervised span. Nothing is tokenised a second time to find out how long it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from av_llava.chat.templates import Rendered, Span
from av_llava.errors import DataError, UsageError
from av_llava.settings import (
    AUDIO_TOKEN,
    AUDIO_TOKEN_INDEX,
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    VIDEO_TOKEN,
    VIDEO_TOKEN_INDEX,
)

MEDIA_IDS: dict[str, int] = {
    IMAGE_TOKEN: IMAGE_TOKEN_INDEX,
    VIDEO_TOKEN: VIDEO_TOKEN_INDEX,
    AUDIO_TOKEN: AUDIO_TOKEN_INDEX,
}
"""Placeholder → id; open to extension. LLaVA's checkpoints take -200 for a video, too."""


class Tokenizer(Protocol):
    """The part of a tokenizer of transformers that is used here."""

    @property
    def bos_token_id(self) -> int | None:
        """Id of the first token, if the tokenizer has one."""

    @property
    def is_fast(self) -> bool:
        """Whether the tokenizer knows the characters of its tokens."""

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokenise one text; the result has ``input_ids``."""


def tokenize_with_media(
    text: str,
    tokenizer: Tokenizer,
    ids: Mapping[str, int] | None = None,
    add_bos: bool = True,
) -> list[int]:
    """Tokenise text with placeholders.

    Args:
        text: a rendered prompt.
        tokenizer: the language model's tokenizer.
        ids: placeholder → id; by default :data:`MEDIA_IDS`.
        add_bos: whether the tokenizer's own first token is put in front, if it adds one.
            Other tokens that it would add (an end token) are never added: the text of a
            template is complete.

    Returns:
        Ids, one for each placeholder.
    """
    ids = MEDIA_IDS if ids is None else ids
    result = _bos(tokenizer) if add_bos else []
    for _, stretch, placeholder in _stretches(text, ids):
        if stretch:
            result += tokenizer(stretch, add_special_tokens=False).input_ids
        if placeholder is not None:
            result.append(ids[placeholder])
    return result


def tokenize_supervised(
    rendered: Rendered, tokenizer: Tokenizer, ids: Mapping[str, int] | None = None
) -> tuple[list[int], list[int]]:
    """Tokenise a rendered conversation for training.

    Returns:
        Ids, the same as ``tokenize_with_media`` gives, and labels of the same length: the id
        where the model would generate it, ``IGNORE_INDEX`` elsewhere and at every medium.

    Raises:
        UsageError: the tokenizer does not know the characters of its tokens.
        DataError: no token is supervised.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            f"The tokenizer {type(tokenizer).__name__} cannot say which characters its tokens "
            "come from, so answers cannot be found for training. Load the checkpoint's fast "
            "tokenizer (tokenizer.json)."
        )
    ids = MEDIA_IDS if ids is None else ids
    token_ids = _bos(tokenizer) if rendered.add_bos else []
    labels = [IGNORE_INDEX] * len(token_ids)
    for start, stretch, placeholder in _stretches(rendered.text, ids):
        if stretch:
            encoded = tokenizer(stretch, add_special_tokens=False, return_offsets_mapping=True)
            token_ids += encoded.input_ids
            holds = _supervised(encoded.offset_mapping, start, rendered.spans)
            labels += [
                token if held else IGNORE_INDEX
                for token, held in zip(encoded.input_ids, holds, strict=True)
            ]
        if placeholder is not None:
            token_ids.append(ids[placeholder])
            labels.append(IGNORE_INDEX)
    if all(label == IGNORE_INDEX for label in labels):
        raise DataError(
            f"Nothing of the conversation would be learned: it has {len(rendered.spans)} answers "
            f"and no supervised token. It begins with {rendered.text[:60]!r}."
        )
    return token_ids, labels


def tokenizer_image_token(
    prompt: str,
    tokenizer: Tokenizer,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> Any:
    """Tokenise a prompt as LLaVA's function of this name does: only ``<image>`` is special.

    Returns:
        A list of ids, or with ``return_tensors="pt"`` a 1-D tensor of int64.
    """
    if return_tensors not in (None, "pt"):
        raise UsageError(f"return_tensors must be None or 'pt', not {return_tensors!r}.")
    token_ids = tokenize_with_media(prompt, tokenizer, {IMAGE_TOKEN: image_token_index})
    if return_tensors is None:
        return token_ids
    import torch

    return torch.tensor(token_ids, dtype=torch.long)


_HALF = re.compile("[\ud800-\udfff]")
"""JSON can hold one half of a surrogate pair; UTF-8 cannot."""


def _bos(tokenizer: Tokenizer) -> list[int]:
    """Return the first token that the tokenizer adds to a text of its own accord, if any."""
    alone = list(tokenizer("").input_ids)
    return alone[:1] if alone and alone[0] == tokenizer.bos_token_id else []


def _stretches(text: str, ids: Mapping[str, int]) -> Iterator[tuple[int, str, str | None]]:
    """Yield (first character, text, placeholder after it); the last has no placeholder."""
    half = _HALF.search(text)
    if half is not None:
        near = text[max(0, half.start() - 20) : half.end() + 20]
        raise UsageError(
            f"The text holds half of a character, which no tokenizer can read, near {near!r}. "
            f"Repair the text: a character beyond U+FFFF was cut in two."
        )
    start = 0
    if ids:
        longest_first = sorted(ids, key=len, reverse=True)
        for found in re.finditer("|".join(map(re.escape, longest_first)), text):
            yield start, text[start : found.start()], found[0]
            start = found.end()
    yield start, text[start:], None


def _supervised(offsets: list[tuple[int, int]], shift: int, spans: tuple[Span, ...]) -> list[bool]:
    """Say for each token whether it holds a character of a span.

    Args:
        offsets: ``[start, end)`` of each token in the stretch.
        shift: where the stretch begins in the rendered text that the spans refer to.
        spans: ordered, disjoint.
    """
    held, reached, nearest = [], 0, 0
    for start, end in offsets:
        start = min(start, reached)  # some tokenizers cut white space off a token's offsets
        reached = max(reached, end)
        while nearest < len(spans) and spans[nearest].end <= start + shift:
            nearest += 1
        held.append(nearest < len(spans) and spans[nearest].start < end + shift)
    return held
