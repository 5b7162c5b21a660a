"""Work shared out to processes, some of which may die of it: a process loses the item it died of, the others are done.

Here: shares, processes that are started again with the rest of theirs, one JSON line an item; what a broken kernel raises.
Not here: what the work is (chosen_tests.py, sweep.py).
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

LINES = "WHEREFROM_GPU_LINES"  # names the file that a process adds its lines to
BROKEN_GPU = 77  # exit code of a process whose GPU answers nothing any more, after an illegal address say: the others need a new one


def add_line(item: str, **content: Any) -> None:
    """Say what an item came to; called by the processes that work."""
    with open(os.environ[LINES], "a", encoding="utf-8") as file:
        file.write(json.dumps({"item": item, **content}) + "\n")


def gpu_is_broken(words: str) -> bool:
    """Say whether an error is one after which a process can't use its GPU."""
    return "CUDA error" in words or "CUDA driver error" in words


def kernel_errors() -> tuple[type[Exception], ...]:
    """Return what a kernel that does not compile, launch or fit may raise."""
    from triton.errors import TritonError

    return (TritonError, RuntimeError, ValueError, AssertionError)


def share_out(
    items: Sequence[str], command: Callable[[Sequence[str]], Sequence[str]], *, processes: int, seconds: float, folder: Path, **popen: Any
) -> dict[str, dict[str, Any]]:
    """Return each item's line; an item whose process died at it has "died", its exit code, and one that nobody came to has none.

    `command` gives the command line that works on some items, in order. Everything is ended once `seconds` are over.
    """
    ends = time.monotonic() + seconds
    shares = [list(items[place::processes]) for place in range(min(processes, len(items)))]
    results: dict[str, dict[str, Any]] = {}

    def work(place: int) -> None:
        file, rest = folder / f"lines-{place}", shares[place]
        file.touch()
        while rest and time.monotonic() < ends:
            process = subprocess.Popen(command(rest), env=os.environ | {LINES: str(file)}, stdin=subprocess.DEVNULL, **popen)
            try:
                code = process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                code = None
            lines = {line["item"]: line for line in _lines(file)}
            rest = [item for item in rest if item not in lines]
            if code is not None and rest and code != BROKEN_GPU:  # it died of the first that has no line
                died, *rest = rest
                lines[died] = {"item": died, "died": code}
            results.update(lines)
            rest = [] if code is None else rest

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {item: results[item] for item in items if item in results}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines, but one that was cut short."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.endswith("}"):
            yield json.loads(line)
