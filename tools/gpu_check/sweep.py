"""A stage of `gpu_check`: the kernels' launch constants, tried one by one: right or not, how fast, which is the best for a shape and dtype.

Here: which constants, changing them in a launcher from outside, checking in several processes, which also fill Triton's cache, timing in
one. Nothing is changed in the kernels' files: what is best is for their authors to read.
Not here: the kernels and their own constants (kernels/*_triton.py), cases and checks (bench_kernels/cases.py, bench_kernels/measuring.py).
"""

import contextlib
import functools
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from wherefrom.kernels.render_views import native_missing
from wherefrom.tools.bench_kernels import problems
from wherefrom.tools.bench_kernels.cases import CASES, KernelCase
from wherefrom.tools.bench_kernels.measuring import check, timer_of
from wherefrom.tools.bench_kernels.problems import KernelContender, KernelProblem
from wherefrom.tools.gpu_check.sharing import BROKEN_GPU, add_line, gpu_is_broken, kernel_errors, share_out
from wherefrom.tools.gpu_check.stages import Options, Report

PROCESSES = 12
COMPILING_FRAC = 0.55  # of the stage's time at most, then what is ready is timed
CHECKED_BATCH = 2  # samples, where it is only seen whether a result is right
ROUNDS, CALLS = 5, 3
TIMING_LEFT_S = 3.0  # before the end, when timing stops


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Launch constants other than the kernel's own, for one case of the benchmark."""

    case: str
    module: str  # of wherefrom.kernels
    kernel: str = ""  # whose launches are changed
    only: Mapping[str, Any] = field(default_factory=dict)  # arguments that such a launch has, of those that differ
    launch: Mapping[str, Any] = field(default_factory=dict)  # arguments instead of the launcher's
    constants: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)  # of the module; functions return them

    @property
    def name(self) -> str:
        """What differs, in words; empty where nothing does."""
        each = [f"{name} {value}" for name, value in {**self.constants, **self.launch}.items()]
        return ", ".join([*(f"{name} {value}" for name, value in self.only.items()), *each]) if each else ""


def _roi_trials(case: str) -> Iterator[Trial]:
    """Blocks of lines, tokens (Y x X) and channels, warps and stages, each direction alone."""
    tries: tuple[dict[str, int], ...] = (
        {"num_warps": 8},
        {"num_stages": 2},
        {"num_stages": 3},
        {"num_stages": 4},
        {"maxnreg": 168},  # three programs a multiprocessor where 255 are two
        {"maxnreg": 128},
        {"BLOCK_ROWS": 32},
        {"BLOCK_ROWS": 128},
        {"BLOCK_ROWS": 128, "num_warps": 8},
        {"BLOCK_Y": 1},
        {"BLOCK_Y": 4},
        {"BLOCK_Y": 4, "num_warps": 8},
        {"BLOCK_D": 64},
        {"BLOCK_D": 128},
        {"BLOCK_D": 256, "num_warps": 8},
        {"BLOCK_D": 64, "BLOCK_ROWS": 128},
        {"BLOCK_D": 64, "BLOCK_Y": 4},
        {"BLOCK_D": 256, "BLOCK_ROWS": 128, "num_warps": 8},
    )
    for launch in tries:
        for transposed in (False, True):
            yield Trial(case=case, module="roi_align_triton", kernel="contract_kernel", only={"TRANSPOSED": transposed}, launch=launch)


def _pair_loss_trials(case: str) -> Iterator[Trial]:
    """Pairs and warps of a program forward, rows, units and warps backward, samples a launch."""
    for pairs, warps in ((128, 1), (128, 2), (256, 1), (256, 4), (512, 2), (512, 4), (512, 8), (1024, 8)):
        yield Trial(
            case=case,
            module="pair_loss_triton",
            kernel="pair_loss_forward_kernel",
            launch={"num_warps": warps},
            constants={"PAIRS": pairs},
        )
    for rows, units, warps in ((8, 64, 2), (16, 64, 1), (16, 64, 2), (4, 64, 1), (4, 128, 1), (8, 32, 1), (16, 32, 1), (8, 128, 2)):
        yield Trial(
            case=case,
            module="pair_loss_triton",
            kernel="pair_loss_backward_kernel",
            launch={"num_warps": warps},
            constants={"rows_at_once": rows, "UNITS": units},
        )
    for samples in (16, 32, 128, 256):
        yield Trial(case=case, module="pair_loss_triton", constants={"SAMPLES_AT_ONCE": samples})
    for warps in (512, 2048, 4096):
        yield Trial(case=case, module="pair_loss_triton", constants={"BACKWARD_WARPS": warps})


