"""A mixture of text, images, sound and video in batches: what ranks spend on padding and waiting.

Sixty thousand samples as in a published audio-visual fine-tuning run (10 % text, 25 % images,
15 % sound, 35 % video, 15 % video with sound); nothing is timed, tokens are counted. A rank is
busy for the padded tokens of its batch, and all wait for the slowest one in every step. The
contestants are four samples a batch at random; what LLaVA does (modality and number of WORDS);
transformers' grouping by length on words; the same by true length; ours, a budget of tokens. The
ratio is tokens that the ranks could have worked through to tokens of samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from av_llava.training.batching import TokenBudgetBatchSampler
from bench.measure import Row, check

TITLE = "Batches of a mixture"
RATIO = "× tokens of samples"
SAMPLES, RANDOM, OURS = "tokens of samples", "4 at random", "av_llava, token budget"
WORDS, GROUPED = "modality + words (LLaVA)", "grouped by words"
LENGTH = "grouped by true length"
# Less than 2 % for padding and waiting together.
BOUND = 1 / 0.98
LONGEST = 8192
BATCH = 4
SHARES = (0.10, 0.25, 0.15, 0.35, 0.15)
MEGA_BATCHES = 50


@dataclass(frozen=True, eq=False)
class Mixture:
    """Samples of a mixture."""

    modality: np.ndarray
    """int [n]: text, image, sound, video, video with sound."""
    words: np.ndarray
    """int [n], words of text."""
    lengths: np.ndarray
    """int [n], tokens as the language model sees them."""


def mixture(n: int, seed: int = 0) -> Mixture:
    """Draw samples; lengths have a mean of 2000, a median of 1500, and 90 % are below 4400."""
    rng = np.random.default_rng(seed)
    modality = rng.choice(len(SHARES), n, p=SHARES)
    text = np.exp(rng.normal(np.log(110), 0.8, n)) + 40
    image = 576 * rng.choice(np.arange(1, 6), n, p=(0.35, 0.25, 0.2, 0.1, 0.1))
    sound = np.clip(25 * np.exp(rng.normal(np.log(20), 0.8, n)), 1, 750)
    frames = np.minimum(np.exp(rng.normal(np.log(9.5), 0.9, n)).round() + 2, 64)
    lengths = text + np.where(modality == 1, image, 0)
    lengths += np.where((modality == 2) | (modality == 4), sound, 0)
    lengths += np.where(modality >= 3, 180 * frames, 0)
    lengths = np.minimum(lengths, LONGEST).round().astype(np.int64)
    return Mixture(modality, (text / 1.3).round().astype(np.int64), lengths)


def ranks_spend(padded: np.ndarray) -> int:
    """Tokens that all ranks could have worked through, from padded tokens [steps, ranks]."""
    return int(padded.max(axis=1).sum() * padded.shape[1])


def fixed(order: np.ndarray, lengths: np.ndarray, ranks: int) -> tuple[int, int]:
    """Batches of four, rank after rank: tokens spent, and tokens of the samples in them."""
    used = order[: len(order) // (ranks * BATCH) * ranks * BATCH]
    batches = lengths[used].reshape(-1, ranks, BATCH)
    return ranks_spend(batches.max(axis=2) * BATCH), int(batches.sum())


def at_random(data: Mixture, ranks: int, rng: np.random.Generator) -> np.ndarray:
    """No grouping."""
    return rng.permutation(len(data.lengths))


def by_key(key: np.ndarray, mega: int, ranks: int, rng: np.random.Generator) -> np.ndarray:
    """Random blocks, each sorted from large to small; the ranks take neighbours of it."""
    order = rng.permutation(len(key))
    block = np.arange(len(key)) // (mega * ranks * BATCH)
    return order[np.lexsort((-key[order], block))]


def by_modality_and_words(data: Mixture, ranks: int, rng: np.random.Generator) -> np.ndarray:
    """Text apart from the rest; in each, blocks of one step, sorted by words and shuffled."""
    steps = []
    for part in (data.modality == 0, data.modality > 0):
        rows = np.flatnonzero(part)
        rows = rows[by_key(data.words[rows], 1, ranks, rng)]
        steps.append(rows[: len(rows) // (ranks * BATCH) * ranks * BATCH])
    whole = np.concatenate(steps).reshape(-1, ranks * BATCH)
    return rng.permutation(whole).reshape(-1)


def by_words(data: Mixture, ranks: int, rng: np.random.Generator) -> np.ndarray:
    """Grouping by the key that is at hand before media are opened."""
    return by_key(data.words, MEGA_BATCHES, ranks, rng)


def by_length(data: Mixture, ranks: int, rng: np.random.Generator) -> np.ndarray:
    """Grouping by true length."""
    return by_key(data.lengths, MEGA_BATCHES, ranks, rng)


Order = Callable[[Mixture, int, np.random.Generator], np.ndarray]
FIXED: dict[str, Order] = {
    RANDOM: at_random,
    WORDS: by_modality_and_words,
    GROUPED: by_words,
    LENGTH: by_length,
}


def ours(data: Mixture, ranks: int) -> tuple[int, int]:
    """Tokens spent by the library's plan, and tokens of the samples; all samples are in it."""
    plan = TokenBudgetBatchSampler(data.lengths, max_tokens=LONGEST, world_size=ranks).plan
    used = np.bincount(plan.order, minlength=len(data.lengths))
    check(bool((used == 1).all()), "the plan does not use every sample once")
    return ranks_spend(plan.padded[plan.steps]), plan.n_tokens


def run(quick: bool) -> list[Row]:
    """All rows."""
    data = mixture(6000 if quick else 60_000)
    rows = []
    for ranks in (1, 2, 8):
        case = f"{ranks} rank{'s' if ranks > 1 else ''}"
        rows.append(_row(case, SAMPLES, int(data.lengths.sum()), int(data.lengths.sum())))
        for name, order in FIXED.items():
            rng = np.random.default_rng(0)
            rows.append(_row(case, name, *fixed(order(data, ranks, rng), data.lengths, ranks)))
        rows.append(_row(case, OURS, *ours(data, ranks), bound=BOUND))
    return rows


def _row(case: str, name: str, spent: int, useful: int, bound: float | None = None) -> Row:
    tokens = spent / 1e6
    return Row(case, name, tokens, tokens, "M tokens", spent / useful, "cost", bound)
