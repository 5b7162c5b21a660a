"""How well orders mix: against counting every pair, and against orders that are known to mix well or badly."""

import re
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from wherefrom.pipeline.order import Order
from wherefrom.tools.mixing import BATCHES, mixing, share_of_pairs

pytestmark = pytest.mark.core


class Samples:
    """What an index says of its samples' shards and labels."""

    def __init__(self, lengths: list[int], label: NDArray[np.int64] | None = None) -> None:
        self.block_lengths = tuple(lengths)
        self.has_trees = False
        self.label = np.full(sum(lengths), -1) if label is None else label

    def __len__(self) -> int:
        return len(self.label)


def shares(samples: Any, batch: int = 256) -> dict[str, dict[str, float]]:
    """Return what is said, as numbers, by line and order."""
    return {
        name: {what: float(percent) / 100 for what, percent in re.findall(r"(\w+) ([\d.e+-]+)%", words)}
        for name, words in mixing(samples, batch)
    }


@given(st.lists(st.integers(-2, 3), min_size=2, max_size=12))
def test_the_share_of_pairs_is_that_of_counting_each(groups: list[int]) -> None:
    pairs = [first == second for first, second in combinations(groups, 2)]
    assert share_of_pairs(np.array(groups)) == pytest.approx(sum(pairs) / len(pairs))


def test_where_each_shard_is_a_class_the_block_order_is_told_from_the_shuffled_one() -> None:
    lengths = [100] * 100
    said = shares(Samples(lengths, np.repeat(np.arange(100), lengths)))
    assert said["same shard"] == said["same class"]
    shard = said["same shard"]
    assert shard["chance"] == pytest.approx(99 / 9999, rel=0.01)
    assert shard["shuffled"] == pytest.approx(shard["chance"], rel=0.05)
    within_a_window, between_two = 99 / 799, 256 / 800 / 3  # of eight shards; batches on a border, where a third of the pairs is of both
    assert shard["block"] == pytest.approx(within_a_window * (1 - between_two), rel=0.05)


def test_nothing_is_said_of_one_shard_nor_of_one_class_or_none() -> None:
    assert shares(Samples([0, 40])) == {}
    assert shares(Samples([40], np.zeros(40, np.int64))) == {}
    assert list(shares(Samples([40], np.arange(40) % 2))) == ["same class"]
    assert list(shares(Samples([40], np.arange(40) % 2))["same class"]) == ["shuffled", "chance"]
    assert shares(Samples([20, 20])).keys() == {"same shard"}
    assert shares(Samples([1], np.zeros(1, np.int64))) == {}


def test_samples_without_a_label_are_no_class() -> None:
    label = np.where(np.arange(400) < 100, np.arange(400) % 2, -1)
    assert shares(Samples([400], label))["same class"]["chance"] == pytest.approx(2 * 50 * 49 / (400 * 399), rel=0.03)


def test_a_batch_that_is_larger_than_the_data_is_all_of_it_and_lines_fit_a_terminal() -> None:
    lines = [f"{name:<12} {words}" for name, words in mixing(Samples([7] * 300, np.arange(2100)), 4096)]  # type: ignore[arg-type]
    assert lines[0].startswith("same shard   pairs in a batch of 2100: shuffled 0.29%, block 0.29%, chance 0.29%")
    assert max(map(len, lines)) <= 80


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ids = Order.ids
    monkeypatch.setattr(Order, "ids", lambda order, epoch, positions: asked.append(len(positions)) or ids(order, epoch, positions))
    said = shares(Samples([2_000] * 500))
    assert sum(asked) <= 2 * BATCHES * 256
    assert said["same shard"]["block"] > 20 * said["same shard"]["shuffled"]
