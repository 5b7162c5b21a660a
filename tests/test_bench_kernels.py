"""The kernels' benchmark in miniature: red checks print no speed, rounds go in turns, ratios are of medians, memory is counted to the byte.

No speed is asserted anywhere. Truth for memory are calls whose tensors are counted by hand, for bytes the tensors themselves.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wherefrom.kernels.dispatch import LIBRARY
from wherefrom.kernels.render_views import native_missing
from wherefrom.tools import machine
from wherefrom.tools.bench_kernels import command
from wherefrom.tools.bench_kernels.cases import CASES, CPU_CASES, Kernel, KernelCase
from wherefrom.tools.bench_kernels.command import bench_kernels_command, memory_ratios, ratios, summary
from wherefrom.tools.bench_kernels.measuring import ROUNDS, KernelPlan, check, interleaved, measure, peak_bytes
from wherefrom.tools.bench_kernels.plot import draw_speeds
from wherefrom.tools.bench_kernels.problems import KernelContender, KernelProblem, Results, pair_loss_problem
from wherefrom.tools.cli import main

QUICK = [case for case in CPU_CASES if case.quick]
CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """What a measuring process sets for itself must not reach other tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def plan_of(case: KernelCase, **settings: Any) -> KernelPlan:
    return KernelPlan(**{"case": case.name, "batch": case.batch, "seconds": 0.01, "threads": 1, "compiled": False} | settings)


def our_path(case: KernelCase) -> str:
    """Return our path on a CPU; skip where it takes a compiler that was not there."""
    if case.kernel != "render_views":
        return "torch"
    if missing := native_missing():
        pytest.skip(missing)
    return "native"


def test_the_command_measures_and_writes_every_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers"
    assert main(["bench", "kernels", "--quick", "--kernels", "pair_targets", "--threads", "1", "--cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "ours, torch" in said and "every result was checked" in said

    written = json.loads((out / "bench.json").read_text())
    assert {"command", "machine", "settings", "timing", "cases", "ahead_of_time"} == set(written)
    assert {"cpu", "cores", "python", "versions", "gpu"} <= set(written["machine"])
    assert written["settings"] == {
        "seconds": 0.3,
        "threads": 1,
        "compiled": False,
        "plant": False,
        "cuda": False,
        "compile_mode": "default",
    }
    [case] = written["cases"]
    assert case["kernel"] == "pair_targets" and case["name"] in said
    assert all(each["passed"] and 0 <= each["error"] <= each["limit"] for each in case["checks"])
    assert min(case["bytes_moved"], case["operations"], case["copy_bytes_per_s"]) > 0 and "bytes: " in case["formulas"]
    assert set(case["contenders"]) == {"torch", "eager"}
    for contender in case["contenders"].values():
        assert len(contender["seconds"]) >= ROUNDS[0] and min(contender["seconds"]) > 0
        assert contender["peak_bytes"]["tensors"] >= 16 * 64 * 64 * 3 * 4  # the targets themselves
        assert contender["copy_share"] > 0 and contender["relative_error"] < 1e-5
    ratio = case["speed_ratios"]["torch / eager"]
    assert ratio["low"] <= ratio["high"] and ratio["rounds"] == len(case["contenders"]["torch"]["seconds"])
    assert Image.open(out / "bench.png").size[0] > 500
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.png"]


def test_a_wrong_kernel_ends_it_before_any_speed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers"
    assert bench_kernels_command(kernels=("pair_targets",), quick=True, threads=1, cpu=True, out=out, plant=True) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "wrong, so no speed is told: pair_targets B16 N64 float32 cpu: torch, targets: " in said and "from float64, at most" in said
    assert "ms" not in said and not out.exists()


@pytest.mark.core
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_every_kernel_is_found_out_when_its_boxes_lie_elsewhere(case: KernelCase) -> None:
    path = our_path(case)
    found = measure(plan_of(case, plant=True))
    assert {each["contender"] for each in found["checks"] if not each["passed"]} == {path}
    assert "seconds" not in found and "memory" not in found


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_every_contender_of_every_kernel_is_right_and_measured(case: KernelCase) -> None:
    path = our_path(case)
    found = measure(plan_of(case))
    assert all(each["passed"] for each in found["checks"]), found["checks"]
    gradients = {"pair_targets": 0, "pair_loss": 5, "roi_align": 1, "roi_align_pairs": 1, "render_views": 0}[case.kernel]
    assert len({each["result"] for each in found["checks"] if each["result"].startswith("d_")}) == gradients
    assert found["ours"] == [path]
    others = {"eager"} | ({"torchvision"} if case.kernel.startswith("roi") else set())
    assert others < set(found["seconds"]) and set(case.speed_floors) <= set(found["seconds"]) | {"compile"}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in QUICK if case.kernel != "render_views"], ids=lambda case: case.name)
