"""Runs side by side, each a process of one thread: the next that is ready whenever there is room, until none is left.

Here: starting them, waiting, stopping them all when asked.
Not here: one run (one_run.py), their order (plan.py).
Killed, whatever was under way goes on at its newest checkpoint when it is started again; processes that outlive this one are seen by the
lock on their folder, and count.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from wherefrom.tools.evidence.one_run import is_running
from wherefrom.tools.evidence.plan import Held, PlannedRun, read
from wherefrom.tools.machine import last_line

POLL_S = 2.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class StopAskedError(Exception):
    """A signal asks to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def make_all(units: Sequence[PlannedRun], out: Path, options: Sequence[str], *, jobs: int, tell: Callable[[str], None]) -> list[PlannedRun]:
    """Make the runs that are not there, `jobs` at a time, in their order, each once what it needs is there; return those that failed.

    options: words of the command line that every run is given, its data among them.
    Raises: StopAskedError, once what was under way has been saved.
    """
    children: dict[PlannedRun, subprocess.Popen[bytes]] = {}
    failed: list[PlannedRun] = []
    try:
        with _signals():
            while True:
                for unit in [unit for unit, child in children.items() if child.poll() is not None]:
                    code = children.pop(unit).returncode
                    tell(_ended(unit, out, code))
                    if read(unit, out) is None:
                        failed.append(unit)
                # who runs is asked before what is there: a run that ends meanwhile is seen as one of both
                running = {unit for unit in units if unit not in children and is_running(unit, out)}
                left = [unit for unit in units if unit not in children and unit not in failed and read(unit, out) is None]
                others = [unit for unit in left if unit in running]
                ready = [unit for unit in left if unit not in running and all(read(each, out) is not None for each in unit.needs)]
                if ready and len(children) + len(others) < jobs:
                    children[ready[0]] = _start(ready[0], out, options)
                    tell(f"{ready[0].name}: started")
                elif children or others:
                    time.sleep(POLL_S)
                else:
                    return failed + left
    finally:
        _stop(children, tell)


def _start(unit: PlannedRun, out: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "wherefrom.tools.evidence", "run", "--only", unit.host, unit.arm, str(unit.seed), "--out", str(out)]
    words += [] if unit.updates is None else ["--updates", str(unit.updates)]
    unit.work(out).mkdir(parents=True, exist_ok=True)
    with log_of(unit, out).open("ab") as log:
        return subprocess.Popen([*words, *options], stdout=log, stderr=log, env=os.environ | ONE_THREAD, start_new_session=True)


def log_of(unit: PlannedRun, out: Path) -> Path:
    """Return where a run's process writes what it has to say."""
    return out / "work" / f"{unit.name}.log"


def _ended(unit: PlannedRun, out: Path, code: int) -> str:
    held = read(unit, out)
    if held is None:
        return f"{unit.name}: FAILED, exit code {code}: {last_line(log_of(unit, out).read_text(encoding='utf-8', errors='replace'))}"
    log_of(unit, out).unlink(missing_ok=True)
    return told(held)


def told(held: Held) -> str:
    """Return a run's results in a line."""
    scores = ", ".join(f"{name} {held['metrics'][name]:.3f}" for name in ("class token knn", "mean token knn") if name in held["metrics"])
    return f"{held['run']['name']}: done, {held['run']['updates']} updates, {held['cpu_s'] / 60:.1f} CPU-minutes; {scores}"


def _stop(children: dict[PlannedRun, subprocess.Popen[bytes]], tell: Callable[[str], None]) -> None:
    """Ask the runs under way to save and end, and wait until they have."""
    for child in children.values():
        child.send_signal(signal.SIGTERM)
    for unit, child in children.items():
        child.wait()
        tell(f"{unit.name}: stopped, goes on when it is started again")


@contextmanager
def _signals() -> Iterator[None]:
    """Raise StopAskedError where a signal asks to stop."""

    def stop(number: int, _: FrameType | None) -> None:
        raise StopAskedError(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
