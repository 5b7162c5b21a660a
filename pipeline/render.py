"""What a renderer is, and which one serves.

Here: the protocol that every renderer follows, and the choice behind renderer="auto".
Not here: pixels (render_torch.py, render_dali.py; the definition is wherefrom.kernels.render_views_reference).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.recipe import Recipe
from wherefrom.pipeline.views import Photometric, ViewGeometry

log = logging.getLogger(__name__)

RendererName = Literal["auto", "dali", "torch"]


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

    def render(self, encoded: Sequence[NDArray[np.uint8]], records: Sequence[tuple[ViewGeometry, Photometric]]) -> Rendered:
        """Render a batch: `encoded` holds B files, `records` one (geometry, photometric) a family of the recipe."""
        ...

    def close(self) -> None:
        """Free threads and memory; twice is fine."""
        ...


def choose_renderer(name: RendererName, device: torch.device) -> tuple[Literal["dali", "torch"], str]:
    """Return which renderer serves on a device, and why."""
    if name != "auto":
        return name, "as asked"
    if device.type != "cuda":
        return "torch", "the fastest on CPUs"
    from wherefrom.pipeline.render_dali import installed

    if not installed():
        return "torch", "DALI is not installed; pip install nvidia-dali-cuda130 decodes on the GPU"
    return "dali", "decodes and resizes on the GPU"


def make_renderer(
    recipe: Recipe, name: RendererName = "auto", *, device: str | torch.device = "cpu", threads: int | None = None, prefetch: int = 2
) -> Renderer:
    """Build the renderer called `name` and say which one serves and why."""
    chosen, why = choose_renderer(name, torch.device(device))
    log.info("renderer %s: %s", chosen, why)
    if chosen == "dali":
        from wherefrom.pipeline.render_dali import DaliRenderer

        # on a CPU, 8 bits after the resize make the whole a quarter faster; on a GPU floats are not what takes the time
        return DaliRenderer(recipe, device=device, threads=threads, exact=torch.device(device).type == "cuda")
    from wherefrom.pipeline.render_torch import TorchRenderer

    return TorchRenderer(recipe, device=device, threads=threads, prefetch=prefetch)
