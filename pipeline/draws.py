"""The randomness contract: every number is a function of (seed, epoch, sample, family, view, purpose, draw).

Here: Philox4x32-10 over whole arrays and tensors, and the counter's layout. Nothing is stored, so nothing has to be restored.
Not here: what the numbers mean (crops.py, color.py, order.py; regions of a view: wherefrom.train.objectives.spatial_dense), draws for a
record under a free name (records.py).
Counter: word 0 = sample, low 32 bits; word 1 = sample, high 8 bits, then epoch, 24; word 2 = family 16, view 8, purpose 8;
word 3 = draw block of four numbers. Key: the seed, low word first; under a free name, two words of what Philox makes of both.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

PICTURE = 0  # the family word of draws that belong to the whole picture; no family may hash to it

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.arange(10, dtype=np.uint64)[:, None, None] * np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)  # what each round adds to the key
_LOW32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)


class Purpose(IntEnum):
    """What a number is for. The list is frozen: append, never reorder."""

    BOX = 0
    PLACE = 1
    MIRROR = 2
    TURN = 3
    JITTER = 4
    COLOR = 5
    BLUR = 6
    ORDER = 7
    REGION = 8
    NAMED = 9  # of numbers under a free name, which changes the key


def philox(counter: NDArray[np.uint32], key: Sequence[int]) -> NDArray[np.uint32]:
    """Return Philox4x32-10 of every counter.

    Shapes: counter (..., 4) uint32, key two 32-bit words -> (..., 4) uint32.
    Source: Salmon et al., SC'11; checked against the Random123 1.14 vectors.
    """
    words = counter.reshape(-1, 4).T.astype(np.uint64, order="C")
    return _philox_rounds(words, key).T.reshape(counter.shape)


def _philox_rounds(words: NDArray[np.uint64], key: Sequence[int]) -> NDArray[np.uint32]:
    """Return Philox of the counters in the columns of words (4, n), which are overwritten: (4, n)."""
    even, odd = words[0::2], words[1::2]  # words 0 and 2, words 1 and 3: a round does the same to both, crosswise
    product, high = np.empty_like(even), np.empty_like(even)
    for round_key in (_WEYL + np.array(key, np.uint64)[:, None]) & _LOW32:
        np.multiply(even, _MULTIPLIERS, out=product)
        np.right_shift(product, _SHIFT32, out=high)
        np.bitwise_xor(high[::-1], odd, out=even)
        np.bitwise_xor(even, round_key, out=even)
        np.bitwise_and(product[::-1], _LOW32, out=odd)
    return words.astype(np.uint32)


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
    seed: int, epoch: int, sample: ArrayLike, family: int, view: ArrayLike, purpose: ArrayLike, block: ArrayLike = 0
) -> NDArray[np.uint32]:
    """Return four random words for every element of the broadcast of sample, view, purpose and block.

    Shapes: sample, view, purpose, block broadcast to (...) -> (..., 4) uint32.
    Raises: ValueError if a word of the counter would overflow.
    """
    ids, views, purposes, blocks = (np.asarray(values, np.int64) for values in (sample, view, purpose, block))
    for name, value, bits in (("seed", seed, 64), ("epoch", epoch, 24), ("family", family, 16)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name}={value}: needs 0 <= {name} < 2**{bits}")
    for name, values, bits in (("sample", ids, 40), ("view", views, 8), ("purpose", purposes, 8), ("block", blocks, 32)):
        if values.size and not (int(values.min()) >= 0 and int(values.max()) < 1 << bits):
            raise ValueError(f"{name} from {values.min()} to {values.max()}: needs 0 <= {name} < 2**{bits}")
    shape = np.broadcast(ids, views, purposes, blocks).shape
    words = np.empty((4, *shape), np.uint64)
    words[0] = ids & 0xFFFFFFFF
    words[1] = (ids >> 32) << 24 | epoch
    words[2] = family << 16 | views << 8 | purposes
    words[3] = blocks
    return np.moveaxis(_philox_rounds(words.reshape(4, -1), (seed & 0xFFFFFFFF, seed >> 32)).reshape(4, *shape), 0, -1)


def random_words_of_tensors(seed: int, epoch: int, sample: Tensor, family: int, view: Tensor, purpose: int, block: Tensor) -> Tensor:
    """Return the numbers of `random_words`, drawn where the tensors lie: a device is neither asked nor waited for.

    Shapes: sample, view and block int64, broadcast to (...) -> (..., 4) int64, each in [0, 2^32). Words that overflow are not noticed.
    """
    sample, view, block = torch.broadcast_tensors(sample, view, block)
    even = torch.stack([sample & 0xFFFFFFFF, family << 16 | view << 8 | purpose])
    odd = torch.stack([(sample >> 32) << 24 | epoch, block])
    second = torch.arange(2, device=sample.device).view(2, *[1] * sample.ndim)  # 0 for words 0 and 1, 1 for words 2 and 3

    def each(constants: NDArray[np.uint64]) -> Tensor:
        first, other = constants.flatten().tolist()
        return first + second * (other - first)

    # multiplied in halves of 16 bits: a product of 64 does not fit int64
    lower_bits, upper_bits = each(_MULTIPLIERS & np.uint64(0xFFFF)), each(_MULTIPLIERS >> np.uint64(16))
    for weyl in _WEYL:
        lower, upper = even * lower_bits, even * upper_bits
        high, low = (upper + (lower >> 16)) >> 16, (lower + ((upper & 0xFFFF) << 16)) & 0xFFFFFFFF
        key = each((weyl.flatten() + np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64)) & _LOW32)
        even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]], -1)


@functools.lru_cache
def named_seed(seed: int, name: str) -> int:
    """Return the seed, 64 bits, of all draws under a free name: another name, or another seed, is another key.

    It is two words of Philox at a counter that is the name's hash, blake2b of 128 bits: mixed, never added.
    """
    counter = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), "<u4")
    low, high, *_ = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).tolist()
    return low | high << 32


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Return (word + 0.5) / 2^32: uniform in the open interval (0, 1), float64."""
    return (words.astype(np.float64) + 0.5) / 2**32


def integer(words: NDArray[np.uint32], n: ArrayLike) -> NDArray[np.int64]:
    """Return (word * n) >> 32: an integer in [0, n) for n up to 2^31, int64."""
    return (words.astype(np.uint64) * np.asarray(n, np.uint64) >> _SHIFT32).astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """What the draws of one batch and family are keyed by."""

    seed: int
    epoch: int
    drawn_for: NDArray[np.int64]  # (B,)
    family: int  # its word in the counter

    def words(self, views: int, purpose: Purpose, blocks: int = 1) -> NDArray[np.uint32]:
        """Return random words (B, V, blocks, 4)."""
        sample, view, block = self.drawn_for[:, None, None], np.arange(views)[:, None], np.arange(blocks)
        return random_words(self.seed, self.epoch, sample, self.family, view, purpose, block)

    def words_for(self, views: int, *purposes: Purpose) -> NDArray[np.uint32]:
        """Return the first words for several purposes in one go: (B, V, purposes, 4)."""
        sample, view = self.drawn_for[:, None, None], np.arange(views)[:, None]
        return random_words(self.seed, self.epoch, sample, self.family, view, purposes)
