"""The same views for people with their own dataset: decoded pictures and their keys in, views out.

Here: `ViewTransform`, which keeps nothing between calls: records and pixels are those of the loader with the same cutter for the same
(seed, epoch, sample) and picture; points, boxes and masks carried along; a sampler of keys and `collate` for torch's DataLoader.
Not here: reading files. There is no counter anywhere: a call without its key is refused, and the key comes from the sampler.
In a DataLoader's worker a batch is made in shared memory, so that handing it over copies nothing.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wherefrom.pipeline.annotations import Carried, Rows, carry_all, join_carried
from wherefrom.pipeline.decode import nearest_byte
from wherefrom.pipeline.literals import check_literal
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.choose import make_cutter
from wherefrom.pipeline.render.renderer import view_shapes
from wherefrom.pipeline.shards.picture_headers import exif_orientation
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Batch, Views
from wherefrom.pipeline.worker_memory import crosses_whole, empty_tensors

Picture = Image.Image | NDArray[np.uint8] | Tensor


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

    def __init__(self, recipe: ViewRecipe, *, seed: int = 0, renderer: str = "auto") -> None:
        check_literal("recipe", recipe, ViewRecipe)
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
        per_picture = {"keys": keys, "labels": labels, "points": points, "boxes": boxes, "masks": masks}
        for name, items in per_picture.items():
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
        records = draw_records(self.recipe, seed=self.seed, epoch=epoch, drawn_for=samples, source_size=size, stored_orientation=turned)
        made = empty_tensors(view_shapes(self.recipe, len(stored)), getattr(torch, self.recipe.pixels))
        plan = self._cutter.plan(records, made)
        for position, array in enumerate(stored):
            self._cutter.cut(plan, position, array)
        batch = Batch(
            sample=torch.tensor(samples),
            drawn_for=torch.tensor(samples),
            label=torch.tensor([operator.index(label) for label in labels]),
            source_size=torch.from_numpy(size),
            views=tuple(Views.of(record, tensor) for record, tensor in zip(records, made, strict=True)),
        )
        return Transformed(batch=batch, carried=tuple(carry_all(record.geometry, annotations) for record in records))


def collate(items: Transformed | Sequence[Transformed]) -> Transformed:
    """Join transformed pictures: the `collate_fn` of a DataLoader. A batch, as a dataset's `__getitems__` gives it, is joined already.

    Raises: ValueError if they differ in recipe, seed or epoch.
    """
    if isinstance(items, Transformed):
        return items
    batch = _join_batches([item.batch for item in items])
    carried = tuple(join_carried(parts) for parts in zip(*(item.carried for item in items), strict=True))
    return Transformed(batch=batch, carried=carried)


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


def _as_stored(picture: Picture) -> tuple[NDArray[np.uint8], int]:
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
    """Return (H, W, 3) uint8 as the loader's decoder has it: 16-bit gray becomes v / 257, the rest is Pillow's."""
    if picture.mode.startswith("I;16"):
        return np.repeat(nearest_byte(np.asarray(picture))[..., None], 3, axis=-1)
    if picture.mode in ("I", "F"):
        raise ValueError(f"picture has Pillow mode {picture.mode!r}, whose range is not known; convert it to 8 bits first")
    return np.asarray(picture.convert("RGB"))
