"""The Triton kernels' machine code, compiled here for GPUs that are not here: nothing spilled, no atomics; what it costs is printed.

Compiled in a process of its own: in the tests' process Triton interprets. What the reader of machine code counts is checked on small
pieces of code first, and on a kernel that must spill.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from wherefrom.tools.bench_kernels import ahead_of_time

pytest.importorskip("triton")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run_fresh(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def assert_lean(printed: str, architectures: set[int], capsys: pytest.CaptureFixture[str]) -> None:
    figures: list[dict[str, Any]] = [json.loads(line) for line in printed.splitlines()]
    with capsys.disabled():
        print()
        for each in figures:
            a_step = "" if each["per_step"] is None else f", {each['per_step']:.1f} instructions a step"
            print(
                f"{each['launch']}, sm_{each['architecture']}: {each['registers']} registers, {each['stack_bytes']} B stack, "
                f"{each['shared_bytes']} B shared{a_step}"
            )
    assert {each["architecture"] for each in figures} == architectures
    wrong = [each for each in figures if each["spills"] or each["stack_bytes"] or each["atomics"]]
    assert not wrong, wrong
    assert all(0 < each["registers"] <= 255 and each["instructions"] > 20 for each in figures)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ahead_of_time.KERNELS)
def test_kernels_compile_without_spills_or_atomics(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_lean(run_fresh("-m", "wherefrom.tools.bench_kernels.ahead_of_time", kernel), set(ahead_of_time.ARCHITECTURES), capsys)


CUT = """
import json
from dataclasses import asdict
from wherefrom.tools.bench_kernels.ahead_of_time import KERNELS, figures, launches_of

def show(launch, architecture):
    print(json.dumps(asdict(figures(launch, architecture))))

for kernel in KERNELS:
    for launch in {launch.kernel: launch for launch in launches_of(kernel)}.values():  # the last of each function
        show(launch, 90)
for launch in launches_of("roi_align"):  # those with the fewest registers to spare
    if launch.name.endswith("ward, fp32"):
        show(launch, 80)
"""


@pytest.mark.core
def test_one_launch_of_every_function_compiles_without_spills_or_atomics(capsys: pytest.CaptureFixture[str]) -> None:
    assert_lean(run_fresh("-c", CUT), {80, 90}, capsys)


PLANTED = """
import triton, triton.language as tl
from wherefrom.kernels.dispatch import Launch
from wherefrom.tools.bench_kernels.ahead_of_time import figures

@triton.jit
def kernel(x_ptr, out_ptr, N, K: tl.constexpr):
    at = tl.arange(0, K)
    total = tl.zeros((K,), tl.float32)
    for n in range(N):
        total += tl.load(x_ptr + n * K + at)
    tl.store(out_ptr + at, total)
    tl.atomic_add(out_ptr + N * K + at, total)

launch = Launch(name="planted", kernel=kernel, types={"x_ptr": "*fp32", "out_ptr": "*fp32", "N": "i32"}, constants={"K": K}, warps=1,
                per_step=K, options=OPTIONS)
found = figures(launch, 90)
print(found.spills, found.stack_bytes, found.atomics, found.loop_instructions, found.per_step)
"""


@pytest.mark.parametrize(("size", "options", "spilled"), [(64, {}, False), (4096, {"maxnreg": 32}, True)])
def test_spills_atomics_and_loops_are_seen(size: int, options: dict[str, int], spilled: bool, tmp_path: Any) -> None:
    script = tmp_path / "planted.py"  # Triton reads a kernel's source from its file
    script.write_text(
        PLANTED.replace("OPTIONS", str(options)).replace('{"K": K}', f'{{"K": {size}}}').replace("per_step=K", f"per_step={size}")
    )
    spills, stack, atomics, loop, per_step = run_fresh(str(script)).split()
    assert (int(spills) > 0, int(stack) > 0) == (spilled, spilled)
    assert int(atomics) > 0
    assert int(loop) > 3
    assert float(per_step) == int(loop) * 32 / size


CHECK = """
import sys
from wherefrom.tools.bench_kernels import ahead_of_time

ahead_of_time.launches_of = lambda kernel: [launch]
ahead_of_time.ARCHITECTURES = (80, 90)
if __name__ == "__main__":
    sys.exit(ahead_of_time.main(["--check", "planted"]))
"""


@pytest.mark.parametrize("atomic", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_check_names_every_launch_with_a_fault_and_fails(atomic: bool, tmp_path: Any) -> None:
    import triton

    script = tmp_path / "planted.py"
    planted = PLANTED[: PLANTED.index("found =")]
    for name, value in (("OPTIONS", "{}"), ('{"K": K}', '{"K": 64}'), ("per_step=K", "per_step=64")):
        planted = planted.replace(name, value)
    if not atomic:
        planted = planted.replace("    tl.atomic_add(out_ptr + N * K + at, total)\n", "")
    script.write_text(planted + CHECK)
    done = subprocess.run([sys.executable, str(script)], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    *named, last = done.stdout.splitlines()
    assert done.returncode == int(atomic), done.stderr[-2000:]
    assert len(named) == (2 if atomic else 0)
    for line, architecture in zip(named, (80, 90), strict=False):
        assert line.startswith(f"planted, sm_{architecture}: ") and line.endswith(" atomics")
    assert last == f"Triton {triton.__version__}: {len(named)} of 2 launches spill, use stack or atomics"


def code_of(*lengths: int) -> str:
    """Return code as nvdisasm writes it, of one loop after another: instructions in each, with the branch back."""
    lines = []
    for number, length in enumerate(lengths):
        lines += [f".L_x_{number}:", *["        /*0000*/                   FADD R0, R1, R2 ;"] * (length - 1)]
        lines.append(f"        /*0000*/              @P0  BRA `(.L_x_{number}) ;")
    return "\n".join(lines)


@pytest.mark.parametrize(("lengths", "counted"), [((30, 40), 30), ((10, 40), 40), ((40, 10), 40), ((), 0)])
def test_of_two_long_loops_the_first_is_counted(lengths: tuple[int, ...], counted: int) -> None:
    assert ahead_of_time._loop_instructions(code_of(*lengths)) == counted


@pytest.mark.core
def test_an_interpreted_kernel_is_refused() -> None:
    from wherefrom.kernels.dispatch import interpreted

    if not interpreted():
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET to compile it"):
        ahead_of_time.figures(ahead_of_time.launches_of("pair_targets")[0], 90)
