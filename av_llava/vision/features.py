"""Which hidden states of a tower become features (LLaVA's select layer and select feature).

Contract: pure integers. Hidden state 0 is the embedding, state i the output of layer i, so a
tower of L layers has L + 1 states. States are resolved once, when a tower is built; a choice
that the tower is not deep enough for raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from av_llava.errors import UsageError, unknown_name


@dataclass(frozen=True)
class Selection:
    """The states whose channels stand side by side in a feature, and whether CLS stays."""

    states: tuple[int, ...]
    keep_cls: bool


def _one(layer: int, n_states: int) -> Sequence[int]:
    return (layer,)


def _every_fourth(layer: int, n_states: int) -> Sequence[int]:
    """Four states, a quarter of the depth apart; ``layer`` shifts the first."""
    step = n_states // 4
    states = range(step + layer, n_states, step) if step else range(0)
    if len(states) != 4 or states[0] < 0:
        raise UsageError(
            f"The slicefour features with select_layer {layer} do not give four states of a tower "
            f"of {n_states - 1} layers; use select_feature 'patch', or another select_layer."
        )
    return states


def _m25811_f6(layer: int, n_states: int) -> Sequence[int]:
    return (-2, -5, -8, -11, 6)


SELECT_FEATURES: dict[str, tuple[Callable[[int, int], Sequence[int]], bool]] = {
    "patch": (_one, False),
    "cls_patch": (_one, True),
    "slicefour_patch": (_every_fourth, False),
    "slicefour_cls_patch": (_every_fourth, True),
    "slice_m25811_f6_patch": (_m25811_f6, False),
    "slice_m25811_f6_cls_patch": (_m25811_f6, True),
}
"""Name to (rule, whether CLS stays). A rule maps (select_layer, number of states) to states."""


def select_states(feature: str, layer: int, n_states: int) -> Selection:
    """Resolve names and negative numbers to states of a tower.

    Args:
        feature: a key of ``SELECT_FEATURES``.
        layer: state that the rule starts from; negative numbers count from the last.
        n_states: of the tower, its layers plus one.

    Raises:
        UsageError: unknown feature, or a state that the tower does not have.
    """
    if feature not in SELECT_FEATURES:
        raise unknown_name("select_feature", feature, SELECT_FEATURES)
    rule, keep_cls = SELECT_FEATURES[feature]
    states = []
    for state in rule(layer, n_states):
        if not -n_states <= state < n_states:
            raise UsageError(
                f"select_feature {feature!r} with select_layer {layer} asks for hidden state "
                f"{state} of a tower of {n_states - 1} layers, which has {-n_states}.."
                f"{n_states - 1}."
            )
        states.append(state % n_states)
    return Selection(tuple(states), keep_cls)
