"""The `native` renderer: threads decode, the compiled kernel writes all views of a picture straight into the batch in one call.

Of pictures whose whole is known to decode, one call for the batch decodes as well, no more than the views read, in threads of its own.

Here: records as the kernel takes them. Python's threads and decoding: threads.py.
Not here: the kernel (wherefrom.kernels.render_views and its C files), drawing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.kernels.render_views import JpegThreads, Normalization, PackedViews, ViewPlan, native_missing, native_stale
from wherefrom.pipeline.color import color_matrix
from wherefrom.pipeline.render.jpeg_parts import part_decoder
from wherefrom.pipeline.render.renderer import RendererEntry
from wherefrom.pipeline.render.threads import in_threads
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedFamilies:
    """Records of N pictures as the kernel reads them; a slice of it is that of some."""

    views: tuple[PackedViews, ...]
    orientation: NDArray[np.uint8]  # (N,), EXIF, 1 to 8

    def __getitem__(self, rows: slice) -> "PackedFamilies":
        return PackedFamilies(views=tuple(each[rows] for each in self.views), orientation=self.orientation[rows])


class NativeCutter:
    """Cuts views with the compiled kernel; its pixels equal the float64 reference's to 2e-3 levels before they are cast."""

    name = "native"

    def __init__(self, recipe: ViewRecipe) -> None:
        self.recipe = recipe
        normalized = recipe.pixels != "uint8"
        self._normalization = Normalization.of(recipe.mean, recipe.std) if normalized else Normalization()

    @property
    def in_parts(self) -> bool:
        """Whether there is a library here that decodes parts of JPEGs."""
        return part_decoder() is not None

    def pack(self, records: Sequence[Record]) -> PackedFamilies:
        """Return the records of any number of pictures as the kernel reads them."""
        packed = []
        for family, record in zip(self.recipe.families, records, strict=True):
            geometry, photometric = record.geometry, record.photometric
            # asked of the recipe first, so that no picture of a batch changes the arithmetic of another
            colored = family.color is not None or bool(photometric.changed.any())
            packed.append(
                PackedViews.of(
                    boxes=geometry.boxes,
                    flipped=geometry.flipped,
                    quarter_turns=geometry.quarter_turns,
                    matrix=color_matrix(photometric) if colored else None,
                    blur_sigma_px=photometric.blur_sigma_px if colored else None,
                    solarized=photometric.solarized if colored else None,
                )
            )
        return PackedFamilies(views=tuple(packed), orientation=records[0].geometry.stored_orientation.numpy())

    def plan_packed(self, packed: PackedFamilies, pixels: Sequence[Tensor]) -> ViewPlan:
        """Return a batch's records, which were packed, as the kernel holds them; raises as `plan`."""
        return ViewPlan.of_packed(packed.views, pixels, orientation=packed.orientation, normalization=self._normalization)

    def plan(self, records: Sequence[Record], pixels: Sequence[Tensor]) -> ViewPlan:
        """Return a batch's records, checked, as the compiled kernel holds them.

        Raises: ValueError for a record that cannot be rendered, such as a box that is empty or not finite.
        """
        return self.plan_packed(self.pack(records), pixels)

    def cut(self, plan: ViewPlan, position: int, stored: NDArray[np.uint8]) -> None:
        """Write all views of the batch's picture number `position`, (H, W, 3) as stored; the interpreter is free meanwhile."""
        plan.render_picture(position, stored)

    def jpeg_threads(self, threads: int) -> JpegThreads | None:
        """Return threads for `cut_jpegs`, or None where the kernel is too old to have any."""
        return JpegThreads(threads) if native_stale() is None else None

    def cut_jpegs(
        self,
        plan: ViewPlan,
        encoded: Sequence[NDArray[np.uint8]],
        stored_size: NDArray[np.int32],
        asked: NDArray[np.bool_],
        threads: JpegThreads | None = None,
    ) -> tuple[list[int], float, float]:
        """Write all views of a batch's JPEGs, of those asked for, decoded no further than they read, the interpreter free all the while.

        Shapes: encoded B of (bytes,), stored_size (B, 2) int32 (height, width), asked (B,).
        Returns: the positions whose whole is to be decoded; the seconds of decoding, and of rendering, summed over threads.
        """
        return plan.render_jpegs(encoded, stored_size, asked, part_decoder(), threads)


ENTRY = RendererEntry(
    devices=("cpu",),
    snaps=("pixel", "none"),
    make=in_threads(NativeCutter),
    missing=native_missing,
    cutter=NativeCutter,
    auto={"cpu": 1, "cuda": 3},
    why="the fastest on CPUs",
)
