"""The same views for people with their own dataset: decoded pictures and their keys in, views out.

Here: `ViewTransform`, which keeps nothing between calls: records and pixels are those of the loader with the same cutter for the same
(seed, epoch, sample) and picture; points, boxes and masks carried along; a sampler of keys and `collate` for torch's DataLoader.
Not here: reading files. There is no counter anywhere: a call without its key is refused, and the key comes from the sampler.
In a DataLoader's worker a batch is made in shared memory, so that handing it over copies nothing.
"""

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from wherefrom.pipeline import geometry
from wherefrom.pipeline.colour import draw_colours
from wherefrom.pipeline.crops import draw_geometry
from wherefrom.pipeline.decode import nearest_byte
from wherefrom.pipeline.hand_over import crosses_whole, empty_tensors
from wherefrom.pipeline.headers import exif_orientation
from wherefrom.pipeline.literals import check_literal
from wherefrom.pipeline.order import Order
from wherefrom.pipeline.recipe import Recipe
from wherefrom.pipeline.render import CutterName, make_cutter
from wherefrom.pipeline.render_threads import view_shapes
from wherefrom.pipeline.views import Batch, ViewGeometry, Views

if TYPE_CHECKING:
    from torchvision.tv_tensors import BoundingBoxes

Picture = Image.Image | NDArray[np.uint8] | Tensor
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


