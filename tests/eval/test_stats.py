"""Intervals and tests against published numbers, brute force, and what they promise."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from golden_data import golden
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import UsageError
from av_llava_eval.stats import (
    bootstrap_means,
    cluster_bootstrap,
    clustered_stderr,
    detectable_difference,
    flip_p_value,
    holm,
    mcnemar_exact,
    mean_stderr,
    paired_ttest,
    t_quantile,
    t_tail,
    wilson,
)


def statistics():
    lines = golden("eval/statistics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_published_standard_errors_and_paired_tests():
    records = statistics()
    assert len(records) >= 10
    for record in records:
        scores = record["scores"]
        assert mean_stderr(scores) == pytest.approx(record["mean_stderr"], rel=1e-12)
        found = clustered_stderr(scores, record["clusters"])
        assert found == pytest.approx(record["clustered_stderr"], rel=1e-9)
        test = vars(paired_ttest(scores, record["baseline"]))
        for name, value in record["paired_ttest"].items():
            assert test[name] == pytest.approx(value, rel=1e-7, abs=1e-9), name


def test_clustered_error_by_definition():
    rng = np.random.default_rng(1)
    scores, clusters = rng.integers(0, 2, 40).astype(float), rng.integers(0, 9, 40)
    mean, total = scores.mean(), 0.0
    for i, j in itertools.product(range(40), repeat=2):
        if i != j and clusters[i] == clusters[j]:
            total += (scores[i] - mean) * (scores[j] - mean)
    expected = math.sqrt(scores.var(ddof=1) / 40 + total / 40**2)
    assert clustered_stderr(scores, list(clusters)) == pytest.approx(expected)
    alone = clustered_stderr(scores, list(range(40)))
    assert alone == pytest.approx(mean_stderr(scores))


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_ends_where_the_score_test_just_rejects(n, share, confidence):
    successes = round(share * n)
    found = wilson(successes, n, confidence)
    p = successes / n
    assert 0 <= found.low <= p <= found.high <= 1
    z = (found.high - p) / math.sqrt(found.high * (1 - found.high) / n) if found.high < 1 else None
    if z is not None:
        assert math.erf(z / math.sqrt(2)) == pytest.approx(confidence, abs=1e-9)
    mirrored = wilson(n - successes, n, confidence)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))


def test_wilson_covers_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for k in rng.binomial(60, 0.3, 2000):
        interval = wilson(int(k), 60)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.93 < hits / 2000 < 0.97
    with pytest.raises(UsageError):
        wilson(3, 0)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 9), (7, 7), (0, 12), (10, 2)])
def test_mcnemar_by_enumeration(first, second):
    n = first + second
    outcomes = [sum(o) for o in itertools.product((0, 1), repeat=n)]
    extreme = sum(abs(2 * k - n) >= abs(first - second) for k in outcomes)
    assert mcnemar_exact(first, second) == pytest.approx(float(Fraction(extreme, 2**n)))


def test_mcnemar_with_thousands_of_pairs():
    assert mcnemar_exact(4000, 4000) == 1.0
    assert 0 < mcnemar_exact(3800, 4200) < 1e-4


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_by_definition(p_values):
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.2):
        rejected, order = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
        for step, i in enumerate(order):
            if p_values[i] * (len(p_values) - step) > level:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected


@pytest.mark.parametrize("df", [1, 2, 4, 30, 199])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 8.0])
def test_students_tail_by_integration(df, t):
    front = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    # The substitution x = tan(a) makes the infinite range finite.
    a = np.linspace(math.atan(t), math.pi / 2, 200_001)[:-1]
    x = np.tan(a)
    density = front * (1 + x * x / df) ** (-(df + 1) / 2) * (1 + x * x)
    area = ((density[1:] + density[:-1]) / 2 * np.diff(a)).sum()
    assert t_tail(t, df) == pytest.approx(area, abs=1e-5)
    if 0 < t < 5:  # beyond, 1 - tail has too few digits
        assert t_quantile(1 - t_tail(t, df), df) == pytest.approx(t, rel=1e-6)


def test_a_paired_test_of_equal_runs():
    same = paired_ttest([1, 0, 1], [1, 0, 1])
    assert (same.mean_diff, same.p_value) == (0, 1)
    shifted = paired_ttest([1, 1, 1], [0, 0, 0])
    assert (shifted.mean_diff, shifted.p_value, shifted.ci_lower) == (1, 0, 1)
    for wrong in (([1], [0]), ([1, 0], [1])):
        with pytest.raises(UsageError):
            paired_ttest(*wrong)


# -------------------------------------------------------------------- bootstrap


def grouped(seed=0, n_clusters=150):
    """Scores that are alike within clusters of one to five."""
    rng = np.random.default_rng(seed)
    scores, clusters, strata = [], [], []
    for c in range(n_clusters):
        p = rng.beta(1.5, 1)
        for _ in range(rng.integers(1, 6)):
            scores.append(float(rng.random() < p))
            clusters.append(f"v{c}")
            strata.append("ab"[int(rng.random() < 0.2)])
    return scores, clusters, strata


def test_resampled_means_by_a_loop():
    rng = np.random.default_rng(3)
    sums, counts = rng.random((6, 2)), rng.integers(1, 4, (6, 2)).astype(float)
    fast = bootstrap_means(sums, counts, 50, seed=9)
    draws = np.random.default_rng(9).integers(6, size=(50, 6), dtype=np.int32)
    for row, drawn in zip(fast, draws):
        total, n = np.zeros(2), np.zeros(2)
        for cluster in drawn:
            total += sums[cluster]
            n += counts[cluster]
        np.testing.assert_allclose(row, total / n)


def test_the_bootstrap_agrees_with_the_clustered_error():
    scores, clusters, _ = grouped()
    interval = cluster_bootstrap(scores, clusters)
    half = (interval.high - interval.low) / 2
    assert half == pytest.approx(1.96 * clustered_stderr(scores, clusters), rel=0.05)
    assert interval == cluster_bootstrap(scores, clusters)  # a fixed seed
    plain = wilson(sum(scores), len(scores))
    assert half > 1.1 * (plain.high - plain.low) / 2  # ignoring clusters flatters


def test_a_macro_mean_is_resampled_as_such():
    scores, clusters, strata = grouped()
    interval = cluster_bootstrap(scores, clusters, strata=strata)
    means = [np.mean([s for s, g in zip(scores, strata) if g == k]) for k in "ab"]
    assert interval.low < np.mean(means) < interval.high
    rng, draws = np.random.default_rng(0), []
    by_video = {}
    for s, c, g in zip(scores, clusters, strata):
        by_video.setdefault(c, []).append((s, g))
    videos = list(by_video.values())
    for _ in range(1000):
        items = [i for k in rng.integers(len(videos), size=len(videos)) for i in videos[k]]
        draws.append(np.mean([np.mean([s for s, g in items if g == k]) for k in "ab"]))
    np.testing.assert_allclose(
        (interval.low, interval.high), np.quantile(draws, [0.025, 0.975]), atol=0.012
    )


def test_blocks_change_nothing_but_memory(monkeypatch):
    sums, counts = np.random.default_rng(0).random((40, 1)), np.ones((40, 1))
    whole = bootstrap_means(sums, counts, 300)
    monkeypatch.setattr("av_llava_eval.stats._CELLS", 4000)
    np.testing.assert_array_equal(bootstrap_means(sums, counts, 300), whole)


def test_one_video_says_nothing():
    assert cluster_bootstrap([1, 0, 1], ["v"] * 3) is None
    assert math.isnan(mean_stderr([1.0]))


def test_coverage_over_videos():
    hits = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        rates = rng.beta(2, 2, 60)
        scores = (rng.random((60, 3)) < rates[:, None]).astype(float).ravel()
        interval = cluster_bootstrap(scores, np.repeat(np.arange(60), 3).tolist(), resamples=400)
        hits += interval.low <= 0.5 <= interval.high
    assert 0.88 <= hits / 150 <= 0.99


def test_a_difference_of_the_detectable_size_is_found_as_often_as_said():
    se = 0.02
    true = detectable_difference(se)
    found = np.random.default_rng(0).normal(true, se, 20_000) / se > 1.959964
    assert found.mean() == pytest.approx(0.8, abs=0.01)


# -------------------------------------------------------------------- exchanging sides


def flips_by_hand(differences, clusters):
    """Every way of exchanging the sides of whole clusters, one by one."""
    names = sorted(set(clusters))
    found = abs(sum(differences))
    far = 0
    for signs in itertools.product((1, -1), repeat=len(names)):
        sign = dict(zip(names, signs, strict=True))
        total = sum(sign[c] * d for c, d in zip(clusters, differences, strict=True))
        far += abs(total) >= found - 1e-9
    return far / 2 ** len(names)


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([-1.0, 0.0, 0.5, 1.0])), min_size=1))
def test_exchanged_sides_are_counted_exactly(pairs):
    clusters, differences = zip(*pairs, strict=True)
    expected = flips_by_hand(differences, clusters)
    assert flip_p_value(differences, clusters) == pytest.approx(expected)


def test_two_videos_are_never_significant():
    assert flip_p_value([-1.0] * 50, ["a"] * 25 + ["b"] * 25) == 0.5


def test_drawn_exchanges_agree_with_all_of_them():
    differences = [1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 0.5, 1.0, -0.5, 1.0, 1.0, -1.0]
    drawn = flip_p_value(differences, range(14))
    assert drawn == pytest.approx(flips_by_hand(differences, range(14)), abs=0.015)
    assert flip_p_value([1.0] * 400, range(400)) == pytest.approx(1 / 10_001)
