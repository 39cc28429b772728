"""How sure a score is, and whether two differ: intervals and tests with numpy alone.

Contract: questions about one video are not independent, so whatever carries a headline resamples
or sums over clusters (videos). Every function is deterministic: the bootstrap has a fixed seed.
Follows Wilson (1927), McNemar (1947) in its exact form, Holm (1979), and Miller, "Adding error bars
to evals" (2024), for the clustered standard error.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from av_llava.errors import UsageError

RESAMPLES, SEED, CONFIDENCE, POWER = 10_000, 20_240_611, 0.95, 0.8
FEW_CLUSTERS = 20
"""Fewer say less when they are resampled than Wilson's formula does."""
_ALL_FLIPS = 12  # clusters, up to which every combination of signs is tried
_CELLS = 1 << 22  # of one block of resampled cluster counts


@dataclass(frozen=True)
class Interval:
    """A range that holds the true value with some confidence."""

    low: float
    high: float
    confidence: float = CONFIDENCE
    method: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self)


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's interval of a proportion, for independent trials.

    Args:
        successes: 0 to n; sums of scores between 0 and 1 are taken as they are.
        n: trials, at least 1.
        confidence: such as 0.95.
    """
    if n < 1 or not 0 <= successes <= n:
        raise UsageError(f"A proportion needs 0 <= successes <= n, not {successes} of {n}.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and 1 the ends are exact; elsewhere rounding must not leave the share outside.
    low = 0.0 if successes == 0 else min(max(middle - half, 0.0), share)
    high = 1.0 if successes == n else max(min(middle + half, 1.0), share)
    return Interval(low, high, confidence, "Wilson")


def mean_stderr(scores: Sequence[float]) -> float:
    """Standard error of a mean of independent scores; NaN for fewer than two."""
    values = np.asarray(scores, float)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def clustered_stderr(scores: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of a mean of scores that are correlated within clusters.

    The independent part has n - 1 under it, as in lmms-eval; NaN for fewer than two scores.
    """
    values = np.asarray(scores, float)
    n = len(values)
    if n < 2:
        return math.nan
    index, n_clusters = cluster_index(clusters)
    off = values - values.mean()
    # Σ over pairs of different items of one cluster.
    pairs = (np.bincount(index, off, n_clusters) ** 2).sum() - (off**2).sum()
    return math.sqrt(max(float(off @ off) / (n - 1) / n + float(pairs) / n**2, 0.0))


def cluster_index(clusters: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """Number of each item's cluster, in order of appearance. [n] int64, and how many there are."""
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(c, len(numbers)) for c in clusters], np.int64)
    return index, len(numbers)


# -------------------------------------------------------------------- bootstrap


