"""How long this process holds its interpreter (the GIL): another process reads the lock all the time.

Here: where CPython keeps the lock, the process that reads it, the share of readings that found it held, per CPU-second.
Not here: what the process does meanwhile (contenders.py). Linux and CPython with a GIL only.
The reader has a core to itself: one that sleeps wakes when others pause, and holds of some microseconds escape it.
"""

import ctypes
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

BURST = 500  # readings between two looks at whether it is over
MARK_US = 4567  # a switch interval that nobody uses, to know the lock by
PR_SET_PTRACER = 0x59616D61  # where Yama guards processes: who may read this one
UNREADABLE = "the interpreter's lock cannot be read"
UNFOUND = "the interpreter's lock cannot be found"


@dataclass(kw_only=True, slots=True)
class Held:
    """What was seen of the lock; filled in when the watching ends."""

    seconds: float = 0.0
    readings: int = 0
    held: int = 0  # of the readings
    ran_s: float = 0.0  # CPU time of all threads of the process
    waited_s: float = 0.0  # in which they could have run and the system let them wait for a core

    @property
    def share(self) -> float:
        """Of the time, by the clock."""
        return self.held / self.readings

    @property
    def per_cpu_s(self) -> float:
        """Seconds for which the lock is held in a CPU-second of the process.

        The system puts threads aside whether they hold the lock or not, and by the clock they go on holding it meanwhile: so time held
        is set against the time in which threads ran or waited for a core. On a quiet machine that is the time in which they ran.
        """
        return self.seconds * self.share / (self.ran_s + self.waited_s)


@contextmanager
def interpreter_watched() -> Iterator[Held]:
    """Read the lock of this process's interpreter while the block runs; meanwhile this process has one core less.

    Raises: OSError of one line where the lock cannot be found or read, or there is one core alone.
    """
    found, cores = Held(), os.sched_getaffinity(0)
    if len(cores) < 2:
        raise OSError(f"{UNREADABLE}: that takes a core of its own, and there is only one")
    arguments = [str(number) for number in (os.getpid(), _lock_address(), max(cores))]
    command = [sys.executable, "-m", "wherefrom.tools.bench_loader.interpreter_held", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, reader.pid, 0, 0, 0)  # says no where there is no Yama, and is not needed
        reader.stdin.write("begin\n")
        reader.stdin.flush()
        if reader.stdout.readline() != "begun\n":
            raise OSError(f"{UNREADABLE}: this system lets no process read another's memory")
        _move_threads(cores - {max(cores)})
        try:
            yield found
        finally:
            _move_threads(cores)
            told, _ = reader.communicate()
    seconds, readings, held, found.ran_s, found.waited_s = map(float, told.split())
    found.seconds, found.readings, found.held = seconds, int(readings), int(held)


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
        raise OSError(f"{UNFOUND}: this Python keeps it to itself") from error
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
        raise OSError(f"{UNFOUND}: {len(marked)} places in Python {sys.version.split()[0]} look like it")
    return runtime + (marked[0] + 2) * ctypes.sizeof(ctypes.c_ulong)


def _mapped_until(address: int) -> int:
    """Return the end of the stretch of memory that holds an address."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        stretches = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    return next(end for start, end in stretches if start <= address < end)


def main(pid: str, address: str, core: str) -> None:
    """Read the word at an address of a process, on a core of its own, until standard input ends; then tell what a `Held` holds."""
    os.sched_setaffinity(0, {int(core)})
    sys.stdin.readline()
    memory, place, free = os.open(f"/proc/{pid}/mem", os.O_RDONLY), int(address), bytes(4)
    os.pread(memory, 4, place)
    print("begun", flush=True)
    readings = held = 0
    start, (ran_s, waited_s) = time.perf_counter(), _threads_s(pid)
    while not select.select([sys.stdin], [], [], 0)[0]:
        held += sum(os.pread(memory, 4, place) != free for _ in range(BURST))
        readings += BURST
    ran_now_s, waited_now_s = _threads_s(pid)
    print(time.perf_counter() - start, readings, held, ran_now_s - ran_s, waited_now_s - waited_s)


def _threads_s(pid: str) -> tuple[float, float]:
    """Return for how many seconds the threads of a process ran, and waited for a core, altogether."""
    ran_ns = waited_ns = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/task/{thread}/schedstat", encoding="ascii") as told:
            ran, waited, _ = map(int, told.read().split())
            ran_ns, waited_ns = ran_ns + ran, waited_ns + waited
    return ran_ns / 1e9, waited_ns / 1e9


if __name__ == "__main__":
    main(*sys.argv[1:])
