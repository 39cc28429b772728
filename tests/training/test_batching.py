"""Batches under a token budget: every sample once, ranks alike, nothing decoded to skip."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from av_llava.errors import DataError, UsageError
from av_llava.training.batch_plan import BatchShape, natural_count
from av_llava.training.batching import PlannedBatch, TokenBudgetBatchSampler

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import batching as batching_bench

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=400).map(np.array)


def some_lengths(n=3000, seed=0, high=400):
    return np.random.default_rng(seed).integers(5, high, n)


def of_all_ranks(lengths, world_size, **settings):
    return [
        TokenBudgetBatchSampler(lengths, world_size=world_size, rank=r, **settings)
        for r in range(world_size)
    ]


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    world_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    max_tokens=st.integers(300, 3000),
    max_samples=st.none() | st.integers(1, 9),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_within_the_budget_and_as_many_batches_on_every_rank(
    lengths, world_size, accumulation, max_tokens, max_samples, shuffle, epoch
):
    samplers = of_all_ranks(
        lengths, world_size, max_tokens=max_tokens, max_samples=max_samples,
        accumulation=accumulation, shuffle=shuffle, seed=3,
    )  # fmt: skip
    batches = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
        own = list(sampler)
        assert len(own) == len(sampler) == len(samplers[0])
        batches += own
    for batch in batches:
        assert batch and len(batch) <= (max_samples or len(lengths))
        assert lengths[batch].max() * len(batch) <= max_tokens
    seen = Counter(i for batch in batches for i in batch)
    assert set(seen) == set(range(len(lengths)))
    repeated = sum(seen.values()) - len(lengths)
    assert repeated == samplers[0].plan.n_repeated
    assert repeated < world_size
    if repeated:  # only to give every rank something
        assert len(batches) > len(lengths)


@settings(deadline=None)
@given(lengths=LENGTHS, epochs=st.integers(1, 4), world_size=st.integers(1, 4))
def test_all_epochs_have_as_many_batches(lengths, epochs, world_size):
    sampler = TokenBudgetBatchSampler(lengths, max_tokens=600, world_size=world_size)
    expected = len(sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        assert len(sampler) == expected == len(list(sampler))


@settings(deadline=None)
@given(lengths=LENGTHS, max_tokens=st.integers(300, 900), most=st.none() | st.integers(1, 5))
def test_the_fewest_batches_are_found(lengths, max_tokens, most):
    """Against a slow oracle: take from the longest on, one sample at a time."""
    count, size, longest = 0, 0, 0
    for length in sorted(lengths, reverse=True):
        if size and (size + 1) * longest <= max_tokens and size != most:
            size += 1
        else:
            count, size, longest = count + 1, 1, length
    assert natural_count(lengths, BatchShape(max_tokens, most)) == count


def test_the_same_seed_and_epoch_give_the_same_batches_and_others_do_not():
    lengths = some_lengths()

    def batches(seed, epoch):
        sampler = TokenBudgetBatchSampler(lengths, max_tokens=2000, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(1, 2) == batches(1, 2)
    assert batches(1, 2) != batches(1, 3) != batches(2, 3)
    as_sets = [{tuple(sorted(b)) for b in batches(1, e)} for e in (0, 1)]
    assert len(as_sets[0] & as_sets[1]) < 0.2 * len(as_sets[0]), "samples meet others every epoch"


def test_later_epochs_do_not_depend_on_earlier_ones():
    lengths = some_lengths()
    straight = TokenBudgetBatchSampler(lengths, max_tokens=2000)
    straight.set_epoch(2)
    visited = TokenBudgetBatchSampler(lengths, max_tokens=2000)
    for epoch in (0, 1, 2):
        visited.set_epoch(epoch)
        last = list(visited)
    assert last == list(straight)


def test_skipping_gives_the_rest():
    sampler = TokenBudgetBatchSampler(some_lengths(), max_tokens=2000)
    assert list(sampler.batches(7)) == list(sampler)[7:]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("world_size", [2, 8])
def test_ranks_work_alike_in_every_micro_step(world_size, accumulation):
    lengths = some_lengths(20_000)
    samplers = of_all_ranks(lengths, world_size, max_tokens=2000, accumulation=accumulation, seed=1)
    plan = samplers[0].plan
    work = plan.padded[plan.steps]
    for rank, sampler in enumerate(samplers):
        own = [lengths[b].max() * len(b) for b in sampler]
        assert own == work[:, rank].tolist()
    assert plan.idle < 0.01
    steps = work.reshape(-1, accumulation, world_size).sum(1)
    spread = (steps.max(1) - steps.min(1)) / steps.mean(1)
    assert np.median(spread) < 0.005 and len(work) % accumulation == 0
    whole = work.sum(0)
    assert (whole.max() - whole.min()) / whole.mean() < 0.005


def test_batches_are_equally_full_even_when_few():
    plan = TokenBudgetBatchSampler(some_lengths(100), max_tokens=10_000, world_size=8).plan
    assert len(plan.padded) == 8, "two or three full batches would leave ranks without work"
    assert plan.padded.max() < 1.35 * plan.padded.mean()


def test_short_and_long_samples_alternate():
    """Steps are shuffled: no epoch begins with all short samples."""
    lengths = some_lengths(20_000)
    means = [lengths[b].mean() for b in TokenBudgetBatchSampler(lengths, max_tokens=2000)]
    correlation = np.corrcoef(np.arange(len(means)), means)[0, 1]
    assert abs(correlation) < 0.1


def test_the_first_step_is_the_heaviest():
    plan = TokenBudgetBatchSampler(some_lengths(), max_tokens=2000, world_size=2).plan
    work = plan.padded[plan.steps].sum(1)
    assert work[0] >= np.quantile(work, 0.999)


def test_without_shuffling_batches_follow_the_data():
    lengths = np.full(40, 100)
    sampler = TokenBudgetBatchSampler(lengths, max_tokens=400, shuffle=False)
    assert list(sampler) == [list(range(i, i + 4)) for i in range(0, 40, 4)]
    sampler.set_epoch(5)
    assert list(sampler) == [list(range(i, i + 4)) for i in range(0, 40, 4)]


def test_a_sample_beyond_the_budget_is_an_error_or_alone():
    lengths = np.array([10, 5000, 20, 7000])
    with pytest.raises(
        DataError,
        match="2 samples are longer than max_tokens = 1,000: the longest is sample 3 with 7,000",
    ):
        TokenBudgetBatchSampler(lengths, max_tokens=1000)
    sampler = TokenBudgetBatchSampler(lengths, max_tokens=1000, too_long="alone")
    assert sorted(map(sorted, sampler)) == [[0, 2], [1], [3]]
    assert sampler.n_too_long == 2


def test_fewer_samples_than_ranks_are_repeated_and_said(caplog):
    samplers = of_all_ranks(np.array([5, 6, 7]), 8, max_tokens=100)
    assert "3 samples are too few for equally many batches on 8 ranks: 5 of" in caplog.text
    assert [len(list(s)) for s in samplers] == [1] * 8


def test_lengths_may_change_with_the_epoch():
    """Modality dropout: the plan is made of the lengths of that epoch."""

    def lengths(epoch):
        return some_lengths(500, seed=epoch, high=100 + 60 * epoch)

    sampler = TokenBudgetBatchSampler(lengths, max_tokens=1000, world_size=2, epochs=4)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        now = lengths(epoch)
        assert len(sampler.plan.steps) == len(sampler)
        assert all(now[b].max() * len(b) <= 1000 for b in sampler)
    sampler.set_epoch(9)
    with pytest.raises(UsageError, match="epoch 9 do not fit the .* batches.*epochs"):
        list(sampler)


def test_batches_carry_their_epoch_through_pickling():
    sampler = TokenBudgetBatchSampler(some_lengths(50), max_tokens=2000)
    sampler.set_epoch(3)
    batch = list(sampler)[1]
    again = pickle.loads(pickle.dumps(batch))
    assert isinstance(again, PlannedBatch) and again == batch
    assert (again.epoch, again.number) == (3, 1)


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_tokens": 999}, {"world_size": 2}])
def test_a_run_with_other_batches_cannot_be_resumed(change):
    before = TokenBudgetBatchSampler(some_lengths(), max_tokens=2000).state_dict()
    TokenBudgetBatchSampler(some_lengths(), max_tokens=2000).load_state_dict(before)
    other = TokenBudgetBatchSampler(some_lengths(), **{"max_tokens": 2000, **change})
    with pytest.raises(DataError, match=f"with {next(iter(change))} = "):
        other.load_state_dict(before)
    changed = TokenBudgetBatchSampler(some_lengths(seed=1), max_tokens=2000)
    with pytest.raises(DataError, match="made its batches with"):
        changed.load_state_dict(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank must be between 0 and 1"),
        ({"too_long": "cut"}, "Unknown answer to samples that are too long 'cut'"),
        ({"lengths": np.array([], int)}, "no samples"),
        ({"lengths": np.array([3, 0])}, "Sample 1 has a length of 0"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    arguments = {"lengths": np.array([5, 6]), "max_tokens": 100, **change}
    with pytest.raises((UsageError, DataError), match=message):
        TokenBudgetBatchSampler(arguments.pop("lengths"), **arguments)


@pytest.mark.slow
def test_a_million_samples_are_planned_in_seconds():
    import time

    lengths = np.random.default_rng(0).integers(50, 8000, 1_000_000)
    started = time.process_time()
    sampler = TokenBudgetBatchSampler(lengths, max_tokens=16_384, world_size=8)
    plan = sampler.plan
    assert time.process_time() - started < 20
    assert plan.waste < 0.02
    assert np.array_equal(np.sort(plan.order), np.arange(len(lengths)))


# ---------------------------------------------------------------- the mixture of the benchmark


def test_the_mixture_is_like_that_of_published_runs():
    data = batching_bench.mixture(60_000)
    assert np.bincount(data.modality) / 60_000 == pytest.approx(batching_bench.SHARES, abs=0.01)
    assert data.lengths.mean() == pytest.approx(1983, rel=0.05)
    assert np.median(data.lengths) == pytest.approx(1564, rel=0.05)
    assert np.quantile(data.lengths, 0.9) == pytest.approx(4486, rel=0.05)
    assert data.lengths.max() == 8192 and data.lengths.min() > 0


@pytest.mark.parametrize("max_tokens", [8192, 16_384, 32_768])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_less_than_two_percent_are_wasted_on_the_mixture(ranks, max_tokens):
    lengths = batching_bench.mixture(20_000).lengths
    for epoch in (0, 1):
        sampler = TokenBudgetBatchSampler(
            lengths, max_tokens=max_tokens, world_size=ranks, accumulation=2, seed=5
        )
        sampler.set_epoch(epoch)
        plan = sampler.plan
        assert 0 <= plan.waste < 0.02
        # What the properties say, counted by hand.
        batches = [[plan.batch(s, r) for r in range(ranks)] for s in range(len(plan.steps))]
        slowest = [max(max(lengths[b]) * len(b) for b in step) for step in batches]
        assert plan.waste == pytest.approx(1 - lengths.sum() / (ranks * sum(slowest)))
