"""What a renderer is: records and encoded pictures in, pixels out.

Here: the protocols that every renderer and every cutter follows, what the table of renderers knows of one, and what they say of a picture
or record that is wrong.
Not here: the table and which one serves (choose.py), pixels (one file a renderer; the definition is
wherefrom.kernels.render_views_reference).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.view_recipe import Snap, ViewRecipe
from wherefrom.pipeline.views import Record, ViewGeometry

RenderDevice = Literal["cpu", "cuda"]


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


@runtime_checkable
class PartRenderer(Renderer, Protocol):
    """A renderer that may decode no more of a picture than its views read, where the whole is known to decode: the pixels are the same."""

    @property
    def in_parts(self) -> bool:
        """Whether it does so on this machine."""
        ...

    def render(
        self, encoded: Sequence[NDArray[np.uint8]], records: Sequence[Record], decodable: NDArray[np.bool_] | None = None
    ) -> Rendered:
        """Render a batch, as `Renderer`; decodable (B,): whose whole was decoded before, None: nobody knows."""
        ...


@runtime_checkable
class PackingRenderer(PartRenderer, Protocol):
    """One that works out what it needs to know of records for many batches at once."""

    def pack(self, records: Sequence[Record]) -> Any:
        """Return it for records, one a family, of any number of pictures: `packed[rows]` is that of a slice of them."""
        ...

    def render(
        self,
        encoded: Sequence[NDArray[np.uint8]],
        records: Sequence[Record],
        decodable: NDArray[np.bool_] | None = None,
        packed: Any = None,
    ) -> Rendered:
        """Render a batch, as `PartRenderer`; packed: what `pack` gave of these records, None: nothing yet."""
        ...


class Closable(Protocol):
    """What holds threads until it is closed."""

    def close(self) -> None:
        """End them; twice is fine."""
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


@runtime_checkable
class PartCutter(Cutter, Protocol):
    """A cutter that can decode as well, no more than its views read."""

    @property
    def in_parts(self) -> bool:
        """Whether it can on this machine."""
        ...

    def pack(self, records: Sequence[Record]) -> Any:
        """Return records of any number of pictures as `plan_packed` takes them: `packed[rows]` are those of a slice of the pictures."""
        ...

    def plan_packed(self, packed: Any, pixels: Sequence[Tensor]) -> Any:
        """Return what `plan` returns of the records that were packed."""
        ...

    def jpeg_threads(self, threads: int) -> Closable | None:
        """Return `threads` threads, 1 or more, that share the pictures of `cut_jpegs`; None where there are no parts to decode."""
        ...

    def cut_jpegs(
        self,
        plan: Any,
        encoded: Sequence[NDArray[np.uint8]],
        stored_size: NDArray[np.int32],
        asked: NDArray[np.bool_],
        threads: Any = None,
    ) -> tuple[list[int], float, float]:
        """Write all views of those pictures of the batch that are asked for, JPEGs of (height, width) as stored.

        Shapes: encoded B of (bytes,), stored_size (B, 2), asked (B,); threads as `jpeg_threads` returns them, None: in the caller's alone.
        Returns: positions whose whole is to be decoded, views undefined; the seconds of decoding, and of rendering, summed over threads.
        """
        ...


class RendererMaker(Protocol):
    """What builds a renderer; raises ValueError in one line if it cannot serve the recipe or the device."""

    def __call__(self, recipe: ViewRecipe, *, device: str | torch.device, threads: int | None, prefetch: int) -> Renderer:
        """Build it for a loader on `device`, to render in `threads` threads (None: its own choice), `prefetch` batches ahead of use."""
        ...


def nothing_missing() -> str | None:
    """Return None: the renderer runs wherever this library does."""
    return None


@dataclass(frozen=True, kw_only=True)
class RendererEntry:
    """What the table of renderers knows of one. A package adds its own by an entry point `NAME = "module:ENTRY"` of `wherefrom.renderers`.

    To make an entry, or to import the module that holds it, must import no library that need not be there.
    """

    devices: tuple[RenderDevice, ...]  # on which it renders, its main one first; from the CPU it serves loaders of every device
    snaps: tuple[Snap, ...]  # the boxes that it can cut: of whole pixels ("pixel"), of parts of them ("none")
    make: RendererMaker
    missing: Callable[[], str | None] = nothing_missing  # what this machine lacks, in one line, or None
    cutter: Callable[[ViewRecipe], Cutter] | None = None  # cuts views of decoded pictures in the caller's thread, where it can
    variants: Mapping[tuple[RenderDevice, str], Callable[[ViewRecipe], Renderer]] = field(
        default_factory=dict
    )  # (device, options) -> what makes it otherwise than `make`; it is proven too
    auto: Mapping[RenderDevice, int] = field(default_factory=dict)  # a loader's device -> rank among those served unasked; ours alone
    why: str = ""  # what is said when it serves unasked


def view_shapes(recipe: ViewRecipe, samples: int) -> list[tuple[int, ...]]:
    """Return the shape of every family's pixels, (B, V, 3, H, W)."""
    return [(samples, family.views, 3, *family.size_px) for family in recipe.families]


