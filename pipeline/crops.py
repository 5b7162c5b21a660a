"""Draw where every view comes from: boxes by the laws of view_recipe.py, mirrors and quarter turns, whole batches at once.

Here: numpy on (B, V) arrays; each number from draws.py; boxes are quantized here, and everything downstream starts from them.
Not here: pixels. A picture too small for a law gives its whole frame as box, and an invalid view.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.draws import PICTURE, Keys, Purpose, integer, random_words, uniform
from wherefrom.pipeline.view_recipe import Center, Disjoint, Grid, Independent, Inside, Overlapping, Paired, Snap, ViewFamily

SUBPIXELS = 1024  # with snap="none" boxes lie on multiples of 1/1024 pixel: exact in float32 up to 2^14


@dataclass(frozen=True, kw_only=True, slots=True)
class Boxes:
    """Boxes as drawn, (B, V, 4) float64 xyxy; which of them a network may learn from; which kept the law without a fallback."""

    boxes: NDArray[np.float64]
    valid: NDArray[np.bool_]  # (B, V)
    accepted: NDArray[np.bool_]  # (B, V)


def draw_orientation(family: ViewFamily, keys: Keys) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return mirrors (B, V) bool and quarter turns (B, V) int64, 0 to 3, as the family's policy has them."""
    shape = (len(keys.drawn_for), family.views)
    flipped = np.zeros(shape, bool)
    turns = np.zeros(shape, np.int64)
    if family.mirror == "view":
        flipped = keys.words_for(family.views, Purpose.MIRROR)[:, :, 0, 0] >= 1 << 31
    elif family.mirror == "picture":
        words = random_words(keys.seed, keys.epoch, keys.drawn_for, PICTURE, 0, Purpose.MIRROR)
        flipped = np.repeat(words[:, :1] >= 1 << 31, family.views, axis=1)
    if family.turns:
        turns = integer(keys.words_for(family.views, Purpose.TURN)[:, :, 0, 0], 4)
    return flipped, turns


def draw_boxes(family: ViewFamily, keys: Keys, source_size: NDArray[np.int32], drawn: dict[str, NDArray[np.float64]]) -> Boxes:
    """Draw one family's boxes by its law.

    Shapes: source_size (B, 2) (height, width); `drawn` holds the boxes of the families before it -> boxes (B, V, 4).
    Units:  source pixels, multiples of 1 or 1/1024 as `family.snap` says.
    """
    size = source_size.astype(np.float64)
    law, views, snap = family.law, family.views, family.snap
    if isinstance(law, Center | Grid):
        cut = _center(law, size, views, snap) if isinstance(law, Center) else _grid(law, size, snap)
        always = np.ones(cut.shape[:2], bool)
        return Boxes(boxes=cut, valid=always, accepted=always)

    containing = drawn[law.of][:, np.arange(views) % drawn[law.of].shape[1]] if isinstance(law, Inside) else None  # (B, V, 4)
    asked = size[:, None] if containing is None else (containing[..., 2:] - containing[..., :2])[..., ::-1]
    small = np.minimum(law.smallest_side_px(asked), asked.min(-1)) < family.min_side_px  # (B, 1), inside a family (B, V)
    size = np.where(small[:, :1], 256.0, size)  # any size will do: these rows are overwritten
    if isinstance(law, Independent):
        boxes = _independent(law, keys, np.repeat(size[:, None, ::-1], views, axis=1), snap)
        made = Boxes(boxes=boxes, valid=np.ones(boxes.shape[:2], bool), accepted=np.ones(boxes.shape[:2], bool))
    elif isinstance(law, Paired):
        boxes = snap_boxes(draw_pairs(law, keys, size), size, snap)
        made = Boxes(boxes=boxes, valid=np.ones(boxes.shape[:2], bool), accepted=np.ones(boxes.shape[:2], bool))
    elif isinstance(law, Disjoint):
        made = _disjoint(law, keys, size, views, snap)
    elif isinstance(law, Overlapping):
        made = _overlapping(law, keys, size, views, snap, None if law.of == family.name else drawn[law.of])
    else:
        assert containing is not None
        made = _inside(law, keys, containing, snap)
    whole = np.zeros((len(small), 1, 4))
    whole[:, 0, 2:] = source_size[:, ::-1]
    return Boxes(boxes=np.where(small[..., None], whole, made.boxes), valid=made.valid & ~small, accepted=made.accepted & ~small)


