"""Pictures with a map beside each: which class every pixel shows, or how far away it is; of the demo, or in public layouts on disk.

Here: what such a set is, the readers of VOC, ADE20K, folders of PNGs and the demo; `cut`, which shows a map as a view shows its picture.
Not here: COCO's polygons and runs (coco_masks.py), what is measured (hummingbird.py, dense_linear.py).
Convention: a map lies on the upright picture, pixel for pixel; masks hold classes from 0 on, and IGNORED where nothing is said; a depth of
0 is not known.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from wherefrom.pipeline.demo.scenes import FARTHEST, SHOWN
from wherefrom.pipeline.demo.shards import demo_masks
from wherefrom.pipeline.geometry import map_points
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Batch, ViewGeometry
from wherefrom.train.evaluation.pictures import PictureSource, ShardPictures

IGNORED = 255
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
ADE20K_CLASSES = 150
ReportRead = Callable[[int, int], None]  # files read so far, of how many


class MaskedPictures(PictureSource, Protocol):
    """Pictures of whose pixels the class is known."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, at most 255."""

    @property
    def background(self) -> int | None:
        """The class of all that is none of the others, where there is one."""

    def masks(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return the class of every pixel of these pictures, (H, W) each.

        Raises: ValueError in one line that names the file, if a mask cannot be read, has another size or holds a class that there is not.
        """


class DepthPictures(PictureSource, Protocol):
    """Pictures of whose pixels it is known how far away they are."""

    @property
    def farthest(self) -> float:
        """The largest depth that counts."""

    def depths(self, ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        """Return the depth of every pixel of these pictures, (H, W) each, 0 where it is not known.

        Raises: ValueError in one line that names the file, if a map cannot be read or has another size.
        """


def cut(maps: Sequence[NDArray[Any]], geometry: ViewGeometry, size: tuple[int, int]) -> Tensor:
    """Return what views show of maps of their pictures, mirrored and turned with them: of every pixel the value where its center lies.

    Shapes: a map (H, W) of every one of B pictures, geometry (B, V), size (height, width), also another than the views' -> (B, V, h, w).
    """
    y, x = ((torch.arange(side, dtype=torch.float64) + 0.5) * full / side for side, full in zip(size, geometry.size_px, strict=True))
    centers = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1).flatten(0, 1)  # (h * w, 2)
    places = map_points(geometry.view_to_source.cpu(), centers).floor().long()  # (B, V, h * w, 2)
    shown = []
    for values, (cols, rows) in zip(maps, places.movedim(-1, 1), strict=True):
        inside = rows.clamp(0, values.shape[0] - 1), cols.clamp(0, values.shape[1] - 1)
        shown.append(torch.from_numpy(np.ascontiguousarray(values))[inside].unflatten(-1, size))
    return torch.stack(shown)


class DemoPictures(ShardPictures):
    """The demo's pictures, whose masks and depths are drawn anew by the code that drew them.

    Raises: ValueError if an index holds others.
    """

    classes, background, farthest = SHOWN, None, FARTHEST

    def masks(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return the class of every pixel of these pictures, (H, W) each."""
        return [demo_masks(self.index.key(sample)).classes for sample in ids.tolist()]

    def depths(self, ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        """Return the depth of every pixel of these pictures, (H, W) each."""
        return [demo_masks(self.index.key(sample)).depth for sample in ids.tolist()]


class ListedPictures(ShardPictures):
    """Some pictures of an index, numbered from 0 in the order of a list; none is ever shown in another's place.

    What batches say of their samples are the numbers in the index.
    """

    files: tuple[Path, ...] = ()  # that hold their maps

    def __init__(self, index: ShardIndex, rows: Sequence[int], **options: Any) -> None:
        """rows: the numbers in the index; options: as of `ShardPictures`.

        Raises: ValueError if one of them is invalid.
        """
        super().__init__(index, **options)
        self.rows = np.asarray(rows, np.int64)
        for row in self.rows[~index.valid[self.rows]][:1].tolist():
            raise ValueError(f"{index.name(row)}: {index.reason(row)}; take it out of the pictures that have masks or depths")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with pictures and their order, and with the name, size and time of any file of maps."""
        digest = hashlib.blake2b(self.index.fingerprint.encode() + self.rows.tobytes(), digest_size=16)
        for file in self.files:
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each picture as a whole, (N,), -1 of none."""
        return super().labels[self.rows]

    def views(self, recipe: ViewRecipe, sample: NDArray[np.int64], drawn_for: NDArray[np.int64] | None = None, epoch: int = 0) -> Batch:
        """Return the views of these pictures by the draws of `drawn_for` (default: their own).

        Raises: ValueError if a picture does not decode.
        """
        rows = self.rows[sample]
        batch = super().views(recipe, rows, None if drawn_for is None else self.rows[drawn_for], epoch)
        for row in rows[batch.sample.cpu().numpy() != rows][:1].tolist():
            raise ValueError(f"{self.index.name(row)}: {self.index.reason(row)}; take it out of the pictures that have masks or depths")
        return batch

    def one_color_views(self, recipe: ViewRecipe, sample: NDArray[np.int64]) -> Batch:
        """Return the same views of pictures that have the same sizes and show one color each."""
        return super().one_color_views(recipe, self.rows[sample])

    def hw(self, sample: int) -> tuple[int, int]:
        """Return (height, width) of a picture, upright."""
        height, width = self.index.source_size[self.rows[sample]].tolist()
        return height, width


class FilesOfMasks(ListedPictures):
    """Pictures with a PNG of classes each: one channel of 8 or 16 bits, or a palette, whose places count and not its colors."""

    def __init__(
        self,
        index: ShardIndex,
        rows: Sequence[int],
        files: Sequence[Path],
        *,
        values: Mapping[int, int],
        classes: Sequence[str],
        background: int | None = None,
        **options: Any,
    ) -> None:
        """files: a mask for every row; values: the class of each value of a file, or IGNORED.

        Raises: ValueError in one line that names the file, if a mask cannot be opened or has another size.
        """
        super().__init__(index, rows, **options)
        self.files = tuple(files)
        for sample, file in enumerate(self.files):
            _check_png(file, self.hw(sample), "a mask")
        self.classes, self.background = checked_classes(classes), background
        self._class_of = np.full(1 << 16, -1, np.int16)
        self._class_of[list(values)] = list(values.values())

    def masks(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return the class of every pixel of these pictures, (H, W) each.

        Raises: ValueError as `MaskedPictures`.
        """
        return [self._mask(sample) for sample in ids.tolist()]

    def _mask(self, sample: int) -> NDArray[np.uint8]:
        file = self.files[sample]
        values = _read_png(file, self.hw(sample), "a mask")
        classes = self._class_of[values]
        for value in values[classes < 0][:1].tolist():
            raise ValueError(
                f"{file}: holds the value {value}, which is none of the {len(self.classes)} classes; mend it, or make it {IGNORED}"
            )
        return classes.astype(np.uint8)


class FilesOfDepth(ListedPictures):
    """Pictures with a PNG of 16 bits each, whose values times `unit` are depths; 0 is not known."""

    def __init__(
        self, index: ShardIndex, rows: Sequence[int], files: Sequence[Path], *, unit: float, farthest: float, **options: Any
    ) -> None:
        """files: a map for every row.

        Raises: ValueError in one line that names what is wrong, if a map cannot be opened or has another size, or a number is not above 0.
        """
        super().__init__(index, rows, **options)
        for name, number in (("unit", unit), ("farthest", farthest)):
            if not 0 < number < float("inf"):
                raise ValueError(f"{name} {number} of depths: take a number of meters above 0")
        self.files, self.unit, self.farthest = tuple(files), unit, farthest
        for sample, file in enumerate(self.files):
            _check_png(file, self.hw(sample), "a map of depths", bits=16)

    def depths(self, ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        """Return the depth of every pixel of these pictures, (H, W) each, 0 where it is not known.

        Raises: ValueError as `DepthPictures`.
        """
        return [(_read_png(self.files[i], self.hw(i), "a map of depths", bits=16) * self.unit).astype(np.float32) for i in ids.tolist()]


def open_voc(root: Path, split: str = "train", **options: Any) -> FilesOfMasks:
    """Open a split of VOC2012's segmentation set: JPEGImages, SegmentationClass, ImageSets/Segmentation/SPLIT.txt.

    Raises: ValueError in one line if something is missing.
    """
    folder, listing = root / "JPEGImages", root / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        stems = listing.read_text(encoding="utf-8").split()
    except OSError as problem:
        raise ValueError(f"{listing}: {problem.strerror}; name the folder that holds JPEGImages, and one of its splits") from None
    if not stems:
        raise ValueError(f"{listing}: names no picture; list those of the split, one a line")
    index, row_of = opened(folder)
    for stem in stems:
        if stem not in row_of:
            raise ValueError(f"{listing}: names {stem}, of which {folder} has no picture")
    files = _all_there({stem: root / "SegmentationClass" / f"{stem}.png" for stem in stems})
    values = {number: number for number in range(len(VOC_CLASSES))} | {IGNORED: IGNORED}
    rows = [row_of[stem] for stem in stems]
    return FilesOfMasks(index, rows, files, values=values, classes=VOC_CLASSES, background=0, **options)


def open_ade20k(root: Path, split: str = "training", **options: Any) -> FilesOfMasks:
    """Open a split, training or validation, of ADE20K's scene parsing set: images/SPLIT, annotations/SPLIT.

    Its 0, everything else, is ignored; its 1 to 150 are the classes 0 to 149, by number.
    Raises: ValueError in one line if something is missing.
    """
    values = {0: IGNORED} | {number + 1: number for number in range(ADE20K_CLASSES)}
    names = [str(number + 1) for number in range(ADE20K_CLASSES)]
    index, rows, files = _pairs(root / "images" / split, root / "annotations" / split)
    return FilesOfMasks(index, rows, files, values=values, classes=names, **options)


def open_masks(pictures: Path, masks: Path, *, classes: Sequence[str] = (), background: int | None = None, **options: Any) -> FilesOfMasks:
    """Open a folder of pictures and one of masks that lie and are named alike, PNGs of classes from 0 on, with IGNORED where need be.

    classes: their names; without, all masks are read once for the highest number.
    Raises: ValueError in one line if something is missing, or no mask, or none that can be read.
    """
    index, rows, files = _pairs(pictures, masks)
    names = classes or numbered_classes(files)
    class_of = {number: number for number in range(len(names))} | {IGNORED: IGNORED}
    return FilesOfMasks(index, rows, files, values=class_of, classes=names, background=background, **options)


def numbered_classes(files: Sequence[Path], progress: ReportRead | None = None) -> tuple[str, ...]:
    """Return "0", "1", ... to the highest class that any mask has, all of which are read.

    Raises: ValueError in one line if one cannot be read.
    """
    highest = 0
    for done, file in enumerate(files, 1):
        values = _read_png(file, None, "a mask")
        highest = max(highest, int(np.where(values == IGNORED, 0, values).max()))
        if progress is not None:
            progress(done, len(files))
    return tuple(map(str, range(highest + 1)))


def open_depths(pictures: Path, depths: Path, *, unit: float = 0.001, farthest: float = 10.0, **options: Any) -> FilesOfDepth:
    """Open a folder of pictures and one of 16-bit PNGs that lie and are named alike; by default in millimeters, up to 10 m, as NYU v2.

    Raises: ValueError in one line if something is missing.
    """
    return FilesOfDepth(*_pairs(pictures, depths), unit=unit, farthest=farthest, **options)


def _pairs(pictures: Path, maps: Path) -> tuple[ShardIndex, list[int], list[Path]]:
    """Return the pictures of a folder, and a map of the same name for each."""
    index, row_of = opened(pictures)
    files = _all_there({stem: maps / f"{stem}.png" for stem in row_of})
    return index, list(row_of.values()), files


def opened(folder: Path) -> tuple[ShardIndex, dict[str, int]]:
    """Return a folder's pictures, and the number of each by its path in the folder, without the extension.

    Raises: ValueError if there is no such folder, or two pictures differ in the extension alone.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name the one that holds the pictures")
    index = ShardIndex.open(folder, labels="none")
    row_of: dict[str, int] = {}
    for row in range(len(index)):
        other = row_of.setdefault(str(Path(index.key(row)).with_suffix("")), row)
        if other != row:
            raise ValueError(f"{index.name(row)}: {index.name(other)} is there too; take one away, a map belongs to one picture")
    return index, row_of


def _all_there(files: Mapping[str, Path]) -> list[Path]:
    for name, file in files.items():
        if not file.is_file():
            raise ValueError(f"picture {name}: {file} is not there; add it, or take the picture away")
    return list(files.values())


def _check_png(file: Path, hw: tuple[int, int] | None, what: str, *, bits: int | None = None) -> None:
    """Raise ValueError unless a file is a PNG of one channel, of this size where `hw` is given; its pixels are not read."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            mode, (width, height) = image.mode, image.size
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as problem:
        raise _unreadable(file, problem) from None
    deep = mode.startswith("I")
    if not (deep or mode in ("1", "L", "P")) or (bits == 16 and not deep):
        raise ValueError(f"{file}: has pixels of kind {mode}; {what} is a PNG of one channel{' of 16 bits' if bits == 16 else ''}")
    if hw is not None and (height, width) != hw:
        raise ValueError(f"{file}: is {width} x {height} px, its picture, upright, {hw[1]} x {hw[0]}; {what} has its size")


def _read_png(file: Path, hw: tuple[int, int] | None, what: str, *, bits: int | None = None) -> NDArray[np.uint16]:
    """Return the values of a PNG, (H, W), checked again: it may have changed."""
    _check_png(file, hw, what, bits=bits)
    try:
        with Image.open(file, formats=("PNG",)) as image:
            return np.asarray(image).astype(np.uint16) // _gray_step(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise _unreadable(file, problem) from None


def _gray_step(file: Path) -> int:
    """Return how far apart Pillow sets neighboring values of a PNG: it spreads gray ones of 2 and 4 bits over 0 to 255, and no others."""
    with file.open("rb") as opened:
        bits, color = opened.read(26)[24:]  # of the header, which comes first in every PNG
    return 255 // (2**bits - 1) if color == 0 and bits in (2, 4) else 1


def _unreadable(file: Path, problem: Exception) -> ValueError:
    return ValueError(f"{file}: cannot be read as a PNG: {' '.join(str(problem).split()):.120}")


def checked_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of classes, as many as masks can tell apart.

    Raises: ValueError if there is one alone, or they are more than that.
    """
    if not 2 <= len(classes) <= IGNORED:
        raise ValueError(f"masks of {len(classes)} classes; 2 to {IGNORED} can be told apart")
    return tuple(classes)
