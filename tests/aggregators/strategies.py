"""Random settings for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from av_llava.settings import (
    LAYOUTS,
    NEWLINES,
    POOL_KINDS,
    AggregatorSettings,
    PoolSettings,
    SelectSettings,
    StreamSettings,
    TemporalSettings,
)

ALL = SelectSettings()

pools = st.builds(
    PoolSettings,
    kind=st.sampled_from(POOL_KINDS),
    stride=st.integers(1, 3),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    tail=st.sampled_from(["drop", "partial"]),
    clamp=st.booleans(),
)
selects = st.one_of(
    st.just(ALL),
    st.builds(SelectSettings, kind=st.just("every"), step=st.integers(1, 5)),
    st.builds(
        SelectSettings, kind=st.just("uniform"), count=st.integers(1, 6), repeat=st.booleans()
    ),
    st.builds(
        SelectSettings,
        kind=st.just("sample"),
        step=st.integers(1, 4),
        min_frames=st.integers(1, 5),
    ),
)
temporals = st.builds(
    TemporalSettings,
    kind=st.sampled_from(["none", "average", "mean", "adaptive"]),
    size=st.integers(1, 4),
    tail=st.sampled_from(["drop", "partial", "adaptive"]),
    min_frames=st.integers(1, 4),
)


@st.composite
def settings(draw: st.DrawFn) -> AggregatorSettings:
    """Any valid settings of kind streams."""
    layout = draw(st.sampled_from(LAYOUTS))
    newline = draw(st.sampled_from(NEWLINES))
    kinds = pools.filter(lambda p: newline != "row" or not p.kind.startswith("raster"))
    times = st.just(TemporalSettings()) if layout == "by_frame" else temporals
    slow = draw(st.builds(StreamSettings, select=selects, pool=kinds, temporal=times))
    fast = draw(st.builds(StreamSettings, select=st.just(ALL), pool=kinds, temporal=times))
    return AggregatorSettings(
        layout=layout,
        slow=slow,
        fast=None if layout == "single" else fast,
        newline=newline,
        frame_end=draw(st.booleans()),
    )


sizes = st.tuples(st.integers(1, 9), st.integers(3, 7), st.integers(3, 7))
"""Frames, height, width: sides that every pooling can take."""
