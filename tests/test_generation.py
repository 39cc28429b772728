"""Stop texts never show in a stream, however the pieces fall."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from av_llava.generation import without_stops


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