@crosses_whole
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Transformed:
    """Views of B pictures with what was carried along, a family after the other."""

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
    `transform.batch(pictures, keys=keys)` gives the same for many at once, and takes a small part of the time beside the pixels.
    A PIL picture is turned upright by the EXIF block that it was opened with, read as the loader reads it; arrays and tensors are upright
    already.
    renderer: "native", the compiled kernel, whose pixels are the loader's on the CPU; "torch"; "auto": the first that is there.
    Raises: ValueError if a setting is none that there is, or a family has snap="none" and "torch" cuts: stock resizing cuts whole pixels.
    """

    def __init__(self, recipe: Recipe, *, seed: int = 0, renderer: CutterName = "auto") -> None:
        check_literal("recipe", recipe, Recipe)
        check_literal("seed", seed, int)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed}: needs 0 <= seed < 2**64")
        self.recipe = recipe
        self.seed = seed
        self._cutter = make_cutter(recipe, renderer)

    def __call__(
        self,
        picture: Picture,
        *,
        sample: int,
        epoch: int,
        label: int = -1,
        points: Rows | None = None,
        boxes: Rows | None = None,
        masks: Rows | None = None,
    ) -> Transformed:
        """Return the views of one picture, B = 1, and where its annotations went in them.

        sample, epoch: the key; sample is the picture's number in the dataset, 0 <= sample < 2**40.
        Shapes: picture PIL, (H, W, 3) uint8 array or (3, H, W) uint8 tensor; points (N, 2) as (x, y); boxes (N, 4) xyxy, or
                `BoundingBoxes` of any unrotated format; masks (H, W) or (N, H, W) of any dtype.
        Units:  pixels of the upright picture, pixel i covers [i, i + 1).
        Raises: TypeError or ValueError if the key is none, or something has another type, shape or size.
        """
        return self._transformed([picture], [(epoch, sample)], [label], [(points, boxes, masks)])

    def batch(
        self,
        pictures: Sequence[Picture],
        *,
        keys: Sequence[tuple[int, int]],
        labels: Sequence[int] | None = None,
        points: Sequence[Rows | None] | None = None,
        boxes: Sequence[Rows | None] | None = None,
        masks: Sequence[Rows | None] | None = None,
    ) -> Transformed:
        """Return the views of B pictures of any sizes: what `collate` makes of a call for each, bit for bit.

        keys: (epoch, sample) for each, as `KeyedSampler` yields them, of one epoch; the others: one for each picture, as a call takes it.
        Raises: TypeError or ValueError as a call does, and if lengths differ, epochs are mixed or there are no pictures.
        """
        given = {"keys": keys, "labels": labels, "points": points, "boxes": boxes, "masks": masks}
        for name, items in given.items():
            if items is not None and len(items) != len(pictures):
                raise ValueError(f"{len(items)} {name} came with {len(pictures)} pictures; give one for each")
        if not len(pictures):
            raise ValueError("no pictures to transform; give at least one")
        nothing = [None] * len(pictures)
        annotations = [nothing if items is None else items for items in (points, boxes, masks)]
        every_label = [-1] * len(pictures) if labels is None else labels
        return self._transformed(pictures, keys, every_label, list(zip(*annotations, strict=True)))

    def _transformed(
        self,
        pictures: Sequence[Picture],
        keys: Sequence[tuple[int, int]],
        labels: Sequence[int],
        annotations: Sequence[tuple[Rows | None, Rows | None, Rows | None]],
    ) -> Transformed:
        epoch, samples = _split_keys(keys)
        stored, orientations = zip(*map(_as_stored, pictures), strict=True)
        turned = np.array(orientations, np.uint8)
        size = np.array([array.shape[:2] for array in stored], np.int32)
        size[turned >= 5] = size[turned >= 5, ::-1]
        drawn = draw_geometry(self.recipe, seed=self.seed, epoch=epoch, drawn_for=samples, source_size=size, stored_orientation=turned)
        colours = draw_colours(self.recipe, seed=self.seed, epoch=epoch, drawn_for=samples)
        made = empty_tensors(view_shapes(self.recipe, len(stored)), getattr(torch, self.recipe.pixels))
        plan = self._cutter.plan([(item.geometry, colour) for item, colour in zip(drawn, colours, strict=True)], made)
        for position, array in enumerate(stored):
            self._cutter.cut(plan, position, array)
        batch = Batch(
            sample=torch.tensor(samples),
            drawn_for=torch.tensor(samples),
            label=torch.tensor([operator.index(label) for label in labels]),
            source_size=torch.from_numpy(size),
            views=tuple(
                Views(pixels=tensor, geometry=item.geometry, valid=item.valid, photometric=colour)
                for tensor, item, colour in zip(made, drawn, colours, strict=True)
            ),
        )
        return Transformed(batch=batch, carried=tuple(_carry_all(item.geometry, annotations) for item in drawn))


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
    carried = _carried_nothing(record.family, len(record.view), record.size_px)
    source_hw = (int(record.source_size[0, 0]), int(record.source_size[0, 1]))
    cut = record.boxes[0].double()[:, None]  # (V, 1, 4)
    if points is not None:
        dots = _as_rows("points", points, 2)
        inside = ((dots >= cut[..., :2]) & (dots < cut[..., 2:])).all(-1)  # (V, N)
        carried = replace(carried, points=(geometry.map_points(record.source_to_view[0], dots),), points_visible=(inside,))
    if boxes is not None:
        wholes = _as_boxes(boxes, source_hw)
        areas = geometry.area(wholes)
        shown = geometry.overlap_area(wholes, cut)
        visible = torch.where(areas > 0, shown / areas, torch.zeros_like(shown))
        carried = replace(carried, boxes=(geometry.map_boxes(record.source_to_view[0], wholes),), boxes_visible=(visible,))
    if masks is not None:
        carried = replace(carried, masks=(_carry_masks(record, _as_masks(masks, source_hw)),))
    return carried


def collate(items: Transformed | Sequence[Transformed]) -> Transformed:
    """Join transformed pictures: the `collate_fn` of a DataLoader. A batch, as a dataset's `__getitems__` gives it, is joined already.

    Raises: ValueError if they differ in recipe, seed or epoch.
    """
    if isinstance(items, Transformed):
        return items
    batch = _join_batches([item.batch for item in items])
    carried = tuple(_join_carried(parts) for parts in zip(*(item.carried for item in items), strict=True))
    return Transformed(batch=batch, carried=carried)


class KeyedSampler:
    """Keys (epoch, sample), a list for each micro-batch: the `batch_sampler` of a DataLoader whose dataset is indexed by keys.

    The order is the loader's. Every key carries its epoch to the worker, so workers may persist and need to be told nothing.
    Each pass is the next epoch, whether or not the pass before was broken off; `seek` says where the next one begins.
    """

    def __init__(self, order: Order) -> None:
        check_literal("order", order, Order)
        self.order = order
        self.updates = 0  # where the next pass begins

    def seek(self, updates: int) -> None:
        """Begin the next pass after `updates` completed optimiser steps: epoch, step = divmod(updates, order.updates_per_epoch).

        For resuming: the sampler can't know which of the batches that workers made ahead were learned from, the training loop does.
        """
        check_literal("updates", updates, int)
        if updates < 0:
            raise ValueError(f"updates={updates}: needs 0 or more")
        self.updates = updates

    def __len__(self) -> int:
        """Micro-batches of the next pass: a whole epoch, or after `seek` the rest of one."""
        return (self.order.updates_per_epoch - self.updates % self.order.updates_per_epoch) * self.order.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the keys of an epoch, or of the rest of one, [(epoch, sample), ...] a micro-batch."""
        epoch, step = divmod(self.updates, self.order.updates_per_epoch)
        # With the first key, not the last: a DataLoader draws keys ahead, so the last one is drawn while an epoch is still under way, and
        # how early depends on its workers. Nor with iter(): a DataLoader with workers calls that twice and uses the second.
        self.updates = (epoch + 1) * self.order.updates_per_epoch
        for s in range(step, self.order.updates_per_epoch):
            for micro in range(self.order.accumulation):
                yield [(epoch, sample) for sample in self.order.micro_batch(epoch, s, micro).tolist()]


