"""Pictures with masks and depths: small sets in the public layouts, COCO's shapes against pycocotools' figures, maps cut as views are.

Cuts are compared with views of pictures of coordinates, which went through the loader and a renderer: what the map says of a place must
be what the picture shows there.
"""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from wherefrom.pipeline.demo.scenes import FARTHEST, SHOWN
from wherefrom.pipeline.demo.shards import demo_masks, demo_shards
from wherefrom.pipeline.laws import Center, Independent
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.train.evaluation.coco_masks import decode_runs, decode_segmentation, fill_polygon, open_coco, unpack_counts
from wherefrom.train.evaluation.dense_pictures import (
    IGNORED,
    VOC_CLASSES,
    DemoPictures,
    cut,
    open_ade20k,
    open_depths,
    open_masks,
    open_voc,
)
from wherefrom.train.evaluation.pictures import ShardPictures

OPTIONS = {"renderer": "torch", "threads": 1}
HW = (20, 30)
RNG = np.random.default_rng(0)


def save(path: Path, values: NDArray[np.generic], mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    if mode == "P":
        image = image.convert("P")
        image.putdata(np.asarray(values).ravel().tolist())
        image.putpalette([(37 * channel) % 256 for channel in range(768)])
    image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def photograph(path: Path, hw: tuple[int, int] = HW) -> Path:
    return save(path, RNG.integers(0, 256, (*hw, 3), dtype=np.uint8))


def random_mask(values: list[int], hw: tuple[int, int] = HW) -> NDArray[np.uint8]:
    return RNG.choice(np.array(values, np.uint8), hw)


@pytest.mark.core
@pytest.mark.parametrize("size", [(24, 24), (100, 60)])
def test_a_map_is_cut_as_its_view_is_mirrored_and_turned(size: tuple[int, int], tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    """Red shows x and green y, four levels a pixel; a map of columns and one of rows must say the same of every place of a view."""
    sides = [(50, 60), (60, 41), (33, 55)]
    maps = [np.indices(side) for side in sides]
    samples = []
    for number, (y, x) in enumerate(maps):
        encoded = io.BytesIO()
        Image.fromarray(np.stack([4 * x, 4 * y, 0 * x], -1).astype(np.uint8)).save(encoded, "PNG")
        samples.append((f"{number}", {"png": encoded.getvalue()}))
    index = ShardIndex.open(make_shard(tmp_path / "places.tar", samples))
    family = ViewFamily(name="views", views=8, size_px=(24, 24), law=Independent(area_frac=(0.2, 0.9)), mirror="view", turns=True)
    with ShardPictures(index, **OPTIONS) as pictures:
        views = pictures.views(ViewRecipe(families=(family,), pixels="uint8"), np.arange(3)).views[0]
    assert views.geometry.flipped.any() and len(views.geometry.quarter_turns.unique()) == 4
    shown = torch.nn.functional.interpolate(views.pixels.flatten(0, 1).float(), size, mode="nearest-exact").unflatten(0, (3, 8)) / 4
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    errors = []
    for channel, axis in ((0, 1), (1, 0)):
        there = cut([both[axis] for both in maps], views.geometry, size)
        assert there.shape == (3, 8, *size)
        errors.append((there - shown[:, :, channel])[inner].abs().max())
    enlarged = float(max(side[1] for side in sides)) / 24  # source pixels a pixel of the view, at most: nearest is half of one away
    assert max(errors) < 0.5 + (0.3 if size == (24, 24) else enlarged)
    unmirrored = torch.zeros_like(views.geometry.flipped)
    wrong = cut([both[1] for both in maps], type(views.geometry)(**fields_of(views.geometry) | {"flipped": unmirrored}), size)
    assert (wrong - shown[:, :, 0])[inner].abs().max() > 5


def fields_of(record: object) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}  # type: ignore[attr-defined]


@pytest.mark.core
def test_the_whole_picture_at_its_own_size_is_the_map_itself(tmp_path: Path) -> None:
    for number in range(3):
        photograph(tmp_path / "pictures" / f"{number}.png")
        save(tmp_path / "masks" / f"{number}.png", random_mask([0, 1, 2, IGNORED]))
    with open_masks(tmp_path / "pictures", tmp_path / "masks", **OPTIONS) as pictures:
        family = ViewFamily(name="whole", views=1, size_px=HW, law=Center())
        batch = pictures.views(ViewRecipe(families=(family,)), np.array([2, 0]))
        masks = pictures.masks(np.array([2, 0]))
    shown = cut(masks, batch.family("whole").geometry, HW)
    assert shown[:, 0].tolist() == [np.array(Image.open(tmp_path / "masks" / f"{number}.png")).tolist() for number in (2, 0)]
    assert pictures.classes == ("0", "1", "2")


@pytest.mark.core
def test_demo_pictures_have_the_masks_and_depths_of_their_keys(tmp_path: Path) -> None:
    shards = demo_shards(tmp_path, train=12, val=2, workers=1)
    with DemoPictures(ShardIndex.open(shards.train), **OPTIONS) as pictures:
        masks, depths = pictures.masks(np.array([11, 3])), pictures.depths(np.array([11, 3]))
        sizes = pictures.index.source_size[[11, 3]].tolist()
    assert [list(mask.shape) for mask in masks] == [list(depth.shape) for depth in depths] == sizes
    assert (masks[0] == demo_masks("train-000011").classes).all()
    assert max(float(depth.max()) for depth in depths) == FARTHEST == DemoPictures.farthest
    assert pictures.classes == SHOWN


@pytest.mark.core
def test_voc_is_read_by_its_lists_and_palettes_are_places_not_colors(tmp_path: Path) -> None:
    masks = {}
    for stem in ("2007_1", "2007_2", "2008_1"):
        photograph(tmp_path / "JPEGImages" / f"{stem}.jpg")
        masks[stem] = random_mask([0, 15, 20, 255])
        save(tmp_path / "SegmentationClass" / f"{stem}.png", masks[stem], "P")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2008_1\n2007_1\n")
    (lists / "val.txt").write_text("2007_2\n")
    with open_voc(tmp_path, "train", **OPTIONS) as train, open_voc(tmp_path, "val", **OPTIONS) as val:
        assert [len(train), len(val)] == [2, 1]
        assert [(mask == masks[stem]).all() for mask, stem in zip(train.masks(np.arange(2)), ("2008_1", "2007_1"), strict=True)]
        assert (val.masks(np.arange(1))[0] == masks["2007_2"]).all()
        assert train.classes == VOC_CLASSES and train.background == 0
        shown = train.views(ViewRecipe(families=(ViewFamily(name="v", views=1, size_px=HW, law=Center()),)), np.arange(2))
    assert [train.index.key(sample) for sample in shown.sample.tolist()] == ["2008_1.jpg", "2007_1.jpg"]
    (lists / "val.txt").write_text("2007_9\n")
    with pytest.raises(ValueError, match=r"val\.txt: names 2007_9, of which \S+JPEGImages has no picture$"):
        open_voc(tmp_path, "val")
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val\.txt: names no picture; list those of the split, one a line$"):
        open_voc(tmp_path, "val")
    with pytest.raises(ValueError, match=r"trainaug\.txt: No such file or directory; name the folder that holds JPEGImages"):
        open_voc(tmp_path, "trainaug")


def test_ade20k_counts_from_1_and_ignores_0(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        photograph(tmp_path / "images" / split / "ADE_1.jpg")
        save(tmp_path / "annotations" / split / "ADE_1.png", np.array([[0, 1, 150]] * 20, np.uint8).repeat(10, 1))
    with open_ade20k(tmp_path, "validation", **OPTIONS) as pictures:
        mask = pictures.masks(np.arange(1))[0]
    assert mask[0, ::10].tolist() == [IGNORED, 0, 149] and len(pictures.classes) == 150


@pytest.mark.core
def test_depths_are_16_bits_in_units(tmp_path: Path) -> None:
    photograph(tmp_path / "rgb" / "a" / "0.png")
    save(tmp_path / "depth" / "a" / "0.png", np.full(HW, 0, np.uint16) + np.arange(30, dtype=np.uint16) * 300)
    with open_depths(tmp_path / "rgb", tmp_path / "depth", **OPTIONS) as pictures:
        depth = pictures.depths(np.arange(1))[0]
        assert np.allclose(depth, np.arange(30) * 0.3) and depth.dtype == np.float32 and pictures.farthest == 10
        save(tmp_path / "depth" / "a" / "0.png", np.zeros(HW, np.uint8))
        with pytest.raises(ValueError, match=r"0\.png: has pixels of kind L; a map of depths is a PNG of one channel of 16 bits$"):
            pictures.depths(np.arange(1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_few_bits_hold_what_was_written(bits: int, tmp_path: Path) -> None:
    values = random_mask(list(range(min(2**bits, 16))))
    rows = np.unpackbits(values[..., None], axis=-1)[..., -bits:].reshape(HW[0], -1)
    png = [(b"IHDR", struct.pack(">IIBBBBB", HW[1], HW[0], bits, 0, 0, 0, 0))]
    png += [(b"IDAT", zlib.compress(b"".join(b"\0" + np.packbits(row).tobytes() for row in rows))), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in png]
    photograph(tmp_path / "pictures" / "0.jpg")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with open_masks(tmp_path / "pictures", tmp_path / "masks", **OPTIONS) as pictures:
        assert len(pictures.classes) == min(2**bits, 16)
        assert (pictures.masks(np.arange(1))[0] == values).all()


@pytest.mark.core
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((30, 20), np.uint8), r"0\.png: is 20 x 30 px, its picture, upright, 30 x 20; a mask has its size$"),
        (np.full(HW, 7, np.uint8), r"0\.png: holds the value 7, which is none of the 3 classes; mend it, or make it 255$"),
        (np.full(HW, 300, np.uint16), r"0\.png: holds the value 300, which is none of the 3 classes; mend it, or make it 255$"),
        (np.zeros((*HW, 3), np.uint8), r"0\.png: has pixels of kind RGB; a mask is a PNG of one channel$"),
        (None, r"picture 0: \S+0\.png is not there; add it, or take the picture away$"),
        (b"\x89PNG\r\n\x1a\nrubbish", r"0\.png: cannot be read as a PNG: "),
    ],
)
def test_a_bad_mask_is_one_line_that_names_it(mask: NDArray[np.generic] | bytes | None, message: str, tmp_path: Path) -> None:
    photograph(tmp_path / "pictures" / "0.jpg")
    (tmp_path / "masks").mkdir()
    if isinstance(mask, bytes):
        (tmp_path / "masks" / "0.png").write_bytes(mask)
    elif mask is not None:
        save(tmp_path / "masks" / "0.png", mask)
    with pytest.raises(ValueError, match=message) as refused:
        open_masks(tmp_path / "pictures", tmp_path / "masks", classes=("a", "b", "c"), **OPTIONS).masks(np.arange(1))
    assert "\n" not in str(refused.value)


def test_a_set_of_one_class_or_of_two_pictures_for_one_mask_is_refused(tmp_path: Path) -> None:
    photograph(tmp_path / "pictures" / "0.jpg")
    save(tmp_path / "masks" / "0.png", np.zeros(HW, np.uint8))
    with pytest.raises(ValueError, match=r"masks of 1 classes; 2 to 255 can be told apart$"):
        open_masks(tmp_path / "pictures", tmp_path / "masks")
    photograph(tmp_path / "pictures" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png: \S+0\.jpg is there too; take one away, a map belongs to one picture$"):
        open_masks(tmp_path / "pictures", tmp_path / "masks")


def test_a_picture_that_does_not_decode_is_named_and_no_other_stands_for_it(tmp_path: Path) -> None:
    for number in range(2):
        photograph(tmp_path / "pictures" / f"{number}.jpg", (64, 64))
        save(tmp_path / "masks" / f"{number}.png", random_mask([0, 1], (64, 64)))
    damaged = tmp_path / "pictures" / "1.jpg"
    content = damaged.read_bytes()
    refused = r"1\.jpg: .*; take it out of the pictures that have masks or depths$"
    damaged.write_bytes(content[: len(content) // 2] + b"\xff\xd9")  # an end, so that the decoder alone finds out
    with open_masks(tmp_path / "pictures", tmp_path / "masks", **OPTIONS) as pictures:
        recipe = ViewRecipe(families=(ViewFamily(name="v", views=1, size_px=(8, 8), law=Center()),))
        pictures.views(recipe, np.array([0]))
        with pytest.raises(ValueError, match=refused):
            pictures.views(recipe, np.array([0, 1]))
    damaged.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=refused):
        open_masks(tmp_path / "pictures", tmp_path / "masks", **OPTIONS)


# pycocotools 2.0.11: encode of a mask that the test draws anew, and merge(frPyObjects([POLYGON], 23, 31))
PACKED = (
    "01100020N00180IO80M0J01070K3NN60OOK0O32NNO000070J001OO0010O17OO0J11O1000O11ON21N20M<3D1:MF101:MF12ON10O91I67MGM02:0H18MFO011OO09<0FGO0"
    "00190HNO0010O90H1O4:LFO012ON093HNO291GN0O04030O0I32MO0O10O0010O0011OO00010;1KOJ42L01OOO01050I02000O0O022NN10O0d01_O0M03OM031NOO"
)
POLYGON = [3.2, 4.1, 25.7, 2.3, 28.9, 17.6, 14.2, 10.3, 6.8, 20.4]
POLYGON_PACKED = "Y21f05K4L5K00O1O1N2O001N2O11O001O001O001O001N1013L4M4Ko0"
LONG_PACKED = "Tl5P5X1" + "0" * 138 + "nKROj2n0X1" + "0" * 376 + "lm1"  # negative differences, of more than one character


@pytest.mark.core
def test_packed_runs_are_those_of_pycocotools() -> None:
    mask = np.random.default_rng(0).random((23, 31)) < 0.3
    mask[5:15, 8:22] = mask[0, 0] = True
    assert (decode_segmentation({"size": [23, 31], "counts": PACKED}, (23, 31)) == mask).all()
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    plain = np.diff(np.concatenate([[0], [0] if flat[0] else [], changes, [flat.size]])).astype(int).tolist()
    assert unpack_counts(PACKED) == plain
    assert (decode_segmentation({"size": [23, 31], "counts": plain}, (23, 31)) == mask).all()
    counts = unpack_counts(LONG_PACKED)
    large = np.zeros((200, 300), np.bool_)
    large[20:180, 30:290] = True
    large[50:60, 100] = False
    assert counts[:3] == [6020, 160, 40] and (decode_runs(counts, (200, 300)) == large).all()


@pytest.mark.core
def test_a_polygon_holds_the_pixels_whose_centers_lie_inside() -> None:
    covered = fill_polygon(np.array(POLYGON).reshape(-1, 2), (23, 31))
    corners = np.array(POLYGON).reshape(-1, 2)
    for y, x in np.ndindex(23, 31):
        edges = zip(corners, np.roll(corners, -1, 0), strict=True)
        crossings = sum(
            (a[1] <= y + 0.5) != (b[1] <= y + 0.5) and a[0] + (y + 0.5 - a[1]) * (b[0] - a[0]) / (b[1] - a[1]) <= x + 0.5 for a, b in edges
        )
        assert covered[y, x] == crossings % 2
    theirs = decode_runs(unpack_counts(POLYGON_PACKED), (23, 31))
    assert (covered ^ theirs).sum() == 5 and covered.sum() == 255
    assert (np.roll(covered, 1, 1) ^ theirs).sum() > 20  # a pixel beside
    assert not fill_polygon(np.array([[-9.0, -9], [-2, -9], [-2, 90]]), (23, 31)).any()
    assert fill_polygon(np.array([[-9.0, -9], [90, -9], [90, 90], [-9, 90]]), (23, 31)).all()


@pytest.mark.core
def test_coco_shows_smaller_shapes_above_larger_ones_and_ignores_crowds(tmp_path: Path) -> None:
    photograph(tmp_path / "pictures" / "7.jpg")
    crowd = np.zeros(HW, np.uint8)
    crowd[:, 20:] = 1
    runs = [20 * 20, 20 * 10]
    listed = {
        "images": [{"id": 3, "file_name": "7.jpg", "height": 20, "width": 30}],
        "categories": [{"id": 90, "name": "cat"}, {"id": 4, "name": "ant"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 4, "iscrowd": 0, "segmentation": [[4, 4, 8, 4, 8, 8, 4, 8]]},
            {"id": 2, "image_id": 3, "category_id": 90, "iscrowd": 0, "segmentation": [[2, 2, 22, 2, 22, 18, 2, 18]]},
            {"id": 3, "image_id": 3, "category_id": 90, "iscrowd": 1, "segmentation": {"size": [20, 30], "counts": runs}},
        ],
    }
    expected = np.zeros(HW, np.uint8)
    expected[crowd == 1] = IGNORED
    expected[2:18, 2:22] = 2
    expected[4:8, 4:8] = 1
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(listed))
    with open_coco(tmp_path / "pictures", file, **OPTIONS) as pictures:
        assert (pictures.masks(np.arange(1))[0] == expected).all()
        assert pictures.classes == ("background", "ant", "cat") and pictures.background == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": [{"id": 3, "file_name": "8.jpg", "height": 20, "width": 30}]}, r"lists 8\.jpg, which \S+ lacks; name the folder"),
        ({"images": [{"id": 3, "file_name": "7.jpg", "height": 30, "width": 20}]}, r"7\.jpg is 20 x 30 px there, and here 30 x 20$"),
        ({"categories": [{"id": 9, "name": "cat"}]}, r"an annotation is of category 4, which its categories lack; add it there$"),
        ({"runs": {"size": [30, 20], "counts": [600]}}, r"annotation 1: its runs are of 20 x 30 px, its picture of 30 x 20$"),
        ({"runs": {"size": [20, 30], "counts": [599]}}, r"annotation 1: its runs make up 599 pixels of 600$"),
        ({"runs": "oval"}, r"annotation 1: its segmentation is neither polygons nor runs of a size and counts$"),
        ({"images": [], "annotations": []}, r"lists no picture; name the file of the split that has some$"),
        ({"annotations": 3}, r"is no file of COCO's instances \(TypeError: "),
    ],
)
def test_bad_coco_is_one_line(wrong: dict[str, object], message: str, tmp_path: Path) -> None:
    photograph(tmp_path / "pictures" / "7.jpg")
    runs = wrong.pop("runs", {"size": [20, 30], "counts": [600]})
    listed = {
        "images": [{"id": 3, "file_name": "7.jpg", "height": 20, "width": 30}],
        "categories": [{"id": 4, "name": "ant"}],
        "annotations": [{"id": 1, "image_id": 3, "category_id": 4, "segmentation": runs}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(listed | wrong))
    with pytest.raises(ValueError, match=message) as refused:
        open_coco(tmp_path / "pictures", tmp_path / "instances.json", **OPTIONS).masks(np.arange(1))
    assert "\n" not in str(refused.value)
