"""How long our loader holds the interpreter: CPU time of all its threads under Python's lock, a picture.

Here: a shared object, built and loaded before Python, that reads a thread's CPU clock where it gives the lock back and where it has it
again; the loader run under it, `python -m wherefrom.tools.bench_loader.interpreter_held SHARDS BATCH THREADS SECONDS`.
Not here: how fast anything is (command.py). Neither waiting nor what others do on the machine counts, but caches that they empty.
It takes Linux, a C compiler, and a Python whose libpython is a shared object: calls within another cannot be seen.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wherefrom.pipeline.loader import make_loader
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.tools.bench_loader.checks import bench_recipe

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <time.h>

static _Atomic long long held_ns;
static __thread long long since_ns; /* the thread's CPU time when it got the lock; a thread begins with it */

static long long cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return 1000000000LL * now.tv_sec + now.tv_nsec;
}

void *PyEval_SaveThread(void)
{
    void *(*save)(void) = (void *(*)(void))dlsym(RTLD_NEXT, "PyEval_SaveThread");
    atomic_fetch_add(&held_ns, cpu_ns() - since_ns);
    return save();
}

void PyEval_RestoreThread(void *state)
{
    void (*restore)(void *) = (void (*)(void *))dlsym(RTLD_NEXT, "PyEval_RestoreThread");
    restore(state);
    since_ns = cpu_ns();
}

long long interpreter_held_ns(void)
{
    return held_ns;
}
"""
WATCHER = "WHEREFROM_INTERPRETER_WATCHER"  # where the shared object lies, told to the process that runs under it


def run_watched(module: str, *arguments: str) -> str:
    """Run a module of this package in a process whose lock is watched; return what it prints.

    Raises: OSError in one line if there is no compiler, or the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        watcher = Path(folder, "watcher.so")
        compiler = os.environ.get("CC", "cc")
        try:
            command = [compiler, "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(watcher), "-ldl"]
            subprocess.run(command, input=SOURCE, text=True, check=True, capture_output=True)
            environment = os.environ | {"LD_PRELOAD": str(watcher), WATCHER: str(watcher)}
            done = subprocess.run([sys.executable, "-m", module, *arguments], env=environment, text=True, check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            raise OSError(f"{error.cmd[0]} ended with code {error.returncode}: {error.stderr.strip().splitlines()[-1:]}") from error
    return done.stdout


def interpreter_held_s() -> float:
    """Return the CPU seconds that threads of this process held the lock until they last gave it back.

    Raises: OSError where nobody watches.
    """
    if WATCHER not in os.environ:
        raise OSError("nobody watches the interpreter's lock; start the process with run_watched")
    watcher = ctypes.CDLL(os.environ[WATCHER])
    watcher.interpreter_held_ns.restype = ctypes.c_longlong
    before = watcher.interpreter_held_ns()
    time.sleep(0)  # gives the lock back
    after = int(watcher.interpreter_held_ns())
    if after == before:
        raise OSError("the interpreter's lock cannot be seen: this Python has no shared libpython")
    return after / 1e9


def measure_loader(index: ShardIndex, recipe: ViewRecipe, *, batch: int, threads: int, seconds: float) -> dict[str, float]:
    """Return the microseconds of CPU time a picture, under the lock and in all, once batches come steadily."""
    with make_loader(index, recipe, global_batch=batch, renderer="native", threads=threads) as loader:
        batches = loader.forever()
        for _ in range(4 + 512 // batch):
            next(batches)
        pictures, held_s, cpu_s, start = 0, interpreter_held_s(), time.process_time(), time.perf_counter()
        while time.perf_counter() - start < seconds or pictures < 1024:  # whole stretches of draws
            pictures += len(next(batches))
        held_s, cpu_s = interpreter_held_s() - held_s, time.process_time() - cpu_s
    return {"held_us": 1e6 * held_s / pictures, "cpu_us": 1e6 * cpu_s / pictures, "pictures": pictures}


def main(shards: str, batch: str, threads: str, seconds: str) -> None:
    """Print what is measured with the views of the benchmark, under the watcher."""
    if WATCHER not in os.environ:
        print(run_watched("wherefrom.tools.bench_loader.interpreter_held", shards, batch, threads, seconds), end="")
        return
    index = ShardIndex.open(shards, decode=True)
    measured = measure_loader(index, bench_recipe(False), batch=int(batch), threads=int(threads), seconds=float(seconds))
    print(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
