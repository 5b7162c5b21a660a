"""The same views for people with their own dataset: a decoded picture and its key in, views out.

Here: `ViewTransform`, which keeps nothing between calls: record and pixels are those of the loader's torch renderer for the same
(seed, epoch, sample) and picture; points, boxes and masks carried along; a sampler of keys and `collate` for torch's DataLoader.
Not here: reading files. There is no counter anywhere: a call without its key is refused, and the key comes from the sampler.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from wherefrom.pipeline import geometry
from wherefrom.pipeline.colour import draw_colours
from wherefrom.pipeline.crops import draw_geometry
from wherefrom.pipeline.order import Order
from wherefrom.pipeline.recipe import Recipe
from wherefrom.pipeline.render import CutterName, make_cutter
from wherefrom.pipeline.render_threads import view_shapes
from wherefrom.pipeline.views import Batch, ViewGeometry, Views

if TYPE_CHECKING:
    from torchvision.tv_tensors import BoundingBoxes

_EXIF_ORIENTATION = 0x0112


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Transformed:
    """Views of B pictures (one from `ViewTransform`, more from `collate`) with what was carried along, a family after the other."""

    batch: Batch
    carried: tuple[Carried, ...]

    def family(self, name: str) -> Views:
        """Return the views of the family called `name`."""
        return self.batch.family(name)

    def carried_into(self, name: str) -> Carried:
        """Return where annotations went in the views of the family called `name`."""
        for carried in self.carried:
            if carried.family == name:
                return carried
        raise KeyError(f"family {name!r}: carried into {[carried.family for carried in self.carried]}")


class ViewTransform:
    """Cuts the recipe's views out of pictures that somebody else decoded.

    `transform(picture, sample=i, epoch=e)`: the key decides the draws, so equal calls give equal views in any process and order.
    A PIL picture is turned upright by its EXIF orientation first, as the loader does; arrays and tensors are upright already.
    renderer: "native", the compiled kernel, whose pixels are the loader's on the CPU; "torch"; "auto": the first that is there.
    Raises: ValueError if a family has snap="none" and "torch" cuts: stock resizing cuts whole pixels.
    """

    def __init__(self, recipe: Recipe, *, seed: int = 0, renderer: CutterName = "auto") -> None:
        self.recipe = recipe
        self.seed = seed
        self._cutter = make_cutter(recipe, renderer)

    def __call__(
        self,
        picture: Image.Image | NDArray[np.uint8] | Tensor,
        *,
        sample: int,
        epoch: int,
        label: int = -1,
        points: ArrayLike | Tensor | None = None,
        boxes: ArrayLike | Tensor | None = None,
        masks: ArrayLike | Tensor | None = None,
    ) -> Transformed:
        """Return the views of one picture, B = 1, and where its annotations went in them.

        sample, epoch: the key; sample is the picture's number in the dataset, 0 <= sample < 2**40.
        Shapes: picture PIL, (H, W, 3) uint8 array or (3, H, W) uint8 tensor; points (N, 2) as (x, y); boxes (N, 4) xyxy, or
                `BoundingBoxes` of any unrotated format; masks (H, W) or (N, H, W) of any dtype.
        Units:  pixels of the upright picture, pixel i covers [i, i + 1).
        Raises: TypeError or ValueError if the key is none, or something has another type, shape or size.
        """
        _check_key("sample", sample)
        _check_key("epoch", epoch)
        stored, orientation = _as_stored(picture)
        height, width = stored.shape[:2] if orientation < 5 else stored.shape[1::-1]
        ids, size = np.array([sample], np.int64), np.array([(height, width)], np.int32)
        drawn = draw_geometry(
            self.recipe,
            seed=self.seed,
            epoch=int(epoch),
            drawn_for=ids,
            source_size=size,
            stored_orientation=np.array([orientation], np.uint8),
        )
        colours = draw_colours(self.recipe, seed=self.seed, epoch=int(epoch), drawn_for=ids)
        made = [torch.empty(shape, dtype=getattr(torch, self.recipe.pixels)) for shape in view_shapes(self.recipe, 1)]
        plan = self._cutter.plan([(item.geometry, colour) for item, colour in zip(drawn, colours, strict=True)], made)
        self._cutter.cut(plan, 0, stored)
        batch = Batch(
            sample=torch.from_numpy(ids),
            drawn_for=torch.from_numpy(ids),
            label=torch.tensor([label]),
            source_size=torch.from_numpy(size),
            views=tuple(
                Views(pixels=tensor, geometry=item.geometry, valid=item.valid, photometric=colour)
                for tensor, item, colour in zip(made, drawn, colours, strict=True)
            ),
        )
        return Transformed(batch=batch, carried=tuple(carry(item.geometry, points=points, boxes=boxes, masks=masks) for item in drawn))


def carry(
    record: ViewGeometry,
    *,
    points: ArrayLike | Tensor | None = None,
    boxes: ArrayLike | Tensor | None = None,
    masks: ArrayLike | Tensor | None = None,
) -> Carried:
    """Carry annotations of one picture into its views; `record` is any record of one picture, a loader's `views.geometry[b]` too.

    Shapes: points (N, 2) as (x, y), boxes (N, 4) xyxy or `BoundingBoxes`, masks (H, W) or (N, H, W).
    Raises: ValueError if a shape does not fit, a box is inverted, a mask or canvas has another size than the source.
    """
    if len(record) != 1:
        raise ValueError(f"record holds {len(record)} pictures, annotations belong to one; pass views.geometry[b]")
    source_hw = (int(record.source_size[0, 0]), int(record.source_size[0, 1]))
    to_view = record.source_to_view[0]  # (V, 2, 3)
    cut = record.boxes[0].double()[:, None]  # (V, 1, 4)

    dots = _as_rows("points", points, 2)
    inside = ((dots >= cut[..., :2]) & (dots < cut[..., 2:])).all(-1)  # (V, N)

    wholes = _as_boxes(boxes, source_hw)
    areas = geometry.area(wholes)
    shown = geometry.overlap_area(wholes, cut)
    visible = torch.where(areas > 0, shown / areas, torch.zeros_like(shown))
    return Carried(
        family=record.family,
        size_px=record.size_px,
        points=(geometry.map_points(to_view, dots),),
        points_visible=(inside,),
        boxes=(geometry.map_boxes(to_view, wholes),),
        boxes_visible=(visible,),
        masks=(_carry_masks(record, _as_masks(masks, source_hw)),),
    )


def collate(items: Sequence[Transformed]) -> Transformed:
    """Join transformed pictures: the `collate_fn` of a DataLoader.

    Raises: ValueError if they differ in recipe, seed or epoch.
    """
    batch = Batch.concatenate([item.batch for item in items])
    names = ("points", "points_visible", "boxes", "boxes_visible", "masks")
    carried = tuple(
        Carried(
            family=parts[0].family,
            size_px=parts[0].size_px,
            **{name: tuple(tensor for part in parts for tensor in getattr(part, name)) for name in names},
        )
        for parts in zip(*(item.carried for item in items), strict=True)
    )
    return Transformed(batch=batch, carried=carried)


class KeyedSampler:
    """Keys (epoch, sample), a list for each micro-batch: the `batch_sampler` of a DataLoader whose dataset is indexed by keys.

    The order is the loader's. Every key carries its epoch to the worker, so workers may persist and need to be told nothing.
    The sampler itself is told: `seek(updates)` before each epoch; it stands where it was told until it is told again.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.updates = 0

    def seek(self, updates: int) -> None:
        """Stand after `updates` completed optimiser steps: epoch, step = divmod(updates, order.updates_per_epoch)."""
        if updates < 0:
            raise ValueError(f"updates={updates}: needs 0 or more")
        self.updates = updates

    def __len__(self) -> int:
        """Micro-batches of the rest of this epoch."""
        return (self.order.updates_per_epoch - self.updates % self.order.updates_per_epoch) * self.order.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the keys of the rest of this epoch, [(epoch, sample), ...] a micro-batch."""
        epoch, step = divmod(self.updates, self.order.updates_per_epoch)
        for s in range(step, self.order.updates_per_epoch):
            for micro in range(self.order.accumulation):
                yield [(epoch, sample) for sample in self.order.micro_batch(epoch, s, micro).tolist()]


def _check_key(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}, expected an integer; every call names its sample and epoch (KeyedSampler yields both)")


def _as_stored(picture: Image.Image | NDArray[np.uint8] | Tensor) -> tuple[NDArray[np.uint8], int]:
    """Return (H, W, 3) uint8 RGB in memory order, as stored, and the EXIF orientation that is to be undone."""
    if isinstance(picture, Image.Image):
        orientation = int(picture.getexif().get(_EXIF_ORIENTATION, 1))
        return np.require(_as_rgb(picture), np.uint8, ["C", "W"]), orientation if 1 <= orientation <= 8 else 1
    if not isinstance(picture, Tensor | np.ndarray):
        raise TypeError(f"picture is {type(picture).__name__}, expected a PIL image, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor")
    planar = isinstance(picture, Tensor)
    array = picture.as_subclass(Tensor).detach().cpu().numpy() if isinstance(picture, Tensor) else picture
    if array.ndim != 3 or array.shape[0 if planar else 2] != 3 or not array.size or array.dtype != np.uint8:
        expected = "(3, H, W)" if planar else "(H, W, 3)"
        raise ValueError(f"picture has shape {array.shape} and is {array.dtype}, expected {expected} of uint8")
    return np.require(array.transpose(1, 2, 0) if planar else array, np.uint8, ["C", "W"]), 1


def _as_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8 as the loader's decoder has it: 16-bit grey becomes v / 257, the rest is Pillow's."""
    if picture.mode.startswith("I;16"):
        grey = ((np.asarray(picture).astype(np.int32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if picture.mode in ("I", "F"):
        raise ValueError(f"picture has Pillow mode {picture.mode!r}, whose range is not known; convert it to 8 bits first")
    return np.asarray(picture.convert("RGB"))


def _as_rows(name: str, rows: ArrayLike | Tensor | None, columns: int) -> Tensor:
    """Return (N, columns) float64; an empty list, as of a picture without objects, and None are N = 0."""
    rows = [] if rows is None else rows
    tensor = rows.as_subclass(Tensor) if isinstance(rows, Tensor) else torch.as_tensor(np.asarray(rows))
    tensor = tensor.reshape(0, columns) if tensor.shape == (0,) else tensor
    if tensor.ndim != 2 or tensor.shape[1] != columns:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (N, {columns})")
    return tensor.double()


def _as_boxes(boxes: ArrayLike | Tensor | None, source_hw: tuple[int, int]) -> Tensor:
    """Return (N, 4) float64, xyxy."""
    if isinstance(boxes, Tensor) and hasattr(boxes, "canvas_size"):  # torchvision's: only then is it loaded
        from torchvision.transforms.v2.functional import convert_bounding_box_format
        from torchvision.tv_tensors import BoundingBoxFormat

        given: Any = boxes
        if tuple(given.canvas_size) != source_hw:
            raise ValueError(f"boxes have canvas_size={tuple(given.canvas_size)}, the picture is {source_hw} (height, width) when upright")
        known = (BoundingBoxFormat.XYXY, BoundingBoxFormat.XYWH, BoundingBoxFormat.CXCYWH)
        if given.format not in known:
            raise ValueError(f"boxes have format {given.format.value}, expected one of {[item.value for item in known]}")
        boxes = convert_bounding_box_format(given, new_format=BoundingBoxFormat.XYXY)
    rows = _as_rows("boxes", boxes, 4)
    inverted = (rows[:, 2:] < rows[:, :2]).any(-1)
    if inverted.any():
        n = int(inverted.nonzero()[0, 0])
        raise ValueError(f"boxes[{n}] is {rows[n].tolist()}, expected x0 <= x1 and y0 <= y1; other formats come as BoundingBoxes")
    return rows


def _as_masks(masks: ArrayLike | Tensor | None, source_hw: tuple[int, int]) -> Tensor:
    """Return (N, H, W)."""
    if masks is None:
        return torch.empty(0, *source_hw, dtype=torch.uint8)
    tensor = masks.as_subclass(Tensor) if isinstance(masks, Tensor) else torch.as_tensor(np.asarray(masks))
    if tensor.ndim not in (2, 3) or tuple(tensor.shape[-2:]) != source_hw:
        raise ValueError(f"masks have shape {tuple(tensor.shape)}, expected (N, {source_hw[0]}, {source_hw[1]}) as the upright picture")
    return tensor.reshape(-1, *source_hw)


def _carry_masks(record: ViewGeometry, masks: Tensor) -> Tensor:
    """Return masks (N, H, W) as every view shows them, (V, N, height, width): the source pixel under each view pixel's centre."""
    height, width = record.size_px
    if not len(masks):
        return masks.new_empty(len(record.view), 0, height, width)
    rows, cols = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    under = geometry.map_points(record.view_to_source[0], torch.stack([cols, rows], -1).view(-1, 2)).floor().long()  # (V, h * w, 2)
    return masks[:, under[..., 1], under[..., 0]].transpose(0, 1).unflatten(-1, (height, width))
