"""What a process and all its children cost: CPU seconds and memory, read from Linux's /proc.

Here: the two numbers. Not here: whose they are (contenders.py).
Worker processes count while they live and after: what a loader hands to others is its cost too.
"""

import os
from pathlib import Path


def tree_cpu_s() -> float:
    """Return the CPU seconds of this process and of all that descend from it, those that have ended included."""
    ticks = 0
    for pid in _tree():
        ticks += sum(map(int, _stat(pid)[11:15]))  # utime, stime, and both of children that were waited for
    return ticks / os.sysconf("SC_CLK_TCK")


def tree_memory_mib() -> float:
    """Return the memory of this process and of all that descend from it; shared pages count once."""
    kib = 0
    for pid in _tree():
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib / 1024


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; all zero for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["0"] * 50


def _tree() -> list[int]:
    """Return the ids of this process and of all that descend from it."""
    parents = {int(path.name): int(_stat(int(path.name))[1]) for path in Path("/proc").iterdir() if path.name.isdigit()}
    tree = [os.getpid()]
    for pid in tree:  # grows while it is walked
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree
