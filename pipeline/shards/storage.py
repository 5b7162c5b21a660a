"""Where data lies: the one seam through which shards, and the metadata beside them, are found and read.

Here: the protocols `Storage` and `StoredFile`, local files behind them, and the choice of a storage by a path's URL scheme.
Not here: files that we write ourselves, index files first of all (files.py); what the bytes mean (table.py, reader.py).
A path is a string, with a scheme unless it is local. Every failure is an OSError of one line; its text need not name the path.
"""

import glob
import os
import re
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from wherefrom.kernels.read_parts import native_read_parts
from wherefrom.pipeline.files import open_regular

__all__ = ["STORAGES", "LocalStorage", "Stamp", "Storage", "StoredFile", "read_at", "read_head", "read_parts", "storage_of"]

_URL_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_SCHEMES_WITHOUT_SLASHES = {"pipe", "file", "http", "https", "sftp", "ftps", "scp", "gs", "s3", "hf", "ais", "htgs"}


class Stamp(NamedTuple):
    """Which content a file has: equal stamps, equal bytes."""

    size: int  # bytes
    version: int  # 64 bits, signed: the mtime in ns of a local file; what a server says of its own, hashed


class StoredFile(Protocol):
    """A file that is open for reading, from any number of threads. Nothing needs to be fetched before the first read."""

    def stamp(self) -> Stamp:
        """Return what is read from: as it is now, or as it was opened where later reads of anything else are refused."""
        ...

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the buffer from `offset` on, without the interpreter's lock; return how many bytes there were, fewer only at the end."""
        ...

    def close(self) -> None:
        """Give back what it holds; no read is under way."""
        ...


class Storage(Protocol):
    """Files of data under one URL scheme."""

    def kind(self, path: str) -> Literal["file", "folder"] | None:
        """Return what is there, None for nothing and for what is neither. Where there are no folders, a prefix of names is one."""
        ...

    def glob(self, pattern: str) -> list[str]:
        """Return what matches a pattern of the standard library's glob and is no folder, sorted; a link may be broken.

        Raises: OSError where nothing can be listed.
        """
        ...

    def stamp(self, path: str) -> Stamp:
        """Return a file's stamp without opening it. Raises: FileNotFoundError; OSError."""
        ...

    def open(self, path: str) -> StoredFile:
        """Open a file. Raises: OSError, here or at the first read."""
        ...

    def canonical(self, path: str) -> str:
        """Return the one name of a file that can be named in several ways."""
        ...

    def local_folder(self, path: str) -> Path | None:
        """Return the folder on this machine that a file lies in, where its index may lie beside it; None: it lies elsewhere."""
        ...


class LocalStorage:
    """Files of this machine; a path has no scheme."""

    def kind(self, path: str) -> Literal["file", "folder"] | None:
        return "file" if os.path.isfile(path) else "folder" if os.path.isdir(path) else None

    def glob(self, pattern: str) -> list[str]:
        return sorted(path for path in glob.glob(pattern) if not os.path.isdir(path))

    def stamp(self, path: str) -> Stamp:
        status = os.stat(path)
        return Stamp(status.st_size, status.st_mtime_ns)

    def open(self, path: str) -> "_LocalFile":
        return _LocalFile(open_regular(path))

    def canonical(self, path: str) -> str:
        return os.path.abspath(path)

    def local_folder(self, path: str) -> Path:
        return Path(path).parent


class _LocalFile:
    """A descriptor, read by position. No mmap: a file that is cut short would kill the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def stamp(self) -> Stamp:
        status = os.fstat(self._descriptor)
        return Stamp(status.st_size, status.st_mtime_ns)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        done = 0
        while done < len(buffer):
            if hasattr(os, "preadv"):
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            else:  # not every system has it
                chunk = os.pread(self._descriptor, len(buffer) - done, offset + done)
                buffer[done : done + len(chunk)] = chunk
                count = len(chunk)
            if not count:
                break
            done += count
        return done

    def read_parts(self, memory: NDArray[np.uint8], parts: NDArray[np.int64]) -> tuple[int, int, OSError | None]:
        """Fill many parts in one call, as the function `read_parts`."""
        native = native_read_parts()
        if native is None:
            return _read_one_by_one(self, memory, parts)
        whole, count, number = native(self._descriptor, memory, np.ascontiguousarray(parts))
        return whole, count, OSError(number, os.strerror(number)) if number else None

    def close(self) -> None:
        os.close(self._descriptor)


STORAGES: dict[str, Storage] = {"": LocalStorage()}  # by URL scheme


def storage_of(path: str) -> Storage:
    """Return the storage that a path's scheme names.

    Raises: ValueError for a scheme that nothing serves.
    """
    match = _URL_SCHEME.match(path)
    scheme = match[1].lower() if match and (match[2] or match[1].lower() in _SCHEMES_WITHOUT_SLASHES) else ""
    if scheme not in STORAGES:
        raise ValueError(f"{path!r} is a {scheme}: URL, and only local files are read; fetch the shards and name their paths")
    return STORAGES[scheme]


def read_at(file: StoredFile, offset: int, length: int) -> bytes:
    """Return `length` bytes from `offset` on; fewer where the file ends before."""
    buffer = bytearray(length)
    count = file.read_into(memoryview(buffer), offset)
    return bytes(memoryview(buffer)[:count])


def read_parts(file: StoredFile, memory: NDArray[np.uint8], parts: NDArray[np.int64]) -> tuple[int, int, OSError | None]:
    """Fill parts of memory from a file, in order, until one is not there whole; of a local file in one call without the interpreter's lock.

    Shapes: memory (bytes,), parts (N, 3), each the offset in the file, the start in memory, and how many bytes.
    Returns: how many parts are whole; of the next, how many bytes there were, and the error that its read ended with.
    """
    if isinstance(file, _LocalFile) and len(parts) > 1:
        return file.read_parts(memory, parts)
    return _read_one_by_one(file, memory, parts)


def _read_one_by_one(file: StoredFile, memory: NDArray[np.uint8], parts: NDArray[np.int64]) -> tuple[int, int, OSError | None]:
    for whole, (offset, start, length) in enumerate(parts.tolist()):
        try:
            count = file.read_into(memory.data[start : start + length], offset)
        except OSError as error:
            return whole, 0, error
        if count < length:
            return whole, count, None
    return len(parts), 0, None


def read_head(path: str, limit: int) -> bytes:
    """Return the first bytes of a file, at most `limit`. Raises: OSError."""
    storage = storage_of(path)
    file = storage.open(path)
    try:
        return read_at(file, 0, min(limit, file.stamp().size))
    finally:
        file.close()
