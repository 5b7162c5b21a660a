"""Watches of the ranges that a loader and a trainer open: seconds of each stage, the times of every stretch, a profiler's labels.

Here: three kinds of `Range`. Not here: what is run meanwhile (measuring.py).
"""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """A piece of work of one thread; seconds by the clock since the watch began."""

    lane: str  # of the thread
    stage: str
    start_s: float
    end_s: float


class StageSeconds:
    """Seconds of every stage of one thread, those of the stages inside not counted twice: CPU-seconds of the process, or a GPU's own."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._inside: list[float] = []  # of every open range: the seconds of the closed ones in it
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event, int]] = []
        self._depth = 0

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the seconds of a stage."""
        if self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self._depth += 1
            yield
            self._depth -= 1
            end.record()
            self._events.append((stage, start, end, self._depth))
            return
        before = time.process_time()
        self._inside.append(0.0)
        yield
        seconds = time.process_time() - before
        self._seconds[stage] += seconds - self._inside.pop()
        if self._inside:
            self._inside[-1] += seconds

    def take(self) -> dict[str, float]:
        """Return the seconds of every stage so far, and begin anew; waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
            inner: dict[int, float] = defaultdict(float)  # by depth: ranges that closed inside the one to come
            for stage, start, end, depth in self._events:
                seconds = start.elapsed_time(end) / 1000
                self._seconds[stage] += seconds - inner.pop(depth + 1, 0.0)
                inner[depth] += seconds
                if depth == 0:
                    inner.clear()
            self._events.clear()
        seconds_of, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds_of


class Timeline:
    """When which thread did what."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Note a stretch of a stage."""
        start = time.perf_counter() - self._began
        try:
            yield
        finally:
            lane = threading.current_thread().name
            self.stretches.append(Stretch(lane=lane, stage=stage, start_s=start, end_s=time.perf_counter() - self._began))


def labeled(stage: str) -> contextlib.AbstractContextManager[None]:
    """Return a range that torch.profiler shows."""
    return torch.profiler.record_function(f"wherefrom/{stage}")
