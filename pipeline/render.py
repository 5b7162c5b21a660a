"""What a renderer is, and which one serves.

Here: the protocol that every renderer follows, and the choice behind renderer="auto".
Not here: pixels (render_native, render_torch, render_triton, render_dali; the definition is wherefrom.kernels.render_views_reference).
"""

import functools
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.kernels.dispatch import triton_missing
from wherefrom.kernels.render_views import native_missing
from wherefrom.pipeline.recipe import Recipe
from wherefrom.pipeline.views import Photometric, ViewGeometry

if TYPE_CHECKING:
    from wherefrom.pipeline.render_threads import Cutter

log = logging.getLogger(__name__)

RendererName = Literal["auto", "native", "torch", "triton", "dali"]
CutterName = Literal["auto", "native", "torch"]

TRIAL_PICTURES, TRIAL_SIZE, TRIAL_ROUNDS = 64, (375, 500), 5  # what tells which renderer is the faster on a GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """The pixels of a batch, and which pictures would not decode."""

    pixels: tuple[Tensor, ...]  # one (B, V, 3, H, W) a family, in the recipe's order
    failed: dict[int, str]  # position in the batch -> reason; their pixels are undefined
    decode_s: float = 0.0  # summed over threads, 0 where the renderer can't tell
    render_s: float = 0.0


class Renderer(Protocol):
    """Records and encoded bytes in, pixels out. Safe to call from several threads; any batch size."""

    name: str
    strict: bool  # whether it refuses whatever decode.py refuses; a GPU's decoders show damaged JPEGs in part

    def render(self, encoded: Sequence[NDArray[np.uint8]], records: Sequence[tuple[ViewGeometry, Photometric]]) -> Rendered:
        """Render a batch: `encoded` holds B files, `records` one (geometry, photometric) a family of the recipe."""
        ...

    def close(self) -> None:
        """Free threads and memory; twice is fine."""
        ...


def choose_renderer(name: RendererName, recipe: Recipe, device: torch.device) -> tuple[RendererName, str]:
    """Return which renderer serves a recipe on a device, and why."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        from wherefrom.pipeline.render_dali import installed

        if installed():
            return _faster_on_gpu(recipe, device)
        chosen, why = choose_cutter()
        return chosen, f"{why}; pip install nvidia-dali-cuda130 decodes on the GPU"
    return choose_cutter()


@functools.cache  # a run builds loaders for its evaluations too, and a trial takes seconds
def _faster_on_gpu(recipe: Recipe, device: torch.device) -> tuple[RendererName, str]:
    """Return the faster of the two renderers that decode on a GPU, by a trial on that device."""
    missing = triton_missing()
    if missing is not None:
        return "dali", f"decodes and resizes on the GPU; {missing}"
    took = trial_seconds(recipe, ("triton", "dali"), device)
    faster, slower = sorted(took, key=lambda name: took[name])
    each_ms = {name: f"{seconds / TRIAL_PICTURES * 1e3:.2f} ms a picture" for name, seconds in took.items()}
    return faster, f"{each_ms[faster]} on this GPU, where {slower} takes {each_ms[slower]}"


def trial_seconds(recipe: Recipe, names: Sequence[RendererName], device: torch.device) -> dict[RendererName, float]:
    """Return the median time that renderers take for a batch of TRIAL_PICTURES made-up photographs, in turns, once all are warm."""
    import simplejpeg

    from wherefrom.pipeline.colour import draw_colours
    from wherefrom.pipeline.crops import draw_geometry

    height, width = TRIAL_SIZE
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(0)) * 255
    picture = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255).byte()[0].permute(1, 2, 0)
    file = np.frombuffer(simplejpeg.encode_jpeg(np.ascontiguousarray(picture.numpy()), quality=90), np.uint8)
    ids, size = np.arange(TRIAL_PICTURES), np.full((TRIAL_PICTURES, 2), TRIAL_SIZE, np.int32)
    drawn = draw_geometry(recipe, seed=0, epoch=0, drawn_for=ids, source_size=size)
    colours = draw_colours(recipe, seed=0, epoch=0, drawn_for=ids)
    records = [(item.geometry, colour) for item, colour in zip(drawn, colours, strict=True)]

    renderers = {name: make_renderer(recipe, name, device=device) for name in names}
    took: dict[RendererName, list[float]] = {name: [] for name in names}
    for _ in range(TRIAL_ROUNDS + 1):
        for name, renderer in renderers.items():
            started = time.perf_counter()
            renderer.render([file] * TRIAL_PICTURES, records)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took[name].append(time.perf_counter() - started)
    for renderer in renderers.values():
        renderer.close()
    return {name: statistics.median(rounds[1:]) for name, rounds in took.items()}  # the first builds and compiles


def choose_cutter() -> tuple[Literal["native", "torch"], str]:
    """Return what cuts views on the CPU, and why."""
    missing = native_missing()
    return ("native", "the fastest on CPUs") if missing is None else ("torch", f"the compiled one is not there: {missing}")


def make_cutter(recipe: Recipe, name: CutterName = "auto") -> "Cutter":
    """Build what cuts views of decoded pictures, and say which one and why.

    Raises: ValueError if "native" is asked for and not there, or "torch" cannot serve the recipe.
    """
    chosen, why = choose_cutter() if name == "auto" else (name, "as asked")
    log.info("views are cut by %s: %s", chosen, why)
    if chosen == "native":
        from wherefrom.pipeline.render_native import NativeCutter

        return NativeCutter(recipe)
    from wherefrom.pipeline.render_torch import TorchCutter

    return TorchCutter(recipe)


def make_renderer(
    recipe: Recipe, name: RendererName = "auto", *, device: str | torch.device = "cpu", threads: int | None = None, prefetch: int = 2
) -> Renderer:
    """Build the renderer called `name` and say which one serves and why."""
    chosen, why = choose_renderer(name, recipe, torch.device(device))
    log.info("renderer %s: %s", chosen, why)
    if chosen == "dali":
        from wherefrom.pipeline.render_dali import DaliRenderer

        # on a CPU, 8 bits after the resize make the whole a quarter faster; on a GPU floats are not what takes the time
        return DaliRenderer(recipe, device=device, threads=threads, exact=torch.device(device).type == "cuda")
    if chosen == "triton":
        from wherefrom.pipeline.render_triton import TritonRenderer

        return TritonRenderer(recipe, device=device, threads=threads)
    from wherefrom.pipeline.render_threads import ThreadedRenderer

    return ThreadedRenderer(make_cutter(recipe, chosen), device=device, threads=threads, prefetch=prefetch)