def test_what_torch_compile_builds_is_right_and_measured(case: KernelCase) -> None:
    found = measure(plan_of(case, compiled=True))
    assert all(each["passed"] for each in found["checks"]), found["checks"]
    assert found["memory"]["compile"]["tensors"] is None and found["memory"]["compile"]["allocator"] > 0


def one_result(eager: Tensor, ours: Tensor, truth: Tensor) -> list[bool]:
    """Say of "eager" and "torch" whether they pass, given what each has as its one result."""
    contenders = {"eager": KernelContender(call=lambda: {"y": eager}), "torch": KernelContender(call=lambda: {"y": ours}, ours=True)}
    told: dict[str, Any] = {"dtype": torch.float32, "bytes_moved": 1, "operations": 1, "formulas": ""}
    problem = KernelProblem(contenders=contenders, truth=lambda: {"y": truth}, **told)
    return [each.passed for each in check(problem)]


def test_ours_may_err_twice_as_far_as_eager_and_four_ulp_more() -> None:
    truth = torch.full((3,), 1.5, dtype=torch.float64)
    ulp = 2.0**-23
    eager = torch.full((3,), 1.5 + 8 * ulp)
    assert one_result(eager, torch.full((3,), 1.5 - 20 * ulp), truth) == [True, True]
    assert one_result(eager, torch.full((3,), 1.5 - 21 * ulp), truth) == [True, False]


def test_nan_other_shapes_and_a_wrong_yardstick_are_red() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    right = torch.ones(3)
    assert one_result(right, right, truth) == [True, True]
    assert one_result(right, torch.tensor([1.0, float("nan"), 1.0]), truth) == [True, False]
    assert one_result(right, right[:2], truth) == [True, False]
    assert one_result(right + 0.01, right, truth) == [False, True]