def snap_boxes(boxes: NDArray[np.float64], source_size: NDArray[np.float64], snap: Snap) -> NDArray[np.float64]:
    """Round sides, then the top left corner, to the grid of `snap`; shift what sticks out of the source back inside.

    Shapes: boxes (B, V, 4), source_size (B, 2) (height, width) -> (B, V, 4).
    """
    cells = 1 if snap == "pixel" else SUBPIXELS
    frame = source_size[:, None, ::-1]
    sides = np.clip(np.rint((boxes[..., 2:] - boxes[..., :2]) * cells), 1, frame * cells)
    corner = np.clip(np.rint(boxes[..., :2] * cells), 0, frame * cells - sides)
    return np.concatenate([corner, corner + sides], -1) / cells


def _sized(
    words: NDArray[np.uint32], area_frac: tuple[float, float], aspect: tuple[float, float], frame: NDArray[np.float64], snap: Snap
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return sides (..., 2) as (width, height), uniform in area and log-uniform in aspect, and whether they fit; frame as sides."""
    u = uniform(words[..., :2])
    area = frame[..., 0] * frame[..., 1] * (area_frac[0] + u[..., 0] * (area_frac[1] - area_frac[0]))
    ratio = np.exp(np.log(aspect[0]) + u[..., 1] * (np.log(aspect[1]) - np.log(aspect[0])))
    cells = 1 if snap == "pixel" else SUBPIXELS
    sides = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], -1)) * cells) / cells
    return sides, ((sides > 0) & (sides <= frame)).all(-1)


def _placed(words: NDArray[np.uint32], sides: NDArray[np.float64], frame: NDArray[np.float64], snap: Snap) -> NDArray[np.float64]:
    """Return boxes (..., 4) whose corner is uniform over every valid place of the grid, the last one included."""
    cells = 1 if snap == "pixel" else SUBPIXELS
    room = np.maximum((frame - sides) * cells, 0).astype(np.int64)
    corner = integer(words[..., 2:], room + 1) / cells
    return np.concatenate([corner, corner + sides], -1)


def _fallback(aspect: tuple[float, float], frame: NDArray[np.float64], snap: Snap) -> NDArray[np.float64]:
    """Return the largest centered boxes (..., 4) whose aspect lies in range; frame (..., 2) as (width, height)."""
    width, height = frame[..., 0], frame[..., 1]
    cells = 1 if snap == "pixel" else SUBPIXELS
    sides = np.stack([np.minimum(width, height * aspect[1]), np.minimum(height, width / aspect[0])], -1)
    sides = np.maximum(np.rint(sides * cells), 1) / cells
    corner = np.floor((frame - sides) * cells / 2) / cells
    return np.concatenate([corner, corner + sides], -1)


def _candidates(
    law: Disjoint | Overlapping, keys: Keys, size: NDArray[np.float64], views: int, snap: Snap
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return every try of every view: boxes (B, V, T, 4), and which fit (B, V, T)."""
    words = keys.words(views, Purpose.BOX, law.tries)
    frame = np.broadcast_to(size[:, None, None, ::-1], (*words.shape[:3], 2))
    sides, fits = _sized(words, law.area_frac, law.aspect, frame, snap)
    return _placed(words, sides, frame, snap), fits


def _shared(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the area that boxes (..., 4) share."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.maximum(sides, 0).prod(-1)


def _independent(law: Independent | Inside, keys: Keys, frame: NDArray[np.float64], snap: Snap) -> NDArray[np.float64]:
    """Draw RandomResizedCrop boxes (B, V, 4) in frames (B, V, 2) as (width, height)."""
    boxes = np.empty((*frame.shape[:2], 4))
    rows, cols = np.indices(frame.shape[:2]).reshape(2, -1)
    for blocks in (range(1), range(1, law.tries)):  # a try each, then all further tries of those that it did not fit
        if not len(rows) or not blocks:
            break
        sample, view = keys.drawn_for[rows, None], cols[:, None]
        words = random_words(keys.seed, keys.epoch, sample, keys.family, view, Purpose.BOX, blocks)  # (n, tries, 4)
        around = np.repeat(frame[rows, cols][:, None], len(blocks), axis=1)
        sides, fits = _sized(words, law.area_frac, law.aspect, around, snap)
        found = np.any(fits, axis=1)
        first = np.flatnonzero(found), fits[found].argmax(1)
        boxes[rows[found], cols[found]] = _placed(words[first], sides[first], around[first], snap)
        rows, cols = rows[~found], cols[~found]
    boxes[rows, cols] = _fallback(law.aspect, frame[rows, cols], snap)
    return boxes


def draw_pairs(law: Paired, keys: Keys, source_size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Draw reference and target boxes before they are snapped: (p, s) first, then the reference's side, then the place.

    Shapes: source_size (B, 2) (height, width) -> (B, 2, 4) float64, xyxy, source pixels.
    Source: METHODS sheet 1.10's constructive sampler, ours; p is drawn without rejection, strip by strip of the square ring.
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


def _disjoint(law: Disjoint, keys: Keys, size: NDArray[np.float64], views: int, snap: Snap) -> Boxes:
    candidates, fits = _candidates(law, keys, size, views, snap)
    gap = (law.min_gap_frac * size.min(-1))[:, None] * np.array([-1.0, -1, 1, 1])
    row = np.arange(len(size))
    boxes, accepted = np.empty((len(size), views, 4)), np.empty((len(size), views), bool)
    for view in range(views):
        placed = boxes[:, :view] + gap[:, None]
        shared = _shared(candidates[:, view, :, None], placed[:, None]).sum(-1)  # (B, T)
        shared[~fits[:, view]] = np.inf
        best = shared.argmin(1)  # the first of the least
        boxes[:, view] = candidates[row, view, best]
        accepted[:, view] = shared[row, best] == 0
    valid = np.any(fits, axis=-1)
    boxes = np.where(valid[..., None], boxes, _fallback(law.aspect, size[:, None, ::-1], snap))
    return Boxes(boxes=boxes, valid=valid, accepted=accepted)


def _overlapping(
    law: Overlapping, keys: Keys, size: NDArray[np.float64], views: int, snap: Snap, anchors: NDArray[np.float64] | None
) -> Boxes:
    candidates, fits = _candidates(law, keys, size, views, snap)
    needed = law.min_shared_frac * size.prod(-1)
    row = np.arange(len(size))
    boxes = np.empty((len(size), views, 4))
    valid, accepted = np.empty((2, len(size), views), bool)
    for view in range(views):
        others = boxes[:, :view] if anchors is None else anchors
        if others.shape[1]:
            shared = _shared(candidates[:, view, :, None], others[:, None]).min(-1)  # (B, T), with the view it meets least
        else:
            shared = np.broadcast_to(needed[:, None], fits.shape[::2]).copy()
        shared[~fits[:, view]] = -1
        keeps = shared >= needed[:, None]
        best = np.where(keeps.any(1), keeps.argmax(1), shared.argmax(1))
        accepted[:, view] = keeps.any(1)
        boxes[:, view] = candidates[row, view, best]
        if others.shape[1]:
            saved = ~accepted[:, view] & (_shared(others[:, :1], others).min(-1) >= needed)
            boxes[:, view] = np.where(saved[:, None], others[:, 0], boxes[:, view])
            valid[:, view] = accepted[:, view] | saved
        else:
            valid[:, view] = accepted[:, view]
        lost = ~fits[:, view].any(1) & ~valid[:, view]
        boxes[:, view] = np.where(lost[:, None], _fallback(law.aspect, size[:, ::-1], snap), boxes[:, view])
    return Boxes(boxes=boxes, valid=valid, accepted=accepted)


def _inside(law: Inside, keys: Keys, around: NDArray[np.float64], snap: Snap) -> Boxes:
    cells = 1 if snap == "pixel" else SUBPIXELS
    corner = np.ceil(around[..., :2] * cells) / cells
    frame = np.maximum(np.floor(around[..., 2:] * cells) / cells - corner, 0)
    boxes = _independent(law, keys, frame, snap) + np.concatenate([corner, corner], -1)
    kept = ((boxes[..., :2] >= around[..., :2]) & (boxes[..., 2:] <= around[..., 2:])).all(-1)
    return Boxes(boxes=np.where(kept[..., None], boxes, around), valid=kept, accepted=kept)


def _center(law: Center, size: NDArray[np.float64], views: int, snap: Snap) -> NDArray[np.float64]:
    sides = size[:, ::-1]
    if law.resize_px is not None and law.crop_px is not None:
        sides = np.repeat(size.min(-1, keepdims=True) * (law.crop_px / law.resize_px), 2, axis=1)
    corner = (size[:, ::-1] - sides) / 2
    return np.repeat(snap_boxes(np.concatenate([corner, corner + sides], -1)[:, None], size, snap), views, axis=1)


def _grid(law: Grid, size: NDArray[np.float64], snap: Snap) -> NDArray[np.float64]:
    row, col = np.indices((law.rows, law.cols)).reshape(2, -1)
    along = np.stack([col / max(law.cols - 1, 1), row / max(law.rows - 1, 1)], -1)  # (V, 2), 0 to 1
    if law.cols == 1:
        along[:, 0] = 0.5
    if law.rows == 1:
        along[:, 1] = 0.5
    sides = law.side_frac * size[:, None, ::-1]
    corner = along * (size[:, None, ::-1] - sides)
    return snap_boxes(np.concatenate([corner, corner + sides], -1), size, snap)