def _carry_all(record: ViewGeometry, annotations: Sequence[tuple[Rows | None, Rows | None, Rows | None]]) -> Carried:
    """Carry (points, boxes, masks) of each of B pictures into its views."""
    nothing = _carried_nothing(record.family, len(record.view), record.size_px)
    return _join_carried(
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


def _join_carried(parts: Sequence[Carried]) -> Carried:
    names = ("points", "points_visible", "boxes", "boxes_visible", "masks")
    joined: dict[str, Any] = {name: tuple(tensor for part in parts for tensor in getattr(part, name)) for name in names}
    return replace(parts[0], **joined)


def _join_batches(batches: Sequence[Batch]) -> Batch:
    """Return batches as one, their pixels joined where a worker hands them over from."""
    bare = [replace(each, views=tuple(replace(views, pixels=views.pixels[:, :, :0]) for views in each.views)) for each in batches]
    batch = Batch.concatenate(bare)  # checked, no channel of pixels copied
    shapes = [(len(batch), *views.pixels.shape[1:]) for views in batches[0].views]
    pixels = empty_tensors(shapes, batches[0].views[0].pixels.dtype)
    for number, tensor in enumerate(pixels):
        torch.cat([each.views[number].pixels for each in batches], out=tensor)
    return replace(batch, views=tuple(replace(views, pixels=tensor) for views, tensor in zip(batch.views, pixels, strict=True)))


def _split_keys(keys: Sequence[tuple[int, int]]) -> tuple[int, NDArray[np.int64]]:
    """Return the one epoch of keys (epoch, sample), and their samples (B,)."""
    for epoch, sample in keys:
        _check_key("sample", sample)
        _check_key("epoch", epoch)
        if epoch != keys[0][0]:
            raise ValueError(f"keys are of epochs {keys[0][0]} and {epoch}, a batch has one; transform each epoch's pictures by themselves")
    return int(keys[0][0]), np.array([sample for _, sample in keys], np.int64)


def _check_key(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}, expected an integer; every call names its sample and epoch (KeyedSampler yields both)")


def _as_stored(picture: Image.Image | NDArray[np.uint8] | Tensor) -> tuple[NDArray[np.uint8], int]:
    """Return (H, W, 3) uint8 RGB in memory order, as stored, and the EXIF orientation that is to be undone."""
    if isinstance(picture, Image.Image):
        pixels = np.require(_as_rgb(picture), np.uint8, ["C", "W"])  # decoded first: a PNG's EXIF may follow its pixels
        exif = picture.info.get("exif")  # not getexif(), which also asks XMP and a PNG's text, as the loader does not
        return pixels, exif_orientation(exif) or 1 if isinstance(exif, bytes) else 1
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
        return np.repeat(nearest_byte(np.asarray(picture))[..., None], 3, axis=-1)
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
    wrong = ~(rows[:, 2:] >= rows[:, :2]).all(-1)  # nan too
    if wrong.any():
        n = int(wrong.nonzero()[0, 0])
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
