"""The `native` renderer: threads decode, the compiled kernel writes all views of a picture straight into the batch in one call.

Here: records as the kernel takes them. Threads and decoding: threads.py.
Not here: the kernel (wherefrom.kernels.render_views and its C files), drawing.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.kernels.render_views import ViewPlan, ViewRequest, native_missing
from wherefrom.pipeline.color import color_matrix
from wherefrom.pipeline.render.threads import ThreadedRenderer
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Record


class NativeCutter:
    """Cuts views with the compiled kernel; its pixels equal the float64 reference's to 2e-3 levels before they are cast.

    Raises: ValueError if the kernel is not there.
    """

    name = "native"

    def __init__(self, recipe: ViewRecipe) -> None:
        if missing := native_missing():
            raise ValueError(f'renderer "native" cannot run: {missing}; or use renderer="torch"')
        self.recipe = recipe
        normalized = recipe.pixels != "uint8"
        self._mean = torch.tensor(recipe.mean, dtype=torch.float64) if normalized else None
        self._std = torch.tensor(recipe.std, dtype=torch.float64) if normalized else None

    def plan(self, records: Sequence[Record], pixels: Sequence[Tensor]) -> ViewPlan:
        """Return a batch's records, checked, as the kernel holds them.

        Raises: ValueError for a record that cannot be rendered, such as a box that is empty or not finite.
        """
        requests = []
        for family, record, out in zip(self.recipe.families, records, pixels, strict=True):
            geometry, photometric = record.geometry, record.photometric
            # asked of the recipe first, so that no picture of a batch changes the arithmetic of another
            colored = family.color is not None or bool(photometric.changed.any())
            requests.append(
                ViewRequest(
                    boxes=geometry.boxes,
                    flipped=geometry.flipped,
                    quarter_turns=geometry.quarter_turns,
                    matrix=color_matrix(photometric) if colored else None,
                    blur_sigma_px=photometric.blur_sigma_px if colored else None,
                    solarized=photometric.solarized if colored else None,
                    out=out,
                )
            )
        return ViewPlan(requests, orientation=records[0].geometry.stored_orientation, mean=self._mean, std=self._std)

    def cut(self, plan: ViewPlan, position: int, stored: NDArray[np.uint8]) -> None:
        """Write all views of the batch's picture number `position`, (H, W, 3) as stored; the interpreter is free meanwhile."""
        plan.render_picture(position, stored)


class NativeRenderer(ThreadedRenderer):
    """`ThreadedRenderer` that cuts with the compiled kernel.

    Raises: ValueError if the kernel is not there.
    """

    def __init__(self, recipe: ViewRecipe, *, device: str | torch.device = "cpu", threads: int | None = None, prefetch: int = 2) -> None:
        super().__init__(NativeCutter(recipe), device=device, threads=threads, prefetch=prefetch)