def _render_trials(case: str) -> Iterator[Trial]:
    """Tiles of a program, and its warps."""
    for tile, warps in (((16, 16), 2), ((16, 16), 8), ((8, 16), 2), ((8, 32), 4), ((8, 32), 8), ((16, 32), 4), ((32, 32), 8), ((4, 64), 4)):
        yield Trial(
            case=case, module="render_views_triton", kernel="render_views_kernel", launch={"num_warps": warps}, constants={"TILE": tile}
        )


TRIALS: dict[str, Callable[[str], Iterator[Trial]]] = {
    "roi_align B256 R8 14x14x768 to 7x7 bfloat16 cuda": _roi_trials,
    "pair_loss B256 N196 H512 gelu squared bfloat16 cuda": _pair_loss_trials,
    "roi_align B256 R8 14x14x768 to 7x7 float32 cuda": _roi_trials,
    "render_views B256 V2 375x500 to 224x224 float32 cuda": _render_trials,
}


def sweep(options: Options, report: Report) -> None:
    """Check every trial in processes side by side, then time those that are right, and report the best of each case."""
    trials = trials_of(options)
    names = [str(place) for place in range(len(trials))]
    with tempfile.TemporaryDirectory() as folder:
        lines = share_out(
            names,
            partial(_command, options),
            processes=1 if options.dry_run else PROCESSES,
            seconds=report.seconds_left * COMPILING_FRAC,
            folder=Path(folder),
        )
    right = [trial for trial, name in zip(trials, names, strict=True) if lines.get(name, {}).get("problem") == ""]
    problems = [
        {"case": trial.case, "trial": trial.name, "problem": lines[name].get("problem", f"died with exit code {lines[name].get('died')}")}
        for trial, name in zip(trials, names, strict=True)
        if name in lines and lines[name].get("problem") != ""
    ]
    report.add("not_usable", problems)
    report.say(f"{len(right)} of {len(trials)} trials are right, {len(problems)} are not usable, the others were not reached")
    for case in dict.fromkeys(trial.case for trial in trials):
        try:
            times = _time_case(case, [trial for trial in right if trial.case == case and trial.name], options, report)
        except kernel_errors() as error:
            report.fail(f"{case}: {type(error).__name__}: {str(error)[:500]}")
            if gpu_is_broken(str(error)):
                raise
            continue
        report.add(case, times)
        own, best = times[0], min(times, key=lambda each: each["median_s"])
        words = f"best {best['trial'] or 'as it is'} {best['median_s'] * 1e3:.3g} ms, as it is {own['median_s'] * 1e3:.3g} ms"
        report.say(f"{case}: {words}, {len(times) - 1} others timed")


def trials_of(options: Options) -> list[Trial]:
    """Return what is tried: a case as it is, then its trials; of a dry run two of each kind."""
    if not options.dry_run:
        return [trial for case, of_case in TRIALS.items() for trial in (Trial(case=case, module=""), *of_case(case))]
    kinds = {"roi_align": _roi_trials, "pair_loss": _pair_loss_trials, "render_views": _render_trials}
    cases = [case for case in DRY_CASES if case.kernel != "render_views" or not native_missing()]  # which a CPU takes for Triton's
    return [trial for case in cases for trial in (Trial(case=case.name, module=""), *list(kinds[case.kernel](case.name))[:10:9])]


DRY_CASES = (
    KernelCase(
        kernel="roi_align",
        sizes="tiny",
        batch=1,
        build=partial(problems.roi_align_problem, R=1, map_hw=(3, 4), D=16, out_hw=(2, 2)),
    ),
    KernelCase(
        kernel="pair_loss",
        sizes="tiny",
        batch=1,
        build=partial(problems.pair_loss_problem, N=4, H=16, activation="relu", loss="squared"),
    ),
    KernelCase(
        kernel="render_views",
        sizes="tiny",
        batch=1,
        build=partial(problems.render_views_problem, V=1, picture_hw=(12, 15), side_px=8),
    ),
)


@contextlib.contextmanager
def apply_trial(trial: Trial) -> Iterator[None]:
    """Launch as a trial says while the block runs.

    Raises: AttributeError if the module has no such constant or kernel.
    """
    module = importlib.import_module(f"wherefrom.kernels.{trial.module}") if trial.module else math
    values: dict[str, Any] = {}
    for name, value in trial.constants.items():
        values[name] = partial(_constant, value) if callable(getattr(module, name)) else value
    if trial.kernel:
        values[trial.kernel] = _TrialKernel(getattr(module, trial.kernel), trial)
    with replace_names(module, values):
        yield