@pytest.mark.core
def test_peak_memory_is_counted_to_the_byte() -> None:
    given = torch.ones(MIB // 4)

    def call() -> Results:
        doubled = given * 2  # 1 MiB
        more = doubled + 1  # 2
        del doubled
        seen = more.view(2, -1).t().detach()  # views of it
        seen.mul_(2)  # in place
        joined = torch.cat([more, given, given])  # 1 + 3
        return {"result": joined[:4].clone()}  # 16 bytes

    assert peak_bytes(KernelContender(call=call), CPU) == {"tensors": 4 * MIB + 16, "allocator": 4 * MIB + 16}


@pytest.mark.core
def test_memory_inside_our_operators_and_in_backward_is_counted() -> None:
    def hoard(x: Tensor) -> Tensor:
        return torch.stack([x, x, x]).sum()

    LIBRARY.define("test_hoard(Tensor x) -> Tensor")
    LIBRARY.impl("test_hoard", hoard, "CPU")
    x = torch.ones(MIB // 4, requires_grad=True)
    inside = peak_bytes(KernelContender(call=lambda: {"sum": torch.ops.wherefrom.test_hoard(x.detach())}), CPU)
    assert inside["tensors"] == 3 * MIB + 4

    def backward() -> Results:
        kept = x.exp()  # 1 MiB, kept for its gradient
        return {"gradient": torch.autograd.grad(kept.sum(), x)[0]}  # 2

    assert peak_bytes(KernelContender(call=backward), CPU)["tensors"] == 2 * MIB + 8  # the sum, and the one above it


def test_rounds_are_taken_in_turns_and_short_calls_in_groups() -> None:
    taken: list[tuple[str, int]] = []
    durations = {"a": 1e-3, "b": 1.0}

    def timer(call: Callable[[], Results], times: int) -> float:
        name = next(iter(call()))
        taken.append((name, times))
        return durations[name]

    calls: dict[str, Callable[[], Results]] = {"a": lambda: {"a": torch.empty(0)}, "b": lambda: {"b": torch.empty(0)}}
    seconds = interleaved(calls, timer, budget_s=7.5)
    assert seconds == {"a": [1e-3] * 7, "b": [1.0] * 7}
    assert taken[-14:] == [("a", 2), ("b", 1)] * 7
    assert {name: len(each) for name, each in interleaved(calls, timer, budget_s=0).items()} == {"a": ROUNDS[0], "b": ROUNDS[0]}


def test_ratios_are_of_medians_within_one_manner_of_timing() -> None:
    seconds = {"torch": [1.0, 4.0, 2.0], "eager": [10.0, 4.0, 5.0], "torch, CUDA graph": [0.5] * 3, "eager, CUDA graph": [1.0] * 3}
    found = ratios(seconds, ["torch", "torch, CUDA graph"])
    assert set(found) == {"torch / eager", "torch, CUDA graph / eager, CUDA graph"}
    ratio = found["torch / eager"]
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (2.5, 1.75, 6.25, 3)  # quartiles of 10, 1, 2.5
    assert found["torch, CUDA graph / eager, CUDA graph"].median == 2


def test_memory_ratios_compare_what_was_counted_alike() -> None:
    memory = {
        "torch": {"tensors": 10, "allocator": 16},
        "eager": {"tensors": 400, "allocator": 320},
        "compile": {"tensors": None, "allocator": 80},
    }
    assert memory_ratios(memory, ["torch"]) == {"torch / eager": 40, "torch / compile": 5}


def test_shares_and_errors_follow_from_what_was_measured() -> None:
    checks = [{"contender": "torch", "error": 1e-3, "limit": 1.0, "largest": 2.0}, {"contender": "torch", "error": 9.0, "largest": 0.0}]
    measured = {"seconds": {"torch": [0.5, 2.0, 1.0]}, "ours": ["torch"], "memory": {"torch": {"tensors": 1, "allocator": 1}}}
    measured |= {"checks": checks, "bytes_moved": 30, "operations": 8, "copy_bytes_per_s": 60.0, "issued_per_s": 32.0}
    contender = summary(measured)["contenders"]["torch"]
    assert (contender["median_s"], contender["copy_share"], contender["issue_share"]) == (1.0, 0.5, 0.25)
    assert contender["relative_error"] == 5e-4


def test_a_missed_floor_is_said_and_ends_in_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"seconds": {"torch": [1.0], "eager": [1.2]}, "ours": ["torch"], "checks": [], "batch": 16, "issued_per_s": None}
    measured |= {"memory": {name: {"tensors": size, "allocator": size} for name, size in (("torch", 10), ("eager", 300))}}
    measured |= {"bytes_moved": 30, "operations": 8, "copy_bytes_per_s": 60.0}
    floors: dict[str, Any] = {"speed_floors": {"eager": 1.5, "compile": 3.0}, "memory_floors": {"eager": 40}, "copy_floor": 0.75}
    case = {"name": "pair_targets B16 N64", "kernel": "pair_targets"} | summary(measured) | floors
    assert command.missed_floors(case) == [
        "pair_targets B16 N64: torch is 1.20 times as fast as eager, has to be 1.5",
        "pair_targets B16 N64: torch is 30.00 times as small as eager, has to be 40",
        "pair_targets B16 N64: torch reaches 50% of copy bandwidth, has to be 75%",
    ]
    reached: dict[str, Any] = {"speed_floors": {"eager": 1.2}, "memory_floors": {"eager": 30}, "copy_floor": 0.5}
    assert command.missed_floors(case | reached) == []

    monkeypatch.setattr(command, "draw_speeds", lambda *_: None)
    monkeypatch.setattr(command, "_ahead_of_time", lambda *_: [])
    for floors_of, quick, code in ((case, False, 2), (case, True, 0), (case | reached, False, 0)):
        monkeypatch.setattr(command, "_measure_case", lambda *_, found=floors_of: found)
        assert bench_kernels_command(kernels=("pair_targets",), quick=quick, cpu=True, out=tmp_path) == code
        assert ("missed a floor: pair_targets B16 N64: torch is" in capsys.readouterr().out) == (floors_of is case)


def test_cases_are_named_apart_and_every_kernel_has_a_quick_one() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.kernel for case in QUICK} == set(get_args(Kernel))
    assert not any(case.launch_bound and not case.cuda for case in CASES)


class MadeOfSize(TorchDispatchMode):
    """Names the operators that make a tensor of so many elements, views left out."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.names = numel, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == self.numel and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return out


def test_eager_adds_the_bias_before_there_are_pairs_of_it() -> None:
    """The leanest eager form: one pass makes the pairs' sums and one their activations, and one goes back through each."""
    made: dict[str, Any] = {"N": 8, "H": 32, "activation": "gelu", "loss": "squared"}
    problem = pair_loss_problem(4, torch.float32, CPU, False, **made)
    with MadeOfSize(4 * 8 * 8 * 32) as mode:
        problem.contenders["eager"].call()
    assert mode.names == ["add", "gelu", "mm", "gelu_backward"]


