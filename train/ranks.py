"""The processes of a run as a group that talks beside the devices: words, numbers, waiting.

Here: what the hosts have to agree on; a run of one process agrees with itself.
Not here: gradients and losses, which the devices exchange (trainer.py).
gloo, whatever the devices use: nobody waits for a device, and whoever waits has patience. No pickle: words go as bytes.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """All processes of this run, of which this is number `rank` of `count`; every method is called by all of them."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank = rank
        self.count = count
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if count > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def texts(self, text: str) -> list[str]:
        """Return what every rank says, in their order."""
        if self.count == 1:
            return [text]
        encoded = torch.tensor(list(text.encode()), dtype=torch.uint8)
        padded = torch.zeros(max(1, self.highest(len(encoded))), dtype=torch.uint8)  # gloo sends no nothing
        padded[: len(encoded)] = encoded
        lengths, parts = self._gathered(torch.tensor([len(encoded)])), self._gathered(padded)
        return [bytes(part[: int(length)].tolist()).decode() for part, length in zip(parts, lengths, strict=True)]

    def highest(self, number: int) -> int:
        """Return the highest number that any rank names."""
        if self.count == 1:
            return number
        highest = torch.tensor(number)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._group)
        return int(highest)

    def in_turn(self, own: Sequence[Tensor]) -> Tensor:
        """Return blocks of rows joined, of which the ranks have every so many-th: the first rank the first, the second the next.

        Shapes: (n, ...) each, n as it comes, all else alike; the first rank has one at least. With several ranks on the processor.
        """
        if self.count == 1:
            return torch.cat(list(own))
        shape, dtype = json.loads(self.texts(json.dumps([own[0].shape[1:], str(own[0].dtype).removeprefix("torch.")]) if own else "")[0])
        lengths = [json.loads(text) for text in self.texts(json.dumps([len(block) for block in own]))]
        padded = torch.zeros((max(map(sum, lengths)), *shape), dtype=getattr(torch, dtype))
        if own:
            padded[: sum(map(len, own))] = torch.cat(list(own)).cpu()
        of_ranks = [part[: sum(each)].split(each) for part, each in zip(self._gathered(padded), lengths, strict=True)]
        return torch.cat([block for blocks in itertools.zip_longest(*of_ranks) for block in blocks if block is not None])

    def first_does(self, work: Callable[[], str | None]) -> str:
        """Let the first rank do something while the others wait; return, on all of them, the text that came out.

        Raises: on the first rank what `work` raises; ValueError of the same text on the others, if that is a ValueError or OSError.
        """
        text = problem = ""
        raised: Exception | None = None
        if self.first:
            try:
                text = work() or ""
            except (OSError, ValueError) as refused:
                raised, problem = refused, str(refused)
        text, problem = self.texts(text)[0], self.texts(problem)[0]
        if raised is not None:
            raise raised
        if problem:
            raise ValueError(problem)
        return text

    @contextmanager
    def led_by(self, leads: bool) -> Iterator[None]:
        """Let those that lead, one of every machine, do what follows first, however long it takes, and the others after them."""
        if not leads:
            self.wait()
        yield
        if leads:
            self.wait()

    def wait(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            dist.barrier(self._group)

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor, group=self._group)
        return parts
