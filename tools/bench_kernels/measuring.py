"""One case of the kernels' benchmark, alone in a fresh process: checked, then weighed, then timed; one JSON object on standard output.

Here: errors against float64 and what they may be, peak memory, copy bandwidth, interleaved timing.
Not here: what is compared (problems.py, cases.py); ratios, tables and plots (command.py, which starts this file).
"""

import json
import math
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wherefrom.tools.bench_kernels.cases import CASES
from wherefrom.tools.bench_kernels.problems import Call, KernelContender, KernelProblem, Results
from wherefrom.tools.machine import query_gpu

OURS_LIMIT, ULPS = 2.0, 4.0  # an error may be so many times eager's, and so many ulp of the largest value more
OTHERS_FRAC = {4: 3e-4, 2: 0.1}  # of the largest value, by bytes of an input: they, eager too, only have to compute the same thing
WARM_CALLS = 2
LEAST_SAMPLE_S = 2e-3  # calls are timed in groups that last so long
ROUNDS = (5, 200)  # at least, at most
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
GRAPH = ", CUDA graph"  # ends the name of a contender that is replayed from one
LANES = 128  # float32 instructions that a GPU's multiprocessor issues each clock, one a thread
FLUSH_BYTES = 2**28  # several times a GPU's L2


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelPlan:
    """What a process is asked to measure."""

    case: str
    batch: int
    seconds: float  # of timing, all contenders together
    threads: int
    compiled: bool = True  # torch.compile as well
    plant: bool = False  # hand our kernels other boxes: the check must find out


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCheck:
    """How far a result of a contender lies from float64; NaN is red."""

    contender: str
    result: str
    error: float
    limit: float
    largest: float  # value of the result

    @property
    def passed(self) -> bool:
        """Say whether the error is a number within the limit."""
        return self.error <= self.limit


def measure(plan: KernelPlan) -> dict[str, Any]:
    """Check every contender of a case, and if none is wrong, weigh and time them."""
    torch.set_num_threads(plan.threads)
    case = next(case for case in CASES if case.name == plan.case)
    device = torch.device("cuda" if case.cuda else "cpu")
    copy_rate = copy_bytes_per_s(device)  # while the memory is empty
    problem = case.build(plan.batch, case.dtype, device, plan.plant)
    contenders = {name: each for name, each in problem.contenders.items() if plan.compiled or not each.compiled}
    checks = check(replace(problem, contenders=contenders))
    result: dict[str, Any] = {"batch": plan.batch, "checks": [asdict(each) | {"passed": each.passed} for each in checks]}
    if not all(each.passed for each in checks):
        return result
    memory = {name: peak_bytes(each, device) for name, each in contenders.items()}
    calls = {name: each.call for name, each in contenders.items()}
    graphs = {name + GRAPH: _graph(each.call) for name, each in contenders.items() if case.launch_bound and not each.compiled}
    calls |= {name: replay for name, replay in graphs.items() if replay}
    return result | {
        "memory": memory,
        "seconds": interleaved(calls, timer_of(device), plan.seconds),
        "copy_bytes_per_s": copy_rate,
        "issued_per_s": issued_per_s(device),
        "bytes_moved": problem.bytes_moved,
        "operations": problem.operations,
        "formulas": problem.formulas,
        "not_captured": [name for name, replay in graphs.items() if not replay],
        "ours": [name for name in calls if problem.contenders[name.removesuffix(GRAPH)].ours],
    }