def render_checked(
    renderer: Renderer,
    recipe: ViewRecipe,
    encoded: Sequence[NDArray[np.uint8]],
    records: Sequence[Record],
    decodable: NDArray[np.bool_] | None = None,
    packed: Any = None,
) -> Rendered:
    """Return what a renderer makes of a batch of B files and their records, one a family of the recipe; the rest as `PackingRenderer`.

    Raises: ValueError in one line if it is not what was asked for.
    """
    known = (decodable, packed) if packed is not None else (decodable,) if isinstance(renderer, PartRenderer) else ()
    rendered, of = renderer.render(encoded, records, *known), f"renderer {renderer.name!r} returns"
    if not isinstance(rendered, Rendered):
        raise ValueError(f"{of} {type(rendered).__name__}, expected Rendered")
    shapes, dtype = view_shapes(recipe, len(encoded)), getattr(torch, recipe.pixels)
    if len(rendered.pixels) != len(shapes):
        raise ValueError(f"{of} pixels of {len(rendered.pixels)} families, the recipe has {len(shapes)}")
    for family, pixels, shape in zip(recipe.families, rendered.pixels, shapes, strict=True):
        if tuple(pixels.shape) != shape or pixels.dtype != dtype:
            shown = f"{tuple(pixels.shape)} and {pixels.dtype}"
            raise ValueError(f"{of} pixels of shape {shown} for family {family.name!r}, expected {shape} of {dtype}")
    beyond = [position for position in rendered.failed if not 0 <= position < len(encoded)]
    if beyond:
        raise ValueError(f"{of} as failed the position {beyond[0]}, in a batch of {len(encoded)}")
    return rendered


def wrong_sizes(upright_size: NDArray[np.int32], recorded_size: NDArray[np.int32]) -> dict[int, str]:
    """Return which pictures have not the size that their record says, position -> reason; both sizes (B, 2), (height, width)."""
    reasons = {}
    for i in np.flatnonzero((upright_size != recorded_size).any(1)).tolist():
        decoded, recorded = tuple(upright_size[i].tolist()), tuple(recorded_size[i].tolist())
        reasons[i] = f"decodes to (height, width) {decoded}, its record says {recorded}; build the index again"
    return reasons


def leaves_picture(geometry: ViewGeometry, b: int, v: int) -> ValueError:
    """Return what to raise for a box that leaves its picture."""
    return ValueError(
        f"box {geometry.boxes[b, v].tolist()} of family {geometry.family!r}, sample {geometry.sample[b]}, view {v}: leaves its "
        f"picture of (height, width) {tuple(geometry.source_size[b].tolist())}; cut it back to the picture"
    )
