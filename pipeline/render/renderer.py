"""What a renderer is: records and encoded pictures in, pixels out.

Here: the protocols that every renderer and every cutter follows, and what they say of a picture or record that is wrong.
Not here: which one serves (choose.py), pixels (one file a renderer; the definition is wherefrom.kernels.render_views_reference).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Record, ViewGeometry

RendererName = Literal["auto", "native", "torch", "triton", "dali"]
CutterName = Literal["auto", "native", "torch"]


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

    def render(self, encoded: Sequence[NDArray[np.uint8]], records: Sequence[Record]) -> Rendered:
        """Render a batch: `encoded` holds B files, `records` one a family of the recipe."""
        ...

    def close(self) -> None:
        """Free threads and memory; twice is fine."""
        ...


class Cutter(Protocol):
    """Cuts, colors and normalizes views of decoded pictures in the caller's thread; safe to call from many."""

    name: str
    recipe: ViewRecipe

    def plan(self, records: Sequence[Record], pixels: Sequence[Tensor]) -> Any:
        """Return what `cut` needs to know of a batch: its records and where its views go, one (B, V, 3, h, w) a family."""
        ...

    def cut(self, plan: Any, position: int, stored: NDArray[np.uint8]) -> None:
        """Write all views of the batch's picture number `position`, contiguous (H, W, 3) as its file stores it, EXIF not undone."""
        ...


def view_shapes(recipe: ViewRecipe, samples: int) -> list[tuple[int, ...]]:
    """Return the shape of every family's pixels, (B, V, 3, H, W)."""
    return [(samples, family.views, 3, *family.size_px) for family in recipe.families]


def wrong_sizes(upright_size: NDArray[np.int32], told_size: NDArray[np.int32]) -> dict[int, str]:
    """Return which pictures have not the size that their record tells, position -> reason; both sizes (B, 2), (height, width)."""
    reasons = {}
    for i in np.flatnonzero((upright_size != told_size).any(1)).tolist():
        found, told = tuple(upright_size[i].tolist()), tuple(told_size[i].tolist())
        reasons[i] = f"decodes to (height, width) {found}, its record says {told}; build the index again"
    return reasons


def leaves_picture(geometry: ViewGeometry, b: int, v: int) -> ValueError:
    """Return what to raise for a box that leaves its picture."""
    return ValueError(
        f"box {geometry.boxes[b, v].tolist()} of family {geometry.family!r}, sample {geometry.sample[b]}, view {v}: leaves its "
        f"picture of (height, width) {tuple(geometry.source_size[b].tolist())}; cut it back to the picture"
    )
