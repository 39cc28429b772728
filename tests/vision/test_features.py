"""Choice of hidden states."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import UsageError
from av_llava.vision import SELECT_FEATURES, select_states


@pytest.mark.parametrize(
    ("feature", "layer", "n_layers", "states"),
    [
        ("patch", -2, 24, (23,)),
        ("cls_patch", -1, 24, (24,)),
        ("patch", 0, 24, (0,)),
        ("slicefour_patch", -2, 24, (4, 10, 16, 22)),
        ("slicefour_patch", -2, 11, (1, 4, 7, 10)),
        ("slice_m25811_f6_patch", -2, 24, (23, 20, 17, 14, 6)),
    ],
)
def test_states(feature, layer, n_layers, states):
    assert select_states(feature, layer, n_layers + 1).states == states


@pytest.mark.parametrize("feature", SELECT_FEATURES)
def test_only_cls_features_keep_the_class_token(feature):
    assert select_states(feature, -2, 25).keep_cls == ("cls" in feature)


@given(st.integers(-60, 60), st.integers(1, 48))
def test_one_state_is_python_indexing(layer, n_layers):
    states = list(range(n_layers + 1))
    try:
        wanted = states[layer]
    except IndexError:
        with pytest.raises(UsageError, match=f"tower of {n_layers} layers"):
            select_states("patch", layer, n_layers + 1)
    else:
        assert select_states("patch", layer, n_layers + 1).states == (wanted,)


@pytest.mark.parametrize(("n_layers", "layer"), [(3, -2), (2, -1), (24, 5), (24, -7)])
def test_four_slices_or_an_error(n_layers, layer):
    # The reference reports four times the width whatever it gives; here that cannot happen.
    with pytest.raises(UsageError, match="slicefour"):
        select_states("slicefour_patch", layer, n_layers + 1)


def test_shallow_towers_lack_fixed_slices():
    with pytest.raises(UsageError, match="hidden state -11"):
        select_states("slice_m25811_f6_patch", -2, 8)


def test_unknown_feature_names_the_known():
    with pytest.raises(UsageError, match="Did you mean 'patch'"):
        select_states("patches", -2, 25)
