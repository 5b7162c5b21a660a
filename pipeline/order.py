"""Which rank takes which sample at which step: a keyed permutation that is computed, never stored.

Here: ids as a function of (seed, epoch, position), and the slices of ranks and micro-batches.
Not here: reading (loader.py). The loop's count of completed updates is the only truth: epoch, step = divmod(updates, updates_per_epoch).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.draws import PICTURE, Purpose, random_words
from wherefrom.pipeline.literals import check_literal, check_literals

OrderMode = Literal["shuffled", "block", "sequential"]

MAX_SAMPLES = 2**40  # what the counter of draws.py holds

_KEYS = 32  # round keys of a permutation
_ROUNDS = 10  # enough from _MIXING_BITS on; smaller networks use every key: ten rounds of three bits gave the identity twice too often
_MIXING_BITS = 8


def permute(positions: NDArray[np.int64], count: int, keys: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return a keyed bijection of [0, count) at some positions: a Feistel network on the next power of two, with cycle walking.

    Takes no memory beyond the positions, and under two walks a position on average.
    Shapes: positions (n,) in [0, count), keys (32,) uint32 -> (n,).
    Source: Black and Rogaway, CT-RSA 2002; the round function is MurmurHash3's 32-bit finalizer.
    """
    return _walk(positions, count, _network(count, keys)[0])