def test_compile_rows_name_their_mode() -> None:
    assert command._title("compile, CUDA graph", {"ours": False}) == "compile, default mode, CUDA graph"


@pytest.mark.core
def test_bytes_are_those_of_what_is_read_and_written() -> None:
    def case_of(kernel: str) -> KernelProblem:
        case = next(case for case in QUICK if case.kernel == kernel)
        return case.build(case.batch, case.dtype, CPU, False)

    targets = case_of("pair_targets")
    assert targets.bytes_moved == 16 * 64 * 4 * 4 + targets.contenders["eager"].call()["targets"].nbytes
    pooled = case_of("roi_align").contenders["eager"].call()
    assert case_of("roi_align").bytes_moved == 2 * (pooled["pooled"].nbytes + pooled["d_tokens"].nbytes) + 2 * 64 * 16
    views = case_of("render_views").contenders["eager"].call()["views"]
    assert case_of("render_views").bytes_moved == 2 * 375 * 500 * 3 + views.nbytes
    loss = case_of("pair_loss").contenders["eager"].call()
    assert case_of("pair_loss").bytes_moved == 2 * sum(value.nbytes for name, value in loss.items() if name != "loss") + 64 * 8 * 16


def test_a_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        tried.append(json.loads(command[-1])["batch"])
        found = {"out_of_memory": True} if tried[-1] > 4 else measured
        return SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(found)}\n", stderr="")

    measured = measure(plan_of(QUICK[0], batch=4))
    monkeypatch.setattr(command.subprocess, "run", run)
    found = command._measure_case(QUICK[0], {"seconds": 1.0, "threads": 1})
    assert tried == [16, 8, 4] and found["batch"] == 4
    assert "B4 of it fits" in str(command._table(found).title)


def test_a_case_that_ends_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = SimpleNamespace(returncode=3, stdout="", stderr="Traceback\nRuntimeError: no such kernel\n")
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(OSError, match="pair_targets B16 N64 float32 cpu ended with code 3: RuntimeError: no such kernel"):
        bench_kernels_command(kernels=("pair_targets",), quick=True, cpu=True)


@pytest.mark.core
def test_a_gpu_machines_graphs_are_told_and_drawn_apart(tmp_path: Path) -> None:
    seconds = {"triton": [1e-4] * 5, "eager": [3e-4] * 5, "triton, CUDA graph": [1e-5] * 5, "eager, CUDA graph": [2e-5] * 5}
    memory = {name: {"tensors": None, "allocator": size} for name, size in (("triton", 10), ("eager", 500))}
    measured = {"batch": 2, "seconds": seconds, "ours": ["triton", "triton, CUDA graph"], "memory": memory, "checks": []}
    measured |= {"bytes_moved": 100, "operations": 100, "copy_bytes_per_s": 1e7, "issued_per_s": 1e7}
    case = {"name": "pair_loss B2 N8", "speed_floors": {"eager": 1.5}, "memory_floors": {"eager": 50.0}, "copy_floor": 0.6}
    case |= summary(measured)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(command._table(case))
    said = console.export_text()
    rows = {line.split("  ")[0].strip(): line for line in said.splitlines()}
    assert "3.00 (3.00-3.00) [1.5]" in rows["eager"] and "50.0 [50]" in rows["eager"]
    assert "2.00 (2.00-2.00)" in rows["eager, CUDA graph"] and "10.0% [60%]" in rows["ours, triton"] and " issue " in said

    where = {"gpu": {"name": "H200"}, "cpu": "", "versions": {"torch": "2.15"}}
    draw_speeds({"cases": [case], "machine": where, "settings": {"cuda": True, "threads": 2}}, tmp_path / "bench.png")
    assert Image.open(tmp_path / "bench.png").size[0] > 500 and len(list(tmp_path.iterdir())) == 1


def test_a_gpu_is_asked_for_what_numbers_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    said = SimpleNamespace(returncode=0, stdout="580.159.04, 700.00 W\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: said)
    assert machine.query_gpu(["driver_version", "power.limit"]) == {"driver_version": "580.159.04", "power.limit": "700.00 W"}
    said.returncode = 9
    assert machine.query_gpu(["driver_version"]) == {}


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seconds=0, threads=None"):
        bench_kernels_command(seconds=0)
    with pytest.raises(ValueError, match="threads=0"):
        bench_kernels_command(threads=0)
