"""The order of samples: against sorted ranges, uniform counts (scipy), and slices cut from the whole global batch."""

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from wherefrom.pipeline.order import Order, OrderMode, permute

KEYS = np.arange(1, 33, dtype=np.uint32) * np.uint32(0x9E3779B1)
MODES: list[OrderMode] = ["shuffled", "block", "sequential"]


def make_order(samples: int, global_batch: int, mode: OrderMode = "shuffled", **settings_: int) -> Order:
    """An order over uneven shards, among them an empty one."""
    shards = max(1, samples // 7)
    ends = np.sort(np.random.default_rng(samples).integers(0, samples + 1, shards - 1))
    lengths = tuple(np.diff([0, *ends, samples]).tolist())
    return Order(samples=samples, global_batch=global_batch, mode=mode, shard_lengths=lengths, window=3, **settings_)


def epoch_ids(order: Order, epoch: int = 0) -> NDArray[np.int64]:
    """Everything that one rank sees in an epoch."""
    places = itertools.product(range(order.updates_per_epoch), range(order.accumulation))
    return np.concatenate([order.micro_batch(epoch, step, micro) for step, micro in places])


@pytest.mark.core
@given(st.integers(1, 5000), st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32))
def test_permutation_is_a_bijection_of_any_length(count: int, keys: list[int]) -> None:
    mixed = permute(np.arange(count), count, np.array(keys, np.uint32))
    np.testing.assert_array_equal(np.sort(mixed), np.arange(count))


@pytest.mark.core
@pytest.mark.parametrize("count", [1, 2, 3, 2**16 - 1, 2**16, 2**16 + 1, 300_007])
def test_permutation_is_a_bijection_around_powers_of_two(count: int) -> None:
    np.testing.assert_array_equal(np.sort(permute(np.arange(count), count, KEYS)), np.arange(count))


@given(st.integers(2**31, 2**40), st.integers(0, 2**31 - 500))
def test_permutation_of_billions_stays_in_range_and_never_meets_itself(count: int, start: int) -> None:
    mixed = permute(np.arange(start, start + 500), count, KEYS)
    assert mixed.min() >= 0 and mixed.max() < count
    assert len(np.unique(mixed)) == 500


@pytest.mark.core
@settings(max_examples=40)
@given(st.sampled_from(MODES), st.integers(1, 400), st.integers(1, 60), st.integers(0, 5))
def test_every_sample_of_an_epoch_comes_exactly_once(mode: OrderMode, samples: int, global_batch: int, epoch: int) -> None:
    if mode != "sequential" and global_batch > samples:
        global_batch = samples
    order = make_order(samples, global_batch, mode)
    ids = epoch_ids(order, epoch)
    assert len(np.unique(ids)) == len(ids)
    assert len(ids) == (samples if mode == "sequential" else samples // global_batch * global_batch)
    everything = order.ids(epoch, np.arange(samples))
    np.testing.assert_array_equal(np.sort(everything), np.arange(samples))
    np.testing.assert_array_equal(everything[: len(ids)], ids)


@pytest.mark.core
@settings(max_examples=40)
@given(st.sampled_from(MODES), st.integers(1, 400), st.integers(0, 5))
def test_positions_are_the_inverse_of_ids(mode: OrderMode, samples: int, epoch: int) -> None:
    order, every = make_order(samples, 1, mode), np.arange(samples)
    np.testing.assert_array_equal(order.positions(epoch, order.ids(epoch, every)), every)
    if mode == "shuffled" and samples > 100:
        assert (order.positions(epoch + 1, order.ids(epoch, every)) != every).any()
    with pytest.raises(IndexError, match=f"sample {samples} of {samples}"):
        order.positions(epoch, np.array([samples]))


def test_positions_of_billions_are_found() -> None:
    order, places = Order(samples=2**39 + 11, global_batch=1, seed=3), np.arange(10**11, 10**11 + 300)
    np.testing.assert_array_equal(order.positions(7, order.ids(7, places)), places)


@pytest.mark.parametrize("mode", ["shuffled", "block"])
def test_dropped_remainder_differs_by_epoch(mode: OrderMode) -> None:
    order = make_order(1000, 64, mode)
    dropped = [frozenset(range(1000)) - set(epoch_ids(order, epoch).tolist()) for epoch in range(20)]
    assert all(len(rest) == 1000 % 64 for rest in dropped)
    assert len(set(dropped)) == 20
    assert len(frozenset.union(*dropped)) > 300


@pytest.mark.core
def test_seed_and_epoch_each_give_another_order() -> None:
    orders = [make_order(1000, 10, seed=seed).ids(epoch, np.arange(1000)) for seed, epoch in ((0, 0), (1, 0), (0, 1), (2**64 - 1, 0))]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).mean() < 0.02  # by chance one in a thousand stays


