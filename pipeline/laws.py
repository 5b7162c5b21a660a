"""The crop laws that come with the library: what each is told, and how it draws.

Here: frozen dataclasses, each a `CropLaw` like those of other packages.
Not here: what a law is asked (view_recipe.py), what laws share (crops.py), mirrors, turns and small pictures (records.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.crops import (
    AreaLaw,
    Boxes,
    Snap,
    candidates,
    cells_of,
    centered_fallback,
    random_resized,
    shared_area,
    smallest_side_px,
    snap_boxes,
)
from wherefrom.pipeline.draws import Keys, Purpose, integer, uniform
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.view_recipe import CropLaw, Earlier, TargetMoments, ViewFamily, check_range

__all__ = ["Center", "Disjoint", "Grid", "Independent", "Inside", "Overlapping", "Paired", "Scattered", "Tiles"]


def _check_areas(law: AreaLaw) -> None:
    """Raise ValueError unless a law's areas are fractions and its aspect ratios positive, low before high."""
    check_range("area_frac", law.area_frac, 1)
    check_range("aspect", law.aspect)


@dataclass(frozen=True, kw_only=True, slots=True)
class Independent(CropLaw):
    """RandomResizedCrop's law: uniform in area, log-uniform in aspect, then an offset uniform over all valid ones.

    Source: Inception crop, arXiv:1409.4842; ten tries and the centered fallback as torchvision 0.29 RandomResizedCrop.
    """

    area_frac: tuple[float, float] = (0.08, 1.0)  # of the source's area
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, in the source
    tries: int = 10

    def __post_init__(self) -> None:
        check_literals(self)
        _check_areas(self)
        if self.tries < 1:
            raise ValueError(f"tries={self.tries}: needs at least 1")

    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Snap, earlier: Earlier) -> Boxes:
        boxes = random_resized(self, keys, np.repeat(source_size[:, None, ::-1], views, axis=1), snap)
        return Boxes.all_kept(boxes)

    def smallest_side_px(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        return smallest_side_px(self, sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired(CropLaw):
    """Pairs (2 views: reference, target) whose relative position and scale are uniform by construction.

    p, in reference sides, is uniform on the square of half side `position_max` less the center of half side `position_min`;
    ln s is uniform in +-`log_scale_max`; the reference's side, a fraction of the short side, is log-uniform in `side_frac`.
    Raises: ValueError if some draw would not fit: the upper side must not exceed (1 - 2 border) / (a + s_max j / 2 + 1/2), nor
            (1 - 2 border) / (s_max j).
    Source: the law is ours; the paper's rejection sampler is known from secondary descriptions only (arXiv:2605.09963).
    """

    position_max: float = 1.5
    position_min: float = 0.5
    log_scale_max: float = math.log(2)
    side_frac: tuple[float, float] | None = None  # None: (0.10, the smaller of 0.33 and the largest that always fits)
    aspect_jitter: float = 1.0  # the target's width is stretched by up to this factor and its height shrunk by it, or the other way
    border_frac: float = 0.0  # of the short side, kept free on every side

    def __post_init__(self) -> None:
        check_literals(self)
        if not 0 <= self.position_min < self.position_max:
            raise ValueError(f"position_min={self.position_min}, position_max={self.position_max}: needs 0 <= min < max")
        if self.log_scale_max < 0 or self.aspect_jitter < 1 or not 0 <= self.border_frac < 0.5:
            raise ValueError(
                f"log_scale_max={self.log_scale_max}, aspect_jitter={self.aspect_jitter}, border_frac={self.border_frac}: "
                "needs log_scale_max >= 0, aspect_jitter >= 1 and 0 <= border_frac < 0.5"
            )
        low, high = self.side_bounds
        check_range("side_frac", (low, high), 1)
        if high > self.largest_side_frac + 1e-12:
            raise ValueError(
                f"side_frac={(low, high)}: some pairs would not fit; the upper bound must be at most {self.largest_side_frac:.4f}"
            )

    @property
    def largest_side_frac(self) -> float:
        """The largest reference side, as a fraction of the short side, with which every draw of (p, s) fits."""
        largest_target = math.exp(self.log_scale_max) * self.aspect_jitter
        reach = max(self.position_max + largest_target / 2 + 0.5, largest_target)  # the second: it sticks out of the reference both ways
        return (1 - 2 * self.border_frac) / reach

    @property
    def side_bounds(self) -> tuple[float, float]:
        """The resolved `side_frac`."""
        return self.side_frac or (min(0.10, self.largest_side_frac), min(0.33, self.largest_side_frac))

    @property
    def position_std(self) -> float:
        """Standard deviation of each axis of p: sqrt((a^2 + d^2) / 3)."""
        return math.sqrt((self.position_max**2 + self.position_min**2) / 3)

    @property
    def log_scale_std(self) -> float:
        """Standard deviation of ln s: its half range over sqrt(3)."""
        return self.log_scale_max / math.sqrt(3)

    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Snap, earlier: Earlier) -> Boxes:
        return Boxes.all_kept(snap_boxes(draw_pairs(self, keys, source_size), source_size, snap))

    @property
    def fixed_views(self) -> int:
        return 2

    def smallest_side_px(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        return sizes.min(-1) * self.side_bounds[0]

    def target_moments(self) -> TargetMoments | None:
        if self.aspect_jitter != 1 or self.log_scale_max == 0:
            return None
        return TargetMoments(position_std=self.position_std, log_scale_std=self.log_scale_std)


@dataclass(frozen=True, kw_only=True, slots=True)
class Disjoint(CropLaw):
    """Views that do not overlap: each is redrawn up to `tries` times, then the least overlapping draw is taken.

    Uniform in area and log-uniform in aspect, as `Independent`; how many sets were free of overlap is counted.
    """

    area_frac: tuple[float, float] = (0.05, 0.12)  # of the source's area
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, in the source
    min_gap_frac: float = 0.0  # of the short side, between any two boxes
    tries: int = 24

    def __post_init__(self) -> None:
        check_literals(self)
        _check_areas(self)
        if self.tries < 1 or self.min_gap_frac < 0:
            raise ValueError(f"tries={self.tries}, min_gap_frac={self.min_gap_frac}: needs tries >= 1 and min_gap_frac >= 0")

    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Snap, earlier: Earlier) -> Boxes:
        tried, fits = candidates(self, keys, source_size, views, snap)
        gap = (self.min_gap_frac * source_size.min(-1))[:, None] * np.array([-1.0, -1, 1, 1])
        row = np.arange(len(source_size))
        boxes, accepted = np.empty((len(source_size), views, 4)), np.empty((len(source_size), views), bool)
        for view in range(views):
            placed = boxes[:, :view] + gap[:, None]
            shared = shared_area(tried[:, view, :, None], placed[:, None]).sum(-1)  # (B, T)
            shared[~fits[:, view]] = np.inf
            best = shared.argmin(1)  # the first of the least
            boxes[:, view] = tried[row, view, best]
            accepted[:, view] = shared[row, best] == 0
        valid = np.any(fits, axis=-1)
        boxes = np.where(valid[..., None], boxes, centered_fallback(self.aspect, source_size[:, None, ::-1], snap))
        return Boxes(boxes=boxes, valid=valid, accepted=accepted)

    def smallest_side_px(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        return smallest_side_px(self, sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlapping(CropLaw):
    """Views that share at least `min_shared_frac` of the picture's area with every view of the family `of`.

    `of` may be the family itself: then each view meets the earlier ones. After `tries` the best draw stands if it keeps the
    bound, else the box of the first view of `of`; where even that does not keep it the view is marked invalid.
    Source: the 1 % and 2 % bounds of GTSA, arXiv:2304.08014.
    """

    of: str
    area_frac: tuple[float, float] = (0.1, 0.3)  # of the source's area
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, in the source
    min_shared_frac: float = 0.01  # of the source's area
    tries: int = 32

    def __post_init__(self) -> None:
        check_literals(self)
        _check_areas(self)
        if self.tries < 1 or not 0 < self.min_shared_frac <= 1:
            raise ValueError(f"tries={self.tries}, min_shared_frac={self.min_shared_frac}: needs tries >= 1 and 0 < min_shared_frac <= 1")

    @property
    def refers_to(self) -> str:
        return self.of

    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Snap, earlier: Earlier) -> Boxes:
        anchors = earlier.get(self.of)  # None: the family itself
        tried, fits = candidates(self, keys, source_size, views, snap)
        needed = self.min_shared_frac * source_size.prod(-1)
        row = np.arange(len(source_size))
        boxes = np.empty((len(source_size), views, 4))
        valid, accepted = np.empty((2, len(source_size), views), bool)
        for view in range(views):
            others = boxes[:, :view] if anchors is None else anchors
            if others.shape[1]:
                shared = shared_area(tried[:, view, :, None], others[:, None]).min(-1)  # (B, T), with the view it meets least
            else:
                shared = np.broadcast_to(needed[:, None], fits.shape[::2]).copy()
            shared[~fits[:, view]] = -1
            keeps = shared >= needed[:, None]
            best = np.where(keeps.any(1), keeps.argmax(1), shared.argmax(1))
            accepted[:, view] = keeps.any(1)
            boxes[:, view] = tried[row, view, best]
            if others.shape[1]:
                saved = ~accepted[:, view] & (shared_area(others[:, :1], others).min(-1) >= needed)
                boxes[:, view] = np.where(saved[:, None], others[:, 0], boxes[:, view])
                valid[:, view] = accepted[:, view] | saved
            else:
                valid[:, view] = accepted[:, view]
            lost = ~fits[:, view].any(1) & ~valid[:, view]
            boxes[:, view] = np.where(lost[:, None], centered_fallback(self.aspect, source_size[:, ::-1], snap), boxes[:, view])
        return Boxes(boxes=boxes, valid=valid, accepted=accepted)

    def smallest_side_px(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        return smallest_side_px(self, sizes)

    @classmethod
    def examples(cls, of: str) -> Mapping[str, Self]:
        return {"": cls(of=of)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inside(CropLaw):
    """Views contained in the views of the family `of`: view v lies inside view v modulo their number.

    Uniform in area (a fraction of the containing box) and log-uniform in aspect, then anywhere inside.
    """

    of: str
    area_frac: tuple[float, float] = (0.1, 0.5)  # of the containing box's area
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, in the source
    tries: int = 10

    def __post_init__(self) -> None:
        check_literals(self)
        _check_areas(self)
        if self.tries < 1:
            raise ValueError(f"tries={self.tries}: needs at least 1")

    @property
    def refers_to(self) -> str:
        return self.of

    def check(self, family: ViewFamily) -> None:
        if family.name == self.of:
            raise ValueError(f"family {family.name!r} refers to {self.of!r}, which must come before it; it cannot lie inside itself")

    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Snap, earlier: Earlier) -> Boxes:
        around = self._around(views, earlier)
        cells = cells_of(snap)
        corner = np.ceil(around[..., :2] * cells) / cells
        frame = np.maximum(np.floor(around[..., 2:] * cells) / cells - corner, 0)
        boxes = random_resized(self, keys, frame, snap) + np.concatenate([corner, corner], -1)
        kept = ((boxes[..., :2] >= around[..., :2]) & (boxes[..., 2:] <= around[..., 2:])).all(-1)
        return Boxes(boxes=np.where(kept[..., None], boxes, around), valid=kept, accepted=kept)

    def frames(self, source_size: NDArray[np.float64], views: int, earlier: Earlier) -> NDArray[np.float64]:
        around = self._around(views, earlier)
        return (around[..., 2:] - around[..., :2])[..., ::-1]

    def smallest_side_px(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        return smallest_side_px(self, sizes)

    @classmethod
    def examples(cls, of: str) -> Mapping[str, Self]:
        return {"": cls(of=of)}

    def _around(self, views: int, earlier: Earlier) -> NDArray[np.float64]:
        """Return the box that each view lies in, (B, V, 4)."""
        others = earlier[self.of]
        return others[:, np.arange(views) % others.shape[1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Center(CropLaw):
    """The whole picture, or the centered box that Resize(resize_px) + CenterCrop(crop_px) shows; for evaluation."""

    resize_px: int | None = None  # the short side after resizing; None: the whole picture
    crop_px: int | None = None

    def __post_init__(self) -> None:
        check_literals(self)
        if (self.resize_px is None) != (self.crop_px is None):
            raise ValueError(f"resize_px={self.resize_px}, crop_px={self.crop_px}: give both, or neither for the whole picture")
        if self.resize_px is not None and self.crop_px is not None and not 0 < self.crop_px <= self.resize_px:
            raise ValueError(f"resize_px={self.resize_px}, crop_px={self.crop_px}: needs 0 < crop_px <= resize_px")

    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Snap, earlier: Earlier) -> Boxes:
        sides = source_size[:, ::-1]
        if self.resize_px is not None and self.crop_px is not None:
            sides = np.repeat(source_size.min(-1, keepdims=True) * (self.crop_px / self.resize_px), 2, axis=1)
        corner = (source_size[:, ::-1] - sides) / 2
        return Boxes.all_kept(
            np.repeat(snap_boxes(np.concatenate([corner, corner + sides], -1)[:, None], source_size, snap), views, axis=1)
        )

    @classmethod
    def examples(cls, of: str) -> Mapping[str, Self]:
        return {"whole": cls(), "cropped": cls(resize_px=256, crop_px=224)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid(CropLaw):
    """Boxes of `side_frac` of either side, spread evenly from edge to edge, row by row; for evaluation. Nothing is drawn."""

    rows: int = 3
    cols: int = 3
    side_frac: float = 0.4  # of the source's height and width

    def __post_init__(self) -> None:
        check_literals(self)
        if self.rows < 1 or self.cols < 1 or not 0 < self.side_frac <= 1:
            raise ValueError(f"rows={self.rows}, cols={self.cols}, side_frac={self.side_frac}: needs at least 1, 1 and 0 < side_frac <= 1")

    @property
    def fixed_views(self) -> int:
        return self.rows * self.cols

    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Snap, earlier: Earlier) -> Boxes:
        row, col = np.indices((self.rows, self.cols)).reshape(2, -1)
        along = np.stack([col / max(self.cols - 1, 1), row / max(self.rows - 1, 1)], -1)  # (V, 2), 0 to 1
        if self.cols == 1:
            along[:, 0] = 0.5
        if self.rows == 1:
            along[:, 1] = 0.5
        sides = self.side_frac * source_size[:, None, ::-1]
        corner = along * (source_size[:, None, ::-1] - sides)
        return Boxes.all_kept(snap_boxes(np.concatenate([corner, corner + sides], -1), source_size, snap))

    @classmethod
    def examples(cls, of: str) -> Mapping[str, Self]:
        return {"": cls(rows=2, cols=4)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scattered(CropLaw):
    """Boxes anywhere in one window of the picture, each uniform over all places that there are, on the grid of the family's `snap`.

    The window is drawn as `Independent` draws its first view. Boxes are measured in its pixels where it is shown as a square of
    `window_px`, so they have its aspect ratio; width and height are uniform and drawn apart. `min_side_px` is that of the window.
    Source: PART, arXiv 2506.03682.
    """

    area_frac: tuple[float, float] = (0.08, 1.0)  # of the source's area, of the window
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the window, in the source
    window_px: int = 224
    sides_px: tuple[int, int] = (16, 16)  # from the smallest to the largest
    tries: int = 10

    def __post_init__(self) -> None:
        check_literals(self)
        _check_areas(self)
        low, high = self.sides_px
        if not 1 <= low <= high <= self.window_px:
            raise ValueError(f"sides_px={self.sides_px} in a window of {self.window_px} px: needs 1 <= low <= high <= {self.window_px}")
        if self.tries < 1:
            raise ValueError(f"tries={self.tries}: needs at least 1")

    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Snap, earlier: Earlier) -> Boxes:
        window = random_resized(self, keys, source_size[:, None, ::-1], snap)  # (B, 1, 4)
        corner, frame = window[..., :2], window[..., 2:] - window[..., :2]
        words, cells = keys.words_for(views, Purpose.PLACE)[:, :, 0], cells_of(snap)  # (B, V, 4)
        low, high = self.sides_px
        sides_px = low + integer(words[..., :2], high - low + 1)
        sides = np.clip(np.rint(sides_px * frame / self.window_px * cells), 1, frame * cells)
        first = integer(words[..., 2:], (frame * cells - sides).astype(np.int64) + 1)
        boxes = np.concatenate([first, first + sides], -1) / cells + np.concatenate([corner, corner], -1)
        return Boxes.all_kept(boxes)

    def smallest_side_px(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        return smallest_side_px(self, sizes)

    @classmethod
    def examples(cls, of: str) -> Mapping[str, Self]:
        return {"": cls(window_px=64, sides_px=(12, 20))}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles(CropLaw):
    """Tiles of one window of the picture, one in each cell of a grid, row by row: what jigsaw puzzles and context prediction are made of.

    The window is drawn as `Independent` draws its first view. All else is measured in its pixels where it is shown as a square of
    `window_px`: the cells, `gap_px` apart, and the tiles, whose places are uniform over those up to half of `jitter_px` about the middle of
    their cells. A tile never leaves its cell, whatever the family's `snap` rounds. `min_side_px` is that of a tile.
    Source: the jitter of VISSL's jigsaw, gap and jitter of arXiv 1505.05192.
    """

    rows: int = 3
    cols: int = 3
    area_frac: tuple[float, float] = (0.3, 1.0)  # of the source's area, of the window
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the window, in the source
    window_px: int = 255
    tile_px: int = 64  # side of a tile
    gap_px: int = 0  # between cells, so at least that between tiles
    jitter_px: int | None = None  # between the first and the last place of a tile, along either axis; None: all the room in its cell
    tries: int = 10

    def __post_init__(self) -> None:
        check_literals(self)
        _check_areas(self)
        if min(self.rows, self.cols, self.tries, self.window_px, self.tile_px) < 1 or self.gap_px < 0 or (self.jitter_px or 0) < 0:
            raise ValueError(
                f"rows={self.rows}, cols={self.cols}, window_px={self.window_px}, tile_px={self.tile_px}, gap_px={self.gap_px}, "
                f"jitter_px={self.jitter_px}, tries={self.tries}: gap and jitter may not be negative, all else needs at least 1"
            )
        cell = min(self.cell_px)
        of_window = f"{self.rows} x {self.cols} cells of a window of {self.window_px} px"
        if cell <= 0:
            raise ValueError(f"gap_px={self.gap_px}: leaves nothing of {of_window}; needs less than {self._largest_gap_px:g}")
        if self.tile_px > cell:
            raise ValueError(
                f"tile_px={self.tile_px}, gap_px={self.gap_px}: {of_window} have {cell:g} px; take smaller tiles, or a smaller gap"
            )
        if (self.jitter_px or 0) > cell - self.tile_px:
            raise ValueError(
                f"jitter_px={self.jitter_px}: tiles of {self.tile_px} px have {cell - self.tile_px:g} px of room in {of_window}"
            )

    @property
    def cell_px(self) -> tuple[float, float]:
        """(height, width) of a cell."""
        height, width = ((self.window_px - (number - 1) * self.gap_px) / number for number in (self.rows, self.cols))
        return height, width

    @property
    def _largest_gap_px(self) -> float:
        return self.window_px / (max(self.rows, self.cols) - 1)

    @property
    def fixed_views(self) -> int:
        return self.rows * self.cols

    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Snap, earlier: Earlier) -> Boxes:
        window = random_resized(self, keys, source_size[:, None, ::-1], snap)  # (B, 1, 4)
        corner, frame = window[..., :2], window[..., 2:] - window[..., :2]
        cells, shown = cells_of(snap), self.window_px
        row, col = np.indices((self.rows, self.cols)).reshape(2, -1)
        cell = np.array(self.cell_px)[::-1]  # width, height
        start = np.stack([col, row], -1) * (cell + self.gap_px)  # (V, 2)
        # on the grid, in whole steps of it: only these are within the cell; the nudge is for what floats round off
        first = np.ceil(start / shown * frame * cells - 1e-6)
        last = np.floor((start + cell) / shown * frame * cells + 1e-6)
        side = np.clip(np.rint(self.tile_px / shown * frame * cells), 1, np.maximum(last - first, 1))
        room = np.maximum(last - first - side, 0)
        spread = room if self.jitter_px is None else np.minimum(room, np.rint(self.jitter_px / shown * frame * cells))
        words = keys.words_for(views, Purpose.PLACE)[:, :, 0, :2]
        place = first + (room - spread) // 2 + integer(words, spread.astype(np.int64) + 1)
        place = np.clip(place, 0, frame * cells - side)  # windows that have not a place for each tile
        return Boxes.all_kept(np.concatenate([place, place + side], -1) / cells + np.concatenate([corner, corner], -1))

    def smallest_side_px(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        return smallest_side_px(self, sizes) * (self.tile_px / self.window_px)

    @classmethod
    def examples(cls, of: str) -> Mapping[str, Self]:
        return {"": cls(rows=2, cols=4, window_px=96, tile_px=16, gap_px=2)}


def draw_pairs(law: Paired, keys: Keys, source_size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Draw reference and target boxes before they are snapped: (p, s) first, then the reference's side, then the place.

    Shapes: source_size (B, 2) (height, width) -> (B, 2, 4) float64, xyxy, source pixels.
    Source: ours; p is drawn without rejection, strip by strip of the square ring.
    """
    u = uniform(keys.words(1, Purpose.BOX, 2)[:, 0]).reshape(len(source_size), 8)
    a, d = law.position_max, law.position_min
    share = a / (a + d)  # of the ring's area in the two strips |x| >= d, which reach over all y
    beside = u[:, 0] < share
    across = np.where(beside, u[:, 0] / share, (u[:, 0] - share) / (1 - share) if share < 1 else 0.5)  # uniform again, given the strip
    signed = 2 * np.where(beside, across, u[:, 1]) - 1  # along the strip's thickness, with its side
    outer = np.sign(signed) * (d + (a - d) * np.abs(signed))
    inner = np.where(beside, a * (2 * u[:, 1] - 1), d * (2 * across - 1))
    position = np.stack([np.where(beside, outer, inner), np.where(beside, inner, outer)], -1)
    scale = np.exp(law.log_scale_max * (2 * u[:, 2] - 1))
    stretch = np.exp(np.log(law.aspect_jitter) * (2 * u[:, 4] - 1))
    low, high = np.log(law.side_bounds)
    side = source_size.min(-1) * np.exp(low + u[:, 3] * (high - low))

    half = np.stack([scale * stretch, scale / stretch], -1) / 2  # of the target, in reference sides
    first, last = np.minimum(-0.5, position - half), np.maximum(0.5, position + half)
    border = (law.border_frac * source_size.min(-1))[:, None]
    room = np.maximum(source_size[:, ::-1] - 2 * border - (last - first) * side[:, None], 0)
    place = uniform(keys.words(1, Purpose.PLACE)[:, 0, 0, :2])
    center = border + room * place - first * side[:, None]
    reference = np.concatenate([center - side[:, None] / 2, center + side[:, None] / 2], -1)
    middle = center + position * side[:, None]
    target = np.concatenate([middle - half * side[:, None], middle + half * side[:, None]], -1)
    return np.stack([reference, target], 1)
