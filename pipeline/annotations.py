"""Points, boxes and masks of a picture, carried into its views by the views' records.

Here: what a view shows of each, and how much of it; their forms as other libraries have them.
Not here: the transform that is given them (transform.py), the maps (geometry.py).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from wherefrom.pipeline import geometry
from wherefrom.pipeline.views import ViewGeometry

if TYPE_CHECKING:
    from torchvision.tv_tensors import BoundingBoxes

Rows = ArrayLike | Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Carried:
    """Where the annotations of B pictures went in the V views of one family: one tensor a picture, since their numbers N differ.

    What was not given has N = 0. Nothing is clamped: points and boxes go on beyond the view's edges.
    """

    family: str
    size_px: tuple[int, int]  # (height, width) of the view
    points: tuple[Tensor, ...]  # B of (V, N, 2) float64, (x, y), view pixels
    points_visible: tuple[Tensor, ...]  # B of (V, N) bool: the point lies in the view's box
    boxes: tuple[Tensor, ...]  # B of (V, N, 4) float64, xyxy, view pixels
    boxes_visible: tuple[Tensor, ...]  # B of (V, N) float64, the part of each box that the view shows
    masks: tuple[Tensor, ...]  # B of (V, N, height, width), the dtype as given; nearest source pixel

    def __repr__(self) -> str:
        counts = {name: sum(tensor.shape[1] for tensor in getattr(self, name)) for name in ("points", "boxes", "masks")}
        carried = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"Carried({self.family!r}, {len(self.points)} pictures, {carried}, size_px={self.size_px})"

    def clamped_boxes(self, sample: int) -> Tensor:
        """Return the boxes of a picture cut back to the view's edges: (V, N, 4) float64; what a view does not show has no area."""
        height, width = self.size_px
        edge = self.boxes[sample].new_tensor([width, height, width, height])
        return torch.minimum(self.boxes[sample].clamp(min=0), edge)

    def bounding_boxes(self, sample: int, view: int) -> "BoundingBoxes":
        """Return the boxes of a picture in one view as torchvision has them: (N, 4), XYXY, canvas_size = size_px, not clamped."""
        from torchvision.tv_tensors import BoundingBoxes

        boxes: Any = BoundingBoxes  # its overloads leave out the format's name
        return boxes(self.boxes[sample][view], format="XYXY", canvas_size=self.size_px, clamping_mode=None)


def carry(
    record: ViewGeometry,
    *,
    points: Rows | None = None,
    boxes: Rows | None = None,
    masks: Rows | None = None,
) -> Carried:
    """Carry annotations of one picture into its views; `record` is any record of one picture, a loader's `views.geometry[b]` too.

    Shapes: points (N, 2) as (x, y), boxes (N, 4) xyxy or `BoundingBoxes`, masks (H, W) or (N, H, W).
    Returns: what was given lies where the first of it lay, on the CPU if that is no tensor; the record may lie elsewhere.
    Raises: ValueError if a shape does not fit, a box is inverted, a mask or canvas has another size than the source.
    """
    if len(record) != 1:
        raise ValueError(f"record holds {len(record)} pictures, annotations belong to one; pass views.geometry[b]")
    carried = _carried_nothing(record.family, len(record.view), record.size_px)
    device = next((rows.device for rows in (points, boxes, masks) if isinstance(rows, Tensor)), torch.device("cpu"))
    if record.boxes.device != device:
        record = record.to(device)
    source_hw = (int(record.source_size[0, 0]), int(record.source_size[0, 1]))
    cut = record.boxes[0].double()[:, None]  # (V, 1, 4)
    if points is not None:
        dots = _as_rows("points", points, 2).to(device)
        inside = ((dots >= cut[..., :2]) & (dots < cut[..., 2:])).all(-1)  # (V, N)
        carried = replace(carried, points=(geometry.map_points(record.source_to_view[0], dots),), points_visible=(inside,))
    if boxes is not None:
        wholes = _as_boxes(boxes, source_hw).to(device)
        areas = geometry.area(wholes)
        shown = geometry.overlap_area(wholes, cut)
        visible = torch.where(areas > 0, shown / areas, torch.zeros_like(shown))
        carried = replace(carried, boxes=(geometry.map_boxes(record.source_to_view[0], wholes),), boxes_visible=(visible,))
    if masks is not None:
        carried = replace(carried, masks=(_carry_masks(record, _as_masks(masks, source_hw).to(device)),))
    return carried