@pytest.mark.parametrize("count", [3, 4])
def test_all_permutations_of_few_samples_are_equally_likely(count: int) -> None:
    seen = dict.fromkeys(itertools.permutations(range(count)), 0)
    keys = np.random.default_rng(1).integers(0, 2**32, (80 * math.factorial(count), 32), dtype=np.uint32)
    for key in keys:
        seen[tuple(permute(np.arange(count), count, key).tolist())] += 1
    assert stats.chisquare(list(seen.values())).pvalue > 0.01


@pytest.mark.slow
def test_all_permutations_of_five_samples_are_equally_likely() -> None:
    test_all_permutations_of_few_samples_are_equally_likely(5)


@pytest.mark.parametrize("count", [7, 16, 150])
def test_every_sample_comes_equally_often_at_every_place(count: int) -> None:
    order = make_order(count, 1, seed=5)
    places, pairs = np.zeros((count, count)), np.zeros((count, count))
    for epoch in range(1000):
        ids = order.ids(epoch, np.arange(count))
        places[np.arange(count), ids] += 1
        pairs[ids[0], ids[1]] += 1
    # each epoch is a permutation, so of count^2 cells (count - 1)^2 are free
    statistic = ((places - 1000 / count) ** 2 / (1000 / count)).sum() * (count - 1) / count
    assert stats.chi2.sf(statistic, (count - 1) ** 2) > 0.01
    others = ~np.eye(count, dtype=bool)
    assert pairs[~others].sum() == 0
    assert stats.chisquare(pairs[others]).pvalue > 0.01


def test_neighbors_are_not_kept_together() -> None:
    """In a shuffled order the distance of consecutive ids is that of independent numbers; `sequential` is the negative control."""
    ids = make_order(20_000, 10).ids(0, np.arange(20_000)) / 20_000
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 3 / math.sqrt(20_000)
    assert stats.kstest(np.abs(np.diff(ids)), "triang", (0, 0, 1)).pvalue > 0.01
    straight = make_order(20_000, 10, "sequential").ids(0, np.arange(20_000)) / 20_000
    assert np.corrcoef(straight[:-1], straight[1:])[0, 1] > 0.99


def test_block_order_reads_few_shards_at_a_time() -> None:
    lengths = tuple([40, 60, 50] * 20)
    order = Order(samples=3000, global_batch=50, mode="block", shard_lengths=lengths, window=4)
    starts = np.cumsum(lengths)
    shards = [np.searchsorted(starts, order.micro_batch(3, step, 0), side="right") for step in range(order.updates_per_epoch)]
    touched = [len(np.unique(batch)) for batch in shards]
    assert max(touched) <= 8 and np.mean(touched) > 3  # a batch meets two windows at most, and mixes all shards of one
    window = np.concatenate(shards)[:150]
    assert (np.diff(window) != 0).mean() > 0.5
    shuffled = Order(samples=3000, global_batch=50).micro_batch(3, 0, 0)
    assert len(np.unique(np.searchsorted(starts, shuffled, side="right"))) > 20
    assert not np.array_equal(order.ids(0, np.arange(3000)), order.ids(1, np.arange(3000)))


@pytest.mark.core
@settings(max_examples=40)
@given(st.sampled_from(MODES), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 20), st.integers(0, 3))
def test_ranks_and_micro_batches_tile_the_global_batch(
    mode: OrderMode, ranks: int, accumulation: int, per_micro: int, extra: int, epoch: int
) -> None:
    global_batch = ranks * accumulation * per_micro
    samples = global_batch + extra
    whole = make_order(samples, global_batch, mode)
    for step in range(whole.updates_per_epoch):
        parts = [
            make_order(samples, global_batch, mode, rank=rank, ranks=ranks, accumulation=accumulation).micro_batch(epoch, step, micro)
            for rank in range(ranks)
            for micro in range(accumulation)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), whole.micro_batch(epoch, step, 0))
        assert mode == "sequential" or all(len(part) == per_micro for part in parts)


@pytest.mark.parametrize("mode", MODES)
def test_several_micro_batches_at_once_are_those_of_each(mode: OrderMode) -> None:
    order = make_order(50, 16, mode, rank=1, ranks=2, accumulation=2)
    places = [(step, micro) for step in range(order.updates_per_epoch) for micro in range(2)]
    for chosen in (places, places[::-1], places[2:3], []):
        together = order.micro_batches(3, chosen)
        assert [ids.tolist() for ids in together] == [order.micro_batch(3, *place).tolist() for place in chosen]
    with pytest.raises(IndexError, match="step 9 of"):
        order.micro_batches(0, [(0, 0), (9, 0)])


