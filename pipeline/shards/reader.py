"""Reads encoded pictures out of tar shards by position.

Here: `ShardReader`, a bounded set of open shards that any number of threads read from, into buffers of theirs.
Not here: what lies where (index.py), how a shard is reached (storage.py), decoding (render/).
A shard is trusted only while its stamp is the one that was indexed; every read checks it.
"""

import errno
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.storage import StoredFile, storage_of

__all__ = ["ShardChangedError", "ShardReader"]

_NOT_THE_SHARDS_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}


class ShardChangedError(OSError):
    """A shard is not what was indexed: gone, cut short or rewritten. One line: shard and key, what is wrong, the mend."""


@dataclass(slots=True)
class _OpenShard:
    file: StoredFile
    users: int = 0


class ShardReader:
    """Reads pictures by sample id; safe from many threads, which wait for the disk without the GIL.

    At most `max_open` shards stay open between reads, the least recently used ones are closed first, one in use never.
    """

    def __init__(self, index: ShardIndex, *, max_open: int = 256) -> None:
        if max_open < 1:
            raise ValueError(f"max_open={max_open}: needs at least 1")
        self.index = index
        self._max_open = max_open
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()  # by shard, the least recently used first
        self._closed = False

    def read(self, sample: int, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Read the encoded bytes of a sample into the head of `buffer`, or into memory of their own, and return a view of them.

        Shapes: buffer (at least index.length[sample],) uint8, contiguous -> (index.length[sample],).
        Raises: ShardChangedError; ValueError if the buffer is too small or the reader is closed; IndexError for an id out of range.
        """
        self._check_ids(np.array([sample]))
        length = int(self.index.length[sample])
        if buffer is None:
            buffer = np.empty(length, np.uint8)
        elif len(buffer) < length:
            raise ValueError(f"buffer holds {len(buffer)} bytes, sample {sample} has {length}; make it as large as index.length.max()")
        self._read_shard(int(self.index.shard[sample]), [(sample, int(self.index.offset[sample]), buffer[:length].data)])
        return buffer[:length]

    def read_batch(self, samples: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Read the encoded bytes of samples (B,) into one stretch of memory, shard by shard, and return B views of it.

        Raises: as `read`.
        """
        self._check_ids(samples)
        lengths = self.index.length[samples]
        ends = np.cumsum(lengths)
        memory = np.empty(int(lengths.sum()), np.uint8)
        views = [memory[start:end] for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]
        requests: dict[int, list[tuple[int, int, memoryview]]] = {}
        shards, offsets = self.index.shard[samples].tolist(), self.index.offset[samples].tolist()
        for shard, sample, offset, view in zip(shards, samples.tolist(), offsets, views, strict=True):
            requests.setdefault(shard, []).append((sample, offset, view.data))
        for shard, of_shard in requests.items():
            self._read_shard(shard, of_shard)
        return views

    def _check_ids(self, samples: NDArray[np.int64]) -> None:
        outside = samples[(samples < 0) | (samples >= len(self.index))]
        if len(outside):
            raise IndexError(f"sample {outside[0]} of {len(self.index)}; samples are numbered 0 to {len(self.index) - 1}")

    def _read_shard(self, shard: int, requests: list[tuple[int, int, memoryview]]) -> None:
        """Fill the memory of every (sample, offset, memory), all of one shard."""
        sample = requests[0][0]
        try:
            with self._borrow(shard) as file:
                self._check_unchanged(file, sample)
                for sample, offset, target in requests:
                    count = file.read_into(target, offset)
                    if count < len(target):
                        raise self._changed(sample, f"{count} of its {len(target)} bytes are there")
        except ShardChangedError:
            raise
        except OSError as error:
            if error.errno in _NOT_THE_SHARDS_FAULT:
                raise
            raise self._changed(sample, error.strerror or str(error)) from error

    def close(self) -> None:
        """Close every shard; those in use when their read ends. Twice is fine."""
        with self._lock:
            self._closed = True
            self._evict(keep=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _borrow(self, shard: int) -> Iterator[StoredFile]:
        """Hand out a shard's file, which stays open until the block ends. Shards are opened outside the lock: that may be slow."""
        opened = self._take(shard)
        if opened is None:
            path = self.index.paths[shard]
            opened = self._take(shard, storage_of(path).open(path))
        assert opened is not None
        try:
            yield opened.file
        finally:
            with self._lock:
                opened.users -= 1
                self._evict(keep=0 if self._closed else self._max_open)

    def _take(self, shard: int, file: StoredFile | None = None) -> _OpenShard | None:
        """Count one more user of a shard that is open; where none is, take `file` for it, or return None."""
        with self._lock:
            opened = self._open.get(shard)
            if file is not None and (self._closed or opened is not None):
                file.close()  # another thread was faster, or the reader was closed meanwhile
            elif file is not None:
                opened = self._open[shard] = _OpenShard(file)
            if self._closed:
                raise ValueError("the reader is closed; make another ShardReader")
            if opened is not None:
                self._open.move_to_end(shard)
                opened.users += 1
            return opened

    def _evict(self, keep: int) -> None:
        """Close idle shards, the least recently used first, until `keep` are left. The caller holds the lock."""
        surplus = len(self._open) - keep
        if surplus > 0:
            idle = (shard for shard, opened in self._open.items() if not opened.users)
            for shard in list(islice(idle, surplus)):
                self._open.pop(shard).file.close()

    def _check_unchanged(self, file: StoredFile, sample: int) -> None:
        stamp = file.stamp()
        _, size, version = self.index.shard_stamps[self.index.shard[sample]].tolist()
        if stamp.size != size:
            raise self._changed(sample, f"the shard has {stamp.size} bytes, {size} were indexed")
        if stamp.version != version:
            raise self._changed(sample, "the shard was written to since it was indexed")

    def _changed(self, sample: int, fault: str) -> ShardChangedError:
        return ShardChangedError(
            f"{self.index.name(sample)}: {fault}; restore the shard, or run `wherefrom index PATTERN --rebuild` and start again"
        )
