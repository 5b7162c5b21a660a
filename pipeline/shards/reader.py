"""Reads encoded pictures out of tar shards by position, and loose files whole.

Here: `ShardReader`, a bounded set of open shards that any number of threads read from, into buffers of theirs.
Not here: what lies where (index.py), how a shard is reached (storage.py), decoding (render/).
A shard, or a loose file, is trusted only while its stamp is the one that was indexed; every read checks it.
"""

import errno
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.storage import StoredFile, read_parts, storage_of
from wherefrom.pipeline.system import ThreadsOfProcess

__all__ = ["ShardChangedError", "ShardReader"]

_CLOSED = "the reader is closed; make another ShardReader"
_NOT_THE_SHARDS_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}


class ShardChangedError(OSError):
    """A shard or a loose file is not what was indexed: gone, cut short or rewritten. One line: which, what is wrong, the mend."""


@dataclass(slots=True)
class _OpenShard:
    file: StoredFile
    users: int = 0


class ShardReader:
    """Reads pictures by sample id; safe from many threads, which wait for the disk without the GIL.

    At most `max_open` shards stay open between reads, the least recently used ones are closed first, one in use never. A loose file is
    open while it is read; of a batch, `loose_threads` of them at once, for a disk far away takes its time over each (0: one by one, in the
    caller's thread).
    """

    def __init__(self, index: ShardIndex, *, max_open: int = 256, loose_threads: int = 8) -> None:
        if max_open < 1 or loose_threads < 0:
            raise ValueError(f"max_open={max_open}, loose_threads={loose_threads}: needs at least 1 and 0")
        self.index = index
        self._max_open = max_open
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()  # by shard, the least recently used first
        self._pool: ThreadsOfProcess | None = None  # for loose files, when there are some to read
        self._loose_threads = loose_threads
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
        part = np.array([[self.index.offset[sample], 0, length]])
        self._read_shard(int(self.index.shard[sample]), [sample], buffer[:length], part)
        return buffer[:length]

    def read_batch(self, samples: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Read the encoded bytes of samples (B,) into one stretch of memory, shard by shard, and return B views of it.

        Raises: as `read`.
        """
        self._check_ids(samples)
        lengths = self.index.length[samples]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        memory = np.empty(int(lengths.sum()), np.uint8)
        parts = np.empty((len(samples), 3), np.int64)
        parts[:, 0], parts[:, 1], parts[:, 2] = self.index.offset[samples], starts, lengths
        ids = samples.tolist()
        rows: dict[int, list[int]] = {}  # by shard
        for row, shard in enumerate(self.index.shard[samples].tolist()):
            rows.setdefault(shard, []).append(row)
        for shard, of_shard in rows.items():
            if len(rows) == 1:
                self._read_shard(shard, ids, memory, parts)
            else:
                self._read_shard(shard, [ids[row] for row in of_shard], memory, parts[of_shard])
        return [memory[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def _check_ids(self, samples: NDArray[np.int64]) -> None:
        outside = samples[(samples < 0) | (samples >= len(self.index))]
        if len(outside):
            raise IndexError(f"sample {outside[0]} of {len(self.index)}; samples are numbered 0 to {len(self.index) - 1}")

    def _read_shard(self, shard: int, samples: list[int], memory: NDArray[np.uint8], parts: NDArray[np.int64]) -> None:
        """Fill a part of memory (bytes,) for each of N samples, all of one shard; parts (N, 3) as `read_parts` takes them."""
        if not self.index.is_tree(shard):
            self._read_file(self._borrow(shard), samples, memory, parts)
        elif self._loose_threads < 2 or len(samples) < 2:
            self._read_loose(samples, memory, parts)
        else:
            shares = [slice(first, None, self._loose_threads) for first in range(min(self._loose_threads, len(samples)))]
            with self._lock:
                if self._closed:
                    raise ValueError(_CLOSED)
                if self._pool is None:
                    self._pool = ThreadsOfProcess(partial(ThreadPoolExecutor, self._loose_threads, "wherefrom-read"))
                reading = [self._pool.get().submit(self._read_loose, samples[share], memory, parts[share]) for share in shares]
            for share_read in reading:
                share_read.result()

    def _read_loose(self, samples: list[int], memory: NDArray[np.uint8], parts: NDArray[np.int64]) -> None:
        """Fill a part of memory for each sample, a file of its own; shapes as `_read_shard`."""
        for row, sample in enumerate(samples):
            self._read_file(self._open_once(sample), [sample], memory, parts[row : row + 1])

    def _read_file(
        self, opened: AbstractContextManager[StoredFile], samples: list[int], memory: NDArray[np.uint8], parts: NDArray[np.int64]
    ) -> None:
        """Fill a part of memory for each sample, all of one file; shapes as `_read_shard`."""
        sample = samples[0]
        try:
            with opened as file:
                self._check_unchanged(file, sample)
                whole, count, failure = read_parts(file, memory, parts)
                if whole < len(samples):
                    sample = samples[whole]
                    try:
                        raise failure or self._changed(sample, f"{count} of its {parts[whole, 2]} bytes are there")
                    finally:
                        del failure  # whose traceback knows this frame, which would keep the memory
        except ShardChangedError:
            raise
        except OSError as error:
            if error.errno in _NOT_THE_SHARDS_FAULT:
                raise
            raise self._changed(sample, error.strerror or str(error)) from error

    def close(self) -> None:
        """Close every shard, those in use when their read ends, and end all threads. Twice is fine."""
        with self._lock:
            self._closed = True
            self._evict(keep=0)
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close(cancel=False)  # a read under way says itself that the reader is closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _open_once(self, sample: int) -> Iterator[StoredFile]:
        """Open the loose file that a sample is, until the block ends."""
        if self._closed:
            raise ValueError(_CLOSED)
        path, _, _ = self.index.location(sample)
        file = storage_of(path).open(path)
        try:
            yield file
            self._check_unchanged(file, sample)  # once more: it may have been written to since the check before it was read
        finally:
            file.close()

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
                raise ValueError(_CLOSED)
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
        stamp, indexed = file.stamp(), self.index.stamp(sample)
        what = "it" if self.index.is_tree(int(self.index.shard[sample])) else "the shard"
        if stamp.size != indexed.size:
            raise self._changed(sample, f"{what} has {stamp.size} bytes, {indexed.size} were indexed")
        if stamp.version != indexed.version:
            raise self._changed(sample, f"{what} was written to since it was indexed")

    def _changed(self, sample: int, fault: str) -> ShardChangedError:
        what = "file" if self.index.is_tree(int(self.index.shard[sample])) else "shard"
        return ShardChangedError(
            f"{self.index.name(sample)}: {fault}; restore the {what}, or run `wherefrom index PATTERN --rebuild` and start again"
        )
