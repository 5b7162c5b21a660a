"""Files of this machine: opening those that others wrote, and writing ours whole or not at all.

Here: to read, regular files or an error, for a pipe, socket or device under such a name would keep its reader waiting for ever, or never
end; to write, files aside that are renamed, so that a process that dies leaves the file as it was.
Not here: what the bytes mean; data that may lie elsewhere (shards/storage.py); a disk that is full, by name (train/disk.py).
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["open_regular", "read_regular", "sync_to_disk", "write_aside"]


def open_regular(path: str | bytes | os.PathLike[str]) -> int:
    """Open a file for reading and return its descriptor; nobody is waited for.

    Raises: OSError if it cannot be opened or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # else a pipe waits for its writer; files read as ever
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fsdecode(path))
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


@contextlib.contextmanager
def write_aside(path: Path, *, fsync: bool = False, concurrent: bool = False, follow_symlinks: bool = True) -> Iterator[Path]:
    """Give a path beside `path` to write to; when the block ends, what was written takes the place of `path`, whole or not at all.

    If the block raises, `path` is as it was and what was begun is removed; a process that is killed leaves one hidden file, which the next
    one to write writes over. `fsync` waits until the file and its name are on the disk itself. `concurrent`: others may write the same
    path at the same time, so what is begun has a name of its own.
    A link stays and the file that it leads to is replaced; a pipe or a device is written into. Without `follow_symlinks`, for a folder
    that others may write to, whatever bears the name is replaced itself.
    Raises: OSError naming `path` where it is about what lies beside it.
    """
    if follow_symlinks and not _is_regular_or_new(path):
        yield path
        return
    target = Path(os.path.realpath(path)) if follow_symlinks and path.is_symlink() else path
    aside = target.with_name(f".{target.name}.{secrets.token_hex(6)}.writing" if concurrent else f".{target.name}.writing")
    try:
        yield aside
        if fsync:
            sync_to_disk(aside)
        os.replace(aside, target)
    except OSError as error:
        taken_away = isinstance(error, FileNotFoundError) and target.parent.is_dir()  # by another: that is of the file beside `path`
        if error.filename is not None and os.fsdecode(error.filename) == str(aside) and not taken_away:
            error.filename = str(path)
            del error.filename2
        raise
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)  # there only if something failed
    if fsync:
        sync_to_disk(target.parent)


def _is_regular_or_new(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk itself."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
