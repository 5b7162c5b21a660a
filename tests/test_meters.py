"""The window of the log against means taken by hand: names that come and go, and ranks that have different ones."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from wherefrom.train.meters import FINITE, LOSS, TERM, Window
from wherefrom.train.ranks import Ranks

SAMPLES = torch.arange(4)


def values(**terms: float) -> dict[str, Tensor]:
    """Return the values of an update of loss 1 and finite gradients, with more terms."""
    numbers = {LOSS: 1.0} | {f"{TERM}{name}": value for name, value in terms.items()} | {FINITE: 1.0}
    return {name: torch.tensor(value) for name, value in numbers.items()}


def terms(means: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix(TERM): value for name, value in means.items() if name.startswith(TERM)}


@pytest.mark.core
def test_every_mean_is_over_the_updates_that_have_its_name() -> None:
    window = Window(Ranks(0, 1))
    for update, new_terms in enumerate(({"a": 1.0}, {"b": 2.0}, {"b": 4.0, "a": 5.0}, {"a": math.nan, "c": 7.0}, {"c": 8.0})):
        window.add(update, values(**new_terms), SAMPLES)
        if update == 2:  # a checkpoint reads what is pending, the log what was read before, too
            window.settle()
    means = window.take()
    assert math.isnan(means.pop(f"{TERM}a"))
    assert terms(means) == {"b": 3.0, "c": 7.5}
    assert (means[LOSS], means[FINITE]) == (1.0, 1.0)
    window.add(5, values(d=3.0), SAMPLES)
    assert terms(window.take()) == {"d": 3.0}


def test_a_broken_update_is_told_by_the_names_it_had() -> None:
    window = Window(Ranks(0, 1))
    window.add(1, values(a=1.0), SAMPLES)
    window.add(2, values(b=math.inf) | {FINITE: torch.tensor(0.0)}, SAMPLES)
    with pytest.raises(FloatingPointError, match="update 2: b is inf on rank 0, samples 0, 1, 2, 3;"):
        window.settle()


class Meeting:
    """Two threads that stand for two ranks: what each brings is handed to both."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.brought: dict[int, Any] = {}
        self.rank = threading.local()

    def bring(self, thing: Any) -> list[Any]:
        self.brought[self.rank.number] = thing
        self.barrier.wait()
        both = [self.brought[0], self.brought[1]]
        self.barrier.wait()
        return both

    def all_reduce(self, row: Tensor) -> None:
        row.copy_(sum(self.bring(row.clone())))


def test_ranks_with_different_terms_agree_on_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting()
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "all_reduce", meeting.all_reduce)
    monkeypatch.setattr(Ranks, "texts", lambda _, text: meeting.bring(text))
    terms_of_ranks = [[{"a": 1.0}, {"b": 2.0}], [{"b": 6.0}, {"b": 4.0, "c": 5.0}]]

    def work(rank: int) -> list[dict[str, float]]:
        meeting.rank.number = rank
        window = Window(Ranks(rank, 2))
        for update, one in enumerate(terms_of_ranks[rank]):
            window.add(update, values(**one), SAMPLES)
        window.settle()
        return [terms(row) for row in window.rows]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    assert first == second == [{"a": 1.0, "b": 6.0}, {"b": 3.0, "c": 5.0}]
