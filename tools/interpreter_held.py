"""How much of the time this process holds its interpreter (the GIL): another process reads the lock all the time.

Here: where CPython keeps the lock, the process that reads it, the share of readings that found it held.
Not here: what the process does meanwhile (bench_contenders.py). Linux and CPython with a GIL only.
The reader has a core to itself: one that sleeps wakes when others pause, and holds of some microseconds escape it.
"""

import ctypes
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

BURST = 5000  # readings between two looks at whether it is over, about 5 ms
MARK_US = 4567  # a switch interval that nobody uses, to know the lock by
PR_SET_PTRACER = 0x59616D61  # where Yama guards processes: who may read this one


@dataclass(kw_only=True, slots=True)
class Held:
    """How often the lock was read, and how often it was held; filled in when the watching ends."""

    readings: int = 0
    held: int = 0

    @property
    def share(self) -> float:
        """Of the time; NaN without readings."""
        return self.held / self.readings if self.readings else float("nan")


@contextmanager
def interpreter_watched() -> Iterator[Held]:
    """Read the lock of this process's interpreter while the block runs; meanwhile this process has one core less.

    Holds count by the clock: a thread that the system puts aside while it holds the lock goes on holding it.
    Raises: OSError of one line where the lock cannot be found or read, or there is one core alone.
    """
    found, cores = Held(), os.sched_getaffinity(0)
    if len(cores) < 2:
        raise OSError("the interpreter's lock cannot be read: that takes a core of its own, and there is only one")
    command = [sys.executable, "-m", "wherefrom.tools.interpreter_held", str(os.getpid()), str(_lock_address()), str(max(cores))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, reader.pid, 0, 0, 0)  # says no where there is no Yama, and is not needed
        reader.stdin.write("begin\n")
        reader.stdin.flush()
        if reader.stdout.readline() != "begun\n":
            raise OSError("the interpreter's lock cannot be read: this system lets no process read another's memory")
        _move_threads(cores - {max(cores)})
        try:
            yield found
        finally:
            _move_threads(cores)
            told, _ = reader.communicate()
    found.readings, found.held = map(int, told.split())


def _move_threads(cores: set[int]) -> None:
    """Let all threads of this process run on these cores alone."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def _lock_address() -> int:
    """Return where CPython keeps the word that is 1 while the GIL is held.

    Its record lies in `_PyRuntime` and begins with the switch interval in microseconds, the thread state that holds or held
    it, and the word itself: one place there shows an interval that we set and this thread.
    Source: `struct _gil_runtime_state`, CPython 3.9 to 3.13.
    """
    try:
        runtime = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
    except ValueError as error:
        raise OSError("the interpreter's lock cannot be found: this Python keeps it to itself") from error
    this_thread = ctypes.pythonapi.PyThreadState_Get
    this_thread.restype = ctypes.c_void_p
    size = (_mapped_until(runtime) - runtime) // ctypes.sizeof(ctypes.c_ulong)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(MARK_US / 1e6)
    try:
        words = list((ctypes.c_ulong * size).from_address(runtime))
    finally:
        sys.setswitchinterval(usual)
    marked = [n for n, word in enumerate(words[:-2]) if word == MARK_US and words[n + 1] == this_thread()]
    if len(marked) != 1 or words[marked[0] + 2] & 0xFFFFFFFF != 1:
        raise OSError(f"the interpreter's lock cannot be found: {len(marked)} places in Python {sys.version.split()[0]} look like it")
    return runtime + (marked[0] + 2) * ctypes.sizeof(ctypes.c_ulong)


def _mapped_until(address: int) -> int:
    """Return the end of the stretch of memory that holds an address."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        stretches = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    return next(end for start, end in stretches if start <= address < end)


def main(pid: str, address: str, core: str) -> None:
    """Read the word at an address of a process, on a core of its own, until standard input ends; tell readings and holds."""
    os.sched_setaffinity(0, {int(core)})
    sys.stdin.readline()
    memory, place, free = os.open(f"/proc/{pid}/mem", os.O_RDONLY), int(address), bytes(4)
    os.pread(memory, 4, place)
    print("begun", flush=True)
    bursts = held = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        bursts += 1
        for _ in range(BURST):
            held += os.pread(memory, 4, place) != free
    print(bursts * BURST, held)


if __name__ == "__main__":
    main(*sys.argv[1:])
