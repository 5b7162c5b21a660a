"""A crop law of another package: views on a ring around the picture's center."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline import Boxes, CropLaw, Earlier, Keys, Purpose, Snap, snap_boxes, uniform


@dataclass(frozen=True, kw_only=True)
class Ring(CropLaw):
    """Square views whose centers lie on a circle around the picture's, equally far apart; where the first one lies is drawn."""

    side_frac: float = 0.3  # of the short side, as the next
    radius_frac: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.side_frac <= 1 - 2 * self.radius_frac or self.radius_frac < 0:
            raise ValueError(f"side_frac={self.side_frac}, radius_frac={self.radius_frac}: needs 0 < side <= 1 - 2 radius, and radius >= 0")

    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Snap, earlier: Earlier) -> Boxes:
        """Draw boxes (B, V, 4) in pictures of source_size (B, 2), (height, width)."""
        short = source_size.min(-1)[:, None, None]  # (B, 1, 1)
        first = uniform(keys.words(1, Purpose.BOX)[:, :, 0, 0])  # (B, 1), of a full turn
        angle = 2 * np.pi * (first + np.arange(views) / views)  # (B, V)
        center = source_size[:, None, ::-1] / 2 + self.radius_frac * short * np.stack([np.cos(angle), np.sin(angle)], -1)
        half = self.side_frac * short / 2
        return Boxes.all_kept(snap_boxes(np.concatenate([center - half, center + half], -1), source_size, snap))

    def smallest_side_px(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the side of the views: pictures in which it is below the family's `min_side_px` give invalid views."""
        return self.side_frac * sizes.min(-1)
