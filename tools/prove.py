"""The command `wherefrom prove`: the pixel proof of every renderer on this machine, as a table.

Here: which renderers there are, how the proof's rows are folded into a table.
Not here: the proof itself (pipeline/proof/prove.py), parsing the command line (cli.py).
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from rich.console import Console

from wherefrom.kernels.dispatch import triton_missing
from wherefrom.kernels.render_views import native_missing
from wherefrom.pipeline.proof.prove import FLOAT_WORST_PX, ROUNDED_MEAN_PX, ROUNDED_WORST_PX, ProofReport, ProofRow, proof_cases, prove
from wherefrom.pipeline.render import dali_renderer
from wherefrom.pipeline.render.choose import choose_renderer, make_renderer
from wherefrom.pipeline.render.renderer import Renderer
from wherefrom.pipeline.view_recipe import Snap, ViewRecipe
from wherefrom.tools.console import print_line, print_table, progress

__all__ = ["prove_command"]

Name = Literal["native", "torch", "triton", "dali"]
Device = Literal["cpu", "cuda"]
SNAPS: dict[Name, tuple[Snap, ...]] = {  # the boxes that each renderer can cut
    "native": ("pixel", "none"),
    "torch": ("pixel",),
    "triton": ("pixel", "none"),
    "dali": ("pixel", "none"),
}


def prove_command(
    renderer: Literal["all", "native", "torch", "triton", "dali"] = "all", *, device: Device | None = None, quick: bool = False
) -> int:
    """Prove by pixels that the records of the renderers here are true; return 0 if all is proven, else 1.

    Args:
        renderer: which renderer; all: every one that is installed.
        device: cpu or cuda; default: both, where there is a GPU.
        quick: a short cut through the cases.
    Raises: ValueError of one line for a device or renderer that is not here.
    """
    console = Console()
    proven = True
    for name, title, factory in _contenders(console, renderer, device):
        cases = proof_cases(SNAPS[name], quick=quick)
        started = time.perf_counter()
        with progress(console, f"{title}, cases") as show:
            report = prove(factory, cases=cases, progress=show)
        _print_report(console, report, title, time.perf_counter() - started)
        proven &= report.passed
    print_line(console, "proven" if proven else "NOT proven: see the rows marked RED", "bold green" if proven else "bold red")
    return 0 if proven else 1


def _contenders(
    console: Console, renderer: Literal["all", "native", "torch", "triton", "dali"], device: Device | None
) -> list[tuple[Name, str, Callable[[ViewRecipe], Renderer]]]:
    """Return every (renderer, title, factory) to prove, each as the loader makes it; say what serves by default, what is left out, why."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch sees no CUDA GPU here; use --device cpu")
    places: list[Device] = [place for place in ("cpu", "cuda") if device in (None, place) and (place == "cpu" or torch.cuda.is_available())]
    for place in places:
        chosen, why = choose_renderer("auto", torch.device(place))
        print_line(console, f'renderer="auto" takes {chosen} on {place}: {why}')
    found: list[tuple[Name, str, Callable[[ViewRecipe], Renderer]]] = []
    for name in SNAPS:
        if renderer not in ("all", name):
            continue
        runs_on, missing = _places(name, places)
        if missing is None:
            found += [(name, f"{name} on {place}", partial(make_renderer, name=name, device=place)) for place in runs_on]
            if name == "dali" and "cpu" in runs_on:
                found.append((name, "dali on cpu, exact=True", partial(dali_renderer.DaliRenderer, exact=True)))
        elif renderer == name:
            raise ValueError(f"renderer {name!r}: {missing}")
        else:
            print_line(console, f"{name} is left out: {missing}")
    if not found:
        raise ValueError(f"device={device!r}: no renderer runs there; leave out --device")
    return found


def _places(name: Name, places: Sequence[Device]) -> tuple[list[Device], str | None]:
    """Return where, of these places, a renderer is proven, and why it is not proven here, or None."""
    no_dali = None if dali_renderer.installed() else "NVIDIA DALI is not installed here; pip install nvidia-dali-cuda130"
    if name == "dali":
        return list(places), no_dali
    if name == "triton":
        if "cuda" not in places:
            return [], "it is proven on a CUDA GPU, and none is here or asked for"
        return ["cuda"], triton_missing() or no_dali  # DALI decodes for it
    if "cpu" not in places:
        return [], "it renders on the CPU whatever the device; leave out --device"
    return ["cpu"], native_missing() if name == "native" else None


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
