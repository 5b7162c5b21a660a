"""Compile the Triton kernels for GPUs that are not here, and read what their machine code costs.

Here: every launch that the kernels name, compiled for an architecture; registers, stack, shared memory, spills, atomics, instructions.
Not here: running them, timing them (command.py). No device and no driver is needed, only the tools in Triton's wheel.
"""

import argparse
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from wherefrom.kernels.dispatch import Launch
from wherefrom.pipeline.system import available_cores

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
KERNELS = ("pair_targets", "pair_loss", "roi_align", "render_views")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What the machine code of one launch takes, read from its cubin."""

    launch: str
    architecture: int
    registers: int  # a thread
    stack_bytes: int  # a thread; spilled registers lie here
    shared_bytes: int  # a program
    instructions: int  # in the whole code
    spills: int  # loads from and stores to the stack
    atomics: int
    loop_instructions: int  # in the innermost loop with the most instructions, 0 without a loop
    per_step: float | None  # thread instructions an activation (or pixel, ...) of that loop


def figures(launch: Launch, architecture: int) -> Figures:
    """Compile one launch and count.

    Raises: RuntimeError if Triton interprets kernels in this process (TRITON_INTERPRET is set): then there is no code to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.JITFunction):
        raise RuntimeError(f"{launch.name} is {type(launch.kernel).__name__}; unset TRITON_INTERPRET to compile it")
    arguments = launch.kernel.arg_names
    signature = {name: "constexpr" if name in launch.constants else launch.types[name] for name in arguments}
    aligned = {(arguments.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, signature, constexprs=launch.constants, attrs=aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, **launch.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _tool("nvdisasm", "-c", str(cubin))
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    names, loop = _mnemonics(code), _loop_instructions(code)
    return Figures(
        launch=launch.name,
        architecture=architecture,
        registers=used["REG"],
        stack_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=max(used["SHARED"], compiled.metadata.shared),
        instructions=len(names),
        spills=sum(re.match(r"(LDL|STL)\b", name) is not None for name in names),
        # ATOMS.OR and .AND keep the books of Blackwell's tensor memory: bits, whose order changes nothing
        atomics=sum(re.match(r"(ATOM|ATOMG|ATOMS(?!\.(OR|AND)\b)|RED|REDG|REDS)\b", name) is not None for name in names),
        loop_instructions=loop,
        per_step=loop * 32 * launch.warps / launch.per_step if launch.per_step else None,
    )


def launches_of(kernel: str) -> list[Launch]:
    """Return the launches that a kernel's Triton file names."""
    launches: list[Launch] = importlib.import_module(f"wherefrom.kernels.{kernel}_triton").launches()
    return launches


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _mnemonics(code: str) -> list[str]:
    """Return every instruction's name with its modifiers, NOPs left out."""
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9][\w.]*)", code, re.MULTILINE)
    return [name for name in names if name != "NOP"]


def _loop_instructions(code: str) -> int:
    """Return the length of the first innermost loop that is at least two thirds as long as the longest: rare paths come last in the code.

    A loop is the code from a label to a branch back to it, innermost if there is no such stretch inside.
    """
    position, labels, stretches = 0, {}, []
    for line in code.splitlines():
        if label := re.match(r"^(\.L_x?_?\w+):", line):
            labels[label[1]] = position
        elif re.match(r"^\s+/\*[0-9a-f]+\*/", line):
            back = re.search(r"\bBRA\S*.*`\((\.L_x?_?\w+)\)", line)
            position += bool(_mnemonics(line))
            if back and back[1] in labels:
                stretches.append((labels[back[1]], position))
    # a branch to itself ends every program: the hang that follows EXIT
    stretches = [(start, stop) for start, stop in stretches if stop - start > 1]
    innermost = [one for one in stretches if not any(one != other and one[0] <= other[0] and other[1] <= one[1] for other in stretches)]
    lengths = [stop - start for start, stop in sorted(innermost)]
    return next((length for length in lengths if 3 * length >= 2 * max(lengths)), 0)


def _figures_of(job: tuple[str, int, int]) -> Figures:
    kernel, number, architecture = job
    return figures(launches_of(kernel)[number], architecture)


def faults(code: Figures) -> str:
    """Return what no launch of ours may have, in words; empty if it has none of it."""
    counts = {"spills": code.spills, "bytes of stack": code.stack_bytes, "atomics": code.atomics}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def main(arguments: Sequence[str]) -> int:
    """Print the figures of all launches, or of the kernels named, a JSON object a line; return 1 if --check finds faults, else 0.

    --check: print faults instead, a launch a line, then the version of Triton that compiled.
    """
    import triton

    parser = argparse.ArgumentParser(prog="python -m wherefrom.tools.bench_kernels.ahead_of_time", description=__doc__, allow_abbrev=False)
    parser.add_argument("kernels", nargs="*", default=KERNELS, help=f"of {', '.join(KERNELS)}; all unless named")
    parser.add_argument("--check", action="store_true", help="print spills, stack and atomics alone, and exit with 1 if there are any")
    options = parser.parse_args(arguments)
    jobs = [(kernel, n, sm) for kernel in options.kernels for n in range(len(launches_of(kernel))) for sm in ARCHITECTURES]
    wrong = 0
    # spawned, since a compiler's threads do not survive a fork
    with ProcessPoolExecutor(available_cores(), multiprocessing.get_context("spawn")) as pool:
        for code in pool.map(_figures_of, jobs):
            if not options.check:
                print(json.dumps(asdict(code)), flush=True)
            elif bad := faults(code):
                wrong += 1
                print(f"{code.launch}, sm_{code.architecture}: {bad}", flush=True)
    if options.check:
        print(f"Triton {triton.__version__}: {wrong} of {len(jobs)} launches spill, use stack or atomics")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
