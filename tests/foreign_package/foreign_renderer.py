"""A renderer from another package: reads every view pixel where the record's own map says, bilinearly; colors stay as they are.

Nothing of wherefrom is touched for it: the package's metadata names ENTRY as an entry point of `wherefrom.renderers`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from wherefrom.pipeline.decode import upright
from wherefrom.pipeline.render.renderer import RendererEntry
from wherefrom.pipeline.render.threads import in_threads
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Record

Cuts = list[tuple[Record, Tensor]]  # a family's record, and where its views go, (B, V, 3, h, w)


class BilinearCutter:
    """Cuts views by `grid_sample`, without antialias."""

    name = "bilinear"

    def __init__(self, recipe: ViewRecipe) -> None:
        self.recipe = recipe

    def plan(self, records: Sequence[Record], pixels: Sequence[Tensor]) -> Cuts:
        """Return each family's record beside the place of its views."""
        return list(zip(records, pixels, strict=True))

    def cut(self, plan: Cuts, position: int, stored: NDArray[np.uint8]) -> None:
        """Write all views of the batch's picture number `position`, (H, W, 3) as stored."""
        for record, pixels in plan:
            geometry = record.geometry[position : position + 1]
            picture = torch.tensor(upright(stored, int(geometry.stored_orientation)).copy()).permute(2, 0, 1).float()  # (3, H, W)
            height, width = geometry.size_px
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            centers = torch.stack([x, y, torch.ones_like(x)], -1).double()  # (h, w, 3)
            points = torch.einsum("vij,hwj->vhwi", geometry.view_to_source[0], centers)  # (V, h, w, 2), (x, y) in source pixels
            grid = (2 * points / geometry.source_size.flip(-1) - 1).float()
            levels = grid_sample(picture.expand(len(grid), -1, -1, -1), grid, padding_mode="border", align_corners=False)
            if pixels.dtype == torch.uint8:
                pixels[position] = levels.round().to(torch.uint8)
            else:
                mean, std = (255 * torch.tensor(numbers)[:, None, None] for numbers in (self.recipe.mean, self.recipe.std))
                pixels[position] = (levels - mean) / std


ENTRY = RendererEntry(devices=("cpu",), snaps=("pixel", "none"), make=in_threads(BilinearCutter), cutter=BilinearCutter)
