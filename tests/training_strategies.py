"""Samples for property tests: any mix of texts, media, times, flags and extra keys."""

from __future__ import annotations

from hypothesis import strategies as st

from av_llava.chat import MediaPart, Message, TextPart
from av_llava.training.samples import Sample

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12)
NAMES = st.from_regex(r"[a-z]{1,6}(/[a-z0-9 ü]{1,4}[a-z])?\.[a-z]{3}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def media(draw, kinds=("image", "video", "audio")):
    kind = draw(st.sampled_from(kinds))
    fields = {}
    if draw(st.booleans()):
        fields["start_s"] = draw(st.integers(0, 3))
        fields["end_s"] = draw(st.none() | st.floats(4, 9))
    if kind == "video" and draw(st.booleans()):
        fields["fps"] = draw(st.none() | st.floats(0.1, 30))
        fields["frames"] = draw(st.none() | st.integers(1, 99))
        fields["audio"] = draw(st.sampled_from([None, "auto", "on", "off"]) | NAMES)
    return MediaPart(kind, draw(NAMES), **fields)


@st.composite
def messages(draw, role):
    """A turn whose neighbouring parts are not both texts, as normalised turns are."""
    parts = []
    for medium in draw(st.lists(media(), max_size=3)) if role == "user" else []:
        parts += [TextPart(draw(TEXT)), medium]
    parts.append(TextPart(draw(TEXT)))
    return Message(role, tuple(p for p in parts if p != TextPart("")))


@st.composite
def samples(draw):
    turns = [draw(messages("system"))] if draw(st.booleans()) else []
    n = draw(st.integers(1, 3))
    for _ in range(n):
        turns += [draw(messages("user")), draw(messages("assistant"))]
    return Sample(
        id=draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)),
        messages=tuple(turns),
        source=draw(TEXT),
        train_turns=draw(st.none() | st.tuples(*[st.booleans()] * n)),
        weight=draw(st.sampled_from([1.0, 0.0, 0.25, 3])),
        meta=draw(st.dictionaries(st.from_regex("m_[a-z]{1,4}", fullmatch=True), JSON, max_size=2)),
    )