def carry_all(record: ViewGeometry, annotations: Sequence[tuple[Rows | None, Rows | None, Rows | None]]) -> Carried:
    """Carry (points, boxes, masks) of each of B pictures into its views."""
    nothing = _carried_nothing(record.family, len(record.view), record.size_px)
    return join_carried(
        [
            nothing if points is boxes is masks is None else carry(record[b], points=points, boxes=boxes, masks=masks)
            for b, (points, boxes, masks) in enumerate(annotations)
        ]
    )


@functools.lru_cache
def _carried_nothing(family: str, views: int, size_px: tuple[int, int]) -> Carried:
    """Return what a picture without annotations carries; its tensors have no elements, so that all pictures may share them."""
    return Carried(
        family=family,
        size_px=size_px,
        points=(torch.empty(views, 0, 2, dtype=torch.float64),),
        points_visible=(torch.empty(views, 0, dtype=torch.bool),),
        boxes=(torch.empty(views, 0, 4, dtype=torch.float64),),
        boxes_visible=(torch.empty(views, 0, dtype=torch.float64),),
        masks=(torch.empty(views, 0, *size_px, dtype=torch.uint8),),
    )


def join_carried(parts: Sequence[Carried]) -> Carried:
    """Return what several pictures carry into views of one family, in their order."""
    names = ("points", "points_visible", "boxes", "boxes_visible", "masks")
    joined: dict[str, Any] = {name: tuple(tensor for part in parts for tensor in getattr(part, name)) for name in names}
    return replace(parts[0], **joined)


def _as_rows(name: str, rows: Rows, columns: int) -> Tensor:
    """Return (N, columns) float64; an empty list, as of a picture without objects, is N = 0."""
    tensor = rows.as_subclass(Tensor) if isinstance(rows, Tensor) else torch.as_tensor(np.asarray(rows))
    tensor = tensor.reshape(0, columns) if tensor.shape == (0,) else tensor
    if tensor.ndim != 2 or tensor.shape[1] != columns:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (N, {columns})")
    return tensor.double()


def _as_boxes(boxes: Rows, source_hw: tuple[int, int]) -> Tensor:
    """Return (N, 4) float64, xyxy."""
    if isinstance(boxes, Tensor) and hasattr(boxes, "canvas_size"):  # torchvision's: only then is it loaded
        from torchvision.transforms.v2.functional import convert_bounding_box_format
        from torchvision.tv_tensors import BoundingBoxFormat

        theirs: Any = boxes
        if tuple(theirs.canvas_size) != source_hw:
            raise ValueError(f"boxes have canvas_size={tuple(theirs.canvas_size)}, the picture is {source_hw} (height, width) when upright")
        unrotated = (BoundingBoxFormat.XYXY, BoundingBoxFormat.XYWH, BoundingBoxFormat.CXCYWH)
        if theirs.format not in unrotated:
            raise ValueError(f"boxes have format {theirs.format.value}, expected one of {[item.value for item in unrotated]}")
        boxes = convert_bounding_box_format(theirs, new_format=BoundingBoxFormat.XYXY)
    rows = _as_rows("boxes", boxes, 4)
    wrong = ~(rows[:, 2:] >= rows[:, :2]).all(-1)  # nan too
    if wrong.any():
        n = int(wrong.nonzero()[0, 0])
        raise ValueError(f"boxes[{n}] is {rows[n].tolist()}, expected x0 <= x1 and y0 <= y1; other formats come as BoundingBoxes")
    return rows


def _as_masks(masks: Rows, source_hw: tuple[int, int]) -> Tensor:
    """Return (N, H, W)."""
    tensor = masks.as_subclass(Tensor) if isinstance(masks, Tensor) else torch.as_tensor(np.asarray(masks))
    if tensor.ndim not in (2, 3) or tuple(tensor.shape[-2:]) != source_hw:
        raise ValueError(f"masks have shape {tuple(tensor.shape)}, expected (N, {source_hw[0]}, {source_hw[1]}) as the upright picture")
    return tensor.reshape(-1, *source_hw)


def _carry_masks(record: ViewGeometry, masks: Tensor) -> Tensor:
    """Return masks (N, H, W) as every view shows them, (V, N, height, width): the source pixel under each view pixel's center."""
    height, width = record.size_px
    if not len(masks):
        return masks.new_empty(len(record.view), 0, height, width)
    centers = (torch.arange(side, device=masks.device) + 0.5 for side in (height, width))
    rows, cols = torch.meshgrid(*centers, indexing="ij")
    under = geometry.map_points(record.view_to_source[0], torch.stack([cols, rows], -1).view(-1, 2)).floor().long()  # (V, h * w, 2)
    return masks[:, under[..., 1], under[..., 0]].transpose(0, 1).unflatten(-1, (height, width))