def test_sequential_ranks_may_get_none() -> None:
    orders = [make_order(10, 8, "sequential", rank=rank, ranks=4) for rank in range(4)]
    assert [order.updates_per_epoch for order in orders] == [2] * 4
    assert [order.micro_batch(0, 1, 0).tolist() for order in orders] == [[8, 9], [], [], []]
    assert make_order(3, 8, "sequential").micro_batch(0, 0, 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("mode", ["shuffled", "block"])
def test_a_billion_samples_cost_no_memory_wherever_one_stands(mode: OrderMode) -> None:
    shards = (10_000,) * 1000 if mode == "block" else ()
    samples = sum(shards) or 2**40
    order = Order(samples=samples, global_batch=1024, mode=mode, shard_lengths=shards)
    last = order.updates_per_epoch - 1
    order.micro_batch(0, 0, 0)
    peaks = []
    for step in (0, last // 2, last):
        tracemalloc.start()
        ids = order.micro_batch(1, step, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(np.unique(ids)) == 1024
    assert max(peaks) < 1_000_000  # a stored permutation would take 8 bytes a sample
    assert max(peaks) < 2 * min(peaks)


def test_seeking_costs_the_same_in_every_epoch_of_any_length() -> None:
    """Sample 10^9 of a hundred thousand epochs' stream against the first of a small set: the same work, within noise and cycle walking."""

    def fastest_s(order: Order, updates: int) -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            epoch, step = divmod(updates, order.updates_per_epoch)
            order.micro_batch(epoch, step, 0)
            times.append(time.perf_counter() - start)
        return min(times)

    small = fastest_s(Order(samples=2**12, global_batch=1024), 0)
    assert fastest_s(Order(samples=2**12, global_batch=1024), 10**9 // 1024) < 5 * small
    assert fastest_s(Order(samples=2**31 + 1, global_batch=1024), 10**9) < 10 * small  # just above a power of two: the most walks


@pytest.mark.core
@pytest.mark.parametrize("mode", MODES)
def test_places_outside_the_epoch_are_named(mode: OrderMode) -> None:
    order = make_order(10, 2, mode)
    for position in (-1, 10, 2**40):
        with pytest.raises(IndexError, match=rf"position {position} of 10; positions are numbered 0 to 9"):
            order.ids(0, np.array([0, position]))
    with pytest.raises(IndexError, match="step 5 of 5; they are numbered 0 to 4"):
        order.micro_batch(0, 5, 0)
    with pytest.raises(IndexError, match="micro-batch 1 of 1; they are numbered 0 to 0"):
        order.micro_batch(0, 4, 1)


@pytest.mark.core
@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"samples": 0, "global_batch": 1}, "samples=0, global_batch=1: needs at least 1 of each"),
        ({"samples": 9, "global_batch": 0}, "samples=9, global_batch=0: needs at least 1 of each"),
        ({"samples": 9, "global_batch": 4, "rank": 2, "ranks": 2}, "rank=2 of 2"),
        ({"samples": 9, "global_batch": 4, "rank": -1}, "rank=-1 of 1"),
        ({"samples": 9, "global_batch": 4, "accumulation": 0}, "accumulation >= 1"),
        ({"samples": 99, "global_batch": 16, "ranks": 3}, "global_batch=16 is not divided by 3 ranks x accumulation 1; take 15"),
        ({"samples": 99, "global_batch": 2, "ranks": 4}, "take 4"),
        ({"samples": 3, "global_batch": 4}, "3 samples are fewer than one batch; take global_batch <= 3, now 4"),
        ({"samples": 9, "global_batch": 4, "mode": "block", "shard_lengths": (4, 4)}, "shard_lengths sum to 8 of 9 samples"),
        (
            {"samples": 9, "global_batch": 4, "mode": "block", "shard_lengths": (11, -2)},
            "shard_lengths hold -2: a shard has 0 samples or more",
        ),
        ({"samples": 9, "global_batch": 4, "mode": "random"}, "mode='random'"),
        ({"samples": 2**40 + 1, "global_batch": 4}, "at most 2\\*\\*40 samples"),
    ],
)
def test_orders_that_make_no_sense_are_refused_by_name(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Order(**settings_)
    assert "\n" not in str(caught.value)
