"""The command `wherefrom prove`: the pixel proof of every renderer on this machine, as a table.

Here: which renderers there are, how the proof's rows are folded into a table.
Not here: the proof itself (pipeline/proof/prove.py), parsing the command line (cli.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from wherefrom.pipeline.literals import check_literal
from wherefrom.pipeline.proof.prove import (
    FLOAT_WORST_PX,
    ROUNDED_MEAN_PX,
    ROUNDED_WORST_PX,
    ProofReport,
    ProofRow,
    law_examples,
    proof_cases,
    prove,
)
from wherefrom.pipeline.render.choose import RENDERERS, choose_renderer, make_renderer, renderer_entry
from wherefrom.pipeline.render.renderer import RenderDevice, Renderer
from wherefrom.pipeline.view_recipe import LAWS, Snap, ViewRecipe
from wherefrom.tools.console import print_line, print_table, progress

__all__ = ["prove_command"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A renderer as it is proven."""

    title: str
    snaps: tuple[Snap, ...]  # the boxes that it can cut
    make: Callable[[ViewRecipe], Renderer]


RendererChoice = Annotated[str, tyro.conf.arg(metavar="|".join(["all", *RENDERERS]))]  # checked against the table when it is asked for


def prove_command(renderer: RendererChoice = "all", *, device: RenderDevice | None = None, quick: bool = False) -> int:
    """Prove by pixels that the records of the renderers here are true; return 0 if all is proven, else 1.

    Args:
        renderer: which renderer, by its name; all: every one that is installed, those of other packages too.
        device: cpu or cuda; default: both, where there is a GPU.
        quick: a short cut through the cases.
    Raises: ValueError of one line for a device or renderer that is not here.
    """
    console = Console()
    proven = True
    candidates, laws = _candidates(console, renderer, device), _laws(console)
    for candidate in candidates:
        started = time.perf_counter()
        cases = [replace(case, laws=case.laws or laws) for case in proof_cases(candidate.snaps, quick=quick)]
        with progress(console, f"{candidate.title}, cases") as show:
            report = prove(candidate.make, cases=cases, progress=show)
        _print_report(console, report, candidate.title, time.perf_counter() - started)
        proven &= report.passed
    print_line(console, "proven" if proven else "NOT proven: see the rows marked RED", "bold green" if proven else "bold red")
    return 0 if proven else 1


def _candidates(console: Console, renderer: str, device: RenderDevice | None) -> list[_Candidate]:
    """Return what to prove, each renderer as the loader makes it; say what serves by default, what is left out, why."""
    check_literal("renderer", renderer, Literal[("all", *RENDERERS)])
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch sees no CUDA GPU here; use --device cpu")
    here: list[RenderDevice] = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    devices = [each for each in here if device in (None, each)]
    for each in devices:
        chosen, why = choose_renderer("auto", torch.device(each))
        print_line(console, f'renderer="auto" takes {chosen} on {each}: {why}')
    candidates: list[_Candidate] = []
    for name in RENDERERS if renderer == "all" else [renderer]:
        try:
            candidates += _candidates_of(name, devices)
        except ValueError as reason:
            if renderer != "all":
                raise
            print_line(console, f"left out: {reason}")
    if not candidates:
        raise ValueError(f"device={device!r}: no renderer runs there; leave out --device")
    return candidates


def _laws(console: Console) -> tuple[str, ...]:
    """Return the laws that renderers cut by; say which ones are left out, of packages that are at fault, and why."""
    laws = []
    for name in LAWS:
        try:
            law_examples(name, of="independent/0")
        except ValueError as reason:
            if name in LAWS.own:
                raise
            print_line(console, f"left out: {reason}")
        else:
            laws.append(name)
    return tuple(laws)


def _candidates_of(name: str, devices: Sequence[RenderDevice]) -> list[_Candidate]:
    """Return a renderer on those of the devices where it renders, and its variants.

    Raises: ValueError saying why it is not proven here.
    """
    entry = renderer_entry(name)
    renders_on = [each for each in devices if each in entry.devices]
    if not renders_on:
        raise ValueError(f"renderer {name!r}: it renders on {' and '.join(entry.devices)}, which is not here or not asked for")
    if missing := entry.missing():
        raise ValueError(f"renderer {name!r}: {missing}")
    makers: dict[str, Callable[[ViewRecipe], Renderer]] = {
        f"{name} on {each}": partial(make_renderer, name=name, device=each) for each in renders_on
    }
    makers |= {f"{name} on {each}, {options}": make for (each, options), make in entry.variants.items() if each in renders_on}
    return [_Candidate(title=title, snaps=entry.snaps, make=make) for title, make in makers.items()]


def _print_report(console: Console, report: ProofReport, title: str, seconds: float) -> None:
    """Print one line a law and view size, then the mistakes made on purpose."""
    lines: list[Sequence[str]] = [("law", "view", "float mean", "worst", "8-bit mean", "worst", "points read", "")]
    for law, size in dict.fromkeys((row.law, row.case.size_px) for row in report.rows):
        rows = [row for row in report.rows if (row.law, row.case.size_px) == (law, size)]
        cells = [cell for rounded in (False, True) for cell in _cells([row for row in rows if row.rounded == rounded])]
        lines.append(
            (law, f"{size[0]} x {size[1]}", *cells, f"{sum(row.points for row in rows):,}", _verdict(all(row.passed for row in rows)))
        )
    print_line(console, f"{title}: errors in source pixels; {seconds:.0f} s", "bold")
    print_table(console, lines)
    print_line(console, f"bars: worst {FLOAT_WORST_PX} on float pixels; mean {ROUNDED_MEAN_PX}, worst {ROUNDED_WORST_PX} on 8-bit ones")
    controls = [("mistake made on purpose", "mean, where mildest", "worst, where mildest", "")]
    for control in report.controls:
        verdict = "fails as it must" if control.caught else "RED: it passes"
        controls.append((control.mistake, f"{control.mildest_mean_px:.3f}", f"{control.mildest_worst_px:.3f}", verdict))
    print_table(console, controls)


def _cells(rows: Sequence[ProofRow]) -> list[str]:
    return [f"{max(row.mean_px for row in rows):.4f}", f"{max(row.worst_px for row in rows):.4f}"] if rows else ["-", "-"]


def _verdict(passed: bool) -> str:
    return "holds" if passed else "RED"
