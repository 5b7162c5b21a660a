"""Memory that batches are written into, and used again once nobody holds it.

Here: a ring of slots. Not here: what is written (threads.py).
A slot comes back when the last tensor that shares its memory is gone: the array behind those tensors is watched, not the tensors.
"""

import contextlib
import logging
import math
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class SlotRing:
    """Flat byte buffers of one size class; `take` hands out tensors over a free one, or over a new one when all are held.

    Of free ones it keeps `expected`.
    """

    def __init__(self, expected: int = 4, *, pinned: bool = False) -> None:
        self.expected = expected  # slots that a caller who drops batches needs
        self.pinned = pinned
        self.slots = 0  # in existence
        self._free: deque[Tensor] = deque()  # appending and popping are atomic: a finalizer may run anywhere
        self._lock = threading.Lock()
        self._growth_logged = False

    def take(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
        """Return tensors of these shapes over one slot; their contents are undefined."""
        counts = [math.prod(shape) for shape in shapes]
        needed = sum(-(-count * dtype.itemsize // 64) * 64 for count in counts)
        memory = self._take_memory(needed)
        lease = memory.numpy()[:needed]  # a new array each time: it lives as long as any tensor made from it
        weakref.finalize(lease, self._free.append, memory).atexit = False
        flat = torch.from_numpy(lease)
        tensors, offset = [], 0
        for shape, count in zip(shapes, counts, strict=True):
            size = count * dtype.itemsize
            tensors.append(flat[offset : offset + size].view(dtype).view(shape))
            offset += -(-size // 64) * 64
        return tensors

    def _take_memory(self, needed: int) -> Tensor:
        while len(self._free) > self.expected:  # a caller kept many batches and dropped them
            with self._lock:
                if len(self._free) > self.expected:  # under the lock nobody else lets go, but others take
                    with contextlib.suppress(IndexError):
                        self._free.popleft()
                        self.slots -= 1
        while True:
            try:
                memory = self._free.popleft()
            except IndexError:
                break
            if memory.numel() >= needed:
                return memory
            with self._lock:
                self.slots -= 1  # too small for this batch: let it go
        with self._lock:
            self.slots += 1
            if self.slots > self.expected and not self._growth_logged:
                self._growth_logged = True
                log.info("all %d batch slots are held; the ring grows: each batch that you keep keeps its memory", self.expected)
        return torch.empty(max(needed, 1), dtype=torch.uint8, pin_memory=self.pinned)
