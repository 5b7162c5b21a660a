"""Both sides of a set with masks or depths, to learn from and held out, by how a folder lays them out.

Here: which layouts there are, and what each has where.
Not here: reading pictures and their maps (dense_pictures.py, coco_masks.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from wherefrom.train.evaluation.coco_masks import CocoPictures, open_coco
from wherefrom.train.evaluation.dense_pictures import (
    FilesOfDepth,
    FilesOfMasks,
    ReportRead,
    numbered_classes,
    open_ade20k,
    open_depths,
    open_masks,
    open_voc,
)

SIDES = ("train", "val")
CLASSES_FILE = "classes.txt"
LAYOUTS = {  # of masks: what each has at least
    "voc": ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"),
    "ade20k": ("images/training", "annotations/training", "images/validation", "annotations/validation"),
    "coco": ("annotations",),
    "folder": ("images/train", "masks/train", "images/val", "masks/val"),
}
DEPTHS = ("images/train", "depths/train", "images/val", "depths/val")
Masked = FilesOfMasks | CocoPictures


def masks_by_layout(source: str, *, progress: ReportRead | None = None, **options: Any) -> tuple[Masked, Masked]:
    """Open the pictures with masks that LAYOUT:FOLDER names, to learn from and held out.

    `voc`: splits train and val. `ade20k`: training and validation. `coco`: annotations/instances_train*.json and instances_val*.json, whose
    pictures lie in the folder named as the file ends, such as train2017. `folder`: images/train, masks/train, images/val, masks/val, where
    pictures and masks are named alike; its classes are named by classes.txt, one a line from 0 on, or else counted in all masks, of which
    `progress` tells. options: as of `ShardPictures`.
    Raises: ValueError in one line if there is no such layout, the folder has another, or a picture or its mask is missing or does not fit.
    """
    layout, colon, path = source.partition(":")
    if not colon or layout not in LAYOUTS:
        raise ValueError(f"masks {source!r}: says no layout; write LAYOUT:FOLDER, of {', '.join(LAYOUTS)}")
    root = Path(path)
    _check_layout(root, layout, LAYOUTS[layout])
    if layout == "voc":
        return _both(lambda side: open_voc(root, side, **options))
    if layout == "ade20k":
        return _both(lambda side: open_ade20k(root, {"train": "training", "val": "validation"}[side], **options))
    if layout == "coco":
        return _both(lambda side: _coco(root, side, **options))
    masks = [file for side in SIDES for file in sorted((root / "masks" / side).rglob("*.png"))]
    classes = _named_classes(root / CLASSES_FILE) or numbered_classes(masks, progress)
    return _both(lambda side: open_masks(root / "images" / side, root / "masks" / side, classes=classes, **options))


def depths_by_layout(root: Path, *, unit: float = 0.001, farthest: float = 10.0, **options: Any) -> tuple[FilesOfDepth, FilesOfDepth]:
    """Open the pictures with depths of a folder, to learn from and held out: images/train, depths/train, images/val, depths/val.

    unit: meters of a value of 1, as of `open_depths`; farthest: the largest depth that counts, in meters.
    Raises: ValueError in one line if the folder lacks one of these, or a picture or its map is missing or does not fit.
    """
    _check_layout(root, "depths", DEPTHS)
    train, val = (open_depths(root / "images" / side, root / "depths" / side, unit=unit, farthest=farthest, **options) for side in SIDES)
    return train, val


def _both(opened: Callable[[str], Masked]) -> tuple[Masked, Masked]:
    train, val = map(opened, SIDES)
    return train, val


def _check_layout(root: Path, layout: str, parts: tuple[str, ...]) -> None:
    """Raise ValueError unless a folder has all parts of a layout; it names another one of masks that the folder has."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; name the one that holds {', '.join(parts)}")
    missing = [part for part in parts if not (root / part).exists()]
    if not missing:
        return
    others = [name for name, own in LAYOUTS.items() if name != layout and all((root / part).exists() for part in own)]
    mend = f"it is laid out as {others[0]}" if others else f"the layout {layout!r} is {', '.join(parts)}"
    raise ValueError(f"{root}: has no {missing[0]}; {mend}")


def _coco(root: Path, side: str, **options: Any) -> CocoPictures:
    files = sorted((root / "annotations").glob(f"instances_{side}*.json"))
    if len(files) != 1:
        listed = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{root / 'annotations'}: has to hold one instances_{side}*.json, and holds {listed}")
    name = files[0].stem.removeprefix("instances_")
    folders = [root / name, root / "images" / name]
    return open_coco(next((folder for folder in folders if folder.is_dir()), folders[0]), files[0], **options)


def _named_classes(file: Path) -> tuple[str, ...]:
    """Return the lines of a file of classes; none where there is no such file."""
    try:
        return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{file}: cannot be read ({problem}); it names a class a line") from None
