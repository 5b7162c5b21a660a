"""The lock on a run's folder: one process writes into it, and a second one learns who does.

Here: taking the lock, giving it back, naming its owner.
Not here: what is written under it (loop.py, run_folder.py).
The kernel holds the lock (`flock`, which NFS hands on to its server) and drops it with the process that took it, however that ends;
the file's words (host and process id) are for the message, and decide only where the file system knows no locks.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without them answers


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on a run's folder, which exists; the lock's file is gone afterwards, unless the process was killed.

    Raises: ValueError that names host and process, if another one holds it; OSError if the folder cannot be written.
    """
    path = folder / LOCK
    handle = _taken(path)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # before the lock is dropped: whoever waits at this file sees that it is no longer the folder's
        os.close(handle)


def _taken(path: Path) -> int:
    """Return the locked file, open."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            owner = os.pread(handle, 4096, 0).decode(errors="replace").split()
            if problem.errno in NO_LOCKS and _may_take_over(owner):
                return handle
            os.close(handle)
            if problem.errno in NO_LOCKS:
                raise ValueError(f"{_complaint(path, owner)}, or delete {path} if that run has ended: no locks work here") from None
            if isinstance(problem, BlockingIOError):
                raise ValueError(_complaint(path, owner)) from None
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # its owner has just given it back and removed it: the next one makes it anew


def _may_take_over(owner: list[str]) -> bool:
    """Return whether nobody, or a process of this host that is no more, is named by `owner`, host and process id."""
    if len(owner) != 2 or not owner[1].isdecimal():
        return True
    if owner[0] != socket.gethostname():
        return False
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _complaint(path: Path, owner: list[str]) -> str:
    who = f"process {owner[1]} on {owner[0]}" if len(owner) == 2 else "another process"
    return f"{path.parent}: {who} is writing this run; wait until it ends, or take another --out"
