"""What the system lets this process have: cores, memory, shared memory, open files; and how fast it reads files.

Here: numbers, from what the kernel says of itself, below a root that a test may plant.
Not here: what is good or bad about them (doctor.py), the machine in words (machine.py).
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 2**22  # of one read


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemLimits:
    """What there is, and how much of it this process may have; None where the system does not say, or sets no limit."""

    cores_seen: int  # of the machine
    cores_allowed: int  # those that the process may run on
    quota_cores: float | None  # how many cores' time its cgroup may use
    memory_bytes: int | None  # of the machine
    memory_available_bytes: int | None
    memory_limit_bytes: int | None  # of its cgroup
    shared_bytes: int | None  # of /dev/shm
    shared_free_bytes: int | None
    open_files: int | None
    open_files_at_most: int | None  # to which the process may raise it itself


def read_limits(root: Path = Path("/")) -> SystemLimits:
    """Return the limits of this process; the kernel's files are those below `root`."""
    from wherefrom.pipeline.system import allowed_cores, cpu_quota  # here: where torch does not load, there is still something to say

    seen = os.cpu_count() or 1
    memory = read_memory(root)
    shared = root / "dev/shm"
    usage = shutil.disk_usage(shared) if shared.is_dir() else None
    soft, hard = _open_files()
    return SystemLimits(
        cores_seen=seen,
        cores_allowed=allowed_cores(),
        quota_cores=cpu_quota(root),
        memory_bytes=memory.get("MemTotal"),
        memory_available_bytes=memory.get("MemAvailable"),
        memory_limit_bytes=memory_limit(root),
        shared_bytes=usage.total if usage else None,
        shared_free_bytes=usage.free if usage else None,
        open_files=soft,
        open_files_at_most=hard,
    )


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return how many bytes the cgroup of this process, or one around it, may use; None: no limit below the machine's memory.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (memory.max) and cgroup-v1/memory.rst (memory.limit_in_bytes).
    """
    from wherefrom.pipeline.system import cgroup_folders

    texts = (_text(folder / name) for folder in cgroup_folders(root, "memory") for name in ("memory.max", "memory.limit_in_bytes"))
    limits = [int(text) for text in texts if text.isdigit()]
    lowest, there = min(limits, default=None), read_memory(root).get("MemTotal")
    return None if lowest is None or (there is not None and lowest >= there) else lowest


def read_memory(root: Path = Path("/")) -> dict[str, int]:
    """Return /proc/meminfo, in bytes by name; nothing where there is none."""
    rows = (line.split() for line in _text(root / "proc/meminfo").splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3}


def _open_files() -> tuple[int | None, int | None]:
    try:
        import resource
    except ImportError:  # Windows
        return None, None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (None if each == resource.RLIM_INFINITY else each for each in (soft, hard))  # type: ignore[return-value]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSpeed:
    """What a short sequential read found."""

    bytes: int
    files: int
    seconds: float
    cold: bool | None  # from the disk, not from the system's memory; None: it cannot be told

    @property
    def bytes_per_s(self) -> float:
        """Read."""
        return self.bytes / max(self.seconds, 1e-9)


def read_speed(paths: Iterable[Path], *, most_bytes: int = 2**26, seconds: float = 1.0) -> ReadSpeed:
    """Read files one after another until they, the bytes or the time are at an end; their pages are let go of first.

    Raises: OSError if one cannot be read.
    """
    from wherefrom.pipeline.files import open_regular

    buffer = memoryview(bytearray(CHUNK_BYTES))
    total = files = 0
    spent = 0.0
    cold: set[bool | None] = set()
    for path in paths:
        if total >= most_bytes or spent >= seconds:
            break
        with open(open_regular(path), "rb", buffering=0) as file:
            held_before = _let_go(file.fileno(), most_bytes - total)
            started = time.perf_counter()
            while total < most_bytes and spent < seconds and (count := file.readinto(buffer[: most_bytes - total])):
                total += count
                spent, started = spent + time.perf_counter() - started, time.perf_counter()
            held_now = _is_held(file.fileno())
            cold.add(not held_before if held_now else None)  # what was read a moment ago is held, where the system says so at all
        files += 1
    return ReadSpeed(bytes=total, files=files, seconds=spent, cold=None if None in cold or not cold else all(cold))


def _let_go(file: int, length: int) -> bool | None:
    """Ask the system to forget the first `length` bytes of a file, a descriptor; return whether it holds them all the same."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, 0, length, os.POSIX_FADV_DONTNEED)
    return _is_held(file)


def _is_held(file: int) -> bool | None:
    """Return whether the system holds the beginning of a file, a descriptor, in its memory; None: it does not say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    try:
        os.preadv(file, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # this kind of disk has no such read
        return None
    return True
