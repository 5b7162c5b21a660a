"""Opening files that others wrote.

Here: the only way that a shard, an index file or metadata beside them is opened: a regular file, or an error.
Not here: what the bytes mean. A pipe, socket or device under such a name would keep its reader waiting for ever, or never end.
"""

import errno
import os
import stat

__all__ = ["open_regular", "read_regular"]


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a file for reading and return its descriptor; nobody is waited for.

    Raises: OSError if it cannot be opened or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # else a pipe waits for its writer; files read as ever
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return descriptor


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the first bytes of a file, at most `limit`.

    Raises: as open_regular, or OSError if it cannot be read.
    """
    with open(open_regular(path), "rb", buffering=0) as file:
        parts: list[bytes] = []
        while limit > 0 and (part := file.read(min(limit, 2**24))):
            parts.append(part)
            limit -= len(part)
    return b"".join(parts)
