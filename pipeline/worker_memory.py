"""Handing batches from a DataLoader's worker to the process that waits for them: shared memory that is used again.

Here: memory that a worker writes views into, how containers of tensors cross to the other process, when their memory is free again.
Not here: what is written (transform.py); the loader's own slots, which cross no process (slots.py).
Fresh shared memory costs more than the views in it: every page is cleared and mapped. So each hand-over has a byte in its memory's
head, which the receiver sets once its last tensor is gone. Those tensors are watched as slots.py does it, in both processes.
"""

import functools
import math
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

_HEAD_BYTES = 64  # one for each hand-over of what is written; whoever hands over more often loses the memory
_ALIGNED_BYTES = 64
_KEPT_FREE = 8  # pieces beside the one that is taken: more than a worker makes ahead
_INLINE_BYTES = 1 << 16  # tensors up to this size travel in the message: a file descriptor each would cost more


def empty_tensors(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of these shapes, contents undefined: in a DataLoader's worker in one piece of memory that crosses without a copy."""
    if get_worker_info() is None:
        return [torch.empty(tuple(shape), dtype=dtype) for shape in shapes]
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    starts = np.cumsum([0, *(-(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES for size in sizes)]).tolist()
    flat = _slots_of(os.getpid()).take(starts[-1])
    pieces = zip(starts, sizes, shapes, strict=False)  # the last start is the end
    return [flat[start : start + size].view(dtype).view(tuple(shape)) for start, size, shape in pieces]


def crosses_whole(kind: type) -> type:
    """Let a frozen dataclass of tensors cross processes as one message; pickle, copy and torch.save are not touched. A decorator."""
    ForkingPickler.register(kind, _reduce)
    return kind


class _Slot:
    """A piece of shared memory, a head of `_HEAD_BYTES` before it."""

    def __init__(self, needed: int) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(_HEAD_BYTES + needed))
        self.room = needed
        self.handed_over = 0
        self._lease: weakref.ref[NDArray[np.uint8]] | None = None

    @property
    def held_here(self) -> bool:
        return self._lease is not None and self._lease() is not None

    @property
    def free(self) -> bool:
        return not self.held_here and self.handed_over <= _HEAD_BYTES and bool(self.memory[: self.handed_over].all())

    def lease(self) -> Tensor:
        self.memory[:_HEAD_BYTES] = 0
        self.handed_over = 0
        lease = self.memory.numpy()[_HEAD_BYTES:]
        self._lease = weakref.ref(lease)
        return torch.from_numpy(lease)

    def hand_over(self) -> int:
        """Return the number of this hand-over."""
        self.handed_over += 1
        return self.handed_over - 1

    def offset(self, tensor: Tensor) -> int | None:
        """Return at which byte of the lease a tensor begins, None if it lies elsewhere."""
        offset = tensor.data_ptr() - self.memory.data_ptr() - _HEAD_BYTES
        return offset if self.held_here and 0 <= offset < self.room else None


class _Slots:
    """All pieces of a worker, as many as are under way at once."""

    def __init__(self) -> None:
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()  # a queue's own thread hands over

    def take(self, needed: int) -> Tensor:
        with self._lock:
            free = [slot for slot in self._slots if slot.free]
            fitting = min((slot for slot in free if slot.room >= needed), key=lambda slot: slot.room, default=None)
            surplus = [slot for slot in free if slot is not fitting][_KEPT_FREE:]
            if surplus:  # a receiver kept many batches and dropped them
                self._slots = [slot for slot in self._slots if slot not in surplus]
            if fitting is None:
                fitting = _Slot(needed)  # what is free is too small: let it go
                self._slots = [slot for slot in self._slots if slot not in free and slot.handed_over <= _HEAD_BYTES] + [fitting]
            return fitting.lease()

    def find(self, tensor: Tensor) -> tuple[_Slot, int] | None:
        with self._lock:
            for slot in self._slots:
                if (offset := slot.offset(tensor)) is not None:
                    return slot, offset
        return None


@functools.cache
def _slots_of(process: int) -> _Slots:
    return _Slots()


@dataclass(frozen=True, slots=True)
class _Parts:
    """A container taken apart; tensors, here or deeper, are `_At` a number."""

    kind: type
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _At:
    tensor: int


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor over handed-over memory, or, with `content`, in the message itself."""

    shape: torch.Size
    dtype: torch.dtype
    stride: tuple[int, ...] = ()
    offset: int = 0  # bytes
    slot: int = -1
    content: NDArray[np.uint8] | None = None


def _reduce(container: Any) -> tuple[Any, ...]:
    tensors: dict[int, tuple[_At, Tensor]] = {}
    parts = _taken_apart(container, tensors)
    slots: list[_Slot] = []
    placed: list[_Placed | Tensor] = []
    for _, tensor in tensors.values():
        place = _slots_of(os.getpid()).find(tensor) if tensor.device.type == "cpu" else None
        if place is not None:
            slot, offset = place
            if slot not in slots:
                slots.append(slot)
            placed.append(_Placed(tensor.shape, tensor.dtype, tensor.stride(), offset, slots.index(slot)))
        elif tensor.device.type == "cpu" and tensor.nbytes <= _INLINE_BYTES:
            content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
            placed.append(_Placed(tensor.shape, tensor.dtype, content=content))
        else:
            placed.append(tensor)
    return _rebuild, (parts, placed, [(slot.memory, slot.hand_over()) for slot in slots])


def _rebuild(parts: Any, placed: list[_Placed | Tensor], slots: list[tuple[Tensor, int]]) -> Any:
    storages = [_held(memory, number) for memory, number in slots]
    tensors = []
    for place in placed:
        if isinstance(place, Tensor):
            tensors.append(place)
        elif place.content is not None:
            tensors.append(torch.from_numpy(place.content).view(place.dtype).view(place.shape))
        else:
            start = place.offset // place.dtype.itemsize
            tensors.append(torch.empty(0, dtype=place.dtype).set_(storages[place.slot], start, place.shape, place.stride))
    return _put_together(parts, tensors)


def _held(memory: Tensor, number: int) -> torch.UntypedStorage:
    """Return the storage behind a head; when the last tensor over it is gone, the head's byte tells the worker."""
    whole = memory.numpy()
    lease = whole[_HEAD_BYTES:]
    weakref.finalize(lease, _give_back, whole, number, os.getpid()).atexit = False
    return torch.from_numpy(lease).untyped_storage()


def _give_back(whole: NDArray[np.uint8], number: int, holder: int) -> None:
    if os.getpid() == holder and number < _HEAD_BYTES:  # a forked child's copies are not the holder's
        whole[number] = 1


def _taken_apart(value: Any, tensors: dict[int, tuple[_At, Tensor]]) -> Any:
    if isinstance(value, Tensor):
        return tensors.setdefault(id(value), (_At(len(tensors)), value))[0]
    if isinstance(value, tuple):
        return tuple(_taken_apart(item, tensors) for item in value)
    if is_dataclass(value):
        return _Parts(type(value), tuple(_taken_apart(getattr(value, field.name), tensors) for field in fields(value)))
    return value


def _put_together(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _At):
        return tensors[value.tensor]
    if isinstance(value, tuple):
        return tuple(_put_together(item, tensors) for item in value)
    if isinstance(value, _Parts):
        names = (field.name for field in fields(value.kind))
        return value.kind(**{name: _put_together(item, tensors) for name, item in zip(names, value.values, strict=True)})
    return value
