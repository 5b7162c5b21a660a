"""What a user's machine has for us: a place for files of ours, cores, and threads on them.

Here: the user's cache folder, by each system's own custom, made on demand; how many cores' time this process, or one rank of several,
may use; threads of ours.
Not here: what is kept in it (shard indexes, demo pictures); their owners name their own sub-folders.
"""

import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

__all__ = [
    "ThreadsOfProcess",
    "allowed_cores",
    "available_cores",
    "cgroup_folders",
    "cores_of_rank",
    "cpu_quota",
    "local_world_size",
    "single_threaded_pool",
    "user_cache_folder",
]

OVERRIDE = "WHEREFROM_CACHE"


def user_cache_folder() -> Path:
    """Return the user's cache folder for wherefrom; it exists and can be written.

    It is $WHEREFROM_CACHE where that is set, else `wherefrom` in the system's own place: $XDG_CACHE_HOME or ~/.cache, ~/Library/Caches
    (macOS), %LOCALAPPDATA% (Windows).
    Raises: OSError in one line if the folder cannot be made or written.
    Source: XDG Base Directory Specification 0.8 (a relative $XDG_CACHE_HOME is to be ignored).
    """
    folder = _customary_folder(os.environ, sys.platform)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cache folder {folder} cannot be written ({error.strerror}); set {OVERRIDE} to a folder that can") from error
    return folder


def _customary_folder(environment: Mapping[str, str], platform: str) -> Path:
    if named := environment.get(OVERRIDE):
        return Path(named).expanduser().absolute()
    if platform == "win32":
        base = environment.get("LOCALAPPDATA", "") or Path.home() / "AppData" / "Local"
    elif platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        xdg = environment.get("XDG_CACHE_HOME", "")
        base = xdg if Path(xdg).is_absolute() else Path.home() / ".cache"
    return Path(base) / "wherefrom"


def available_cores() -> int:
    """Return how many cores' time this process may use: of those that it may run on, as many as a container leaves it, rounded up."""
    quota = cpu_quota()
    return allowed_cores() if quota is None else min(allowed_cores(), max(1, math.ceil(quota)))


def cores_of_rank() -> int:
    """Return how many of the available cores are this rank's share: those that it may run on, divided among the ranks of its machine.

    At least 1. Where a launcher has bound every rank to cores of its own, that share is a part of these.
    Raises: as local_world_size.
    """
    return max(1, available_cores() // local_world_size())


def local_world_size() -> int:
    """Return how many ranks of this run are on this machine: $LOCAL_WORLD_SIZE, which torchrun and Accelerate set, else 1.

    Raises: ValueError in one line if that is no whole number of at least 1.
    """
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"LOCAL_WORLD_SIZE={text!r}: needs a whole number of at least 1, as torchrun sets it; unset it for one rank")
    return int(text)


def allowed_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores' time the cgroup of this process, or one around it, may use; None: no limit.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us, -1: none).
    """
    quotas = []
    for folder in cgroup_folders(root, "cpu"):
        words = _text(folder / "cpu.max").split() or [_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")]
        if all(word.isdigit() for word in words) and int(words[-1]):  # "max" and "-1" are no limit
            quotas.append(int(words[0]) / int(words[-1]))
    return min(quotas, default=None)


def cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield where a controller's files of this process's cgroup and of those around it may lie, of either version."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # a path that leads out of the container's own view is as good as its root
        own = PurePosixPath(path if ".." not in path else "/")
        for mount in ("", "unified") if not controllers else dict.fromkeys((controllers, controller)):
            for place in (own, *own.parents):
                yield root / "sys/fs/cgroup" / mount / str(place).lstrip("/")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def single_threaded_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Start a pool whose threads, `threads` of them, each do their own arithmetic in PyTorch alone: pictures are the parallelism.

    All start now, none amid the caller's arithmetic. PyTorch notes the last number that any thread set as the one that every later thread
    of the process begins with; it is noted anew as it was, for that is not ours to say.
    Raises: OSError in one line if the system starts fewer; those that it did start end.
    """
    import torch

    def take_one_thread() -> None:
        torch.get_num_threads()  # a thread first takes the noted number when it is asked, which may be after it was told another
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, name, take_one_thread)
    barrier = threading.Barrier(threads)
    waiting: list[Future[int]] = []
    try:
        while len(waiting) < threads:
            waiting.append(pool.submit(barrier.wait))
        for each in waiting:
            each.result()
    except RuntimeError as error:  # "can't start new thread"
        barrier.abort()
        pool.shutdown(wait=True)
        raise OSError(
            f"{name}: the system starts {len(waiting)} of {threads} threads ({error}); set threads= to fewer, or raise the limit of "
            "processes (ulimit -u, a container's pids)"
        ) from error
    finally:
        torch.set_num_threads(torch.get_num_threads())
    return pool


class ThreadsOfProcess:
    """A pool of threads, which a forked process, that has none of them, makes anew.

    make: makes the pool; called at once.
    """

    def __init__(self, make: Callable[[], ThreadPoolExecutor]) -> None:
        self._make = make
        self._pool, self._process = make(), os.getpid()

    def get(self) -> ThreadPoolExecutor:
        """Return this process's pool."""
        if self._process != os.getpid():
            self._pool, self._process = self._make(), os.getpid()
        return self._pool

    def close(self, *, cancel: bool = True) -> None:
        """End the threads; what none of them has begun is dropped, or done first. Twice is fine."""
        if self._process == os.getpid():  # else the threads are another's
            self._pool.shutdown(wait=True, cancel_futures=cancel)
