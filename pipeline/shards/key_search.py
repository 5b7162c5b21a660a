"""Samples by their keys: which rows of a shard have one, and which keys are nearest to one that none has.

Here: whole columns of keys compared at once, in memory for a part of them at a time.
Not here: what a key is (table.py), the shards of an index (index.py).
"""

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.shards.table import ShardTable

_ROWS_AT_ONCE = 2**16
_MOST_COMPARED = 256  # bytes at each end of a key


def rows_of_key(table: ShardTable, key: bytes) -> list[int]:
    """Return the rows of the samples that have this key: one, more where it stands twice, or none."""
    starts, lengths = _places(table)
    rows = np.flatnonzero(lengths == len(key))
    for place in reversed(range(len(key))):  # keys differ in their ends first
        rows = rows[table.keys[starts[rows] + place] == key[place]]
    return rows.tolist()


def nearest_rows(table: ShardTable, key: bytes, count: int) -> list[tuple[int, int]]:
    """Return the rows whose keys begin and end most as `key` does, each with its score; at most `count`, the nearest first.

    One slip in a key, wherever it is, leaves all its other bytes alike at one end or the other. A byte at the head scores 2, for it may be
    all that was typed, one at the tail 1.
    """
    starts, lengths = _places(table)
    scores = np.empty(len(table), np.int64)
    for first in range(0, len(table), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        begins, ends = starts[part], starts[part] + lengths[part]
        most = np.minimum(lengths[part], min(len(key), _MOST_COMPARED))
        heads = _run(table.keys, begins, key, most, step=1)
        scores[part] = 2 * heads + _run(table.keys, ends - 1, key[::-1], most - heads, step=-1)
    nearest = np.argsort(-scores, kind="stable")[:count]
    return list(zip(nearest.tolist(), scores[nearest].tolist(), strict=True))


def _places(table: ShardTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each row's key starts, and how long it is, in bytes."""
    lengths = np.diff(table.key_ends, prepend=0)
    return table.key_ends - lengths, lengths


def _run(keys: NDArray[np.uint8], at: NDArray[np.int64], wanted: bytes, most: NDArray[np.int64], *, step: int) -> NDArray[np.int64]:
    """Return for each place in `keys` how many bytes from there on, in the direction of `step`, are those of `wanted`; at most `most`."""
    run = np.zeros(len(at), np.int64)
    rows = np.flatnonzero(most > 0)
    for place, byte in enumerate(wanted):
        rows = rows[keys[at[rows] + step * place] == byte]
        run[rows] += 1
        rows = rows[most[rows] > place + 1]
        if not len(rows):
            break
    return run
