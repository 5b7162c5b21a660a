"""What a renderer is, and which one serves.

Here: the protocol that every renderer follows, and the choice behind renderer="auto".
Not here: pixels (render_native, render_torch, render_triton, render_dali; the definition is wherefrom.kernels.render_views_reference).
"""

import logging
from typing import TYPE_CHECKING

import torch

from wherefrom.kernels.dispatch import triton_missing
from wherefrom.kernels.render_views import native_missing
from wherefrom.pipeline.literals import check_literal
from wherefrom.pipeline.render.renderer import CutterName, Renderer, RendererName
from wherefrom.pipeline.view_recipe import ViewRecipe

if TYPE_CHECKING:
    from wherefrom.pipeline.render.renderer import Cutter

log = logging.getLogger(__name__)


# What renderer="auto" takes: the first that can run. TODO: triton before dali once the proof has passed with it on a GPU.
GPU_PREFERENCE: tuple[RendererName, ...] = ("dali", "triton", "native", "torch")
CPU_PREFERENCE: tuple[RendererName, ...] = ("native", "torch")
WHY: dict[RendererName, str] = {
    "dali": "decodes and resizes on the GPU",
    "triton": "decodes and renders on the GPU",
    "native": "the fastest on CPUs",
    "torch": "runs everywhere",
}


def choose_renderer(name: RendererName, device: torch.device) -> tuple[RendererName, str]:
    """Return which renderer serves on a device, and why: the one named, or the first of a fixed list that can run here.

    Nothing is timed, so that ranks and resumed runs on machines of one kind choose alike.
    Raises: ValueError if there is no renderer of that name.
    """
    check_literal("renderer", name, RendererName)
    if name != "auto":
        return name, "as asked"
    passed_over: list[str] = []
    for candidate in GPU_PREFERENCE if device.type == "cuda" else CPU_PREFERENCE:
        missing = _missing(candidate)
        if missing is None:
            return candidate, "; ".join([WHY[candidate], *passed_over])
        passed_over.append(f"{candidate} cannot run: {missing}")
    raise AssertionError("torch runs everywhere")


def _missing(name: RendererName) -> str | None:
    """Return why a renderer cannot run on this machine, or None."""
    if name == "native":
        return native_missing()
    if name == "torch":
        return None
    from wherefrom.pipeline.render.dali_decode import installed

    if not installed():  # it decodes for triton too
        return "NVIDIA DALI is not installed; pip install nvidia-dali-cuda130"
    return triton_missing() if name == "triton" else None


def check_runtime(*, threads: int | None, prefetch: int) -> None:
    """Raise ValueError unless threads and prefetch are numbers that a loader can work with."""
    check_literal("threads", threads, int | None)
    check_literal("prefetch", prefetch, int)
    if threads is not None and threads < 0:
        raise ValueError(f"threads={threads}: needs at least 0 (all in the caller's thread); None takes one a core")
    if prefetch < 1:
        raise ValueError(f"prefetch={prefetch}: needs at least 1 batch")


def make_cutter(recipe: ViewRecipe, name: CutterName = "auto") -> "Cutter":
    """Build what cuts views of decoded pictures, and say which one and why.

    Raises: ValueError if there is none of that name, "native" is asked for and not there, or "torch" cannot serve the recipe.
    """
    check_literal("renderer", name, CutterName)
    chosen, why = choose_renderer(name, torch.device("cpu"))
    log.info("views are cut by %s: %s", chosen, why)
    if chosen == "native":
        from wherefrom.pipeline.render.native_cutter import NativeCutter

        return NativeCutter(recipe)
    from wherefrom.pipeline.render.torch_cutter import TorchCutter

    return TorchCutter(recipe)


def make_renderer(
    recipe: ViewRecipe, name: RendererName = "auto", *, device: str | torch.device = "cpu", threads: int | None = None, prefetch: int = 2
) -> Renderer:
    """Build the renderer called `name` and say which one serves and why.

    Raises: ValueError if there is none of that name, it cannot run here or serve the recipe, or threads or prefetch are out of range.
    """
    check_runtime(threads=threads, prefetch=prefetch)
    chosen, why = choose_renderer(name, torch.device(device))
    log.info("renderer %s: %s", chosen, why)
    if chosen == "dali":
        from wherefrom.pipeline.render.dali_renderer import DaliRenderer

        # on a CPU, 8 bits after the resize make the whole a quarter faster; on a GPU floats are not what takes the time
        return DaliRenderer(recipe, device=device, threads=threads, exact=torch.device(device).type == "cuda")
    if chosen == "triton":
        from wherefrom.pipeline.render.triton_renderer import TritonRenderer

        return TritonRenderer(recipe, device=device, threads=threads)
    from wherefrom.pipeline.render.threads import ThreadedRenderer

    return ThreadedRenderer(make_cutter(recipe, chosen), device=device, threads=threads, prefetch=prefetch)
