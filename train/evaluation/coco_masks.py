"""COCO's annotations as masks of classes: polygons, and runs of pixels, plain and packed.

Here: reading a JSON file of instances, its shapes as arrays of pixels. No pycocotools is asked for.
Not here: what a set of pictures with masks is (dense_pictures.py).
Convention: runs go down the columns, the first one outside. A polygon covers the pixels whose centers it holds, which differs from
pycocotools, whose polygons keep parts of their edge, by less than a pixel along it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.train.evaluation.dense_pictures import IGNORED, ListedPictures, checked_classes, opened

Annotation = Mapping[str, Any]
NEEDED = {"image": ("file_name", "height", "width"), "annotation": ("category_id", "segmentation")}


class CocoPictures(ListedPictures):
    """Pictures with COCO's annotations, as masks: 0 is the background, then the categories by their ids.

    Of two shapes the smaller one is seen; crowds are ignored where nothing else lies.
    """

    background = 0

    def __init__(
        self,
        index: ShardIndex,
        rows: Sequence[int],
        annotations: Sequence[Sequence[Annotation]],
        *,
        categories: Mapping[int, str],
        file: Path,
        **options: Any,
    ) -> None:
        """annotations: of every row; categories: names by id; file: where they come from, for messages."""
        super().__init__(index, rows, **options)
        self.annotations, self.file, self.files = annotations, file, (file,)
        self.classes = checked_classes(("background", *categories.values()))
        self._class_of = {id: number for number, id in enumerate(categories, 1)}

    def masks(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return the class of every pixel of these pictures, (H, W) each.

        Raises: ValueError in one line if an annotation is of a category that there is not, or of another size than its picture.
        """
        return [self._mask(sample) for sample in ids.tolist()]

    def _mask(self, sample: int) -> NDArray[np.uint8]:
        hw = self.hw(sample)
        mask = np.zeros(hw, np.uint8)
        shapes = []
        for annotation in self.annotations[sample]:
            category = annotation["category_id"]
            if category not in self._class_of:
                raise ValueError(f"{self.file}: an annotation is of category {category}, which its categories lack; add it there")
            try:
                shape = decode_segmentation(annotation["segmentation"], hw)
            except ValueError as problem:
                raise ValueError(f"{self.file}: annotation {annotation.get('id', '?')}: {problem}") from None
            shapes.append((not annotation.get("iscrowd", 0), -int(shape.sum()), self._class_of[category], shape))
        for counts, _, number, shape in sorted(shapes, key=lambda each: each[:3]):
            mask[shape] = number if counts else IGNORED
        return mask


def open_coco(pictures: Path, file: Path, **options: Any) -> CocoPictures:
    """Open the pictures that a JSON file of COCO's instances lists, which lie in a folder under their file names.

    Raises: ValueError in one line if the file is none, says no size of a picture or no shape of an annotation, or a picture is missing or
    has another size.
    """
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        images = {int(image["id"]): image for image in listed["images"]}
        categories = {int(each["id"]): str(each["name"]) for each in sorted(listed["categories"], key=lambda each: int(each["id"]))}
        annotations: dict[int, list[Annotation]] = {id: [] for id in images}
        for annotation in listed["annotations"]:
            annotations[int(annotation["image_id"])].append(annotation)
        lacking = [
            f"{kind} {each.get('id', '?')} has no {key}"
            for kind, keys in NEEDED.items()
            for each in listed[kind + "s"]
            for key in keys
            if each.get(key) is None
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(
            f"{file}: is no file of COCO's instances ({type(problem).__name__}: {problem}); name an instances_*.json"
        ) from None
    if lacking:
        raise ValueError(f"{file}: {lacking[0]}; name the file of instances that has sizes of pictures and shapes, not boxes alone")
    index, row_of = opened(pictures)
    if not images:
        raise ValueError(f"{file}: lists no picture; name the file of the split that has some")
    rows = []
    for image in images.values():
        row = row_of.get(str(Path(image["file_name"]).with_suffix("")))
        if row is None:
            raise ValueError(f"{file}: lists {image['file_name']}, which {pictures} lacks; name the folder of its pictures")
        rows.append(row)
        height, width = index.source_size[row].tolist()
        if (image["height"], image["width"]) != (height, width):
            raise ValueError(f"{file}: {image['file_name']} is {image['width']} x {image['height']} px there, and here {width} x {height}")
    return CocoPictures(index, rows, [annotations[id] for id in images], categories=categories, file=file, **options)


def decode_segmentation(segmentation: Any, hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixels one of COCO's segmentations covers, (H, W): a list of polygons, or {"size", "counts"} of runs, plain or packed.

    Raises: ValueError in one line if it is neither, or of another size.
    """
    if isinstance(segmentation, list):
        covered = np.zeros(hw, np.bool_)
        for polygon in segmentation:
            covered |= fill_polygon(np.asarray(polygon, np.float64).reshape(-1, 2), hw)
        return covered
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        raise ValueError("its segmentation is neither polygons nor runs of a size and counts")
    if tuple(segmentation["size"]) != hw:
        raise ValueError(f"its runs are of {segmentation['size'][1]} x {segmentation['size'][0]} px, its picture of {hw[1]} x {hw[0]}")
    counts = segmentation["counts"]
    return decode_runs(unpack_counts(counts) if isinstance(counts, str) else counts, hw)


def decode_runs(counts: ArrayLike, hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Return runs, down the columns, outside and inside in turn, as pixels, (H, W).

    Raises: ValueError if they do not make up the picture.
    """
    lengths = np.asarray(counts, np.int64)
    if (lengths < 0).any() or lengths.sum() != hw[0] * hw[1]:
        raise ValueError(f"its runs make up {lengths.sum()} pixels of {hw[0] * hw[1]}")
    inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return inside.reshape(hw[1], hw[0]).T


def unpack_counts(packed: str) -> list[int]:
    """Return the runs of a string: six bits a character from "0" on, five of a number and whether it goes on, the lowest first.

    From the fourth on, a number is the difference to the run before the last.
    Source: pycocotools' rleFrString.
    """
    counts: list[int] = []
    number = shift = 0
    for character in packed:
        bits = ord(character) - 48
        number |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:  # negative
                number -= 1 << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    return counts


def fill_polygon(corners: NDArray[np.float64], hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels whose centers a polygon holds, by the even-odd rule: corners (n, 2) as (x, y), source pixels -> (H, W)."""
    x0, y0 = corners.T
    x1, y1 = np.roll(corners, -1, axis=0).T
    y = np.arange(hw[0])[:, None] + 0.5
    crosses = (y0 <= y) != (y1 <= y)  # (H, n): each row's line through the centers
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.where(crosses, x0 + (y - y0) * (x1 - x0) / (y1 - y0), np.inf)
    before = np.zeros((hw[0], hw[1] + 1), np.int64)
    first = np.ceil(at.clip(0, hw[1]) - 0.5).clip(0).astype(np.int64)  # the first column whose center lies right of the crossing
    rows = np.broadcast_to(np.arange(hw[0])[:, None], first.shape)
    np.add.at(before, (rows[crosses], first[crosses]), 1)
    return before[:, :-1].cumsum(1) % 2 == 1
