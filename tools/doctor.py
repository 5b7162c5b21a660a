"""The command `wherefrom doctor`: whether this machine has what wherefrom needs, each thing in a line, with what mends it.

Here: what is looked at, in which order, the exit code.
Not here: looking (software_findings.py, machine_findings.py), a line (findings.py), parsing the command line (cli.py).
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from json import dumps
from typing import Annotated, Literal

import tyro
from rich.console import Console

from wherefrom.tools.console import print_line
from wherefrom.tools.findings import FAULTS, Asked, Finding, first_line, print_finding, summary
from wherefrom.tools.machine_findings import look_at_caches, look_at_data, look_at_system
from wherefrom.tools.software_findings import load_fault, look_at_gpu, look_at_kernels, look_at_libraries, look_at_renderers

__all__ = ["doctor_command"]

LOOKS: dict[str, Callable[[Asked], Iterator[Finding]]] = {
    "GPU": look_at_gpu,
    "kernels": look_at_kernels,
    "renderers": look_at_renderers,
    "system": look_at_system,
    "caches": look_at_caches,
    "data": look_at_data,
}


def doctor_command(
    *,
    data: str | None = None,
    labels: str | None = None,
    renderer: Annotated[str, tyro.conf.arg(metavar="auto|NAME")] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> int:
    """Look whether this machine has what wherefrom needs; say of each thing that it is good, or what mends it.

    Args:
        data: pictures that are to be read, as for `wherefrom index`: their index is looked at, and how fast they are read.
        labels: what labels them, as for `wherefrom index`.
        renderer: which renderer has to work, by its name; auto: the one that a run takes.
        device: where training has to run; auto: on a GPU if there is one.
        json: print JSON instead of lines.
    Returns: the exit code, 1 if something that was asked for cannot work, else 0.
    Raises: ValueError of one line if there is no renderer of that name.
    """
    asked = Asked(data=data, labels=labels, renderer=renderer, device=device)
    console = Console()
    findings = []
    with _quiet():
        for finding in examine(asked):
            findings.append(finding)
            if not json:
                print_finding(console, finding)
    code = int(any(finding.mark == "FAILS" for finding in findings))
    if json:
        print(dumps({"exit_code": code, "asked": asdict(asked), "findings": [finding._asdict() for finding in findings]}, indent=1))
    else:
        print_line(console, summary(findings), "bold red" if code else "bold")
    return code


def examine(asked: Asked) -> Iterator[Finding]:
    """Look at everything, one thing after another; a look that fails is a finding too.

    Raises: ValueError of one line if there is no renderer of that name.
    """
    yield from _looked_at("libraries", look_at_libraries, asked)
    for module in ("torch", "wherefrom.pipeline"):
        if fault := load_fault(module):
            yield fault
            yield Finding("absent", "all the rest", f"is not looked at without {module}")
            return
    from wherefrom.pipeline.render.choose import check_renderer

    check_renderer(asked.renderer)
    if fault := load_fault("torchvision"):
        yield fault
    for name, look in LOOKS.items():
        yield from _looked_at(name, look, asked)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let libraries say what they have to say by findings alone."""
    ours = logging.getLogger("wherefrom")
    level = ours.level
    ours.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.setLevel(level)


def _looked_at(name: str, look: Callable[[Asked], Iterator[Finding]], asked: Asked) -> Iterator[Finding]:
    try:
        yield from look(asked)
    except FAULTS as problem:
        needed = {"data": asked.data is not None, "renderers": asked.renderer != "auto", "GPU": asked.device == "cuda"}.get(name, False)
        yield Finding("FAILS" if needed else "mend", name, f"cannot be looked at: {first_line(problem)}", "mend that first")