def unpermute(values: NDArray[np.int64], count: int, keys: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the positions at which `permute` has these values: its inverse, at the same cost; values (n,) -> (n,)."""
    return _walk(values, count, _network(count, keys)[1])


Mixing = Callable[[NDArray[np.int64], int, NDArray[np.uint32]], NDArray[np.int64]]
Bijection = Callable[[NDArray[np.uint64]], NDArray[np.uint64]]


def _walk(values: NDArray[np.int64], count: int, once: Bijection) -> NDArray[np.int64]:
    """Apply a bijection of a larger range until every value lies in [0, count) again."""
    if count == 1:
        return np.zeros_like(values)
    result = once(values.astype(np.uint64))
    outside = np.flatnonzero(result >= count)
    while len(outside):
        result[outside] = once(result[outside])
        outside = outside[result[outside] >= count]
    return result.astype(np.int64)


def _network(count: int, keys: NDArray[np.uint32]) -> tuple[Bijection, Bijection]:
    """Return the keyed bijection of [0, the next power of two from `count` on), and its inverse."""
    bits = max(2, int(count - 1).bit_length())
    rounds = keys[:_ROUNDS] if bits >= _MIXING_BITS else keys
    pairs: list[list[int]] = rounds.reshape(-1, 2).tolist()
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    shift = np.uint64(low_bits)

    def mixed(half: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
        x = ((half ^ np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x85EBCA6B)) & np.uint64(0xFFFFFFFF)
        x = ((x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & np.uint64(0xFFFFFFFF)
        return x ^ (x >> np.uint64(16))

    def forth(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = values >> shift, values & low_mask
        for first, second in pairs:
            high = high ^ (mixed(low, first) & high_mask)
            low = low ^ (mixed(high, second) & low_mask)
        return high << shift | low

    def back(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = values >> shift, values & low_mask
        for first, second in reversed(pairs):
            low = low ^ (mixed(high, second) & low_mask)
            high = high ^ (mixed(low, first) & high_mask)
        return high << shift | low

    return forth, back


@functools.lru_cache(maxsize=64)  # every batch of an epoch asks for the same
def _keys(seed: int, epoch: int, what: int) -> NDArray[np.uint32]:
    """Return the round keys of the permutation numbered `what`: 0 the samples or shards, k + 1 the k-th window of shards."""
    keys = random_words(seed, epoch, what, PICTURE, 0, Purpose.ORDER, np.arange(_KEYS // 4)).reshape(-1)
    keys.flags.writeable = False
    return keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The order of all samples, and the part of it that one rank sees.

    `shuffled`: one permutation of all samples; `block`: shards permuted, then samples within windows of `window` shards;
    `sequential`: as they lie, every sample once, the last batch short (ranks may get none).
    Raises: ValueError if a field is not what it is annotated as, ranks and accumulation do not divide the global batch, or there are
            fewer samples than a batch.
    """

    samples: int
    global_batch: int  # samples of one optimizer step, over all ranks
    seed: int = 0
    rank: int = 0
    ranks: int = 1
    accumulation: int = 1  # micro-batches a step on each rank
    mode: OrderMode = "shuffled"
    shard_lengths: tuple[int, ...] = ()  # for `block`
    window: int = 8  # shards mixed together in `block`

    def __post_init__(self) -> None:
        check_literals(self)
        if self.samples < 1 or self.global_batch < 1:
            raise ValueError(f"samples={self.samples}, global_batch={self.global_batch}: needs at least 1 of each")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed}: needs 0 <= seed < 2**64")
        if self.samples > MAX_SAMPLES:
            raise ValueError(f"samples={self.samples}: draws are keyed by at most 2**40 samples; split the data")
        if not 0 <= self.rank < self.ranks or self.accumulation < 1:
            raise ValueError(
                f"rank={self.rank} of {self.ranks}, accumulation={self.accumulation}: needs 0 <= rank < ranks, accumulation >= 1"
            )
        if self.global_batch % (self.ranks * self.accumulation):
            raise ValueError(
                f"global_batch={self.global_batch} is not divided by {self.ranks} ranks x accumulation {self.accumulation}; "
                f"take {self._divided()}"
            )
        if self.mode != "sequential" and self.samples < self.global_batch:
            raise ValueError(
                f"{self.samples} samples are fewer than one batch; take global_batch <= {self.samples}, now {self.global_batch}"
            )
        if min(self.shard_lengths, default=0) < 0:
            raise ValueError(f"shard_lengths hold {min(self.shard_lengths)}: a shard has 0 samples or more")
        if self.mode == "block" and (sum(self.shard_lengths) != self.samples or self.window < 1):
            raise ValueError(f"block order: shard_lengths sum to {sum(self.shard_lengths)} of {self.samples} samples, window={self.window}")

    def _divided(self) -> int:
        parts = self.ranks * self.accumulation
        return max(parts, self.global_batch // parts * parts)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the remainder is dropped, but in `sequential`."""
        whole, rest = divmod(self.samples, self.global_batch)
        return whole + (self.mode == "sequential" and rest > 0)

    def ids(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sample ids (n,) at positions (n,) of an epoch's order.

        Raises: IndexError if a position lies outside the epoch.
        """
        if positions.size and not (positions.min() >= 0 and positions.max() < self.samples):
            outside = positions.min() if positions.min() < 0 else positions.max()
            raise IndexError(f"position {outside} of {self.samples}; positions are numbered 0 to {self.samples - 1}")
        if self.mode == "sequential":
            return positions.astype(np.int64)
        if self.mode == "shuffled":
            return permute(positions, self.samples, _keys(self.seed, epoch, 0))
        return self._block_ids(epoch, positions)

    def positions(self, epoch: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions (n,) of an epoch's order at which these sample ids (n,) stand: the inverse of `ids`, at the same cost.

        Raises: IndexError if there is no such sample.
        """
        if ids.size and not (ids.min() >= 0 and ids.max() < self.samples):
            outside = ids.min() if ids.min() < 0 else ids.max()
            raise IndexError(f"sample {outside} of {self.samples}; samples are numbered 0 to {self.samples - 1}")
        if self.mode == "sequential":
            return ids.astype(np.int64)
        if self.mode == "shuffled":
            return unpermute(ids, self.samples, _keys(self.seed, epoch, 0))
        return self._block_positions(epoch, ids)

    def _block_ids(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        lengths, shards, ends = self._blocks(epoch)
        mixed = self._in_windows(epoch, positions, ends, permute)
        slot = np.searchsorted(ends, mixed, side="right")
        shard_ends: NDArray[np.int64] = lengths.cumsum()
        return shard_ends[shards[slot]] + mixed - ends[slot]

    def _block_positions(self, epoch: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        lengths, shards, ends = self._blocks(epoch)
        slots = np.empty_like(shards)  # of the shards
        slots[shards] = np.arange(len(shards))
        shard_ends = lengths.cumsum()
        shard = np.searchsorted(shard_ends, ids, side="right")
        return self._in_windows(epoch, ids - shard_ends[shard] + ends[slots[shard]], ends, unpermute)

    def _blocks(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards' lengths, their order in an epoch, and where each of that order ends, in positions: all (S,)."""
        lengths = np.asarray(self.shard_lengths, np.int64)
        shards = permute(np.arange(len(lengths)), len(lengths), _keys(self.seed, epoch, 0))
        return lengths, shards, lengths[shards].cumsum()

    def _in_windows(self, epoch: int, values: NDArray[np.int64], ends: NDArray[np.int64], mix: Mixing) -> NDArray[np.int64]:
        """Mix places (n,) of an epoch, each within its window of shards, of which each ends at one of `ends` (S,)."""
        window_ends = np.append(ends[self.window - 1 : -1 : self.window], self.samples)
        mixed = np.empty_like(values)
        window_of = np.searchsorted(window_ends, values, side="right")
        for window in np.unique(window_of):
            start = window_ends[window - 1] if window else 0
            inside = window_of == window
            keys = _keys(self.seed, epoch, int(window) + 1)
            mixed[inside] = start + mix(values[inside] - start, int(window_ends[window] - start), keys)
        return mixed

    def micro_batch(self, epoch: int, step: int, micro: int) -> NDArray[np.int64]:
        """Return this rank's sample ids of one micro-batch: contiguous slices of the global batch by rank, then by micro-batch.

        Raises: IndexError if there is no such step or micro-batch.
        """
        return self.micro_batches(epoch, [(step, micro)])[0]

    def micro_batches(self, epoch: int, places: Sequence[tuple[int, int]]) -> list[NDArray[np.int64]]:
        """Return the sample ids of several (step, micro-batch) of an epoch, as `micro_batch` does of each: in one go, for less.

        Raises: IndexError if there is no such step or micro-batch.
        """
        per_rank = self.global_batch // self.ranks
        per_micro = per_rank // self.accumulation
        ranges = []
        for step, micro in places:
            for name, number, count in (("step", step, self.updates_per_epoch), ("micro-batch", micro, self.accumulation)):
                if not 0 <= number < count:
                    raise IndexError(f"{name} {number} of {count}; they are numbered 0 to {count - 1}")
            start = step * self.global_batch + self.rank * per_rank + micro * per_micro
            ranges.append(np.arange(min(start, self.samples), min(start + per_micro, self.samples)))
        if not ranges:
            return []
        return np.split(self.ids(epoch, np.concatenate(ranges)), np.cumsum([len(positions) for positions in ranges[:-1]]))


class KeyedSampler:
    """Keys (epoch, sample), a list for each micro-batch: the `batch_sampler` of a DataLoader whose dataset is indexed by keys.

    The order is the loader's. Every key carries its epoch to the worker, so workers may persist and need to be told nothing.
    Each pass is the next epoch, whether or not the pass before was broken off; `seek` says where the next one begins.
    """

    def __init__(self, order: Order) -> None:
        check_literal("order", order, Order)
        self.order = order
        self.updates = 0  # where the next pass begins

    def seek(self, updates: int) -> None:
        """Begin the next pass after `updates` completed optimizer steps: epoch, step = divmod(updates, order.updates_per_epoch).

        For resuming: the sampler can't know which of the batches that workers made ahead were learned from, the training loop does.
        """
        check_literal("updates", updates, int)
        if updates < 0:
            raise ValueError(f"updates={updates}: needs 0 or more")
        self.updates = updates

    def __len__(self) -> int:
        """Micro-batches of the next pass: a whole epoch, or after `seek` the rest of one."""
        return (self.order.updates_per_epoch - self.updates % self.order.updates_per_epoch) * self.order.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the keys of an epoch, or of the rest of one, [(epoch, sample), ...] a micro-batch."""
        epoch, step = divmod(self.updates, self.order.updates_per_epoch)
        # With the first key, not the last: a DataLoader draws keys ahead, so the last one is drawn while an epoch is still under way, and
        # how early depends on its workers. Nor with iter(): a DataLoader with workers calls that twice and uses the second.
        self.updates = (epoch + 1) * self.order.updates_per_epoch
        for s in range(step, self.order.updates_per_epoch):
            for micro in range(self.order.accumulation):
                yield [(epoch, sample) for sample in self.order.micro_batch(epoch, s, micro).tolist()]
