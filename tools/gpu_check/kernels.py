"""Stages of `gpu_check`: what machine this is, and the kernels against eager PyTorch, torch.compile and torchvision.

Here: facts; the benchmark's cases for a GPU, each checked before it is timed.
Not here: the cases (bench_kernels/cases.py), checking and timing (bench_kernels/measuring.py), tables and plots (bench_kernels/command.py).
"""

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from wherefrom.kernels.dispatch import triton_missing
from wherefrom.kernels.pair_targets import pair_targets
from wherefrom.kernels.pair_targets_reference import pair_targets_reference
from wherefrom.tools.bench_kernels.cases import CASES, Kernel, KernelCase
from wherefrom.tools.bench_kernels.measuring import KernelPlan, copy_bytes_per_s, measure
from wherefrom.tools.gpu_check.sharing import gpu_is_broken, kernel_errors
from wherefrom.tools.gpu_check.stages import Options, Report
from wherefrom.tools.machine import SMI_FIELDS, query_gpu

PACKAGES = ("torch", "torchvision", "triton", "numpy", "scipy", "pytest", "hypothesis", "timm", "accelerate", "wherefrom")
MODULES = ("nvidia.dali", "simplejpeg", "webdataset", "braceexpand", "tyro", "tensorboard", "wherefrom.kernels._native")
TINY_BAR = 1e-5
CASE_S = {False: 3.0, True: 0.1}  # of timing a case; in a dry run


def facts(options: Options, report: Report) -> None:
    """Tell device, driver and versions, compile a tiny kernel, copy memory; without a GPU there is nothing more to do."""
    report.add("versions", {name: _version(name) for name in PACKAGES})
    report.add("there", {name: _is_there(name) for name in MODULES})
    cores = len(os.sched_getaffinity(0))
    report.add("system", {"python": platform.python_version(), "system": platform.platform(), "cores": cores})
    if not (options.dry_run or torch.cuda.is_available()):
        report.stop("torch sees no CUDA GPU here; wherefrom prove and wherefrom bench kernels check and measure on the CPU")
        return
    if missing := triton_missing():
        report.stop(f"{missing}; nothing here can be checked without it")
        return
    device = torch.device(options.device)
    gpu: dict[str, Any] = {"name": "none, a dry run"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "processors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
        gpu["capability"], gpu["cuda"] = list(torch.cuda.get_device_capability(device)), torch.version.cuda
    report.add("gpu", gpu | query_gpu((*SMI_FIELDS, "clocks.sm", "temperature.gpu")))

    boxes = torch.tensor([[[1.0, 2, 5, 8], [3, 1, 4, 9]]], device=device)
    started = time.perf_counter()
    targets = pair_targets(boxes, backend="triton").cpu()
    report.add("tiny_kernel_s", time.perf_counter() - started)
    error = float((targets - pair_targets_reference(boxes.cpu().double())).abs().max())
    if not error <= TINY_BAR:
        report.fail(f"a tiny kernel errs by {error:.3g}, at most {TINY_BAR:g} is right")
    copied = copy_bytes_per_s(device)
    report.add("copy_bytes_per_s", copied)
    report.say(f"{gpu['name']}, torch {torch.__version__}, triton {_version('triton')}, copies {copied / 1e9:.0f} GB/s")


def roi_align_stage(options: Options, report: Report) -> None:
    """Check and time roi_align against torchvision, eager and torch.compile, and the product fused with pair targets."""
    _measure_all(("roi_align", "roi_align_pairs"), options, report)


def pair_loss_stage(options: Options, report: Report) -> None:
    """Check and time pair_loss against eager and torch.compile, then pair_targets."""
    _measure_all(("pair_loss", "pair_targets"), options, report)


def measure_case(case: KernelCase, options: Options, report: Report) -> None:
    """Check one case of the benchmark and, if nothing is wrong, report its times; half the samples as often as it takes to fit."""
    batch = case.batch
    while True:
        plan = KernelPlan(
            case=case.name, batch=batch, seconds=CASE_S[options.dry_run], threads=torch.get_num_threads(), compiled=not options.dry_run
        )
        try:
            outcome = measure(plan)
            break
        except torch.OutOfMemoryError:
            if batch == 1:
                report.fail(f"{case.name} does not fit into the GPU's memory, not even a single sample")
                return
        except kernel_errors() as error:
            report.fail(f"{case.name}: {type(error).__name__}: {str(error)[:500]}")
            if gpu_is_broken(str(error)):
                raise
            return
        torch.cuda.empty_cache()
        batch //= 2
    report.add(case.name, outcome)
    wrong = [check for check in outcome["checks"] if not check["passed"]]
    for check in wrong:
        words = f"{check['contender']}, {check['result']}: {check['error']:.3g} from float64, at most {check['limit']:.3g} is right"
        report.fail(f"{case.name}: {words}")
    if not wrong:
        report.say(f"{case.name}{'' if batch == case.batch else f', B{batch} of it fits'}: {_speeds(outcome['seconds'], outcome['ours'])}")


def _measure_all(kernels: Sequence[Kernel], options: Options, report: Report) -> None:
    """Measure the cases of some kernels, those that promise a speed first; of a dry run a quick one of a CPU."""
    of_kernels = [case for kernel in kernels for case in CASES if case.kernel == kernel]
    if options.dry_run:
        cases = [case for case in of_kernels if case.quick and not case.cuda][:1]
    else:  # a CUDA graph that cannot be captured may leave the process unwell
        cases = sorted((case for case in of_kernels if case.cuda), key=lambda case: (case.launch_bound, not case.speed_floors))
    for case in cases:
        measure_case(case, options, report)


def _speeds(seconds: dict[str, list[float]], ours: Sequence[str]) -> str:
    """Return medians and quartiles in words, and how many times as fast as each our first path is."""
    first = statistics.median(seconds[ours[0]])
    words = []
    for name, rounds in seconds.items():
        low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
        ratio = "" if name in ours else f", ours x {median / first:.2f}"
        words.append(f"{name} {median * 1e3:.3g} ms ({low * 1e3:.3g} to {high * 1e3:.3g}{ratio})")
    return "; ".join(words)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is what it lies in
        return False