def bootstrap_means(
    sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> np.ndarray:
    """Means of resampled clusters.

    Args:
        sums: of the scores in each cluster and column. [C, K] float
        counts: of the items in each cluster and column. [C, K]
        resamples: B.
        seed: of the draws, which are shared by all columns.

    Returns:
        Σ sums / Σ counts over C clusters drawn with replacement, NaN where no item was drawn.
        [B, K] float
    """
    n_clusters = len(sums)
    rng = np.random.default_rng(seed)
    block = max(1, min(resamples, _CELLS // max(n_clusters, 1)))
    out = np.empty((resamples, sums.shape[1]))
    for at in range(0, resamples, block):
        b = min(block, resamples - at)
        drawn = rng.integers(n_clusters, size=(b, n_clusters), dtype=np.int32)
        drawn += np.arange(b, dtype=np.int32)[:, None] * n_clusters
        times = np.bincount(drawn.ravel(), minlength=b * n_clusters).reshape(b, n_clusters)
        weights = times.astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            out[at : at + b] = (weights @ sums) / (weights @ counts)
    return out


def percentile_interval(
    draws: np.ndarray, confidence: float = CONFIDENCE, method: str = "cluster bootstrap"
) -> Interval | None:
    """The middle part of bootstrap draws; None without any."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return None
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), confidence, method)


def cluster_bootstrap(
    scores: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    strata: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval | None:
    """Interval of a mean by resampling whole clusters.

    Args:
        scores: of all items.
        clusters: the video of each item.
        strata: group of each item, for the mean of the groups' means; None for the plain mean.
        confidence: such as 0.95.
        resamples: bootstrap draws.
        seed: of the draws.

    Returns:
        None for fewer than two clusters, of which nothing can be said.
    """
    values = np.asarray(scores, float)
    index, n_clusters = cluster_index(clusters)
    if n_clusters < 2:
        return None
    column, n_columns = cluster_index(strata if strata is not None else [0] * len(values))
    cells = index * n_columns + column
    shape = (n_clusters, n_columns)
    sums = np.bincount(cells, values, n_clusters * n_columns).reshape(shape)
    counts = np.bincount(cells, minlength=n_clusters * n_columns).reshape(shape).astype(float)
    means = bootstrap_means(sums, counts, resamples, seed)
    drawn = ~np.isnan(means)
    with np.errstate(invalid="ignore"):
        draws = np.where(drawn, means, 0.0).sum(1) / drawn.sum(1)
    return percentile_interval(draws, confidence)


# -------------------------------------------------------------------- two runs


@dataclass(frozen=True)
class PairedTest:
    """Student's t test of paired scores."""

    mean_diff: float
    se_diff: float
    ci_lower: float
    ci_upper: float
    t_stat: float
    p_value: float
    n: int


def paired_ttest(
    scores: Sequence[float], baseline: Sequence[float], confidence: float = CONFIDENCE
) -> PairedTest:
    """Whether the mean of paired differences is zero, for independent pairs.

    Raises:
        UsageError: fewer than two pairs, or lists of different length.
    """
    diff = _differences(scores, baseline)
    n = len(diff)
    if n < 2:
        raise UsageError(f"A paired test needs at least two pairs, not {n}.")
    mean, se = float(diff.mean()), mean_stderr(diff)  # type: ignore[arg-type]
    if se == 0:
        t = math.inf * mean if mean else 0.0
        return PairedTest(mean, 0.0, mean, mean, t, float(mean == 0), n)
    t, half = mean / se, t_quantile(0.5 + confidence / 2, n - 1) * se
    p = 2 * t_tail(abs(t), n - 1)
    return PairedTest(mean, se, mean - half, mean + half, t, p, n)


def _differences(scores: Sequence[float], baseline: Sequence[float]) -> np.ndarray:
    if len(scores) != len(baseline):
        raise UsageError(f"Pairs need equal lengths, not {len(scores)} and {len(baseline)}.")
    diff: np.ndarray = np.asarray(scores, float) - np.asarray(baseline, float)
    return diff


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value that discordant pairs fall to either side alike.

    Args:
        only_first: pairs that only the first has right.
        only_second: pairs that only the second has right.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    term = total = 1
    for i in range(k):
        term = term * (n - i) // (i + 1)
        total += term
    # Whole numbers until the end: exact for any n.
    return min(1.0, 2 * total / 2**n)


def flip_p_value(
    differences: Sequence[float],
    clusters: Sequence[Hashable],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> float:
    """Two-sided p-value that the two sides of every cluster could as well be exchanged.

    A randomisation test, which stays honest with few clusters: k of them that differ can give no
    less than 2 / 2**k. With few every exchange is tried, with many some are drawn.

    Args:
        differences: of all pairs.
        clusters: the video of each pair; its pairs are exchanged together.
        resamples: exchanges that are drawn.
        seed: of the draws.
    """
    index, n_clusters = cluster_index(clusters)
    sums = np.bincount(index, np.asarray(differences, float), n_clusters)
    sums = sums[sums != 0]
    size, observed = len(sums), abs(float(sums.sum())) - 1e-9
    if size <= _ALL_FLIPS:
        bits = np.arange(2**size)[:, None] >> np.arange(size) & 1
        return float((np.abs((1 - 2 * bits) @ sums) >= observed).mean())
    rng = np.random.default_rng(seed)
    block, far = max(1, min(resamples, _CELLS // size)), 0
    for at in range(0, resamples, block):
        b = min(block, resamples - at)
        signs = 1 - 2 * rng.integers(2, size=(b, size), dtype=np.int8)
        far += int((np.abs(signs @ sums) >= observed).sum())
    return (far + 1) / (resamples + 1)  # what was found is one of the exchanges: never 0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, by Holm's steps down; in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, largest = [0.0] * len(p_values), 0.0
    for step, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - step) * p_values[i]))
        out[i] = largest
    return out


def detectable_difference(
    stderr: float, confidence: float = CONFIDENCE, power: float = POWER
) -> float:
    """The smallest true difference that would be found with this power.

    Args:
        stderr: standard error of the difference.
        confidence: of the two-sided test.
        power: share of experiments that find it.
    """
    normal = NormalDist()
    return stderr * (normal.inv_cdf(0.5 + confidence / 2) + normal.inv_cdf(power))


# -------------------------------------------------------------------- Student's t


def t_tail(t: float, df: float) -> float:
    """P(T > t) for Student's distribution, t >= 0."""
    return 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))


def t_quantile(probability: float, df: float) -> float:
    """The t below which that much of the distribution lies; probability >= 0.5."""
    low, high = 0.0, 1.0
    while t_tail(high, df) > 1 - probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 1 - probability else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function, by its continued fraction."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - math.exp(log_front) * _fraction(b, a, 1 - x) / b
    return math.exp(log_front) * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    """Lentz's evaluation of the continued fraction of the incomplete beta function."""
    tiny = 1e-300
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1), tiny)
    out = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away(1 + term * d, tiny)
            c = _away(1 + term / c, tiny)
            out *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return out


def _away(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def is_binary(values: Iterable[float]) -> bool:
    """Whether all scores are 0 or 1."""
    return all(v in (0, 1) for v in values)
