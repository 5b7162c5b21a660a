"""The randomness contract: every number is a function of (seed, epoch, sample, family, view, purpose, draw).

Here: Philox4x32-10 over whole arrays, and the counter's layout. Nothing is stored, so nothing has to be restored.
Not here: what the numbers mean (crops.py, colour.py, order.py).
Counter: word 0 = sample, low 32 bits; word 1 = sample, high 8 bits, then epoch, 24; word 2 = family 16, view 8, purpose 8;
word 3 = draw block of four numbers. Key: the seed, low word first.
"""

import hashlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

PICTURE = 0  # the family word of draws that belong to the whole picture; no family may hash to it

_LOW32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)


class Purpose(IntEnum):
    """What a number is for. The list is frozen: append, never reorder."""

    BOX = 0
    PLACE = 1
    MIRROR = 2
    TURN = 3
    JITTER = 4
    COLOUR = 5
    BLUR = 6
    ORDER = 7


def philox(counter: NDArray[np.uint32], key: Sequence[int]) -> NDArray[np.uint32]:
    """Return Philox4x32-10 of every counter.

    Shapes: counter (..., 4) uint32, key two 32-bit words -> (..., 4) uint32.
    Source: Salmon et al., SC'11; checked against the Random123 1.14 vectors.
    """
    words = np.moveaxis(counter, -1, 0).astype(np.uint64)
    c0, c1, c2, c3 = words[0], words[1], words[2], words[3]
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT32) ^ c1 ^ np.uint64(k0),
            product1 & _LOW32,
            (product0 >> _SHIFT32) ^ c3 ^ np.uint64(k1),
            product0 & _LOW32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def family_word(name: str) -> int:
    """Return the 16 bits that stand for a family's name in the counter.

    Raises: ValueError if the name hashes to the word that is reserved for whole-picture draws.
    """
    word = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=2).digest(), "big")
    if word == PICTURE:
        raise ValueError(f"family name {name!r} hashes to the reserved word {PICTURE}; take another name")
    return word


def check_family_names(names: Sequence[str]) -> None:
    """Raise ValueError if two family names share a word in the counter: their draws would be equal."""
    words: dict[int, str] = {}
    for name in names:
        other = words.setdefault(family_word(name), name)
        if other != name:
            raise ValueError(f"families {other!r} and {name!r} share the draw word {family_word(name)}; rename one")


def random_words(
    seed: int, epoch: int, sample: ArrayLike, family: int, view: ArrayLike, purpose: Purpose, block: ArrayLike = 0
) -> NDArray[np.uint32]:
    """Return four random words for every element of the broadcast of sample, view and block.

    Shapes: sample, view, block broadcast to (...) -> (..., 4) uint32.
    Raises: ValueError if a word of the counter would overflow.
    """
    ids, views, blocks = np.broadcast_arrays(np.asarray(sample, np.int64), np.asarray(view, np.int64), np.asarray(block, np.int64))
    for name, value, bits in (("seed", seed, 64), ("epoch", epoch, 24), ("family", family, 16)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name}={value}: needs 0 <= {name} < 2**{bits}")
    for name, values, bits in (("sample", ids, 40), ("view", views, 8), ("block", blocks, 32)):
        if values.size and not (int(values.min()) >= 0 and int(values.max()) < 1 << bits):
            raise ValueError(f"{name} from {values.min()} to {values.max()}: needs 0 <= {name} < 2**{bits}")
    counter = np.empty((*ids.shape, 4), np.uint32)
    counter[..., 0] = ids & 0xFFFFFFFF
    counter[..., 1] = (ids >> 32) << 24 | epoch
    counter[..., 2] = family << 16 | views << 8 | int(purpose)
    counter[..., 3] = blocks
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Return (word + 0.5) / 2^32: uniform in the open interval (0, 1), float64."""
    return (words + 0.5) / 4294967296.0


def integer(words: NDArray[np.uint32], n: ArrayLike) -> NDArray[np.int64]:
    """Return (word * n) >> 32: an integer in [0, n) for n up to 2^31, int64."""
    return (words.astype(np.uint64) * np.asarray(n, np.uint64) >> _SHIFT32).astype(np.int64)