def check(problem: KernelProblem) -> list[KernelCheck]:
    """Compare every result of every contender with float64: ours may err twice as far as eager PyTorch, and 4 ulp of the largest value."""
    truth = problem.truth()
    results = {name: each.settle(each.call()) for name, each in problem.contenders.items()}
    checks = []
    for part, exact in truth.items():
        yardstick = results["eager"][part]
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        ulp = torch.finfo(yardstick.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 0.0
        allowed = OURS_LIMIT * _error(yardstick, exact) + ULPS * ulp
        for name, each in problem.contenders.items():
            limit = allowed if each.ours else OTHERS_FRAC[problem.dtype.itemsize] * largest
            checks.append(KernelCheck(contender=name, result=part, error=_error(results[name][part], exact), limit=limit, largest=largest))
    return checks


def _error(result: Tensor, exact: Tensor) -> float:
    """Return the largest distance; NaN where either is NaN, infinite where shapes differ."""
    if result.shape != exact.shape:
        return math.inf
    return float((result.double() - exact).abs().max()) if exact.numel() else 0.0


def peak_bytes(contender: KernelContender, device: torch.device) -> dict[str, int | None]:
    """Return the most bytes that a call holds beyond what was there, its results included.

    "allocator": as PyTorch's allocator saw it; "tensors", on a CPU: of all living tensors, None for compiled code, which hides its own.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.call()
        torch.cuda.synchronize()
        return {"allocator": torch.cuda.max_memory_allocated() - before, "tensors": None}
    if contender.compiled:
        return {"allocator": _allocator_peak(contender.call), "tensors": None}
    with TensorPeak() as counter:
        contender.call()
    return {"allocator": _allocator_peak(contender.call), "tensors": counter.peak}


class TensorPeak(TorchDispatchMode):
    """Counts the bytes of tensors made under it that still live; `peak` is the most there were. Looks into operators of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.living = self.peak = 0
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = kwargs or {}
        for tensor in _tensors((args, options)):
            self._storages.add(tensor.untyped_storage())  # was there before, or has been counted
        if func.namespace == "wherefrom":
            with self:  # a mode is off while it is asked: what our implementation makes would not be seen
                results = func._op_dk(torch._C.DispatchKey.CPU, *args, **options)
        else:
            results = func(*args, **options)
        for tensor in _tensors(results):
            self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: Any) -> None:
        if storage not in self._storages:
            self._storages.add(storage)
            self.living += storage.nbytes()
            self.peak = max(self.peak, self.living)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, nbytes: int) -> None:
        self.living -= nbytes


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _allocator_peak(call: Call) -> int:
    """Return the peak of what PyTorch's CPU allocator handed out during a call and had not got back, from the profiler's log."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as log:
        call()
    living = peak = 0
    for event in log.profiler.kineto_results.events():
        if event.name() == "[memory]":
            living += event.nbytes()
            peak = max(peak, living)
    return peak


def interleaved(calls: Mapping[str, Call], timer: Callable[[Call, int], float], budget_s: float) -> dict[str, list[float]]:
    """Time calls in turns, A B A B, and return the seconds of a call, one number a round, everyone having as many rounds."""
    groups, once = {}, 0.0
    for name, call in calls.items():
        for _ in range(WARM_CALLS):
            timer(call, 1)
        took = max(timer(call, 1), 1e-7)
        groups[name] = max(1, math.ceil(LEAST_SAMPLE_S / took))
        once += took * groups[name]
    rounds = min(max(ROUNDS[0], int(budget_s / once)), ROUNDS[1])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timer(call, groups[name]))
    return seconds


def timer_of(device: torch.device) -> Callable[[Call, int], float]:
    """Return a function that gives the seconds of one of several calls: the clock on a CPU, CUDA events with a flushed L2 on a GPU."""
    if device.type == "cpu":
        return _cpu_seconds
    flushing = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def cuda_seconds(call: Call, times: int) -> float:
        spans = []
        for _ in range(times):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flushing.zero_()
            start.record()
            call()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize()
        return statistics.fmean(start.elapsed_time(end) for start, end in spans) / 1e3

    return cuda_seconds


def _cpu_seconds(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def _graph(call: Call) -> Call | None:
    """Return a call that replays what was captured as a CUDA graph, at the cost of one launch; None if it waits for the GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = call()
    except RuntimeError as problem:
        print(problem, file=sys.stderr)
        return None
    return partial(_replay, graph, results)


def _replay(graph: torch.cuda.CUDAGraph, results: Results) -> Results:
    graph.replay()
    return results


def copy_bytes_per_s(device: torch.device) -> float:
    """Return what a big copy reaches here and now, bytes read and bytes written both counted."""
    count = COPY_BYTES[device.type]
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> Results:
        return {"target": target.copy_(source)}

    timer = timer_of(device)
    seconds = [timer(copy, 1) for _ in range(WARM_CALLS + 5)][WARM_CALLS:]
    return 2 * count / statistics.median(seconds)


def issued_per_s(device: torch.device) -> float | None:
    """Return how many thread instructions a GPU can issue a second at its highest clock; None where that is not known."""
    clock = query_gpu(["clocks.max.sm"]).get("clocks.max.sm", "") if device.type == "cuda" else ""  # "1980 MHz"
    if not clock.endswith("MHz"):
        return None
    return torch.cuda.get_device_properties(device).multi_processor_count * LANES * float(clock.split()[0]) * 1e6


def main(arguments: Sequence[str]) -> None:
    """Measure the plan given as JSON and print the result as JSON."""
    plan = KernelPlan(**json.loads(arguments[0]))
    try:
        result = measure(plan)
    except torch.OutOfMemoryError:
        result = {"out_of_memory": True}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
