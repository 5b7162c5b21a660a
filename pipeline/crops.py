"""Boxes: drawn inside a frame, rounded to the grid of pixels, compared; what crop laws share.

Here: numpy on (B, V) arrays; each number from draws.py; boxes are quantized here, and everything downstream starts from them.
Not here: the laws (laws.py), what a law is (view_recipe.py), records (records.py). No pixels.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.draws import Keys, Purpose, integer, random_words, uniform

Snap = Literal["pixel", "none"]

SUBPIXELS = 1024  # with snap="none" boxes lie on multiples of 1/1024 pixel: exact in float32 up to 2^14


@dataclass(frozen=True, kw_only=True, slots=True)
class Boxes:
    """Boxes as drawn, (B, V, 4) float64 xyxy; which of them a network may learn from; which kept the law without a fallback."""

    boxes: NDArray[np.float64]
    valid: NDArray[np.bool_]  # (B, V)
    accepted: NDArray[np.bool_]  # (B, V)

    @classmethod
    def all_kept(cls, boxes: NDArray[np.float64]) -> "Boxes":
        """Return boxes (B, V, 4) all of which are valid and kept the law."""
        return cls(boxes=boxes, valid=np.ones(boxes.shape[:2], bool), accepted=np.ones(boxes.shape[:2], bool))


class AreaLaw(Protocol):
    """What a law has whose boxes are uniform in area and log-uniform in aspect ratio."""

    @property
    def area_frac(self) -> tuple[float, float]: ...  # of the frame's area
    @property
    def aspect(self) -> tuple[float, float]: ...  # width / height
    @property
    def tries(self) -> int: ...


def smallest_side_px(law: AreaLaw, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the shortest side that boxes may get in frames of sizes (..., 2), (height, width): (...) pixels."""
    area = law.area_frac[0] * sizes.prod(-1)
    return np.minimum(np.sqrt(area * min(law.aspect[0], 1 / law.aspect[1])), sizes.min(-1))


def cells_of(snap: Snap) -> int:
    """Return how many places a box's edge has along a pixel."""
    return 1 if snap == "pixel" else SUBPIXELS


def snap_boxes(boxes: NDArray[np.float64], source_size: NDArray[np.float64], snap: Snap) -> NDArray[np.float64]:
    """Round sides, then the top left corner, to the grid of `snap`; shift what sticks out of the source back inside.

    Shapes: boxes (B, V, 4), source_size (B, 2) (height, width) -> (B, V, 4).
    """
    cells = cells_of(snap)
    frame = source_size[:, None, ::-1]
    sides = np.clip(np.rint((boxes[..., 2:] - boxes[..., :2]) * cells), 1, frame * cells)
    corner = np.clip(np.rint(boxes[..., :2] * cells), 0, frame * cells - sides)
    return np.concatenate([corner, corner + sides], -1) / cells


def _sized(
    law: AreaLaw, words: NDArray[np.uint32], frame: NDArray[np.float64], snap: Snap
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return sides (..., 2) as (width, height), uniform in area and log-uniform in aspect, and whether they fit; frame as sides."""
    u = uniform(words[..., :2])
    area_frac, aspect = law.area_frac, law.aspect
    area = frame[..., 0] * frame[..., 1] * (area_frac[0] + u[..., 0] * (area_frac[1] - area_frac[0]))
    ratio = np.exp(np.log(aspect[0]) + u[..., 1] * (np.log(aspect[1]) - np.log(aspect[0])))
    cells = cells_of(snap)
    sides = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], -1)) * cells) / cells
    return sides, ((sides > 0) & (sides <= frame)).all(-1)


def _placed(words: NDArray[np.uint32], sides: NDArray[np.float64], frame: NDArray[np.float64], snap: Snap) -> NDArray[np.float64]:
    """Return boxes (..., 4) whose corner is uniform over every valid place of the grid, the last one included."""
    cells = cells_of(snap)
    room = np.maximum((frame - sides) * cells, 0).astype(np.int64)
    corner = integer(words[..., 2:], room + 1) / cells
    return np.concatenate([corner, corner + sides], -1)


def centered_fallback(aspect: tuple[float, float], frame: NDArray[np.float64], snap: Snap) -> NDArray[np.float64]:
    """Return the largest centered boxes (..., 4) whose aspect lies in range; frame (..., 2) as (width, height)."""
    width, height = frame[..., 0], frame[..., 1]
    cells = cells_of(snap)
    sides = np.stack([np.minimum(width, height * aspect[1]), np.minimum(height, width / aspect[0])], -1)
    sides = np.maximum(np.rint(sides * cells), 1) / cells
    corner = np.floor((frame - sides) * cells / 2) / cells
    return np.concatenate([corner, corner + sides], -1)


def candidates(
    law: AreaLaw, keys: Keys, size: NDArray[np.float64], views: int, snap: Snap
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return every try of every view in sources of size (B, 2): boxes (B, V, T, 4), and which fit (B, V, T)."""
    words = keys.words(views, Purpose.BOX, law.tries)
    frame = np.broadcast_to(size[:, None, None, ::-1], (*words.shape[:3], 2))
    sides, fits = _sized(law, words, frame, snap)
    return _placed(words, sides, frame, snap), fits


def shared_area(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the area that boxes (..., 4) share."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.maximum(sides, 0).prod(-1)


def random_resized(law: AreaLaw, keys: Keys, frame: NDArray[np.float64], snap: Snap) -> NDArray[np.float64]:
    """Draw RandomResizedCrop boxes (B, V, 4) in frames (B, V, 2) as (width, height)."""
    boxes = np.empty((*frame.shape[:2], 4))
    rows, cols = np.indices(frame.shape[:2]).reshape(2, -1)
    for blocks in (range(1), range(1, law.tries)):  # a try each, then all further tries of those that it did not fit
        if not len(rows) or not blocks:
            break
        sample, view = keys.drawn_for[rows, None], cols[:, None]
        words = random_words(keys.seed, keys.epoch, sample, keys.family, view, Purpose.BOX, blocks)  # (n, tries, 4)
        around = np.repeat(frame[rows, cols][:, None], len(blocks), axis=1)
        sides, fits = _sized(law, words, around, snap)
        any_fits = np.any(fits, axis=1)
        first = np.flatnonzero(any_fits), fits[any_fits].argmax(1)
        boxes[rows[any_fits], cols[any_fits]] = _placed(words[first], sides[first], around[first], snap)
        rows, cols = rows[~any_fits], cols[~any_fits]
    boxes[rows, cols] = centered_fallback(law.aspect, frame[rows, cols], snap)
    return boxes
