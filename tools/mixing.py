"""How well an order mixes: how many pairs of pictures in a batch come from one shard or folder, or show one class, against chance.

Here: some batches of an epoch, counted. Not here: the orders (pipeline/order.py), where the lines stand (index.py).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.order import Order, OrderMode
from wherefrom.pipeline.shards.index import ShardIndex

BATCHES = 32  # that are counted, spread over an epoch


def mixing(index: ShardIndex, batch: int) -> Iterator[tuple[str, str]]:
    """Yield what is counted, and the shares of pairs in batches of so many samples (or of all) for each order and by chance.

    Nothing is said of shards, or a tree's folders, where there is one, nor of classes where there is one or none; where the shards are one,
    so are the orders.
    """
    size = min(batch, len(index))
    several = np.count_nonzero(index.block_lengths) > 1
    modes: tuple[OrderMode, ...] = ("shuffled", "block") if several else ("shuffled",)
    batches = {mode: _some_batches(index, size, mode) for mode in modes if size > 1}
    unlabeled = index.label < 0
    own_class = -1 - np.arange(len(index))  # of a sample without a label: nobody else's
    blocks = np.repeat(np.arange(len(index.block_lengths)), index.block_lengths)
    groups = {
        "same folder" if index.has_trees else "same shard": blocks if several else None,
        "same class": np.where(unlabeled, own_class, index.label) if len(np.unique(index.label[~unlabeled])) > 1 else None,
    }
    for name, group in groups.items():
        if group is not None and batches:
            shares = {mode: float(np.mean([share_of_pairs(group[ids]) for ids in each])) for mode, each in batches.items()}
            words = (f"{what} {_percent(share)}" for what, share in (shares | {"chance": share_of_pairs(group)}).items())
            yield name, f"pairs in a batch of {size}: {', '.join(words)}"


def share_of_pairs(group: NDArray) -> float:
    """Return the share of the pairs of samples (n,) that are in one group, by the number of each one's group."""
    counts = np.unique(group, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum() / (len(group) * (len(group) - 1)))


def _some_batches(index: ShardIndex, size: int, mode: OrderMode) -> NDArray[np.int64]:
    """Return the sample ids of some batches of the first epoch, (batches, size)."""
    lengths = index.block_lengths if mode == "block" else ()
    order = Order(samples=len(index), global_batch=size, mode=mode, shard_lengths=lengths)
    steps = np.unique(np.linspace(0, order.updates_per_epoch - 1, BATCHES).round().astype(np.int64))
    positions = steps[:, None] * size + np.arange(size)
    return order.ids(0, positions.reshape(-1)).reshape(positions.shape)


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"