def _constant(value: Any, *_: Any) -> Any:
    return value


@contextlib.contextmanager
def replace_names(module: ModuleType, values: Mapping[str, Any]) -> Iterator[None]:
    """Give names of a module other values while the block runs."""
    own = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(module, name, value)


class _TrialKernel:
    """A kernel whose launches a trial concerns are made with its arguments, on as many programs as these ask for."""

    def __init__(self, kernel: Any, trial: Trial) -> None:
        self.kernel, self.trial = kernel, trial

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            if any(named[name] != value for name, value in self.trial.only.items()):
                return self.kernel[grid](*arguments, **named)
            changed = named | dict(self.trial.launch)
            programs = grid
            if self.trial.kernel == "contract_kernel":
                pictures = grid[0] // _roi_programs(named)
                programs = (pictures * _roi_programs(changed),)
            return self.kernel[programs](*arguments, **changed)

        return launch


def _roi_programs(named: Mapping[str, Any]) -> int:
    """Return the programs of a picture that `contract_kernel` needs."""
    lines = named["H"] * named["W"] if named["TRANSPOSED"] else named["R"] * named["OUT_H"] * named["OUT_W"]
    return math.ceil(lines / named["BLOCK_ROWS"]) * math.ceil(named["D"] / named["BLOCK_D"])


def _case(name: str) -> KernelCase:
    return next(case for case in (*CASES, *DRY_CASES) if case.name == name)


@functools.lru_cache(maxsize=1)
def _problem(name: str, batch: int, device: str) -> KernelProblem:
    """Build a case for Triton's path alone and the yardstick; in Triton's interpreter on CPU tensors too."""
    case = _case(name)
    with replace_names(problems, {"_ours": _by_triton}):
        problem: KernelProblem = case.build(batch, case.dtype, torch.device(device), False)
    exact = problem.truth()  # once for all trials
    contenders = {each: one for each, one in problem.contenders.items() if one.ours or each == "eager"}
    return replace(problem, contenders=contenders, truth=lambda: exact)


def _by_triton(device: torch.device, call: Callable[[Any], problems.Call]) -> dict[str, KernelContender]:
    return {"triton": KernelContender(call=call("triton"), ours=True)}


def _time_case(name: str, trials: Sequence[Trial], options: Options, report: Report) -> list[dict[str, Any]]:
    """Time a case as it is and with each trial, in turns, as many rounds as there is time for, the first round at any rate."""
    case = _case(name)
    with replace_names(problems, {"_ours": _by_triton}):
        problem: KernelProblem = case.build(case.batch, case.dtype, torch.device(options.device), False)
    call = next(each.call for each in problem.contenders.values() if each.ours)
    timer = timer_of(torch.device(options.device))
    contenders = [Trial(case=name, module=""), *trials]
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(ROUNDS + 1):
        for trial, rounds in zip(contenders, seconds, strict=True):
            if rounds and report.seconds_left < TIMING_LEFT_S:
                continue
            with apply_trial(trial):
                rounds.append(timer(call, 1 if options.dry_run else CALLS))
        if options.dry_run:
            break
    # the first round loads what is compiled
    medians = [statistics.median(rounds[1:] or rounds) for rounds in seconds]
    return [
        {"trial": trial.name, "median_s": median, "seconds": rounds, "batch": case.batch}
        for trial, median, rounds in zip(contenders, medians, seconds, strict=True)
    ]


def _command(options: Options, names: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", "-m", "wherefrom.tools.gpu_check.sweep", json.dumps({"dry_run": options.dry_run}), *names]


def main(settings: str, *names: str) -> None:
    """Compile and check the trials of these numbers, a line each: no problem, or what it is."""
    options = Options(seconds=0, **json.loads(settings))
    trials = trials_of(options)
    for name in names:
        trial, started = trials[int(name)], time.perf_counter()
        try:
            with apply_trial(trial):
                red = [
                    each
                    for each in check(_problem(trial.case, CHECKED_BATCH, options.device))
                    if each.contender != "eager" and not each.passed
                ]
            problem = "; ".join(f"{each.result} errs by {each.error:.3g}, at most {each.limit:.3g} is right" for each in red)
        except kernel_errors() as error:  # too much shared memory, a block that a shape forbids
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        add_line(name, problem=problem, seconds=time.perf_counter() - started)
        if gpu_is_broken(problem):
            sys.exit(BROKEN_GPU)


if __name__ == "__main__":
    main(*sys.argv[1:])
