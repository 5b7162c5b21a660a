"""Decoding for renderers that cut on a GPU: what a decoder is, and what it hands on.

Here: the protocol.
Not here: decoders (dali_decode.py, gpu_decode.py), the strict decoding of one file on a CPU (decode.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Pictures as stored (EXIF not undone), where they lie and how large they are."""

    owner: object  # of the memory: they stay where they are while it lives
    addresses: list[int]  # of contiguous (H, W, 3) uint8
    sizes: NDArray[np.int32]  # (B, 2), (height, width)
    failed: dict[int, str]  # position -> reason; one gray pixel stands in


class Decoder(Protocol):
    """Encoded files in, decoded pictures out."""

    strict: bool  # whether a damaged picture is always refused

    def decode(self, encoded: Sequence[NDArray[np.uint8]]) -> Decoded:
        """Decode a batch of at least one file; on a GPU the pictures are there once its current stream has come so far."""
        ...

    def close(self) -> None:
        """Free threads and memory; twice is fine."""
        ...
